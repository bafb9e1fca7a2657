"""Cross-entropy of N rows of V logits, one row every ``x_stride`` elements.

With s = softcap·tanh(x / softcap) or x, W = Σ w_c and the upstream gradient g of a row's loss:

    forward   m = max s      l = log Σ exp(s − m)      lse = m + l
              loss = (1 − ε)·w_t·(lse − s_t) + (ε / V)·Σ w_c·(lse − s_c) + z·w_t·lse²
    backward  p = exp(s − m − l)
              ds = g·((1 − ε)·w_t·(p − [c = t]) + (ε / V)·(W·p − w_c) + 2z·w_t·lse·p)
              dx = ds·(1 − tanh²(x / softcap))

Memory-bound: the logits are read once forward, with a running maximum and sum (Milakov and Gimelshein, 2018), and once
backward, where blocks of a row are independent programs. m and l are kept apart: at logits of 1e8 their sum has lost l.
Rows shorter than a block share a program, which adds their losses up where those are to be reduced; the logits of
ignored rows are not read.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from .activations import tanh
from .launch import contiguous, launch, rows
from .launch_table import measured

MAX_BLOCK = 4_096


@triton.jit
def row_statistics(
    x, weight, n, counts, x_stride, V, softcap, SMOOTHED: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr
):
    """m = max s, m or 0 where it is −∞, and of what is relative to that the sums; 0 for rows that do not count."""
    m = tl.full([BLOCK_N], float("-inf"), tl.float32)
    base = tl.zeros([BLOCK_N], tl.float32)
    total = tl.zeros([BLOCK_N], tl.float32)
    gap = tl.zeros([BLOCK_N], tl.float32)  # Σ w_c·(base − s_c)
    W = 0.0
    for start in range(0, V, BLOCK_V):
        v = start + tl.arange(0, BLOCK_V)
        inside = counts[:, None] & (v < V)[None, :]
        s = tl.load(x + n[:, None] * x_stride + v[None, :], inside, other=float("-inf")).to(tl.float32)
        if softcap is not None:
            bounded, _ = tanh(s / softcap)
            s = tl.where(inside, softcap * bounded, float("-inf"))
        peak = tl.maximum(m, tl.max(s, 1))
        before = base
        # While every logit is −∞ so is the maximum, and −∞ − (−∞) would be NaN.
        base = tl.where(peak == float("-inf"), 0.0, peak)
        below = base[:, None] - s
        total = total * tl.exp(m - base) + tl.sum(tl.exp(-below), 1)
        m = peak
        if SMOOTHED:
            w_c = tl.where(v < V, 1.0, 0.0)
            if weight is not None:
                w_c = tl.load(weight + v, v < V, other=0.0).to(tl.float32)
            gap += (base - before) * W + tl.sum(tl.where(inside, w_c[None, :] * below, 0.0), 1)
            W += tl.sum(w_c, 0)
    return m, base, total, gap, W


@triton.jit
def _forward(
    x, target, weight, losses, position_weights, peaks, log_sums,
    x_stride, N, V, ignore_index, smoothing, softcap, z_loss,
    SMOOTHED: tl.constexpr, REDUCED: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    t = tl.load(target + n, n < N, other=0).to(tl.int64)
    counts = (n < N) & (t != ignore_index)
    valid = counts & (t >= 0) & (t < V)
    _, base, total, gap, W = row_statistics(x, weight, n, counts, x_stride, V, softcap, SMOOTHED, BLOCK_N, BLOCK_V)
    log_sum = tl.log(total)
    s_t = tl.load(x + n * x_stride + t, valid, other=float("nan")).to(tl.float32)
    if softcap is not None:
        bounded, _ = tanh(s_t / softcap)
        s_t = softcap * bounded
    w = tl.where(counts, 1.0, 0.0)
    if weight is not None:
        w = tl.load(weight + t, valid, other=0.0).to(tl.float32)
    loss = (1.0 - smoothing) * w * (base - s_t + log_sum)
    if SMOOTHED:
        loss += smoothing / V * (gap + log_sum * W)
    if z_loss is not None:
        loss += z_loss * w * (base + log_sum) * (base + log_sum)
    loss = tl.where(counts, loss, 0.0)
    if REDUCED:
        tl.store(losses + tl.program_id(0), tl.sum(loss, 0))
        tl.store(position_weights + tl.program_id(0), tl.sum(w, 0))
    else:
        tl.store(losses + n, loss, n < N)
    tl.store(peaks + n, base, n < N)
    tl.store(log_sums + n, log_sum, n < N)


@triton.jit
def _backward(
    grad, x, target, weight, peaks, log_sums, weight_sum, normalizer, dx,
    grad_stride, x_stride, N, V, ignore_index, smoothing, softcap, z_loss,
    SMOOTHED: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    v = tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)
    t = tl.load(target + n, n < N, other=0).to(tl.int64)
    counts = (n < N) & (t != ignore_index)
    valid = counts & (t >= 0) & (t < V)
    inside = counts[:, None] & (v < V)[None, :]
    g = tl.load(grad + n * grad_stride, counts, other=0.0).to(tl.float32)
    if normalizer is not None:
        g = g / tl.load(normalizer)
    base = tl.load(peaks + n, counts, other=0.0)
    log_sum = tl.load(log_sums + n, counts, other=0.0)
    w = tl.where(valid, 1.0, float("nan"))
    if weight is not None:
        w = tl.load(weight + t, valid, other=float("nan")).to(tl.float32)
    pull = (1.0 - smoothing) * w
    s = tl.load(x + n[:, None] * x_stride + v[None, :], inside, other=0.0).to(tl.float32)
    if softcap is not None:
        bounded, slope = tanh(s / softcap)
        s = softcap * bounded
    p = tl.exp(s - base[:, None] - log_sum[:, None])
    ds = tl.where(v.to(tl.int64)[None, :] == t[:, None], p - 1.0, p) * pull[:, None]
    if SMOOTHED:
        if weight is not None:
            w_c = tl.load(weight + v, v < V, other=0.0).to(tl.float32)
            ds += smoothing / V * (tl.load(weight_sum) * p - w_c[None, :])
        else:
            ds += smoothing / V * (V * p - 1.0)
    if z_loss is not None:
        ds += 2.0 * z_loss * (w * (base + log_sum))[:, None] * p
    ds *= g[:, None]
    if softcap is not None:
        ds *= slope
    ds = tl.where(inside, ds, 0.0).to(dx.dtype.element_ty)
    tl.store(dx + n[:, None] * V + v[None, :], ds, (n < N)[:, None] & (v < V)[None, :])


def forward(x, target, weight, *, reduction: str, **options):
    """Return the loss of logits [N, V], and what the backward pass needs."""
    losses, position_weights, peaks, log_sums = _launch_forward(x, target, weight, reduction != "none", **options)
    normalizer = None
    if reduction == "none":
        loss = losses
    elif reduction == "sum":
        loss = losses.sum()
    else:
        normalizer = position_weights.sum()
        loss = losses.sum() / normalizer
    return loss.to(x.dtype), (x, target, weight, peaks, log_sums, normalizer)


def backward(grads, saved, needs, *, reduction: str, **options):
    """Return the gradient of the logits."""
    x, target, weight, peaks, log_sums, normalizer = saved
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    _launch_backward(grads[0], x, target, weight, peaks, log_sums, normalizer, dx, **options)
    return dx, None, None


def losses_and_gradient(x, target, weight, scale, **options):
    """Return the float32 losses of logits [N, V]; the gradient of Σ scale·loss, if there is a scale, replaces x."""
    losses, _, peaks, log_sums = _launch_forward(x, target, weight, False, **options)
    if scale is not None:
        _launch_backward(scale, x, target, weight, peaks, log_sums, None, x, **options)
    return losses


def _launch_forward(
    x, target, weight, reduced: bool, *, ignore_index: int, label_smoothing: float, softcap, z_loss: float
):
    """Losses and weights of the rows or, if they are reduced, of the programs; peaks and log-sums of the rows."""
    logits = rows(x)
    N, V = logits.shape
    operands = (logits, target, weight, softcap, z_loss or None)
    meta = block(_forward, operands, max(1, V), SMOOTHED=label_smoothing != 0.0, REDUCED=reduced)
    programs = triton.cdiv(N, meta["BLOCK_N"])
    losses, position_weights = torch.empty(2, programs if reduced else N, dtype=torch.float32, device=x.device).unbind()
    peaks, log_sums = torch.empty(2, N, dtype=torch.float32, device=x.device).unbind()
    if x.numel():
        launch(_forward, (programs,),
            logits, target.contiguous(), contiguous(weight), losses, position_weights, peaks, log_sums,
            logits.stride(0), N, V, ignore_index, label_smoothing, softcap, z_loss or None, **meta,
        )  # fmt: skip
    return losses, position_weights, peaks, log_sums


def _launch_backward(
    grad, x, target, weight, peaks, log_sums, normalizer, dx,
    *, ignore_index: int, label_smoothing: float, softcap, z_loss: float,
):  # fmt: skip
    logits = rows(x)
    N, V = logits.shape
    weight_sum = weight.sum(dtype=torch.float32) if weight is not None and label_smoothing else None
    if x.numel():
        operands = (logits, target, weight, softcap, z_loss or None)
        meta = block(_backward, operands, V, SMOOTHED=label_smoothing != 0.0)
        launch(_backward, (triton.cdiv(N, meta["BLOCK_N"]), triton.cdiv(V, meta["BLOCK_V"])),
            grad, logits, target.contiguous(), contiguous(weight), peaks, log_sums, weight_sum, normalizer, dx,
            grad.stride(0) if grad.dim() else 0, logits.stride(0), N, V,
            ignore_index, label_smoothing, softcap, z_loss or None, **meta,
        )  # fmt: skip


def block(kernel, operands, V: int, **which) -> dict[str, Any]:
    """Rows and logits of a block of about MAX_BLOCK elements, the warps that work on it, and the other constants."""
    BLOCK_V = min(triton.next_power_of_2(V), MAX_BLOCK)
    free = {"BLOCK_N": MAX_BLOCK // BLOCK_V, "BLOCK_V": BLOCK_V, "num_warps": 8}
    return measured(kernel, operands, free, **which)
