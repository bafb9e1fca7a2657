"""Autocast for operators with matrix products: dtypes are settled once, before the first product."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

#: Device types that have autocast; a constant, because torch 2.11's compiler does not trace the question.
_AVAILABLE = frozenset(filter(torch.amp.is_autocast_available, ("cpu", "cuda", "xpu", "mps", "hpu", "mtia", "xla")))


def autocasting(device: str) -> bool:
    """Whether autocast is on for this device type."""
    return device in _AVAILABLE and torch.is_autocast_enabled(device)


def autocast_operands(*tensors: Tensor | None) -> tuple[Any, ...]:
    """The tensors in the dtype of autocast where that is on, as they are where not."""
    device = next(t.device.type for t in tensors if t is not None)
    if not autocasting(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(t if t is None else t.to(dtype) for t in tensors)


def without_autocast(device: str) -> AbstractContextManager[None]:
    """A block in which products run in the dtype of their operands."""
    return torch.autocast(device, enabled=False) if autocasting(device) else nullcontext()
