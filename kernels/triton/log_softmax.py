"""Logarithm of the softmax of rows.

N rows of D elements:

    forward   m = max x      t = Σ exp(x − m)      y = (x − m) − log t
    backward  p = exp(x − m) / t                   dx = dy − p·Σ dy

The backward pass reads x, m and t, and not y, which would move as many bytes: y comes back rounded, to within 2⁻⁹ of
itself in bf16, so exp(y) is wrong by that times |y|: 2 % at p = 1e-4. m and t are kept apart: the sum of m and log t
has fewer digits than either, and an exponential takes them all.

Memory-bound: tiles as in softmax, whole rows of about 4,096 elements (8 warps: 16 elements, two 16-byte accesses of
bf16, a thread). A row of more than MAX_TILE elements does not fit into the registers of a program; x is read twice
forward, the first time with a running maximum and sum (Milakov and Gimelshein, Online normalizer calculation for
softmax, 2018), and dy twice backward.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .launch import launch, rows
from .launch_table import measured
from .norm import LONG_BLOCK, MAX_TILE, tile


@triton.jit
def _forward(
    x, y, peaks, totals, x_stride, N, D,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    d = tl.arange(0, BLOCK_D)
    inside = (n < N)[:, None] & (d < D)[None, :]
    row = tl.load(x + n[:, None] * x_stride + d[None, :], inside, other=float("-inf")).to(tl.float32)
    m = tl.max(row, 1)
    shifted = row - m[:, None]
    total = tl.sum(tl.exp(shifted), 1)
    tl.store(y + n[:, None] * D + d[None, :], (shifted - tl.log(total)[:, None]).to(y.dtype.element_ty), inside)
    tl.store(peaks + n, m, n < N)
    tl.store(totals + n, total, n < N)


@triton.jit
def _forward_long(x, y, peaks, totals, x_stride, N, D, BLOCK_D: tl.constexpr):
    n = tl.program_id(0).to(tl.int64)
    m = float("-inf")
    base = 0.0
    total = 0.0
    for start in range(0, D, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        block = tl.load(x + n * x_stride + d, d < D, other=float("-inf")).to(tl.float32)
        peak = tl.maximum(m, tl.max(block, 0))
        # While every element is −∞ so is the maximum, and −∞ − (−∞) would be NaN.
        base = tl.where(peak == float("-inf"), 0.0, peak)
        total = total * tl.exp(m - base) + tl.sum(tl.exp(block - base), 0)
        m = peak
    log_sum = tl.log(total)
    for start in range(0, D, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        block = tl.load(x + n * x_stride + d, d < D, other=0.0).to(tl.float32)
        tl.store(y + n * D + d, (block - base - log_sum).to(y.dtype.element_ty), d < D)
    tl.store(peaks + n, base)
    tl.store(totals + n, total)


@triton.jit
def _backward(
    dy, x, peaks, totals, dx, dy_stride, x_stride, N, D,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    d = tl.arange(0, BLOCK_D)
    inside = (n < N)[:, None] & (d < D)[None, :]
    g = tl.load(dy + n[:, None] * dy_stride + d[None, :], inside, other=0.0).to(tl.float32)
    row = tl.load(x + n[:, None] * x_stride + d[None, :], inside, other=0.0).to(tl.float32)
    m = tl.load(peaks + n, n < N, other=0.0)
    total = tl.load(totals + n, n < N, other=1.0)
    p = tl.exp(row - m[:, None]) / total[:, None]
    out = g - p * tl.sum(g, 1)[:, None]
    tl.store(dx + n[:, None] * D + d[None, :], out.to(dx.dtype.element_ty), inside)


@triton.jit
def _backward_long(dy, x, peaks, totals, dx, dy_stride, x_stride, N, D, BLOCK_D: tl.constexpr):
    n = tl.program_id(0).to(tl.int64)
    m = tl.load(peaks + n)
    total = tl.load(totals + n)
    sum_g = 0.0
    for start in range(0, D, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        sum_g += tl.sum(tl.load(dy + n * dy_stride + d, d < D, other=0.0).to(tl.float32), 0)
    for start in range(0, D, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        g = tl.load(dy + n * dy_stride + d, d < D, other=0.0).to(tl.float32)
        block = tl.load(x + n * x_stride + d, d < D, other=0.0).to(tl.float32)
        out = g - tl.exp(block - m) / total * sum_g
        tl.store(dx + n * D + d, out.to(dx.dtype.element_ty), d < D)


def forward(x):
    """Return y, and what the backward pass needs."""
    x_rows = rows(x)
    N, D = x_rows.shape
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    peaks, totals = torch.empty(2, N, dtype=torch.float32, device=x.device).unbind()
    if x.numel():
        _launch(_forward, _forward_long, N, D, (x_rows, y, peaks, totals, x_rows.stride(0), N, D))
    return y, (x, peaks, totals)


def backward(grads, saved, needs):
    """Return the gradient of x."""
    x, peaks, totals = saved
    dy, x_rows = rows(grads[0]), rows(x)
    N, D = x_rows.shape
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if x.numel():
        arguments = (dy, x_rows, peaks, totals, dx, dy.stride(0), x_rows.stride(0), N, D)
        _launch(_backward, _backward_long, N, D, arguments)
    return (dx,)


def _launch(kernel, long_kernel, N: int, D: int, arguments: tuple) -> None:
    if D <= MAX_TILE:
        BLOCK_N, BLOCK_D, num_warps = tile(D)
        meta = measured(kernel, arguments[:2], {"BLOCK_N": BLOCK_N, "num_warps": num_warps}, BLOCK_D=BLOCK_D)
        launch(kernel, (triton.cdiv(N, meta["BLOCK_N"]),), *arguments, **meta)
    else:
        meta = measured(long_kernel, arguments[:2], {"BLOCK_D": LONG_BLOCK, "num_warps": 8})
        launch(long_kernel, (N,), *arguments, **meta)
