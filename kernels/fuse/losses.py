"""``nn.CrossEntropyLoss`` and ``nn.Softmax``, and subclasses that keep their forward."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn

from ..ops.cross_entropy import cross_entropy
from ..ops.softmax import softmax
from .joint import Joint, fused_class, takes
from .sample import Draw, Sample


class _Stateless(Joint):
    """A module whose forward is torch's own: only the forward changes."""

    base: ClassVar[type[nn.Module]]

    @classmethod
    def suits(cls, module: nn.Module) -> bool:
        """A module of the torch class, with the forward of the torch class."""
        return isinstance(module, cls.base) and type(module).forward is cls.base.forward

    @classmethod
    def recognise(cls, sample: Sample) -> Joint | None:
        """Nothing is left to find."""
        return cls()

    def trial(self, sample: Sample) -> tuple[nn.Module, nn.Module]:
        """The sample, and the same in the fused class."""
        fused = copy.deepcopy(sample.module)
        fused.__class__ = fused_class(type(fused), self)
        return sample.module, fused


@dataclass(frozen=True)
class CrossEntropy(_Stateless):
    """``nn.CrossEntropyLoss``."""

    hint: ClassVar[str] = "crossentropy"
    operator: ClassVar[str] = "cross_entropy"  # type: ignore[misc]
    base: ClassVar[type[nn.Module]] = nn.CrossEntropyLoss

    def members(self, original: type) -> dict[str, Any]:
        """A forward that runs the fused operator."""
        own = original.forward  # type: ignore[attr-defined]

        def forward(self: nn.CrossEntropyLoss, input: Any, target: Any) -> Any:
            if not takes(input) or target.is_floating_point():
                return own(self, input, target)
            return cross_entropy(
                input,
                target,
                self.weight,
                ignore_index=self.ignore_index,
                reduction=self.reduction,
                label_smoothing=self.label_smoothing,
            )

        return {"forward": forward}

    def draws(self, sample: Sample) -> list[Draw]:
        """Logits of a few scales; one ignored target."""
        module = sample.module
        classes = 11 if module.weight is None else len(module.weight)
        generator = sample.generator
        target = torch.randint(0, classes, (7,), generator=generator).to(sample.device)
        target[3] = module.ignore_index
        image = torch.randint(0, classes, (3, 5), generator=generator).to(sample.device)
        return [
            Draw("an ordinary", (sample.randn(7, classes), target)),
            Draw("a large", (30.0 * sample.randn(7, classes), target)),
            Draw("a three-dimensional", (sample.randn(3, classes, 5), image)),
        ]


@dataclass(frozen=True)
class SoftmaxModule(_Stateless):
    """``nn.Softmax`` with a dim."""

    hint: ClassVar[str] = "softmax"
    operator: ClassVar[str] = "softmax"  # type: ignore[misc]
    base: ClassVar[type[nn.Module]] = nn.Softmax

    @classmethod
    def suits(cls, module: nn.Module) -> bool:
        """The deprecated ``dim=None`` is left alone."""
        return super().suits(module) and module.dim is not None

    def members(self, original: type) -> dict[str, Any]:
        """A forward that runs the fused operator."""
        own = original.forward  # type: ignore[attr-defined]

        def forward(self: nn.Softmax, input: Any) -> Any:
            return softmax(input, dim=self.dim) if takes(input) else own(self, input)

        return {"forward": forward}

    def draws(self, sample: Sample) -> list[Draw]:
        """Two scales, four dims: enough for any usual ``dim``."""
        return [
            Draw("an ordinary", (sample.randn(3, 4, 5, 6),)),
            Draw("a large", (30.0 * sample.randn(3, 4, 5, 6),)),
        ]
