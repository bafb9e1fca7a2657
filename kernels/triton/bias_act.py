"""Bias and activation: N rows of D elements, one row of x every ``x_stride`` elements. With h = x + b:

    forward   y  = act(h)
    backward  dx = dy·act'(h)      db = Σ_rows dx

Memory-bound; the backward pass recomputes h and act(h), which costs nothing beside the reads. A program walks down 256
columns (``column_tiles``), so that b is read, and a partial db written, once a program and not once a row; a second
kernel adds the partial sums up in a fixed order. With 16 elements a thread the forward pass takes up to 44 registers
and the backward pass 96, so that the eight and the four programs meant for a multiprocessor fit on it.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .activations import act
from .launch import column_sum, column_tiles, contiguous, launch, rows


@triton.jit
def _forward(
    x, bias, y, x_stride, N, D, ACTIVATION: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr
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
        out, _ = act(h, h, ACTIVATION)
        tl.store(y + n[:, None] * D + d[None, :], out.to(y.dtype.element_ty), mask)


@triton.jit
def _backward(
    dy, x, bias, dx, db_partial, dy_stride, x_stride, N, D,
    ACTIVATION: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    d = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    in_row = d < D
    if bias is not None:
        b = tl.load(bias + d, in_row, other=0.0).to(tl.float32)
    db = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    for tile in range(tl.program_id(1), tl.cdiv(N, BLOCK_N), tl.num_programs(1)):
        n = tile * BLOCK_N + tl.arange(0, BLOCK_N).to(tl.int64)
        mask = (n < N)[:, None] & in_row[None, :]
        dout = tl.load(dy + n[:, None] * dy_stride + d[None, :], mask, other=0.0).to(tl.float32)
        h = tl.load(x + n[:, None] * x_stride + d[None, :], mask, other=0.0).to(tl.float32)
        if bias is not None:
            h += b[None, :]
        _, pulled = act(h, dout, ACTIVATION)
        if dx is not None:
            tl.store(dx + n[:, None] * D + d[None, :], pulled.to(dx.dtype.element_ty), mask)
        if db_partial is not None:
            db += pulled
    if db_partial is not None:
        tl.store(db_partial + tl.program_id(1) * D + d, tl.sum(db, 0), in_row)


def forward(x, bias, *, activation: str):
    """Return y, and what the backward pass needs: x and bias themselves."""
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    x_rows = rows(x)
    N, D = x_rows.shape
    if x.numel():
        grid, meta = column_tiles(_forward, (x_rows, bias), N, D, read=1, ACTIVATION=activation)
        launch(_forward, grid, x_rows, contiguous(bias), y, x_rows.stride(0), N, D, **meta)
    return y, (x, bias)


def backward(grads, saved, needs, *, activation: str):
    """Return the gradients of x and bias."""
    x, bias = saved
    dy_rows, x_rows = rows(grads[0]), rows(x)
    N, D = x_rows.shape
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device) if needs[0] else None
    grid, meta = column_tiles(_backward, (dy_rows, x_rows, bias, dx), N, D, read=2, ACTIVATION=activation)
    partial = torch.empty(grid[1], D, dtype=torch.float32, device=x.device) if needs[1] else None
    if x.numel():
        launch(_backward, grid,
            dy_rows, x_rows, contiguous(bias), dx, partial, dy_rows.stride(0), x_rows.stride(0), N, D, **meta
        )  # fmt: skip
    return dx, None if partial is None else column_sum(partial, bias.dtype)
