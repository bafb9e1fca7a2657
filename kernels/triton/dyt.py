"""Dynamic tanh: N rows of D elements, one row of x every ``x_stride`` elements. With t = tanh(αx):

    forward   y  = w·t + b
    backward  s  = dy·w·(1 − t²)      dx = α·s      dα = Σ s·x      dw = Σ_rows dy·t      db = Σ_rows dy

Memory-bound: nothing is reduced along a row, so that a program walks down 256 columns, as in bias_act.py, and keeps
running sums of them; a second kernel adds up what the programs found, in a fixed order. For α a row of a tile, which is
one warp's, is added up at once: 16 more running sums a thread spilled on sm_100. 1 − t² comes from exp, as t does, and
not from t, where it would cancel.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .activations import tanh
from .launch import column_sum, column_tiles, contiguous, launch, rows


@triton.jit
def _forward(x, alpha, weight, bias, y, x_stride, N, D, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr):
    d = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    in_row = d < D
    a = tl.load(alpha).to(tl.float32)
    w = tl.load(weight + d, in_row, other=0.0).to(tl.float32)
    if bias is not None:
        b = tl.load(bias + d, in_row, other=0.0).to(tl.float32)
    for tile in range(tl.program_id(1), tl.cdiv(N, BLOCK_N), tl.num_programs(1)):
        n = tile * BLOCK_N + tl.arange(0, BLOCK_N).to(tl.int64)
        mask = (n < N)[:, None] & in_row[None, :]
        h = tl.load(x + n[:, None] * x_stride + d[None, :], mask, other=0.0).to(tl.float32)
        t, _ = tanh(a * h)
        t *= w[None, :]
        if bias is not None:
            t += b[None, :]
        tl.store(y + n[:, None] * D + d[None, :], t.to(y.dtype.element_ty), mask)


@triton.jit
def _backward(
    dy, x, alpha, weight, dx, dalpha_partial, dw_partial, db_partial, dy_stride, x_stride, N, D,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    d = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    in_row = d < D
    a = tl.load(alpha).to(tl.float32)
    w = tl.load(weight + d, in_row, other=0.0).to(tl.float32)
    dalpha = tl.zeros([BLOCK_N], tl.float32)
    dw = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    db = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    for tile in range(tl.program_id(1), tl.cdiv(N, BLOCK_N), tl.num_programs(1)):
        n = tile * BLOCK_N + tl.arange(0, BLOCK_N).to(tl.int64)
        mask = (n < N)[:, None] & in_row[None, :]
        g = tl.load(dy + n[:, None] * dy_stride + d[None, :], mask, other=0.0).to(tl.float32)
        h = tl.load(x + n[:, None] * x_stride + d[None, :], mask, other=0.0).to(tl.float32)
        t, slope = tanh(a * h)
        if db_partial is not None:
            db += g
        if dw_partial is not None:
            dw += g * t
        s = g * slope * w[None, :]
        if dx is not None:
            tl.store(dx + n[:, None] * D + d[None, :], (a * s).to(dx.dtype.element_ty), mask)
        if dalpha_partial is not None:
            dalpha += tl.sum(s * h, 1)
    row = tl.program_id(1) * D + d
    if dalpha_partial is not None:
        program = tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)
        tl.store(dalpha_partial + program, tl.sum(dalpha, 0))
    if dw_partial is not None:
        tl.store(dw_partial + row, tl.sum(dw, 0), in_row)
    if db_partial is not None:
        tl.store(db_partial + row, tl.sum(db, 0), in_row)


def forward(x, alpha, weight, bias):
    """Return y, and what the backward pass needs: the inputs themselves."""
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    x_rows = rows(x)
    N, D = x_rows.shape
    if x.numel():
        grid, meta = column_tiles(_forward, (x_rows, alpha, weight, bias), N, D, read=1)
        launch(_forward, grid,
            x_rows, alpha, contiguous(weight), contiguous(bias), y, x_rows.stride(0), N, D, **meta
        )  # fmt: skip
    return y, (x, alpha, weight, bias)


def backward(grads, saved, needs):
    """Return the gradients of x, alpha, weight and bias."""
    x, alpha, weight, bias = saved
    dy_rows, x_rows = rows(grads[0]), rows(x)
    N, D = x_rows.shape
    operands = (dy_rows, x_rows, alpha, weight, *(t if need else None for t, need in zip(saved, needs, strict=True)))
    grid, meta = column_tiles(_backward, operands, N, D, read=2)
    blocks, programs = grid
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device) if needs[0] else None
    partial = [
        torch.empty(shape, dtype=torch.float32, device=x.device) if need else None
        for shape, need in zip(((blocks * programs,), (programs, D), (programs, D)), needs[1:], strict=True)
    ]
    if x.numel():
        launch(_backward, grid,
            dy_rows, x_rows, alpha, contiguous(weight), dx, *partial, dy_rows.stride(0), x_rows.stride(0), N, D, **meta
        )  # fmt: skip
    dalpha = None if partial[0] is None else partial[0].sum().to(alpha.dtype).view(alpha.shape)
    dw, db = (
        None if sums is None else column_sum(sums, parameter.dtype)
        for sums, parameter in zip(partial[1:], (weight, bias), strict=True)
    )
    return dx, dalpha, dw, db
