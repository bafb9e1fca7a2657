"""Gated MLPs: ``down(act(gate(x)) · up(x))`` from three linear children, whatever they are called.

The linear children are still called as modules, so their hooks, adapters and parametrizations stay in force; only the
activation and the product become one operator.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..ops.glu import glu
from .joint import Joint, own_forward, takes
from .sample import Draw, Exactly, Refused, Sample
from .savings import Counted, Measure
from .sites import hooked

#: Parameters of the largest module that is copied at its full size.
LARGEST_COPY = 2**22

ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "relu", "sigmoid")


@dataclass(frozen=True)
class GatedMLP(Joint):
    """The names of the three linear children, and of the activation's module if it has one."""

    hint: ClassVar[str] = "mlp"
    operator: ClassVar[str] = "glu"  # type: ignore[misc]
    gate: str
    up: str
    down: str
    activation: str
    activation_child: str | None

    @classmethod
    def suits(cls, module: nn.Module) -> bool:
        """Three linear children, two of one shape and one of the transposed shape."""
        shapes = sorted(_shape(child) for child in module.children() if _linear(child))
        if len(shapes) != 3:
            return False
        first, middle, last = shapes
        return middle in (first, last) and (first[::-1] == last)

    @classmethod
    def sizes(cls, module: nn.Module) -> Sequence[dict[int, int] | None]:
        """48 features in and 80 inside; if the module insists on its own sizes and is not large, those."""
        outer = features(module)
        inside = {size for child in module.children() if _linear(child) for size in _shape(child)} - {outer}
        small = {outer: 48} | dict.fromkeys(inside, 80)
        return (small, {}) if sum(p.numel() for p in module.parameters()) <= LARGEST_COPY else (small,)

    @classmethod
    def recognise(cls, sample: Sample) -> GatedMLP | None:
        """Probe which child is the gate, and which activation follows it."""
        module = sample.module
        linear = {name: child for name, child in module.named_children() if _linear(child)}
        others = [name for name, child in module.named_children() if name not in linear]
        if any(True for _ in module.parameters(recurse=False)) or any(True for _ in module.buffers(recurse=False)):
            raise Refused("it has parameters or buffers of its own, beside its three linear layers")
        if len(others) > 1 or any(any(True for _ in module.get_submodule(n).parameters()) for n in others):
            raise Refused(f"it has more children than three linear layers and an activation: {', '.join(others)}")
        x = sample.randn(2, 5, features(module))
        with torch.no_grad(), Exactly():
            module.eval()
            try:
                y = own_forward(module)(module, x.clone())
            except Exception as error:
                raise Refused(f"it does not take [batch, sequence, features]: {error}") from error
            if not isinstance(y, Tensor) or y.shape != x.shape:
                return None
            for gate, up, down in itertools.permutations(linear):
                if _shape(linear[gate]) != _shape(linear[up]) or _shape(linear[gate]) != _shape(linear[down])[::-1]:
                    continue
                if _shape(linear[gate])[0] != x.shape[-1]:
                    continue
                g, u = linear[gate](x), linear[up](x)
                for activation in ACTIVATIONS:
                    expected = linear[down](glu(g, u, activation=activation))
                    if (y - expected).abs().max() <= 1e-6 * expected.abs().max():
                        return cls(gate, up, down, activation, others[0] if others else None)
        return None

    def members(self, original: type) -> dict[str, Any]:
        """The forward with activation and product in one operator."""
        own = original.forward  # type: ignore[attr-defined]
        gate, up, down, activation, child = self.gate, self.up, self.down, self.activation, self.activation_child

        @functools.wraps(own)
        def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
            if len(args) != 1 or kwargs or not takes(args[0]) or (child and hooked(getattr(self, child))):
                return own(self, *args, **kwargs)
            x = args[0]
            return getattr(self, down)(glu(getattr(self, gate)(x), getattr(self, up)(x), activation=activation))

        return {"forward": forward}

    def draws(self, sample: Sample) -> list[Draw]:
        """Scales on both sides of the activation's bend."""
        return around_the_bend(sample, features(sample.module))

    def counted(self, sample: Sample) -> Counted:
        """An element between the layers: the linear layers themselves cost the same, fused or not."""
        counted = super().counted(sample)
        return counted._replace(elements=10 * _shape(sample.module.get_submodule(self.gate))[1])

    def measure(self, module: nn.Module) -> Measure:
        """What is between the layers, of one token."""
        return Measure("token", _shape(module.get_submodule(self.gate))[1])


def features(module: nn.Module) -> int:
    """The input features: those that two of the three linear children take, or all three."""
    return sorted(_shape(child)[0] for child in module.children() if _linear(child))[1]


def _shape(linear: Any) -> tuple[int, int]:
    return linear.in_features, linear.out_features


def _linear(module: nn.Module) -> bool:
    return isinstance(getattr(module, "in_features", None), int) and isinstance(
        getattr(module, "out_features", None), int
    )


def around_the_bend(sample: Sample, width: int) -> list[Draw]:
    """Tokens on scales on both sides of an activation's bend."""
    return [
        Draw("an ordinary", (sample.randn(2, 5, width),)),
        Draw("a small", (0.05 * sample.randn(2, 5, width),)),
        Draw("a large", (20.0 * sample.randn(2, 5, width),)),
        Draw("a shifted", (sample.randn(2, 5, width) + 2.0,)),
    ]
