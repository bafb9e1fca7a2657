"""Binary cross-entropy and focal loss on the CPU, in the closed form of their kernels (``triton/binary_losses.py``).

The references take two logarithms of a sigmoid, and autograd two more: four exponentials an element where one will do.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..autograd import Gradients
from ..compiled import compiled_call
from .loss_weights import reduced

#: atanh(u) / u as a polynomial of u², for u = z / (2 + z) of 0 ≤ z ≤ 1; relative error 4e-9.
ATANH = (1.0, 0.333331573, 0.200124551, 0.139803013, 0.140891676)


def forward(*tensors: Tensor | None, **options: Any) -> tuple[Tensor, Any]:
    """The losses of x, target and two weights, or their sum or mean."""
    return compiled_call(_losses, tensors, options), tensors


def backward(grads: Any, saved: Any, needs: Any, **options: Any) -> Gradients:
    """The gradient of x; None for the others."""
    return compiled_call(_gradient, (*grads, *saved), options), *[None] * (len(needs) - 1)


def _losses(x: Tensor, target: Tensor, *weights: Tensor | None, reduction: str, **options: Any) -> Tensor:
    loss, _ = loss_and_slope(x, target, *weights, **options)
    return reduced(loss, reduction).to(torch.promote_types(x.dtype, target.dtype))


def _gradient(
    grad: Tensor, x: Tensor, target: Tensor, *weights: Tensor | None, reduction: str, **options: Any
) -> Tensor:
    _, slope = loss_and_slope(x, target, *weights, **options)
    grad = grad.to(slope.dtype)
    return (slope * (grad / x.numel() if reduction == "mean" else grad)).to(x.dtype)


def loss_and_slope(
    x: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    pos_weight: Tensor | None = None,
    *,
    alpha: float | None = None,
    gamma: float = 0.0,
    label_smoothing: float = 0.0,
    z: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The loss of each element and its derivative, with the names of the kernels; z is exp(−|x|) if it is known."""
    h = x.to(torch.promote_types(torch.promote_types(x.dtype, target.dtype), torch.float32))
    t = target.to(h.dtype)
    if label_smoothing:
        t = t * (1.0 - label_smoothing) + 0.5 * label_smoothing
    u = t if pos_weight is None else t * pos_weight.to(h.dtype)
    v = 1.0 - t
    if z is None:
        z = (-h.abs()).exp()
    inverse = 1.0 / (1.0 + z)
    against, along = torch.where(h >= 0.0, v, u), torch.where(h >= 0.0, u, v)
    loss = against * h.abs() + (against + along) * _log1p(z)
    slope = (against - along * z) * inverse
    if gamma:
        wrong = against + along * z
        right = against == 0.0
        rho = torch.where(right, 1.0, z / torch.where(right, 1.0, wrong))
        power = (wrong * inverse) ** gamma
        slope = power * (slope + gamma * loss * (against - along) * rho * inverse)
        loss = loss * power
    slope = torch.where(h >= 0.0, slope, -slope)
    scale = None if weight is None else weight.to(h.dtype)
    if alpha is not None:
        scale = alpha * t + (1.0 - alpha) * v
    return (loss, slope) if scale is None else (loss * scale, slope * scale)


def _log1p(z: Tensor) -> Tensor:
    """log(1 + z) for 0 ≤ z ≤ 1, as 2·atanh(z / (2 + z)): the compiler's own is a call of a function."""
    if z.dtype != torch.float32:
        return torch.log1p(z)
    u = z / (2.0 + z)
    q = u * u
    series = ATANH[0] + q * (ATANH[1] + q * (ATANH[2] + q * (ATANH[3] + q * ATANH[4])))
    return (u + u) * series
