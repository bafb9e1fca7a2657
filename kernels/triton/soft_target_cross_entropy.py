"""Cross-entropy of N rows of V logits with N rows of V class probabilities.

With s = softcap·tanh(x / softcap) or x, π = w·((1 − ε)·t + ε / V), and the upstream gradient g of a row's loss:

    forward   m = max s      l = log Σ exp(s − m)      Π = Σ π      loss = Σ π·(m − s) + l·Π
    backward  p = exp(s − m − l)      ds = g·(p·Π − π)              dx = ds·(1 − tanh²(x / softcap))
              dt = g·(1 − ε)·w·(m − s + l)

Memory-bound: x and t are read once forward, with a running maximum that takes the sums along with it (Milakov and
Gimelshein, 2018), and once backward, where blocks of a row are independent programs. Rows need not sum to 1. The tiles
and the reasons are those of cross_entropy.py.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .activations import tanh
from .cross_entropy import block
from .launch import contiguous, launch, rows


@triton.jit
def _class_weights(weight, v, V):
    return tl.load(weight + v, v < V, other=0.0).to(tl.float32)[None, :]


@triton.jit
def _pull(t, inside, V, smoothing):
    """π for weights of 1, 0 outside."""
    pull = t.to(tl.float32)
    if smoothing is not None:
        pull = tl.where(inside, pull * (1.0 - smoothing) + smoothing / V, 0.0)
    return pull


@triton.jit
def _forward(
    x, target, weight, losses, peaks, log_sums, masses, x_stride, target_stride, N, V, smoothing, softcap,
    BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    m = tl.full([BLOCK_N], float("-inf"), tl.float32)
    base = tl.zeros([BLOCK_N], tl.float32)
    total = tl.zeros([BLOCK_N], tl.float32)
    gap = tl.zeros([BLOCK_N], tl.float32)  # Σ π·(base − s)
    mass = tl.zeros([BLOCK_N], tl.float32)
    for start in range(0, V, BLOCK_V):
        v = start + tl.arange(0, BLOCK_V)
        inside = (n < N)[:, None] & (v < V)[None, :]
        s = tl.load(x + n[:, None] * x_stride + v[None, :], inside, other=float("-inf")).to(tl.float32)
        if softcap is not None:
            bounded, _ = tanh(s / softcap)
            s = tl.where(inside, softcap * bounded, float("-inf"))
        t = tl.load(target + n[:, None] * target_stride + v[None, :], inside, other=0.0)
        pull = _pull(t, inside, V, smoothing)
        if weight is not None:
            pull *= _class_weights(weight, v, V)
        peak = tl.maximum(m, tl.max(s, 1))
        before = base
        # While every logit is −∞ so is the maximum, and −∞ − (−∞) would be NaN.
        base = tl.where(peak == float("-inf"), 0.0, peak)
        total = total * tl.exp(m - base) + tl.sum(tl.exp(s - base[:, None]), 1)
        m = peak
        gap += (base - before) * mass + tl.sum(tl.where(inside, pull * (base[:, None] - s), 0.0), 1)
        mass += tl.sum(pull, 1)
    mass += 0.0  # triton 3.6 takes no loop's sum that is used twice
    log_sum = tl.log(total)
    tl.store(losses + n, gap + log_sum * mass, n < N)
    tl.store(peaks + n, base, n < N)
    tl.store(log_sums + n, log_sum, n < N)
    tl.store(masses + n, mass, n < N)


@triton.jit
def _backward(
    grad, x, target, weight, peaks, log_sums, masses, dx, dtarget, divisor,
    grad_stride, x_stride, target_stride, N, V, smoothing, softcap,
    BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    v = tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)
    inside = (n < N)[:, None] & (v < V)[None, :]
    g = tl.load(grad + n * grad_stride, n < N, other=0.0).to(tl.float32) / divisor
    base = tl.load(peaks + n, n < N, other=0.0)
    log_sum = tl.load(log_sums + n, n < N, other=0.0)
    s = tl.load(x + n[:, None] * x_stride + v[None, :], inside, other=0.0).to(tl.float32)
    if softcap is not None:
        bounded, slope = tanh(s / softcap)
        s = softcap * bounded
    if weight is not None:
        w = _class_weights(weight, v, V)
    at = n[:, None] * V + v[None, :]
    if dx is not None:
        mass = tl.load(masses + n, n < N, other=0.0)
        t = tl.load(target + n[:, None] * target_stride + v[None, :], inside, other=0.0)
        pull = _pull(t, inside, V, smoothing)
        if weight is not None:
            pull *= w
        ds = (tl.exp(s - base[:, None] - log_sum[:, None]) * mass[:, None] - pull) * g[:, None]
        if softcap is not None:
            ds *= slope
        tl.store(dx + at, ds.to(dx.dtype.element_ty), inside)
    if dtarget is not None:
        dt = (base[:, None] - s + log_sum[:, None]) * g[:, None]
        if smoothing is not None:
            dt *= 1.0 - smoothing
        if weight is not None:
            dt *= w
        tl.store(dtarget + at, dt.to(dtarget.dtype.element_ty), inside)


def forward(x, target, weight, *, reduction: str, label_smoothing: float, softcap):
    """Return the loss of logits and probabilities [N, V], and what the backward pass needs."""
    logits, probabilities = rows(x), rows(target)
    N, V = logits.shape
    losses, *statistics = torch.empty(4, N, dtype=torch.float32, device=x.device).unbind()
    if x.numel():
        meta = block(_forward, (logits, probabilities, weight, label_smoothing or None, softcap), V)
        launch(_forward, (triton.cdiv(N, meta["BLOCK_N"]),),
            logits, probabilities, contiguous(weight), losses, *statistics,
            logits.stride(0), probabilities.stride(0), N, V, label_smoothing or None, softcap, **meta,
        )  # fmt: skip
    loss = losses if reduction == "none" else losses.sum()
    if reduction == "mean":
        loss = loss / N
    return loss.to(torch.promote_types(x.dtype, target.dtype)), (x, target, weight, *statistics)


def backward(grads, saved, needs, *, reduction: str, label_smoothing: float, softcap):
    """Return the gradients of the logits and of the probabilities."""
    x, target, weight, *statistics = saved
    logits, probabilities = rows(x), rows(target)
    N, V = logits.shape
    dx, dtarget = (
        torch.empty(t.shape, dtype=t.dtype, device=t.device) if need else None
        for t, need in zip((x, target), needs[:2], strict=True)
    )
    grad = grads[0]
    if x.numel():
        operands = (logits, probabilities, weight, label_smoothing or None, softcap, dx, dtarget)
        meta = block(_backward, operands, V)
        launch(_backward, (triton.cdiv(N, meta["BLOCK_N"]), triton.cdiv(V, meta["BLOCK_V"])),
            grad, logits, probabilities, contiguous(weight), *statistics, dx, dtarget,
            float(N) if reduction == "mean" else 1.0,
            grad.stride(0) if grad.dim() else 0, logits.stride(0), probabilities.stride(0), N, V,
            label_smoothing or None, softcap, **meta,
        )  # fmt: skip
    return dx, dtarget, None
