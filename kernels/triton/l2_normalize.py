"""Rows of D elements divided by their length, one row every ``x_stride`` elements.

With s = Σ x², and l = √(s + ε) if SMOOTH else max(√s, ε):

    forward   u = x/l
    backward  dx = (du − u·Σ du·u)/l, and du/l where √s ≤ ε: there l is constant

The backward pass reads x and s. Memory-bound, with the tiles and programs of norm.py; rows are independent, so there is
nothing to add up afterwards. A row of more than MAX_TILE elements is read twice in each pass.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .launch import launch, multiprocessors, programs, rows
from .launch_table import measured
from .norm import LONG_BLOCK, MAX_TILE, tile


@triton.jit
def _length(squares, eps, SMOOTH: tl.constexpr):
    if SMOOTH:
        return tl.sqrt(squares + eps)
    else:
        root = tl.sqrt(squares)
        return tl.where(root <= eps, eps, root)  # not maximum, which may drop a NaN


@triton.jit
def _along(dot, squares, eps, SMOOTH: tl.constexpr):
    """The part of du along u, which dx lacks; 0 where l is constant."""
    if SMOOTH:
        return dot
    else:
        return tl.where(tl.sqrt(squares) <= eps, 0.0, dot)


@triton.jit
def _forward(x, y, squares, x_stride, N, D, eps, SMOOTH: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr):
    d = tl.arange(0, BLOCK_D)
    for block in range(tl.program_id(0), tl.cdiv(N, BLOCK_N), tl.num_programs(0)):
        n = block * BLOCK_N + tl.arange(0, BLOCK_N).to(tl.int64)
        mask = (n < N)[:, None] & (d < D)[None, :]
        row = tl.load(x + n[:, None] * x_stride + d[None, :], mask, other=0.0).to(tl.float32)
        s = tl.sum(row * row, 1)
        tl.store(squares + n, s, n < N)
        row /= _length(s, eps, SMOOTH)[:, None]
        tl.store(y + n[:, None] * D + d[None, :], row.to(y.dtype.element_ty), mask)


@triton.jit
def _forward_long(x, y, squares, x_stride, D, eps, SMOOTH: tl.constexpr, BLOCK_D: tl.constexpr):
    n = tl.program_id(0).to(tl.int64)
    s = 0.0
    for start in range(0, D, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        row = tl.load(x + n * x_stride + d, d < D, other=0.0).to(tl.float32)
        s += tl.sum(row * row, 0)
    tl.store(squares + n, s)
    length = _length(s, eps, SMOOTH)
    for start in range(0, D, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        row = tl.load(x + n * x_stride + d, d < D, other=0.0).to(tl.float32)
        tl.store(y + n * D + d, (row / length).to(y.dtype.element_ty), d < D)


@triton.jit
def _backward(
    dy, x, squares, dx, dy_stride, x_stride, N, D, eps,
    SMOOTH: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    d = tl.arange(0, BLOCK_D)
    for block in range(tl.program_id(0), tl.cdiv(N, BLOCK_N), tl.num_programs(0)):
        n = block * BLOCK_N + tl.arange(0, BLOCK_N).to(tl.int64)
        mask = (n < N)[:, None] & (d < D)[None, :]
        g = tl.load(dy + n[:, None] * dy_stride + d[None, :], mask, other=0.0).to(tl.float32)
        unit = tl.load(x + n[:, None] * x_stride + d[None, :], mask, other=0.0).to(tl.float32)
        s = tl.load(squares + n, n < N, other=1.0)
        length = _length(s, eps, SMOOTH)
        unit /= length[:, None]
        along = _along(tl.sum(g * unit, 1), s, eps, SMOOTH)
        out = (g - unit * along[:, None]) / length[:, None]
        tl.store(dx + n[:, None] * D + d[None, :], out.to(dx.dtype.element_ty), mask)


@triton.jit
def _backward_long(dy, x, squares, dx, dy_stride, x_stride, D, eps, SMOOTH: tl.constexpr, BLOCK_D: tl.constexpr):
    n = tl.program_id(0).to(tl.int64)
    s = tl.load(squares + n)
    length = _length(s, eps, SMOOTH)
    dot = 0.0
    for start in range(0, D, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        g = tl.load(dy + n * dy_stride + d, d < D, other=0.0).to(tl.float32)
        dot += tl.sum(g * (tl.load(x + n * x_stride + d, d < D, other=0.0).to(tl.float32) / length), 0)
    along = _along(dot, s, eps, SMOOTH)
    for start in range(0, D, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        g = tl.load(dy + n * dy_stride + d, d < D, other=0.0).to(tl.float32)
        unit = tl.load(x + n * x_stride + d, d < D, other=0.0).to(tl.float32) / length
        tl.store(dx + n * D + d, ((g - unit * along) / length).to(dx.dtype.element_ty), d < D)


def forward(x, *, eps: float, smooth: bool):
    """Return y, and what the backward pass needs: x and the sums of squares."""
    x_rows = rows(x)
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    squares = torch.empty(len(x_rows), dtype=torch.float32, device=x.device)
    _launch(_forward, _forward_long, x_rows, (x_rows, y, squares, x_rows.stride(0)), eps, smooth)
    return y, (x, squares)


def backward(grads, saved, needs, *, eps: float, smooth: bool):
    """Return the gradient of x."""
    x, squares = saved
    dy_rows, x_rows = rows(grads[0]), rows(x)
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    pointers = (dy_rows, x_rows, squares, dx, dy_rows.stride(0), x_rows.stride(0))
    _launch(_backward, _backward_long, x_rows, pointers, eps, smooth)
    return (dx,)


def _launch(kernel, long_kernel, x_rows, pointers, eps: float, smooth: bool) -> None:
    N, D = x_rows.shape
    if x_rows.numel() == 0:
        return
    if D > MAX_TILE:
        meta = measured(long_kernel, (x_rows,), {"BLOCK_D": LONG_BLOCK, "num_warps": 8}, SMOOTH=smooth)
        launch(long_kernel, (N,), *pointers, D, eps, **meta)
        return
    BLOCK_N, BLOCK_D, num_warps = tile(D)
    free = {"BLOCK_N": BLOCK_N, "num_warps": num_warps, "programs": 4}
    meta = measured(kernel, (x_rows,), free, SMOOTH=smooth, BLOCK_D=BLOCK_D)
    P = programs(N, meta["BLOCK_N"], meta.pop("programs") * multiprocessors(x_rows.device), 1)
    launch(kernel, (P,), *pointers, N, D, eps, **meta)
