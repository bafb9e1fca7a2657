"""Residual add of a biased tensor under dropout: N rows of D elements, one row of x every ``x_stride`` elements.

    forward   y  = residual + m·(x + b)      m = scale where kept(seed, n, d), else 0; 1 without a seed
    backward  dx = m·dy                      db = Σ_rows dx

Memory-bound. The mask is hashed again in the backward pass, which therefore reads nothing but dy and the seed: the 20
integer instructions an element are what an H100 has time for at 4 bytes in and out (see dropout.py). Programs walk down
256 columns, as in bias_act.py, for the sake of b and db.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .dropout import kept
from .launch import column_sum, column_tiles, contiguous, launch, rows


@triton.jit
def _forward(
    x, residual, bias, seed, y, x_stride, residual_stride, N, D, threshold, scale,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    d = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    in_row = d < D
    if bias is not None:
        b = tl.load(bias + d, in_row, other=0.0).to(tl.float32)
    for tile in range(tl.program_id(1), tl.cdiv(N, BLOCK_N), tl.num_programs(1)):
        n = tile * BLOCK_N + tl.arange(0, BLOCK_N).to(tl.int64)
        mask = (n < N)[:, None] & in_row[None, :]
        h = tl.load(x + n[:, None] * x_stride + d[None, :], mask, other=0.0).to(tl.float32)
        if bias is not None:
            h += b[None, :]
        if seed is not None:
            h = tl.where(kept(seed, n, d, threshold), h * scale, 0.0)
        h += tl.load(residual + n[:, None] * residual_stride + d[None, :], mask, other=0.0).to(tl.float32)
        tl.store(y + n[:, None] * D + d[None, :], h.to(y.dtype.element_ty), mask)


@triton.jit
def _backward(
    dy, seed, dx, db_partial, dy_stride, N, D, threshold, scale, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr
):  # fmt: skip
    d = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    in_row = d < D
    db = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    for tile in range(tl.program_id(1), tl.cdiv(N, BLOCK_N), tl.num_programs(1)):
        n = tile * BLOCK_N + tl.arange(0, BLOCK_N).to(tl.int64)
        mask = (n < N)[:, None] & in_row[None, :]
        g = tl.load(dy + n[:, None] * dy_stride + d[None, :], mask, other=0.0).to(tl.float32)
        if seed is not None:
            g = tl.where(kept(seed, n, d, threshold), g * scale, 0.0)
        if dx is not None:
            tl.store(dx + n[:, None] * D + d[None, :], g.to(dx.dtype.element_ty), mask)
        if db_partial is not None:
            db += g
    if db_partial is not None:
        tl.store(db_partial + tl.program_id(1) * D + d, tl.sum(db, 0), in_row)


def forward(x, residual, bias, seed, *, threshold: int, scale: float):
    """Return y, and what the backward pass needs: the dtypes of x and residual, the bias and the seed."""
    y = torch.empty(x.shape, dtype=torch.promote_types(x.dtype, residual.dtype), device=x.device)
    x_rows, residual_rows = rows(x), rows(residual)
    N, D = x_rows.shape
    if x.numel():
        grid, meta = column_tiles(_forward, (x_rows, residual_rows, bias, seed), N, D, read=2)
        launch(_forward, grid,
            x_rows, residual_rows, contiguous(bias), seed, y, x_rows.stride(0), residual_rows.stride(0), N, D,
            threshold, scale, **meta,
        )  # fmt: skip
    return y, (x.new_empty(0), residual.new_empty(0), bias, seed)


def backward(grads, saved, needs, *, threshold: int, scale: float):
    """Return the gradients of x, residual and bias; without dropout those of x and residual are dy itself."""
    x, residual, bias, seed = saved
    dy = grads[0]
    dy_rows = rows(dy)
    N, D = dy_rows.shape
    written = needs[0] and not (seed is None and x.dtype == dy.dtype)
    dx = torch.empty(dy.shape, dtype=x.dtype, device=dy.device) if written else None
    grid, meta = column_tiles(_backward, (dy_rows, seed, dx, bias), N, D, read=1)
    partial = torch.empty(grid[1], D, dtype=torch.float32, device=dy.device) if needs[2] else None
    if dy.numel() and (written or needs[2]):
        launch(_backward, grid, dy_rows, seed, dx, partial, dy_rows.stride(0), N, D, threshold, scale, **meta)
    db = None if partial is None else column_sum(partial, bias.dtype)
    return dx if written else dy, dy.to(residual.dtype), db, None
