"""Softmax of the rows of scores, scaled, capped, masked, and beside a sink.

N rows of D elements. With u = scale·x, s = u or softcap·tanh(u / softcap) (+ mask), −∞ where dropped, and the logit k
of the row's sink (−∞ where there is none):

    forward   m = max(s, k)     t = Σ exp(s − m) + exp(k − m)     y = exp(s − m) / t
    backward  p = exp(s − m) / t, or y / Σ y
              ds = p·(dy − Σ dy·p)      dx = scale·(1 − tanh²(u / softcap))·ds      dk = −exp(k − m) / t·Σ dy·p

and ds is the gradient of a floating-point mask.

The backward pass reads y, which attention keeps anyway, and no mask, unless a sink, a cap or the gradient of a mask
asks for more. y comes back rounded, so its sum is not quite 1, and dy − Σ dy·y does not cancel where y is nearly
one-hot: in bf16 the gradient would have no correct digit. y / Σ y sums to 1 in float32 and costs one more sum in
registers. A sink or a mask may be of a wider dtype than y: their gradients, and that of a cap, are computed from x, the
mask and the statistics of the rows. m and t are kept apart: the sum of m and log t has fewer digits than either, and an
exponential takes them all.

A dropped entry is a constant: its cotangent counts for nothing. In a row of y it is 0, which says as much unless the
row is NaN or that cotangent is not finite: only then is the mask read in the backward pass from y. Causally dropped
entries are not read at all. A row of more than MAX_TILE elements does not fit into the registers of a program; it is
read twice, the first time with a running maximum and sum (Milakov and Gimelshein, Online normalizer calculation for
softmax, 2018).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .activations import tanh
from .launch import launch, rows
from .launch_table import measured
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
def _scores(x, mask, start, n, d, read, kept, x_stride, scale, softcap, L1, L2, s0, s1, s2, sd, BOOLEAN: tl.constexpr):
    """s, the slope of the cap, and what is kept."""
    s = tl.load(x + n[:, None] * x_stride + d[None, :], read, other=float("-inf")).to(tl.float32) * scale
    slope = 1.0
    if softcap is not None:
        t, slope = tanh(s / softcap)
        s = softcap * t
    if mask is not None:
        at = _mask_at(mask, start, n, d, read, L1, L2, s0, s1, s2, sd)
        if BOOLEAN:
            kept = kept & (at != 0)
        else:
            s += at.to(tl.float32)
    return tl.where(kept, s, float("-inf")), slope, kept


@triton.jit
def _forward(
    x, mask, sink, y, peaks, totals, x_stride, N, D, Q, scale, softcap, L1, L2, s0, s1, s2, sd,
    CAUSAL: tl.constexpr, BOOLEAN: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    start = tl.program_id(0).to(tl.int64) * BLOCK_N
    n = start + tl.arange(0, BLOCK_N)
    d = tl.arange(0, BLOCK_D)
    inside, read, kept = _spans(start, n, d, N, D, Q, CAUSAL)
    s, _, _ = _scores(x, mask, start, n, d, read, kept, x_stride, scale, softcap, L1, L2, s0, s1, s2, sd, BOOLEAN)
    m = tl.max(s, 1)
    if sink is not None:
        k = tl.load(sink + n, n < N, other=0.0).to(tl.float32)
        m = tl.maximum(m, k)
    e = tl.exp(s - m[:, None])
    total = tl.sum(e, 1)
    if sink is not None:
        total += tl.exp(k - m)
    tl.store(y + n[:, None] * D + d[None, :], (e / total[:, None]).to(y.dtype.element_ty), inside)
    if peaks is not None:
        tl.store(peaks + n, m, n < N)
        tl.store(totals + n, total, n < N)


@triton.jit
def _forward_long(
    x, mask, sink, y, peaks, totals, x_stride, N, D, Q, scale, softcap, L1, L2, s0, s1, s2, sd,
    CAUSAL: tl.constexpr, BOOLEAN: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    start = tl.program_id(0).to(tl.int64)
    n = start + tl.arange(0, 1)
    m = tl.full([1], float("-inf"), tl.float32)
    if sink is not None:
        k = tl.load(sink + n).to(tl.float32)
        m = k
    base = tl.zeros([1], tl.float32)
    total = tl.zeros([1], tl.float32)
    for block in range(0, D, BLOCK_D):
        d = block + tl.arange(0, BLOCK_D)
        inside, read, kept = _spans(start, n, d, N, D, Q, CAUSAL)
        s, _, _ = _scores(x, mask, start, n, d, read, kept, x_stride, scale, softcap, L1, L2, s0, s1, s2, sd, BOOLEAN)
        peak = tl.maximum(m, tl.max(s, 1))
        # While all is dropped the maximum is −∞, and −∞ − (−∞) would be NaN.
        base = tl.where(peak == float("-inf"), 0.0, peak)
        total = total * tl.exp(m - base) + tl.sum(tl.exp(s - base[:, None]), 1)
        m = peak
    if sink is not None:
        total += tl.exp(k - base)
    for block in range(0, D, BLOCK_D):
        d = block + tl.arange(0, BLOCK_D)
        inside, read, kept = _spans(start, n, d, N, D, Q, CAUSAL)
        s, _, _ = _scores(x, mask, start, n, d, read, kept, x_stride, scale, softcap, L1, L2, s0, s1, s2, sd, BOOLEAN)
        out = tl.exp(s - base[:, None]) / total[:, None]
        tl.store(y + n[:, None] * D + d[None, :], out.to(y.dtype.element_ty), inside)
    if peaks is not None:
        tl.store(peaks + n, base)
        tl.store(totals + n, total)


@triton.jit
def _cotangents(
    dy, source, mask, peaks, totals, start, n, d, read, kept, dy_stride, source_stride, N, scale, softcap,
    L1, L2, s0, s1, s2, sd, BOOLEAN: tl.constexpr,
):  # fmt: skip
    """dy, p, the slope of the cap, and what is kept: from x where there are statistics of its rows, else from y."""
    slope = 1.0
    if peaks is not None:
        s, slope, kept = _scores(
            source, mask, start, n, d, read, kept, source_stride, scale, softcap, L1, L2, s0, s1, s2, sd, BOOLEAN
        )
        m = tl.load(peaks + n, n < N, other=0.0)
        total = tl.load(totals + n, n < N, other=1.0)
        p = tl.exp(s - m[:, None]) / total[:, None]
    else:
        p = tl.load(source + n[:, None] * source_stride + d[None, :], read, other=0.0).to(tl.float32)
    g = tl.load(dy + n[:, None] * dy_stride + d[None, :], read, other=0.0).to(tl.float32)
    return tl.where(kept, g, 0.0), tl.where(kept, p, 0.0), slope, kept


@triton.jit
def _kept_where_odd(mask, start, n, d, kept, odd, L1, L2, s0, s1, s2, sd):
    """What is kept, with a boolean mask looked at in the odd rows alone."""
    look = kept & odd[:, None]
    return kept & ((_mask_at(mask, start, n, d, look, L1, L2, s0, s1, s2, sd) != 0) | ~look)


@triton.jit
def _write_gradients(dx, dmask, g, p, slope, dot, n, d, inside, kept, D, scale):
    ds = p * (g - dot[:, None])
    at = n[:, None] * D + d[None, :]
    if dmask is not None:
        tl.store(dmask + at, tl.where(kept, ds, 0.0), inside)
    if dx is not None:
        tl.store(dx + at, tl.where(kept, ds * slope * scale, 0.0).to(dx.dtype.element_ty), inside)


@triton.jit
def _write_sink_gradient(dsink, sink, peaks, totals, dot, n, N):
    k = tl.load(sink + n, n < N, other=0.0).to(tl.float32)
    m = tl.load(peaks + n, n < N, other=0.0)
    total = tl.load(totals + n, n < N, other=1.0)
    tl.store(dsink + n, -tl.exp(k - m) / total * dot, n < N)


@triton.jit
def _backward(
    dy, source, mask, sink, peaks, totals, dx, dmask, dsink, dy_stride, source_stride, N, D, Q, scale, softcap,
    L1, L2, s0, s1, s2, sd,
    CAUSAL: tl.constexpr, BOOLEAN: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    start = tl.program_id(0).to(tl.int64) * BLOCK_N
    n = start + tl.arange(0, BLOCK_N)
    d = tl.arange(0, BLOCK_D)
    inside, read, kept = _spans(start, n, d, N, D, Q, CAUSAL)
    g, p, slope, kept = _cotangents(
        dy, source, mask, peaks, totals, start, n, d, read, kept, dy_stride, source_stride, N, scale, softcap,
        L1, L2, s0, s1, s2, sd, BOOLEAN,
    )  # fmt: skip
    if peaks is None:
        p /= tl.sum(p, 1)[:, None]
    dot = tl.sum(g * p, 1)
    if peaks is None and BOOLEAN:
        odd = ~(tl.abs(dot) < float("inf"))
        kept = _kept_where_odd(mask, start, n, d, kept, odd, L1, L2, s0, s1, s2, sd)
        g = tl.where(kept, g, 0.0)
        dot = tl.sum(g * p, 1)
    _write_gradients(dx, dmask, g, p, slope, dot, n, d, inside, kept, D, scale)
    if dsink is not None:
        _write_sink_gradient(dsink, sink, peaks, totals, dot, n, N)


@triton.jit
def _backward_long(
    dy, source, mask, sink, peaks, totals, dx, dmask, dsink, dy_stride, source_stride, N, D, Q, scale, softcap,
    L1, L2, s0, s1, s2, sd,
    CAUSAL: tl.constexpr, BOOLEAN: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    start = tl.program_id(0).to(tl.int64)
    n = start + tl.arange(0, 1)
    total = tl.zeros([1], tl.float32)
    dot = tl.zeros([1], tl.float32)
    for block in range(0, D, BLOCK_D):
        d = block + tl.arange(0, BLOCK_D)
        _, read, kept = _spans(start, n, d, N, D, Q, CAUSAL)
        g, p, _, _ = _cotangents(
            dy, source, mask, peaks, totals, start, n, d, read, kept, dy_stride, source_stride, N, scale, softcap,
            L1, L2, s0, s1, s2, sd, BOOLEAN,
        )  # fmt: skip
        total += tl.sum(p, 1)
        dot += tl.sum(g * p, 1)
    odd = ~(tl.abs(dot) < float("inf"))
    if peaks is None:
        if BOOLEAN:
            dot = tl.where(odd, 0.0, dot)
            for block in range(0, tl.where(tl.max(odd.to(tl.int32), 0) != 0, D, 0), BLOCK_D):
                d = block + tl.arange(0, BLOCK_D)
                _, read, kept = _spans(start, n, d, N, D, Q, CAUSAL)
                kept = _kept_where_odd(mask, start, n, d, kept, odd, L1, L2, s0, s1, s2, sd)
                g, p, _, _ = _cotangents(
                    dy, source, mask, peaks, totals, start, n, d, read, kept, dy_stride, source_stride, N,
                    scale, softcap, L1, L2, s0, s1, s2, sd, BOOLEAN,
                )  # fmt: skip
                dot += tl.sum(g * p, 1)
        dot /= total
    else:
        total = tl.full([1], 1.0, tl.float32)
    for block in range(0, D, BLOCK_D):
        d = block + tl.arange(0, BLOCK_D)
        inside, read, kept = _spans(start, n, d, N, D, Q, CAUSAL)
        if peaks is None and BOOLEAN:
            kept = _kept_where_odd(mask, start, n, d, kept, odd, L1, L2, s0, s1, s2, sd)
        g, p, slope, kept = _cotangents(
            dy, source, mask, peaks, totals, start, n, d, read, kept, dy_stride, source_stride, N, scale, softcap,
            L1, L2, s0, s1, s2, sd, BOOLEAN,
        )  # fmt: skip
        _write_gradients(dx, dmask, g, p / total[:, None], slope, dot, n, d, inside, kept, D, scale)
    if dsink is not None:
        _write_sink_gradient(dsink, sink, peaks, totals, dot, n, N)


def forward(x, mask, sink, *, scale: float, softcap: float | None, causal: bool, keep_x: bool):
    """Return y, and what the backward pass needs: x and the statistics of its rows, or y."""
    x_rows = rows(x)
    N, D = x_rows.shape
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    peaks = totals = None
    if keep_x:
        peaks, totals = torch.empty(2, N, dtype=torch.float32, device=x.device).unbind()
    pointer, strides, boolean = _broadcast(mask, x.shape)
    Q = x.shape[-2] if causal else 1
    arguments = (
        x_rows, pointer, _of_each_row(sink, x), y, peaks, totals, x_rows.stride(0), N, D, Q, scale, softcap, *strides
    )  # fmt: skip
    if x.numel():
        operands = (x_rows, pointer, sink, peaks, softcap)
        _launch(_forward, _forward_long, N, D, arguments, operands, False, CAUSAL=causal, BOOLEAN=boolean)
    return y, (x if keep_x else y, mask, sink, peaks, totals)


def backward(grads, saved, needs, *, scale: float, softcap: float | None, causal: bool):
    """Return the gradients of x, of the mask and of the sink."""
    kept, mask, sink, peaks, totals = saved
    dy, source = rows(grads[0]), rows(kept)
    N, D = dy.shape
    dx = torch.empty(kept.shape, dtype=kept.dtype, device=kept.device) if needs[0] else None
    dmask = torch.empty(kept.shape, dtype=torch.float32, device=kept.device) if needs[1] else None
    dsink = torch.empty(*kept.shape[:-1], 1, dtype=torch.float32, device=kept.device) if needs[2] else None
    pointer, strides, boolean = _broadcast(mask, kept.shape)
    Q = kept.shape[-2] if causal else 1
    arguments = (
        dy, source, pointer, _of_each_row(sink, kept), peaks, totals, dx, dmask, dsink,
        dy.stride(0), source.stride(0), N, D, Q, scale, softcap, *strides,
    )  # fmt: skip
    if kept.numel():
        operands = (source, dy, pointer, sink, peaks, softcap, dx, dmask, dsink)
        _launch(_backward, _backward_long, N, D, arguments, operands, sink is not None, CAUSAL=causal, BOOLEAN=boolean)
    return (
        dx,
        None if dmask is None else dmask.sum_to_size(mask.shape).to(mask.dtype),
        None if dsink is None else dsink.sum_to_size(sink.shape).to(sink.dtype),
    )


def _of_each_row(sink: Tensor | None, x: Tensor) -> Tensor | None:
    """The sink as the kernels read it: a logit for each row of x, which is little beside the row."""
    return sink if sink is None else sink.expand(*x.shape[:-1], 1).contiguous()


def _launch(kernel, long_kernel, N: int, D: int, arguments: tuple, operands: tuple, crowded: bool, **which) -> None:
    """Launch either kernel; ``crowded`` is one that needs registers for more than a tile's worth of rows."""
    if D <= MAX_TILE:
        BLOCK_N, BLOCK_D, num_warps = tile(D)
        if crowded and BLOCK_N > 1:
            BLOCK_N, num_warps = BLOCK_N // 2, num_warps // 2
        meta = measured(kernel, operands, {"BLOCK_N": BLOCK_N, "num_warps": num_warps}, BLOCK_D=BLOCK_D, **which)
        launch(kernel, (triton.cdiv(N, meta["BLOCK_N"]),), *arguments, **meta)
    else:
        meta = measured(long_kernel, operands, {"BLOCK_D": LONG_BLOCK, "num_warps": 8}, **which)
        launch(long_kernel, (N,), *arguments, **meta)


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
