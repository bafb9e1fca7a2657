"""Softmax of the rows of scores, scaled and masked.

N rows of D elements. With s = scale·x (+ mask), −∞ where dropped:

    forward   m = max s      y = exp(s − m) / Σ exp(s − m)
    backward  ŷ = y / Σ y    dx = scale·ŷ·(dy − Σ dy·ŷ)          the gradient of a floating-point mask is dx / scale

y comes back rounded, so its sum is not quite 1, and dy − Σ dy·y does not cancel where y is nearly one-hot: in bf16 the
gradient would have no correct digit. ŷ sums to 1 in float32 and costs one more sum in registers.

The row of a dropped entry says nothing about it unless the row is NaN: only then is the mask read in the backward pass.
Causally dropped entries are not read at all. A row of more than MAX_TILE elements does not fit into the registers of a
program; it is read twice, the first time with a running maximum and sum (Milakov and Gimelshein, Online normalizer
calculation for softmax, 2018).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import launch, rows
from .norm import LONG_BLOCK, MAX_TILE, tile


@triton.jit
def _mask_at(mask, start, n, d, read, L1, L2, s0, s1, s2, sd):
    # As below: one 64-bit division a program, not one a row.
    period = L1 * L2
    r = (start % period).to(tl.int32) + (n - start).to(tl.int32)
    n0 = start // period + r // period
    n1 = (r % period) // L2
    n2 = r % L2
    at = n0 * s0 + n1.to(tl.int64) * s1 + n2.to(tl.int64) * s2
    return tl.load(mask + at[:, None] + d.to(tl.int64)[None, :] * sd, read, other=0)


@triton.jit
def _spans(start, n, d, N, D, Q, CAUSAL: tl.constexpr):
    """Where the rows are; what is read of them; what of that is kept.

    Reads end with a group of eight elements: a predicate that may change at any element would make every access a
    single element wide.
    """
    inside = (n < N)[:, None] & (d < D)[None, :]
    read = inside
    kept = inside
    if CAUSAL:
        # A 64-bit division takes a hundred instructions: one a program, not one a row.
        q = ((start % Q).to(tl.int32) + (n - start).to(tl.int32)) % Q
        last = q + (D - Q)
        read = inside & (d[None, :] // 8 <= (last // 8)[:, None])
        kept = inside & (d[None, :] <= last[:, None])
    return inside, read, kept


@triton.jit
def _scores(x, mask, start, n, d, read, kept, x_stride, scale, L1, L2, s0, s1, s2, sd, BOOLEAN: tl.constexpr):
    s = tl.load(x + n[:, None] * x_stride + d[None, :], read, other=float("-inf")).to(tl.float32) * scale
    if mask is not None:
        at = _mask_at(mask, start, n, d, read, L1, L2, s0, s1, s2, sd)
        if BOOLEAN:
            kept = kept & (at != 0)
        else:
            s += at.to(tl.float32)
    return tl.where(kept, s, float("-inf"))


@triton.jit
def _gradients(dy, y, n, d, read, kept, dy_stride, D):
    g = tl.load(dy + n[:, None] * dy_stride + d[None, :], read, other=0.0).to(tl.float32)
    p = tl.load(y + n[:, None] * D + d[None, :], read, other=0.0).to(tl.float32)
    return tl.where(kept, g, 0.0), tl.where(kept, p, 0.0)


@triton.jit
def _forward(
    x, mask, y, x_stride, N, D, Q, scale, L1, L2, s0, s1, s2, sd,
    CAUSAL: tl.constexpr, BOOLEAN: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    start = tl.program_id(0).to(tl.int64) * BLOCK_N
    n = start + tl.arange(0, BLOCK_N)
    d = tl.arange(0, BLOCK_D)
    inside, read, kept = _spans(start, n, d, N, D, Q, CAUSAL)
    s = _scores(x, mask, start, n, d, read, kept, x_stride, scale, L1, L2, s0, s1, s2, sd, BOOLEAN)
    e = tl.exp(s - tl.max(s, 1)[:, None])
    out = e / tl.sum(e, 1)[:, None]
    tl.store(y + n[:, None] * D + d[None, :], out.to(y.dtype.element_ty), inside)


@triton.jit
def _forward_long(
    x, mask, y, x_stride, N, D, Q, scale, L1, L2, s0, s1, s2, sd,
    CAUSAL: tl.constexpr, BOOLEAN: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    start = tl.program_id(0).to(tl.int64)
    n = start + tl.arange(0, 1)
    m = tl.full([1], float("-inf"), tl.float32)
    base = tl.zeros([1], tl.float32)
    total = tl.zeros([1], tl.float32)
    for block in range(0, D, BLOCK_D):
        d = block + tl.arange(0, BLOCK_D)
        inside, read, kept = _spans(start, n, d, N, D, Q, CAUSAL)
        s = _scores(x, mask, start, n, d, read, kept, x_stride, scale, L1, L2, s0, s1, s2, sd, BOOLEAN)
        peak = tl.maximum(m, tl.max(s, 1))
        # While all is dropped the maximum is −∞, and −∞ − (−∞) would be NaN.
        base = tl.where(peak == float("-inf"), 0.0, peak)
        total = total * tl.exp(m - base) + tl.sum(tl.exp(s - base[:, None]), 1)
        m = peak
    for block in range(0, D, BLOCK_D):
        d = block + tl.arange(0, BLOCK_D)
        inside, read, kept = _spans(start, n, d, N, D, Q, CAUSAL)
        s = _scores(x, mask, start, n, d, read, kept, x_stride, scale, L1, L2, s0, s1, s2, sd, BOOLEAN)
        out = tl.exp(s - base[:, None]) / total[:, None]
        tl.store(y + n[:, None] * D + d[None, :], out.to(y.dtype.element_ty), inside)


@triton.jit
def _write_gradient(
    dx, dmask, mask, y, g, total, dot, start, n, d, inside, kept, D, scale, L1, L2, s0, s1, s2, sd,
    BOOLEAN: tl.constexpr,
):  # fmt: skip
    ds = y / total[:, None] * (g - dot[:, None])
    ds = tl.where(kept, ds, 0.0)
    if BOOLEAN:
        poisoned = inside & (~(tl.abs(dot) < float("inf")))[:, None]
        ds = tl.where(poisoned & (_mask_at(mask, start, n, d, poisoned, L1, L2, s0, s1, s2, sd) == 0), 0.0, ds)
    at = n[:, None] * D + d[None, :]
    if dx is not None:
        tl.store(dx + at, (ds * scale).to(dx.dtype.element_ty), inside)
    if dmask is not None:
        tl.store(dmask + at, ds, inside)


@triton.jit
def _backward(
    dy, y, mask, dx, dmask, dy_stride, N, D, Q, scale, L1, L2, s0, s1, s2, sd,
    CAUSAL: tl.constexpr, BOOLEAN: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    start = tl.program_id(0).to(tl.int64) * BLOCK_N
    n = start + tl.arange(0, BLOCK_N)
    d = tl.arange(0, BLOCK_D)
    inside, read, kept = _spans(start, n, d, N, D, Q, CAUSAL)
    g, p = _gradients(dy, y, n, d, read, kept, dy_stride, D)
    total = tl.sum(p, 1)
    dot = tl.sum(g * p, 1) / total
    _write_gradient(
        dx, dmask, mask, p, g, total, dot, start, n, d, inside, kept, D, scale, L1, L2, s0, s1, s2, sd, BOOLEAN
    )  # fmt: skip


@triton.jit
def _backward_long(
    dy, y, mask, dx, dmask, dy_stride, N, D, Q, scale, L1, L2, s0, s1, s2, sd,
    CAUSAL: tl.constexpr, BOOLEAN: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    start = tl.program_id(0).to(tl.int64)
    n = start + tl.arange(0, 1)
    total = tl.zeros([1], tl.float32)
    dot = tl.zeros([1], tl.float32)
    for block in range(0, D, BLOCK_D):
        d = block + tl.arange(0, BLOCK_D)
        inside, read, kept = _spans(start, n, d, N, D, Q, CAUSAL)
        g, p = _gradients(dy, y, n, d, read, kept, dy_stride, D)
        total += tl.sum(p, 1)
        dot += tl.sum(g * p, 1)
    dot /= total
    for block in range(0, D, BLOCK_D):
        d = block + tl.arange(0, BLOCK_D)
        inside, read, kept = _spans(start, n, d, N, D, Q, CAUSAL)
        g, p = _gradients(dy, y, n, d, read, kept, dy_stride, D)
        _write_gradient(
            dx, dmask, mask, p, g, total, dot, start, n, d, inside, kept, D, scale, L1, L2, s0, s1, s2, sd, BOOLEAN
        )  # fmt: skip


def forward(x, mask, *, scale: float, causal: bool):
    """Return y, and what the backward pass needs."""
    x_rows = rows(x)
    N, D = x_rows.shape
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    pointer, strides, boolean = _broadcast(mask, x.shape)
    Q = x.shape[-2] if causal else 1
    arguments = (x_rows, pointer, y, x_rows.stride(0), N, D, Q, scale, *strides)
    if x.numel():
        _launch(_forward, _forward_long, N, D, arguments, CAUSAL=causal, BOOLEAN=boolean)
    return y, (y, mask)


def backward(grads, saved, needs, *, scale: float, causal: bool):
    """Return the gradients of x and of the mask."""
    y, mask = saved
    dy = rows(grads[0])
    N, D = dy.shape
    dx = torch.empty(y.shape, dtype=y.dtype, device=y.device) if needs[0] else None
    dmask = torch.empty(y.shape, dtype=torch.float32, device=y.device) if needs[1] else None
    pointer, strides, boolean = _broadcast(mask, y.shape)
    Q = y.shape[-2] if causal else 1
    arguments = (dy, y, pointer, dx, dmask, dy.stride(0), N, D, Q, scale, *strides)
    if y.numel():
        _launch(_backward, _backward_long, N, D, arguments, CAUSAL=causal, BOOLEAN=boolean)
    return dx, None if dmask is None else dmask.sum_to_size(mask.shape).to(mask.dtype)


def _launch(kernel, long_kernel, N: int, D: int, arguments: tuple, **meta) -> None:
    if D <= MAX_TILE:
        BLOCK_N, BLOCK_D, num_warps = tile(D)
        meta |= {"BLOCK_N": BLOCK_N, "BLOCK_D": BLOCK_D, "num_warps": num_warps}
        launch(kernel, (triton.cdiv(N, BLOCK_N),), *arguments, **meta)
    else:
        launch(long_kernel, (N,), *arguments, BLOCK_D=LONG_BLOCK, num_warps=8, **meta)


def _broadcast(mask: Tensor | None, shape: torch.Size) -> tuple[Tensor | None, tuple[int, ...], bool]:
    """A mask as the kernels read it: its storage; row n is (n0, n1, n2) in [*, L1, L2]; (L1, L2, strides); boolean?

    Leading dims that one stride can walk through are merged; in the rare case that more than three are left, as for
    [B, 1, H, 1, K] against [B, G, H, Q, K], the mask is expanded in memory.
    """
    if mask is None:
        return None, (1, 1, 0, 0, 0, 0), False
    boolean = mask.dtype == torch.bool
    if boolean:
        mask = mask.view(torch.uint8)
    leading = _merged(mask.expand(shape))
    if len(leading) > 3:
        mask = mask.expand(shape).contiguous()
        leading = _merged(mask)
    (_, s0), (L1, s1), (L2, s2) = [(1, 0)] * (3 - len(leading)) + leading
    return mask, (L1, L2, s0, s1, s2, mask.expand(shape).stride(-1)), boolean


def _merged(mask: Tensor) -> list[tuple[int, int]]:
    merged: list[tuple[int, int]] = []
    for size, stride in zip(mask.shape[:-1], mask.stride()[:-1], strict=True):
        if size == 1:
            continue
        if merged and merged[-1][1] == size * stride:
            merged[-1] = (merged[-1][0] * size, stride)
        else:
            merged.append((size, stride))
    return merged
