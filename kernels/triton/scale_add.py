"""Residual add of scaled channels under stochastic depth: N rows of D elements, R rows to a sample.

    forward   y  = residual + m·γ·x      m = keep_scale where the sample is kept, else 0; 1 without a seed
    backward  dx = m·γ·dy                dγ = Σ_rows m·dy·x

Memory-bound. Of a dropped sample neither x nor dy is read: the rows' predicate is the same for all of a row's elements,
so accesses stay 16 bytes wide. Programs walk down 256 columns, as in bias_act.py, for the sake of γ and dγ; where there
is no γ, a sample is one long row.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from .dropout import kept
from .launch import column_sum, column_tiles, contiguous, launch, memory_order, rows


@triton.jit
def _multipliers(seed, tile, N, R, threshold, keep_scale, BLOCK_N: tl.constexpr):
    """The rows of a tile, whether each is there, whether it is read, and its m."""
    n = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    there = n < N
    read = there
    m = tl.full([BLOCK_N], 1.0, tl.float32)
    if seed is not None:
        # A 64-bit division takes a hundred instructions: one a tile, not one a row, and only where N has 64 bits, which
        # the tile's number then has too.
        first = tile * BLOCK_N
        sample = first // R + ((first % R).to(tl.int32) + tl.arange(0, BLOCK_N)) // R
        read &= tl.reshape(kept(seed, sample, tl.arange(0, 1), threshold), [BLOCK_N])
        m = tl.where(read, keep_scale, 0.0)
    return n.to(tl.int64), there, read, m


@triton.jit
def _forward(
    x, residual, scale, seed, y, x_stride, residual_stride, N, D, R, threshold, keep_scale,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    d = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    in_row = d < D
    if scale is not None:
        gamma = tl.load(scale + d, in_row, other=0.0).to(tl.float32)
    # With what the loop could share kept in registers, ptxas spilled one for sm_100.
    for tile in tl.range(tl.program_id(1), tl.cdiv(N, BLOCK_N), tl.num_programs(1), disable_licm=True):
        n, there, read, m = _multipliers(seed, tile, N, R, threshold, keep_scale, BLOCK_N)
        mask = there[:, None] & in_row[None, :]
        in_kept = read[:, None] & in_row[None, :]
        h = tl.load(x + n[:, None] * x_stride + d[None, :], in_kept, other=0.0).to(tl.float32) * m[:, None]
        if scale is not None:
            h *= gamma[None, :]
        if residual is not None:
            h += tl.load(residual + n[:, None] * residual_stride + d[None, :], mask, other=0.0).to(tl.float32)
        tl.store(y + n[:, None] * D + d[None, :], h.to(y.dtype.element_ty), mask)


@triton.jit
def _backward(
    dy, x, scale, seed, dx, dscale_partial, dy_stride, x_stride, N, D, R, threshold, keep_scale,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    d = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    in_row = d < D
    if scale is not None:
        gamma = tl.load(scale + d, in_row, other=0.0).to(tl.float32)
    dgamma = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    for tile in range(tl.program_id(1), tl.cdiv(N, BLOCK_N), tl.num_programs(1)):
        n, there, read, m = _multipliers(seed, tile, N, R, threshold, keep_scale, BLOCK_N)
        mask = there[:, None] & in_row[None, :]
        in_kept = read[:, None] & in_row[None, :]
        g = tl.load(dy + n[:, None] * dy_stride + d[None, :], in_kept, other=0.0).to(tl.float32) * m[:, None]
        if dscale_partial is not None:
            dgamma += g * tl.load(x + n[:, None] * x_stride + d[None, :], in_kept, other=0.0).to(tl.float32)
        if dx is not None:
            if scale is not None:
                g *= gamma[None, :]
            tl.store(dx + n[:, None] * D + d[None, :], g.to(dx.dtype.element_ty), mask)
    if dscale_partial is not None:
        tl.store(dscale_partial + tl.program_id(1) * D + d, tl.sum(dgamma, 0), in_row)


def forward(x, residual, scale, seed, *, threshold: int, keep_scale: float):
    """Return y, and what the backward pass needs: x for γ's gradient, the dtype of residual, γ and the seed."""
    y, order = _like(x, scale, x.dtype if residual is None else torch.promote_types(x.dtype, residual.dtype))
    if x.numel():
        x_rows, R = _rows(x.permute(order), scale)
        residual_rows = None if residual is None else _rows(residual.permute(order), scale)[0]
        residual_stride = 0 if residual_rows is None else residual_rows.stride(0)
        N, D = x_rows.shape
        operands = (x_rows, residual_rows, scale, seed)
        grid, meta = column_tiles(_forward, operands, N, D, read=1 if residual is None else 2)
        launch(_forward, grid,
            x_rows, residual_rows, contiguous(scale), seed, y, x_rows.stride(0), residual_stride, N, D, R,
            threshold, keep_scale, **meta,
        )  # fmt: skip
    kept_x = x.new_empty(0) if scale is None else x
    return y, (kept_x, None if residual is None else residual.new_empty(0), scale, seed)


def backward(grads, saved, needs, *, threshold: int, keep_scale: float):
    """Return the gradients of x, residual and γ."""
    x, residual, scale, seed = saved
    dy = grads[0]
    dx, order = _like(dy, scale, x.dtype) if needs[0] else (None, list(range(dy.dim())))
    dy_rows, R = _rows(dy.permute(order), scale)
    N, D = dy_rows.shape
    grid, meta = column_tiles(_backward, (dy_rows, scale, seed, dx), N, D, read=1 if scale is None else 2)
    partial = torch.empty(grid[1], D, dtype=torch.float32, device=dy.device) if needs[2] else None
    x_rows = rows(x) if needs[2] else None
    x_stride = 0 if x_rows is None else x_rows.stride(0)
    if dy.numel() and (needs[0] or needs[2]):
        launch(_backward, grid,
            dy_rows, x_rows, contiguous(scale), seed, dx, partial, dy_rows.stride(0), x_stride, N, D, R,
            threshold, keep_scale, **meta,
        )  # fmt: skip
    dscale = None if partial is None else column_sum(partial, scale.dtype)
    return dx, None if residual is None else dy.to(residual.dtype), dscale, None


def _like(x: Tensor, scale: Tensor | None, dtype: torch.dtype) -> tuple[Tensor, list[int]]:
    """An empty tensor that lies as x does, if samples are one behind the other and nothing is per channel; its order.

    The order of its dims, the outermost in memory first.
    """
    order = memory_order(x)
    if scale is None and order[:1] == [0] and x.permute(order).is_contiguous():
        return torch.empty_like(x, dtype=dtype), order
    return torch.empty(x.shape, dtype=dtype, device=x.device), list(range(x.dim()))


def _rows(x: Tensor, scale: Tensor | None) -> tuple[Tensor, int]:
    """x as rows, and how many of them are a sample: one long one if nothing is per channel."""
    if scale is None and x.dim() > 1:
        return rows(x.flatten(1)), 1
    return rows(x), max(1, math.prod(x.shape[1:-1]))
