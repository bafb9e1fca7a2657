"""Plain MLPs: ``fc2(act(fc1(x)))``, with dropout between or behind, whatever the parts are called.

The operator keeps only x for the backward pass, and multiplies by the first weight again there: arithmetic for memory,
which only the user can weigh. So these joints are offered, and swapped where they are asked for by name, or where
``tune`` finds them no slower. The linear layers are then not called; where a hook, an adapter or a dropout between them
is to have its say, the original runs.
"""

from __future__ import annotations

import copy
import functools
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..ops.activations import ACTIVATIONS
from ..ops.mlp import mlp
from .gated_mlp import LARGEST_COPY, around_the_bend
from .joint import Joint, fused_class, own_forward, takes
from .sample import Draw, Exactly, Refused, Sample, transposed
from .savings import Counted, Measure
from .sites import hooked


@dataclass(frozen=True)
class PlainMLP(Joint):
    """The names and the class of the two linear children, and the dropouts between and behind them.

    Of other children their names and classes.
    """

    hint: ClassVar[str] = "mlp"
    operator: ClassVar[str] = "mlp"  # type: ignore[misc]
    common: ClassVar[bool] = True
    offer: ClassVar[str] = "keeps less and multiplies once more"
    first: str
    second: str
    layer: type
    activation: str
    between: tuple[str, ...]
    behind: tuple[str, ...]
    others: tuple[tuple[str, type], ...]

    @classmethod
    def suits(cls, module: nn.Module) -> bool:
        """Two linear children, one of which takes what the other gives, and nothing else that has parameters."""
        linear = [child for child in module.children() if _linear(child)]
        chained = any(_shape(a)[1] == _shape(b)[0] for a, b in itertools.permutations(linear, 2))
        if len(linear) != 2 or type(linear[0]) is not type(linear[1]) or not chained:
            return False
        inside = sum(1 for one in linear for _ in one.parameters())
        return sum(1 for _ in module.parameters()) == inside and not any(True for _ in module.buffers())

    @classmethod
    def sizes(cls, module: nn.Module) -> Sequence[dict[int, int] | None]:
        """Small ones of the same proportions; if the module insists on its own sizes and is not large, those."""
        features = {n for child in module.children() if _linear(child) for n in _shape(child)}
        small = {n: min(24 * n // min(features), 384) for n in features}
        return (small, {}) if sum(p.numel() for p in module.parameters()) <= LARGEST_COPY else (small,)

    @classmethod
    def recognise(cls, sample: Sample) -> PlainMLP | None:
        """Probe which child is the first, which activation follows, and where something is dropped."""
        module = sample.module
        linear: dict[str, Any] = {name: child for name, child in module.named_children() if _linear(child)}
        others = {name: child for name, child in module.named_children() if name not in linear}
        failure = None
        with torch.no_grad(), Exactly():
            for first, second in itertools.permutations(linear):
                if _shape(linear[first])[1] != _shape(linear[second])[0]:
                    continue
                x = sample.randn(2, 5, _shape(linear[first])[0])
                module.eval()
                try:
                    y = own_forward(module)(module, x.clone())
                except Exception as error:
                    failure = error
                    continue
                for activation in ACTIVATIONS:
                    expected = linear[second](ACTIVATIONS[activation](linear[first](x)))
                    if not isinstance(y, Tensor) or y.shape != expected.shape:
                        break
                    if (y - expected).abs().max() <= 1e-6 * expected.abs().max():
                        places = {name: _place(module, name, x, y) for name, one in others.items() if _drops(one)}
                        between, behind = (tuple(n for n, p in places.items() if p == at) for at in _PLACES)
                        rest = tuple((n, type(one)) for n, one in others.items() if n not in (*between, *behind))
                        return cls(first, second, type(linear[first]), activation, between, behind, rest)
        if failure is not None:
            raise Refused(f"it does not take [batch, sequence, features]: {failure}")
        return None

    def members(self, original: type) -> dict[str, Any]:
        """A forward that runs the operator where nobody has to see what is between."""
        own = original.forward  # type: ignore[attr-defined]
        between, behind, others = self.between, self.behind, self.others

        @functools.wraps(own)
        def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
            if len(args) != 1 or kwargs or not takes(args[0]):
                return own(self, *args, **kwargs)
            x, fc1, fc2 = args[0], getattr(self, first), getattr(self, second)
            idle = all(_idle(getattr(self, name)) for name in between)
            same = all(type(getattr(self, name)) is cls and not hooked(getattr(self, name)) for name, cls in others)
            if not idle or not same or not all(_plain(one, layer, x) for one in (fc1, fc2)):
                return own(self, x)
            w1, w2 = (one.weight if layer is nn.Linear else one.weight.mT for one in (fc1, fc2))
            y = mlp(x, w1, fc1.bias, w2, fc2.bias, activation=activation)
            for name in behind:
                y = getattr(self, name)(y)
            return y

        first, second, layer, activation = self.first, self.second, self.layer, self.activation
        return {"forward": forward}

    def trial(self, sample: Sample) -> tuple[nn.Module, nn.Module]:
        """With nothing dropped: what is random cannot be compared, and where it drops is known."""
        original = copy.deepcopy(sample.module)
        for name in (*self.between, *self.behind):
            original.get_submodule(name).p = 0.0  # type: ignore[assignment]
        fused = copy.deepcopy(original)
        fused.__class__ = fused_class(type(fused), self)
        return original, fused

    def draws(self, sample: Sample) -> list[Draw]:
        """Scales on both sides of the activation's bend."""
        return around_the_bend(sample, _shape(getattr(sample.module, self.first))[0])

    def counted(self, sample: Sample) -> Counted:
        """An element between the layers."""
        counted = super().counted(sample)
        return counted._replace(elements=10 * _shape(getattr(sample.module, self.first))[1])

    def measure(self, module: nn.Module) -> Measure:
        """What is between the layers, of one token."""
        return Measure("token", _shape(getattr(module, self.first))[1])


_PLACES = ("between", "behind")


def _linear(module: nn.Module) -> bool:
    return type(module) is nn.Linear or transposed(module)  # not with an adapter, or a parametrization


def _shape(linear: Any) -> tuple[int, int]:
    """(features in, features out)."""
    return (linear.in_features, linear.out_features) if isinstance(linear, nn.Linear) else (linear.nx, linear.nf)


def _plain(linear: Any, layer: type, x: Tensor) -> bool:
    """Whether calling the layer only multiplies by a parameter of x's dtype, or of one that autocast makes it."""
    cast = torch.is_autocast_enabled(x.device.type)
    parameters = (p for p in (getattr(linear, name, None) for name in ("weight", "bias")) if p is not None)
    own = type(linear) is layer and not hooked(linear)
    return own and all(takes(p) and (cast or p.dtype == x.dtype) for p in parameters)


def _drops(module: nn.Module) -> bool:
    return isinstance(module, nn.Dropout) and type(module).forward is nn.Dropout.forward


def _idle(module: Any) -> bool:
    """Whether a dropout, or what is in its place now, does nothing, and nothing listens."""
    dropout = type(module) is nn.Identity or (_drops(module) and (not module.training or module.p == 0.0))
    return dropout and not hooked(module)


def _place(module: nn.Module, name: str, x: Tensor, y: Tensor) -> str:
    """Where a dropout is, by what it does to the result; "" if it is not used."""
    probe = copy.deepcopy(module).train()
    for other in probe.modules():
        if isinstance(other, nn.Dropout):
            other.p = 0.0
    probe.get_submodule(name).p = 0.5  # type: ignore[assignment]
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(7)  # torch.manual_seed would seed GPUs too, which are not forked
        dropped = own_forward(probe)(probe, x.clone())
    if torch.allclose(dropped, y):
        return ""
    kept = dropped != 0.0
    return _PLACES[bool(0 < kept.sum() < kept.numel() and torch.allclose(dropped[kept], 2.0 * y[kept]))]
