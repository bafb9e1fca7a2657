"""Cross-entropy of N rows of V logits that are a process's own classes; what the processes share comes in between.

    statistics   m = max s      Σ exp(s − m)      Σ w_c·(m − s_c)
    gradient     ds = (p − [c = index])·pull + p·lift − each·w_c      p = exp(s − base − log_sum)
                 dx = ds·(1 − tanh²(x / softcap))

with the sums of ``ops/vocab_parallel.py``, which says what pull, lift and each are. As in ``cross_entropy`` the logits
are read once each way, and those of ignored rows, whose index is −1, are not.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .activations import tanh
from .cross_entropy import block, row_statistics
from .launch import contiguous, launch, rows


@triton.jit
def _statistics(
    x, target, weight, peaks, totals, gaps, x_stride, N, V, ignore_index, softcap,
    SMOOTHED: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    counts = (n < N) & (tl.load(target + n, n < N, other=0).to(tl.int64) != ignore_index)
    m, _, total, gap, _ = row_statistics(x, weight, n, counts, x_stride, V, softcap, SMOOTHED, BLOCK_N, BLOCK_V)
    tl.store(peaks + n, m, n < N)
    tl.store(totals + n, total, n < N)
    if SMOOTHED:
        tl.store(gaps + n, gap, n < N)


@triton.jit
def _gradient(
    x, index, weight, bases, log_sums, pulls, lifts, shares, dx, x_stride, N, V, softcap,
    BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    v = tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)
    t = tl.load(index + n, n < N, other=-1)
    counts = (n < N) & (t != -1)
    inside = counts[:, None] & (v < V)[None, :]
    lse_base = tl.load(bases + n, counts, other=0.0)
    log_sum = tl.load(log_sums + n, counts, other=0.0)
    pull = tl.load(pulls + n, counts, other=0.0)
    s = tl.load(x + n[:, None] * x_stride + v[None, :], inside, other=0.0).to(tl.float32)
    if softcap is not None:
        bounded, slope = tanh(s / softcap)
        s = softcap * bounded
    p = tl.exp(s - lse_base[:, None] - log_sum[:, None])
    ds = tl.where(v.to(tl.int64)[None, :] == t[:, None], p - 1.0, p) * pull[:, None]
    if lifts is not None:
        ds += p * tl.load(lifts + n, counts, other=0.0)[:, None]
    if shares is not None:
        each = tl.load(shares + n, counts, other=0.0)[:, None]
        if weight is not None:
            each = each * tl.load(weight + v, v < V, other=0.0).to(tl.float32)[None, :]
        ds -= each
    if softcap is not None:
        ds *= slope
    ds = tl.where(inside, ds, 0.0).to(dx.dtype.element_ty)
    tl.store(dx + n[:, None] * V + v[None, :], ds, (n < N)[:, None] & (v < V)[None, :])


def statistics(x, target, weight, *, ignore_index: int, softcap, smoothed: bool):
    """Return m, Σ exp(s − m) and, if smoothed, Σ w_c·(m − s_c) of logits [N, V]."""
    logits = rows(x)
    N, V = logits.shape
    peaks, totals, gaps = torch.empty(3, N, dtype=torch.float32, device=x.device).unbind()
    if x.numel():
        meta = block(_statistics, (logits, target, weight, softcap), V, SMOOTHED=smoothed)
        launch(_statistics, (triton.cdiv(N, meta["BLOCK_N"]),),
            logits, target.contiguous(), contiguous(weight), peaks, totals, gaps, logits.stride(0), N, V,
            ignore_index, softcap, **meta,
        )  # fmt: skip
    return peaks, totals, gaps if smoothed else None


def gradient(x, *others, softcap):
    """Return the gradient of logits [N, V]."""
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    _write_gradient(dx, x, *others, softcap=softcap)
    return dx


def replace(x, *others, softcap):
    """Write the gradient over contiguous logits [N, V]."""
    _write_gradient(x, x, *others, softcap=softcap)


def _write_gradient(dx, x, index, weight, base, log_sum, pull, lift, each, *, softcap):
    logits = rows(x)
    N, V = logits.shape
    if x.numel():
        meta = block(_gradient, (logits, index, weight, lift, each, softcap), V)
        launch(_gradient, (triton.cdiv(N, meta["BLOCK_N"]), triton.cdiv(V, meta["BLOCK_V"])),
            logits, index, contiguous(weight), base, log_sum, pull, lift, each, dx, logits.stride(0), N, V, softcap,
            **meta,
        )  # fmt: skip
