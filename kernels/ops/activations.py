"""Activations: the functions of one element that fused operators apply on their way.

    silu        x·σ(x)                     relu          max(x, 0)
    gelu        x·Φ(x)                     relu_squared  max(x, 0)²
    gelu_tanh   gelu's approximation       sigmoid       σ(x)
    quick_gelu  x·σ(1.702x)

Sources: Hendrycks and Gimpel, Gaussian Error Linear Units (2016), for gelu, its approximations and silu; So et al.,
Primer (2021), for relu_squared. ``kernels/triton/activations.py`` has the same for kernels.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from ..compiled import tracing


def _gelu(x: Tensor) -> Tensor:
    # F.gelu's vectorized CPU form gives NaN at +inf in float32; everywhere else, in float64 and compiled, it gives inf.
    return F.gelu(x) if tracing() else torch.where(x == torch.inf, x, F.gelu(x))


def _gelu_tanh(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


def _quick_gelu(x: Tensor) -> Tensor:
    return x * torch.sigmoid(1.702 * x)


def _relu_squared(x: Tensor) -> Tensor:
    return F.relu(x).square()


#: Each activation in plain PyTorch, by its name.
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": _gelu,
    "gelu_tanh": _gelu_tanh,
    "quick_gelu": _quick_gelu,
    "relu": F.relu,
    "relu_squared": _relu_squared,
    "sigmoid": torch.sigmoid,
}


def check_activation(name: str, activation: str) -> None:
    """Raise unless there is such an activation."""
    if activation not in ACTIVATIONS:
        raise ValueError(f"{name}: activation must be one of {', '.join(ACTIVATIONS)}, got {activation!r}")
