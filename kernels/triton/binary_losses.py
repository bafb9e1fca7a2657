"""Binary cross-entropy of logits, and the focal loss, which is that times a power of the probability of being wrong.

N rows of D elements in one piece. With the target t (smoothed, if so), u = w⁺·t and v = 1 − t:

    z = exp(−|x|)        against, along = v, u if x ≥ 0 else u, v        s = sign of x
    loss  = against·|x| + (against + along)·log(1 + z)                   = u·softplus(−x) + v·softplus(x)
    dloss = s·(against − along·z) / (1 + z)                              = v·σ(x) − u·σ(−x)

    focal loss     q = (against + along·z) / (1 + z)                     = 1 − p_t
                   floss = q^γ·loss
                   dq/q  = s·(against − along)·ρ / (1 + z)               ρ = z / (against + along·z)
                   dfloss = q^γ·(dloss + γ·loss·dq/q)

and all of it times w, or times α·t + (1 − α)·(1 − t). Nothing cancels and nothing overflows: p − t, 1 − p and q^(γ − 1)
of a well classified element would. There against = 0, and ρ = 1 also where z has become 0.

Memory-bound: x and t are read once in each pass, and a loss that is reduced is not written: each program keeps
sums for its tiles, and those of all programs are added up in a fixed order. Weights that broadcast are read where they
lie; rows are as long as each of them either varies along all of a row or along none of it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .activations import log1p
from .launch import elementwise_tiles, launch, memory_order, multiprocessors


@triton.jit
def binary_loss(x, t, positive_weight, alpha, gamma, fraction, smoothing, WHOLE: tl.constexpr):
    """The loss of an element, and its derivative; γ = WHOLE + fraction."""
    if smoothing is not None:
        t = t * (1.0 - smoothing) + 0.5 * smoothing
    u = t
    if positive_weight is not None:
        u = t * positive_weight
    v = 1.0 - t
    z = tl.exp(-tl.abs(x))
    inverse = 1.0 / (1.0 + z)
    against = tl.where(x >= 0.0, v, u)
    along = tl.where(x >= 0.0, u, v)
    loss = against * tl.abs(x) + (against + along) * log1p(z)
    slope = (against - along * z) * inverse
    if gamma is not None:
        wrong = against + along * z
        right = against == 0.0
        rho = tl.where(right, 1.0, z / tl.where(right, 1.0, wrong))
        q = wrong * inverse
        power = tl.full(q.shape, 1.0, tl.float32)
        for _ in tl.static_range(WHOLE):
            power *= q
        if fraction is not None:
            power *= tl.exp(fraction * tl.log(q))
        slope = power * (slope + gamma * loss * (against - along) * rho * inverse)
        loss *= power
    slope = tl.where(x >= 0.0, slope, -slope)
    if alpha is not None:
        weight = alpha * t + (1.0 - alpha) * v
        loss *= weight
        slope *= weight
    return loss, slope


@triton.jit
def eighths(x):
    """Sums of eight neighbours in a row, which a thread holds: a running sum of every element spilled on sm_90."""
    NEIGHBOURS: tl.constexpr = 8 if x.shape[1] > 8 else x.shape[1]
    return tl.sum(tl.reshape(x, [x.shape[0], x.shape[1] // NEIGHBOURS, NEIGHBOURS]), 2)


@triton.jit
def _broadcast(weight, n, d, mask, rows, columns, column_stride):
    at = (n % rows)[:, None] * columns + d[None, :] * column_stride
    return tl.load(weight + at, mask, other=0.0).to(tl.float32)


@triton.jit
def _forward(
    x, target, weight, positive_weight, out,
    N, D, stride, w_rows, w_columns, w_stride, p_rows, p_columns, p_stride, alpha, gamma, fraction, smoothing,
    WHOLE: tl.constexpr, REDUCED: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    # Signed, the divisions by it spilled 8 bytes on sm_100 (pos_weight, float32).
    across = tl.cast(tl.cdiv(D, BLOCK_D), tl.uint32)
    total = eighths(tl.zeros([BLOCK_N, BLOCK_D], tl.float32))
    for tile in range(tl.program_id(0), tl.cdiv(N, BLOCK_N) * tl.cdiv(D, BLOCK_D), tl.num_programs(0)):
        tile = tl.cast(tile, tl.uint32)
        n = (tile // across).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
        d = (tile % across).to(tl.int64) * BLOCK_D + tl.arange(0, BLOCK_D)
        mask = (n < N)[:, None] & (d < D)[None, :]
        at = n[:, None] * stride + d[None, :]
        p = None
        if positive_weight is not None:
            p = _broadcast(positive_weight, n, d, mask, p_rows, p_columns, p_stride)
        loss, _ = binary_loss(
            tl.load(x + at, mask, other=0.0).to(tl.float32), tl.load(target + at, mask, other=0).to(tl.float32),
            p, alpha, gamma, fraction, smoothing, WHOLE,
        )  # fmt: skip
        if weight is not None:
            loss *= _broadcast(weight, n, d, mask, w_rows, w_columns, w_stride)
        if REDUCED:
            total += eighths(tl.where(mask, loss, 0.0))
        else:
            tl.store(out + at, loss.to(out.dtype.element_ty), mask)
    if REDUCED:
        tl.store(out + tl.program_id(0), tl.sum(tl.sum(total, 1), 0))


@triton.jit
def _backward(
    grad, x, target, weight, positive_weight, dx, divisor,
    N, D, stride, w_rows, w_columns, w_stride, p_rows, p_columns, p_stride, alpha, gamma, fraction, smoothing,
    WHOLE: tl.constexpr, REDUCED: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    across = tl.cdiv(D, BLOCK_D)
    n = (tl.program_id(0) // across).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    d = (tl.program_id(0) % across).to(tl.int64) * BLOCK_D + tl.arange(0, BLOCK_D)
    mask = (n < N)[:, None] & (d < D)[None, :]
    at = n[:, None] * stride + d[None, :]
    p = None
    if positive_weight is not None:
        p = _broadcast(positive_weight, n, d, mask, p_rows, p_columns, p_stride)
    _, slope = binary_loss(
        tl.load(x + at, mask, other=0.0).to(tl.float32), tl.load(target + at, mask, other=0).to(tl.float32),
        p, alpha, gamma, fraction, smoothing, WHOLE,
    )  # fmt: skip
    if weight is not None:
        slope *= _broadcast(weight, n, d, mask, w_rows, w_columns, w_stride)
    if REDUCED:
        slope *= tl.load(grad).to(tl.float32) / divisor
    else:
        slope *= tl.load(grad + at, mask, other=0.0).to(tl.float32)
    tl.store(dx + at, slope.to(dx.dtype.element_ty), mask)


def forward(x, target, weight=None, positive_weight=None, *, reduction: str, **options):
    """Return the losses, or their sum or mean, and what the backward pass needs: the inputs themselves."""
    view = _view(x, target, weight, positive_weight)
    dtype = torch.promote_types(x.dtype, target.dtype)
    reduced = reduction != "none"
    (tiles,), meta = _tiles(_forward, view, reduced, **options) if x.numel() else ((0,), {})
    if reduced:
        tiles = min(tiles, 8 * multiprocessors(x.device))
        out = torch.empty(tiles, dtype=torch.float32, device=x.device)
    else:
        out = view.like(x, dtype)
    if tiles:
        launch(_forward, (tiles,), *view.operands, out, *view.sizes, **meta)
    loss = out.sum() if reduced else out
    if reduction == "mean":
        loss = loss / x.numel()
    return loss.to(dtype), (x, target, weight, positive_weight)


def backward(grads, saved, needs, *, reduction: str, **options):
    """Return the gradient of x; None for the others."""
    x, target, *weights = saved
    view = _view(x, target, *weights)
    dx = view.like(x, x.dtype)
    if x.numel():
        grid, meta = _tiles(_backward, view, reduction != "none", **options)
        grad = grads[0].permute(view.order).contiguous() if reduction == "none" else grads[0]
        launch(_backward, grid,
            grad, *view.operands, dx, float(x.numel()) if reduction == "mean" else 1.0, *view.sizes, **meta
        )  # fmt: skip
    return (dx, *[None] * (len(needs) - 1))


def _tiles(
    kernel, view: _View, reduced: bool, *, alpha: float | None = None, gamma: float = 0.0, label_smoothing: float = 0.0
) -> tuple[tuple[int], dict]:
    """Grid, and options as kernels take them: None switches a part off."""
    whole = math.floor(gamma)
    options = {
        "alpha": alpha,
        "gamma": gamma or None,
        "fraction": gamma - whole or None,
        "smoothing": label_smoothing or None,
    }
    operands = (*view.operands, *options.values())
    grid, meta = elementwise_tiles(kernel, operands, view.N, view.D, WHOLE=whole, REDUCED=reduced)
    return grid, {**options, **meta}


class _View(NamedTuple):
    """The operands of a call as rows that kernels can index."""

    #: The dims of x, the outermost in memory first.
    order: list[int]
    #: Whether x lies in one piece, in that order; results then lie as x does.
    dense: bool
    N: int
    D: int
    #: x, target, weight, positive weight.
    operands: tuple[Tensor | None, ...]
    #: N, D, the distance of rows, and for each weight its rows, its columns, and their distance.
    sizes: tuple[int, ...]

    def like(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """An empty tensor in which a kernel finds the elements where it finds those of x."""
        return torch.empty_like(x, dtype=dtype) if self.dense else torch.empty(x.shape, dtype=dtype, device=x.device)


def _view(x: Tensor, target: Tensor, *weights: Tensor | None) -> _View:
    order = memory_order(x)
    dense = x.permute(order).is_contiguous()
    if not dense:
        order = list(range(x.dim()))
    x, target = (t.permute(order).contiguous() for t in (x, target))
    if target.dtype == torch.bool:
        target = target.view(torch.uint8)
    aligned = [None if w is None else w[(None,) * (x.dim() - w.dim())].permute(order) for w in weights]
    lead = _leading_dims(x.shape, [w for w in aligned if w is not None])
    N, D = x.shape[:lead].numel(), x.shape[lead:].numel()
    tables = [(None, 1, 1, 0) if w is None else _rows_of_weight(w, x.shape[:lead]) for w in aligned]
    # One row may have any length: a distance of 0 leaves its vectors aligned.
    sizes = (N, D, D if N > 1 else 0, *(size for table in tables for size in table[1:]))
    return _View(order, dense, N, D, (x, target, *(table[0] for table in tables)), sizes)


def _leading_dims(shape: torch.Size, weights: Sequence[Tensor]) -> int:
    """How many dims are not part of a row: along a row each weight varies, or does not, from end to end."""
    varies = None
    for dim in reversed(range(len(shape))):
        if shape[dim] != 1:
            here = [w.shape[dim] != 1 for w in weights]
            if varies not in (None, here):
                return dim + 1
            varies = here
    return 0


def _rows_of_weight(w: Tensor, lead: torch.Size) -> tuple[Tensor, int, int, int]:
    """A weight as rows that repeat, how many, of how many elements, and the distance of these."""
    own = w.shape[: len(lead)]
    first = next((dim for dim, size in enumerate(own) if size != 1), len(lead))
    if own[first:] != lead[first:]:  # [B, 1, H, W] beside [C, 1, 1]
        w = w.expand(*lead, *w.shape[len(lead) :])
        first = 0
    columns = w.shape[len(lead) :].numel()
    return w.contiguous(), lead[first:].numel(), columns, int(columns > 1)
