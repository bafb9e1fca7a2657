"""Group norms by themselves, and batch and group norms that hold the activation behind them (as timm's do)."""

from __future__ import annotations

import functools
from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..ops.channel_norm import Activation
from .acts import computed, same_act
from .joint import Joint, own_forward
from .norm_act import OPERATORS, SLACK, draws, measure, normalized, of_pixels, suits
from .sample import Draw, Exactly, Refused, Sample, attributes_of, kind
from .savings import Counted, Measure
from .sites import module_type


@dataclass(frozen=True)
class ChannelNorm(Joint):
    """A subclass of torch's batch or group norm, and the child that is its activation; a group norm may have none."""

    hint: ClassVar[str] = "norm"
    slack: ClassVar[float] = SLACK
    family: str
    act: str | None
    act_type: type | None
    activation: Activation | None

    @property
    def operator(self) -> str:  # type: ignore[override]
        """The name of the fused operator."""
        return OPERATORS[self.family]

    @classmethod
    def suits(cls, module: nn.Module) -> bool:
        """Torch's group norm, or a subclass of either with children that have no parameters."""
        own = type(module).forward
        if isinstance(module, nn.GroupNorm):
            return True
        return (
            isinstance(module, _BatchNorm) and own is not _BatchNorm.forward and not all(map(_idle, module.children()))
        )

    @classmethod
    def key(cls, module: nn.Module) -> Hashable:
        """Of batch norms the number of channels does not count: a DenseNet has one for almost every norm."""
        if isinstance(module, nn.GroupNorm):
            return kind(module)
        attributes = tuple(one for one in attributes_of(module) if one[0] != "num_features")
        tensors = (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False))
        dtypes = tuple((name, t.dtype, t.device.type) for name, t in tensors)
        return type(module), attributes, dtypes, tuple((name, kind(child)) for name, child in module.named_children())

    @classmethod
    def recognise(cls, sample: Sample) -> ChannelNorm | None:
        """The norm, then at most one child that does something."""
        module: Any = sample.module
        family = "group" if isinstance(module, nn.GroupNorm) else "batch"
        working = [(name, child) for name, child in module.named_children() if not _idle(child)]
        if len(working) > 1:
            raise Refused(f"it has more children than an activation: {', '.join(name for name, _ in working)}")
        act, child = working[0] if working else (None, None)
        found = None if child is None else computed(child)
        if child is not None and found is None:
            learned = ", which is learned" if any(True for _ in child.parameters()) else ""
            raise Refused(f"{OPERATORS[family]} has no such activation as its {act}{learned}")
        x = draws(sample)[0].inputs[0]
        with torch.no_grad(), Exactly():
            module.eval()
            try:
                y = own_forward(module)(module, x.clone())
            except Exception as error:
                raise Refused(f"it does not take [N, C, H, W]: {error}") from error
            expected = normalized(module, x, found)
        if not isinstance(y, torch.Tensor) or y.shape != x.shape or not torch.allclose(y, expected):
            return None
        return cls(family, act, module_type(child), found)

    def members(self, original: type) -> dict[str, Any]:
        """A forward that runs the fused operator, and the original's own for all that the operator does not take."""
        own = original.forward  # type: ignore[attr-defined]
        act, act_type, activation, family = self.act, self.act_type, self.activation, self.family

        @functools.wraps(own)
        def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
            same = activation is None or same_act(getattr(self, str(act)), act_type, activation)
            if len(args) != 1 or kwargs or not same or not suits(self, args[0], family):
                return own(self, *args, **kwargs)
            return normalized(self, args[0], activation)

        return {"forward": forward}

    def draws(self, sample: Sample) -> list[Draw]:
        """Images with other means and scales."""
        return draws(sample)

    def counted(self, sample: Sample) -> Counted:
        """Twice the pixels, and not the images."""
        return of_pixels(super().counted(sample))

    def measure(self, module: nn.Module) -> Measure:
        """The channels of a pixel."""
        return measure(module)


def _idle(child: nn.Module) -> bool:
    return isinstance(child, nn.Identity) or (isinstance(child, nn.Dropout) and child.p == 0.0)
