"""What RMSNorm and LayerNorm share: the normalization of rows, with and without a residual add.

With h = x (+ residual), over the last dim of D elements:

    μ = mean(h) if center else 0
    y = (h − μ) / √(mean((h − μ)²) + ε) · (weight + weight_offset) + bias
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..autograd import Gradients, fused, vjp
from ..op import Traffic


def reference(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, *, eps: float, weight_offset: float, center: bool
) -> Tensor:
    """Row normalization in plain PyTorch: float32 (or wider) inside, the result in the dtype of ``x``."""
    h = x.to(torch.promote_types(x.dtype, torch.float32))
    if center:
        h = h - h.mean(-1, keepdim=True)
    y = h * torch.rsqrt(h.square().mean(-1, keepdim=True) + eps)
    if weight is not None:
        y = y * (weight.to(h.dtype) + weight_offset)
    if bias is not None:
        y = y + bias.to(h.dtype)
    return y.to(x.dtype)


def add_reference(x: Tensor, residual: Tensor, *affine: Tensor | None, **options: Any) -> tuple[Tensor, Tensor]:
    """``h = x + residual``, rounded to the wider of the two dtypes; returns (row norm of h in x's dtype, h)."""
    h = x + residual
    return reference(h, *affine, **options).to(x.dtype), h


def triton(x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None, **options: Any) -> Any:
    """The Triton kernels; with a residual they return (y, h)."""
    from ..triton import norm

    return fused(norm.forward, norm.backward, _second, (x, residual, weight, bias), options)


def _second(grads: Any, saved: Any, needs: Any, **options: Any) -> Gradients:
    h = saved[0]
    dh, dweight, dbias = vjp(reference)([grads[0].to(h.dtype)], saved, (True, *needs[2:]), **options)
    if len(grads) == 2:
        assert dh is not None
        dh = dh + grads[1]
    return dh, dh, dweight, dbias


def check_affine(name: str, x: Tensor, weight: Tensor | None, bias: Tensor | None = None) -> None:
    """Raise unless x is a floating-point tensor with rows, and weight and bias fit them."""
    if not x.is_floating_point():
        raise TypeError(f"{name}: x must be a floating-point tensor, got {x.dtype}; convert it, e.g. x.float()")
    if x.dim() == 0:
        raise ValueError(f"{name}: x must have at least one dimension to normalize over, got a scalar")
    for label, parameter in (("weight", weight), ("bias", bias)):
        if parameter is not None and parameter.shape != x.shape[-1:]:
            raise ValueError(
                f"{name}: {label} must have the shape of the last dim of x, ({x.shape[-1]},), "
                f"got {tuple(parameter.shape)}; build the module with the model's hidden size"
            )


def check_residual(name: str, x: Tensor, residual: Tensor) -> None:
    """Raise unless the residual can be added to x without broadcasting."""
    if residual.shape != x.shape:
        raise ValueError(
            f"{name}: residual must have the shape of x, {tuple(x.shape)}, got {tuple(residual.shape)}; "
            "expand it first if it should broadcast"
        )


def traffic(itemsize: int, parameters: int, *, N: int, D: int, residual: bool, statistics: int = 1) -> Traffic:
    """x, (residual, h,) y forward; dy, h, (dh_out,) dx backward; the rows' statistics and the parameters once."""
    passes = N * D * itemsize
    return Traffic(
        forward=(4 if residual else 2) * passes + parameters * D * itemsize + 4 * statistics * N,
        backward=(4 if residual else 3) * passes + 2 * parameters * D * itemsize + 4 * statistics * N,
    )
