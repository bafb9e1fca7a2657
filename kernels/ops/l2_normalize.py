"""Vectors of length one.

    y = x / max(‖x‖₂, ε)           or, smooth, x / √(‖x‖₂² + ε)           over one dim

Source: ``torch.nn.functional.normalize`` with p = 2; Gated DeltaNet does the smooth form to its queries and keys (Yang,
Kautz and Hatamizadeh, Gated Delta Networks, 2025).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import dispatch
from ..autograd import Gradients, fused, vjp
from ..compiled import compiled_call
from ..op import Call, Draw, ErrorInput, Excess, Op, Traffic
from . import checks


def reference(x: Tensor, *, eps: float, smooth: bool) -> Tensor:
    """L2 normalization over the last dim in plain PyTorch: float32 (or wider) inside."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return (wide / _divisor(wide, eps, smooth)).to(x.dtype)


def _divisor(wide: Tensor, eps: float, smooth: bool) -> Tensor:
    squares = wide.square().sum(-1, keepdim=True)
    if smooth:
        return (squares + eps).sqrt()
    short = squares.detach().sqrt() <= eps
    # The root of a row that is too short is not taken at all: at 0 it has no derivative, and 0·∞ is NaN.
    return torch.where(short, eps, torch.where(short, 1.0, squares).sqrt())


def l2_normalize(x: Tensor, *, dim: int = -1, eps: float = 1e-12, smooth: bool = False) -> Tensor:
    """Divide by the Euclidean length: ``x / max(‖x‖, eps)``, as ``torch.nn.functional.normalize`` with p = 2.

    Computed in float32 and rounded once. Up to ``eps`` the divisor is constant, and its gradient zero.

    Args:
        x: floating-point tensor of any shape but a scalar.
        dim: the dim whose vectors get length one. Any other than the last is moved there by a copy.
        eps: the least length to divide by.
        smooth: divide by ``√(‖x‖² + eps)`` instead: differentiable everywhere, and never quite of length one.

    Returns:
        like x.

    Raises:
        TypeError: if x is not floating point.
        ValueError: if x is a scalar, or eps is negative.
        IndexError: if x has no such dim.
    """
    checks.floating("l2_normalize", x=x)
    if x.dim() == 0:
        raise ValueError("l2_normalize: x must have at least one dimension to sum over, got a scalar")
    if not -x.dim() <= dim < x.dim():
        raise IndexError(f"l2_normalize: dim must be in [{-x.dim()}, {x.dim() - 1}] for x {tuple(x.shape)}, got {dim}")
    if eps < 0.0:
        raise ValueError(f"l2_normalize: eps must not be negative, got {eps}; the default is 1e-12")
    options = {"eps": float(eps), "smooth": bool(smooth)}
    if dim in (-1, x.dim() - 1):
        return dispatch.run(L2_NORMALIZE, x, **options)
    return dispatch.run(L2_NORMALIZE, x.movedim(dim, -1), **options).movedim(-1, dim)


def _triton(x: Tensor, **options: Any) -> Tensor:
    from ..triton import l2_normalize as kernels

    return fused(kernels.forward, kernels.backward, vjp(reference), (x,), options)


def _compiled(x: Tensor, **options: Any) -> Tensor:
    return fused(_compiled_forward, _compiled_backward, vjp(reference), (x,), options)


def _compiled_forward(x: Tensor, **options: Any) -> Any:
    y, divisor = compiled_call(_with_divisor, (x,), options)
    return y, (x, divisor)


def _compiled_backward(grads: Any, saved: Any, needs: Any, **options: Any) -> Gradients:
    return (compiled_call(_gradient, (*grads, *saved), options),)


def _with_divisor(x: Tensor, *, eps: float, smooth: bool) -> tuple[Tensor, Tensor]:
    """y and the divisor. Kept, it is worked out once for each row, and not for every few elements."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    divisor = _divisor(wide, eps, smooth)
    return (wide / divisor).to(x.dtype), divisor


def _gradient(dy: Tensor, x: Tensor, divisor: Tensor, *, eps: float, smooth: bool) -> Tensor:
    """(dy − y·Σ dy·y) / divisor, and without the sum where the divisor is constant."""
    y, g = x.to(divisor.dtype) / divisor, dy.to(divisor.dtype)
    along = (g * y).sum(-1, keepdim=True)
    if not smooth:
        along = along.masked_fill(divisor <= eps, 0.0)
    return ((g - y * along) / divisor).to(x.dtype)


def _aten(x: Tensor, *, dim: int = -1, eps: float = 1e-12, smooth: bool = False) -> Tensor:
    if smooth:
        return x * torch.rsqrt(x.square().sum(dim, keepdim=True) + eps).to(x.dtype)
    return F.normalize(x, dim=dim, eps=eps)


def _inputs(draw: Draw, *, N: int, D: int, **options: Any) -> Call:
    return Call((draw.tensor(N, D),), options)


def _errors() -> Iterator[ErrorInput]:
    x = torch.zeros(2, 8)
    yield ErrorInput(Call((x.long(),)), TypeError, r"x must be a floating-point.*int64")
    yield ErrorInput(Call((torch.tensor(1.0),)), ValueError, "at least one dimension")
    yield ErrorInput(Call((x,), {"dim": 2}), IndexError, r"dim must be in \[-2, 1\].*got 2")
    yield ErrorInput(Call((x,), {"eps": -1.0}), ValueError, "eps must not be negative, got -1.0")


def _traffic(itemsize: int, *, N: int, D: int, dim: int = -1, **_: Any) -> Traffic:
    """x, y forward; dy, x, dx backward; the sums of squares."""
    numbers = 4 * (N if dim else D)
    return Traffic(forward=2 * N * D * itemsize + numbers, backward=3 * N * D * itemsize + numbers)


L2_NORMALIZE = Op(
    name="l2_normalize",
    replaces="`F.normalize`; with `smooth=True` the l2norm of Gated DeltaNet",
    fn=l2_normalize,
    reference=reference,
    impls={"triton": _triton, "compile": _compiled},
    inputs=_inputs,
    dims={"N": (0, 1, 2, 5, 129), "D": (1, 31, 32, 33, 127, 129, 1023, 1025, 16_384, 16_385)},
    # Queries or keys of Gated DeltaNet, 32 heads of 128; embeddings of a contrastive batch.
    bench=({"N": 65_536, "D": 128}, {"N": 8192, "D": 1024}),
    audit=({"N": 512, "D": 128}, {"N": 512, "D": 1024}, {"N": 16, "D": 262_144}),
    traffic=_traffic,
    excess={
        ("dim 0", "forward"): Excess(2.01, "vectors along another dim are copied together first"),
        ("dim 0", "backward"): Excess(2.35, "vectors along another dim are copied together first, x and dy"),
    },
    flops=lambda N, D: 3 * N * D,
    aten=_aten,
    axes="... D -> ... D",
    errors=_errors,
    variants={
        "default": {},
        "smooth": {"smooth": True, "eps": 1e-6},
        "some below eps": {"eps": 5.0},
        "dim 0": {"dim": 0},
    },
)
