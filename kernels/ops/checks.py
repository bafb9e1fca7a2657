"""Checks of arguments that several operators make, each with an error that teaches."""

from __future__ import annotations

import torch
from torch import Tensor


def floating(name: str, **tensors: Tensor | None) -> None:
    """Raise unless every tensor is floating point."""
    for label, tensor in tensors.items():
        if tensor is not None and not tensor.is_floating_point():
            raise TypeError(
                f"{name}: {label} must be a floating-point tensor, got {tensor.dtype}; convert it, e.g. {label}.float()"
            )


def dropout(name: str, p: float, seed: Tensor | None) -> None:
    """Raise unless p is a probability, and the seed an int64 scalar."""
    if not 0.0 <= p <= 1.0:
        raise ValueError(f"{name}: p must be a probability, between 0 and 1, got {p}")
    if seed is not None and (seed.dtype != torch.int64 or seed.dim()):
        raise ValueError(
            f"{name}: seed must be a scalar tensor of int64, got {tuple(seed.shape)} of {seed.dtype}; "
            "e.g. torch.tensor(1234, device=x.device)"
        )
