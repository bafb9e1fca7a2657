"""Divergences of N rows of V teacher's logits z from a student's x, and their gradient, which takes the place of x.

With s = x / T and r = z / T, each less its maximum, and S = Σ exp(s), R = Σ exp(r):

    p = exp(s) / S      q = exp(r) / R      mix = β·q + (1 − β)·p      log p − log q = s − r + log(R / S)

    forward_kl  Σ q·(log q − log p)                                    a = −q
    reverse_kl  Σ p·(log p − log q)                                    a = p·(log p − log q)
    js          β·Σ q·log(q / mix) + (1 − β)·Σ p·log(p / mix)          a = (1 − β)·p·log(p / mix)
    tv          ½·Σ |p − q|                                            a = ½·p·sign(p − q)

    dx = scale / T·(a − p·Σ a)

where nothing is infinitely improbable: 0·∞ is 0. S and R are kept, not their logarithms: at 262,144 classes these are
rounded by 5e-7, and so would be every p of a row, to the same side.

Memory-bound: logits are read once for the statistics, with running maxima and sums (Milakov and Gimelshein, 2018), and
once for the gradient, where blocks of a row are independent programs. A KL divergence is summed up on the way, and
moved with the maxima; the others are no sums under one exponential, and read the logits once more. A block has 4,096
elements of each, 8 warps: two 16-byte accesses of bf16 to either, 16 KB in flight for each program, about what
3.35 TB/s at 0.6 µs latency asks of a multiprocessor, which has registers for two or more. Rows shorter than a block
share a program.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .cross_entropy import block
from .launch import launch, rows


@triton.jit
def _scores(x, n, v, inside, x_stride, inverse_temperature):
    block = tl.load(x + n[:, None] * x_stride + v[None, :], inside, other=float("-inf"))
    return block.to(tl.float32) * inverse_temperature


@triton.jit
def _raised(s, m, total):
    """The maximum with s, what to subtract for it, and the sum of exponentials, with the terms and factor it takes."""
    peak = tl.maximum(m, tl.max(s, 1))
    # While every score is −∞ so is the maximum, and −∞ − (−∞) would be NaN.
    base = tl.where(peak == float("-inf"), 0.0, peak)
    shrink = tl.exp(m - base)
    e = tl.exp(s - base[:, None])
    return peak, base, total * shrink + tl.sum(e, 1), e, shrink


@triton.jit
def _information(p, other):
    """p·log(p / other), where what is not a normal number is 0: a GPU may take its logarithm for that of 0."""
    least = 1.1754943508222875e-38
    return tl.where(p < least, 0.0, p * tl.log(p / tl.where(other < least, least, other)))


@triton.jit
def _pulls(s, r, p, q, log_ratio, beta, DIVERGENCE: tl.constexpr):
    """a of each class."""
    if DIVERGENCE == "forward_kl":
        return -q
    elif DIVERGENCE == "reverse_kl":
        return tl.where(p == 0.0, 0.0, p * (s - r + log_ratio))
    elif DIVERGENCE == "js":
        return (1.0 - beta) * _information(p, beta * q + (1.0 - beta) * p)
    else:
        tl.static_assert(DIVERGENCE == "tv")
        return 0.5 * p * (tl.where(p > q, 1.0, 0.0) - tl.where(p < q, 1.0, 0.0))


@triton.jit
def _forward(
    a, b, losses, pulls, a_bases, a_totals, b_bases, b_totals,
    a_stride, b_stride, N, V, inverse_temperature, beta,
    DIVERGENCE: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    KL: tl.constexpr = (DIVERGENCE == "forward_kl") | (DIVERGENCE == "reverse_kl")
    a_peak = tl.full([BLOCK_N], float("-inf"), tl.float32)
    b_peak = tl.full([BLOCK_N], float("-inf"), tl.float32)
    a_base = tl.zeros([BLOCK_N], tl.float32)
    b_base = tl.zeros([BLOCK_N], tl.float32)
    a_total = tl.zeros([BLOCK_N], tl.float32)
    b_total = tl.zeros([BLOCK_N], tl.float32)
    log_ratio = tl.zeros([BLOCK_N], tl.float32)
    gap = tl.zeros([BLOCK_N], tl.float32)  # Σ exp(s)·(s − r + log_ratio), s and r being of a and b here
    for start in range(0, V, BLOCK_V):
        v = start + tl.arange(0, BLOCK_V)
        inside = (n < N)[:, None] & (v < V)[None, :]
        s = _scores(a, n, v, inside, a_stride, inverse_temperature)
        r = _scores(b, n, v, inside, b_stride, inverse_temperature)
        before, a_before, b_before, ratio_before = a_total, a_base, b_base, log_ratio
        a_peak, a_base, a_total, e, shrink = _raised(s, a_peak, a_total)
        b_peak, b_base, b_total, _, _ = _raised(r, b_peak, b_total)
        if KL:
            # Terms as small as those of the divergence itself: what has one sign until the end cancels there.
            log_ratio = tl.where((a_total == 0.0) | (b_total == 0.0), 0.0, tl.log(b_total / a_total))
            moved = (a_before - a_base) + (b_base - b_before) + (log_ratio - ratio_before)
            apart = (s - a_base[:, None]) - (r - b_base[:, None]) + log_ratio[:, None]
            gap = tl.where(shrink == 0.0, 0.0, (gap + before * moved) * shrink)
            gap += tl.sum(tl.where(e == 0.0, 0.0, e * apart), 1)
    if KL:
        # A row of nothing but −∞ is no distribution.
        loss = tl.where(b_total == 0.0, float("nan"), gap / a_total)
        pull = loss
        if DIVERGENCE == "forward_kl":
            pull = tl.full([BLOCK_N], -1.0, tl.float32)
    else:
        loss = tl.zeros([BLOCK_N], tl.float32)
        pull = tl.zeros([BLOCK_N], tl.float32)
        for start in range(0, V, BLOCK_V):
            v = start + tl.arange(0, BLOCK_V)
            inside = (n < N)[:, None] & (v < V)[None, :]
            # What is not inside has a probability of 0 here, and adds nothing.
            r = _scores(a, n, v, inside, a_stride, inverse_temperature) - a_base[:, None]
            s = _scores(b, n, v, inside, b_stride, inverse_temperature) - b_base[:, None]
            p = tl.exp(s) * (1.0 / b_total)[:, None]
            q = tl.exp(r) * (1.0 / a_total)[:, None]
            block = _pulls(s, r, p, q, 0.0, beta, DIVERGENCE)
            pull += tl.sum(block, 1)
            if DIVERGENCE == "js":
                block += beta * _information(q, beta * q + (1.0 - beta) * p)
            else:
                block = 0.5 * tl.abs(p - q)
            loss += tl.sum(block, 1)
    tl.store(losses + n, loss, n < N)
    tl.store(pulls + n, pull, n < N)
    tl.store(a_bases + n, a_base, n < N)
    tl.store(a_totals + n, a_total, n < N)
    tl.store(b_bases + n, b_base, n < N)
    tl.store(b_totals + n, b_total, n < N)


@triton.jit
def _backward(
    scale, x, z, pulls, x_bases, x_totals, z_bases, z_totals,
    scale_stride, x_stride, z_stride, N, V, inverse_temperature, beta,
    DIVERGENCE: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    v = tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)
    inside = (n < N)[:, None] & (v < V)[None, :]
    g = tl.load(scale + n * scale_stride, n < N, other=0.0).to(tl.float32) * inverse_temperature
    pull = tl.load(pulls + n, n < N, other=0.0)
    S = tl.load(x_totals + n, n < N, other=1.0)
    R = tl.load(z_totals + n, n < N, other=1.0)
    s = _scores(x, n, v, inside, x_stride, inverse_temperature) - tl.load(x_bases + n, n < N, other=0.0)[:, None]
    r = _scores(z, n, v, inside, z_stride, inverse_temperature) - tl.load(z_bases + n, n < N, other=0.0)[:, None]
    p = tl.exp(s) * (1.0 / S)[:, None]
    q = tl.exp(r) * (1.0 / R)[:, None]
    dx = g[:, None] * (_pulls(s, r, p, q, tl.log(R / S)[:, None], beta, DIVERGENCE) - p * pull[:, None])
    tl.store(x + n[:, None] * x_stride + v[None, :], dx.to(x.dtype.element_ty), inside)


def losses_and_gradient(x, z, scale, *, divergence: str, beta: float, temperature: float):
    """Return the float32 losses of student's and teacher's logits [N, V].

    The gradient of Σ scale·loss, if there is a scale, replaces the student's.
    """
    N, V = x.shape
    z = rows(z)
    losses, pulls, *statistics = torch.empty(6, N, dtype=torch.float32, device=x.device).unbind()
    student, teacher = (x, statistics[:2]), (z, statistics[2:])
    # The one whose probabilities weigh the terms of a KL divergence comes first.
    (a, of_a), (b, of_b) = (student, teacher) if divergence == "reverse_kl" else (teacher, student)
    meta = block(_forward, (a, b), V, DIVERGENCE=divergence)
    launch(_forward, (triton.cdiv(N, meta["BLOCK_N"]),),
        a, b, losses, pulls, *of_a, *of_b, a.stride(0), b.stride(0), N, V, 1.0 / temperature, beta, **meta,
    )  # fmt: skip
    if scale is not None:
        meta = block(_backward, (x, z), V, DIVERGENCE=divergence)
        launch(_backward, (triton.cdiv(N, meta["BLOCK_N"]), triton.cdiv(V, meta["BLOCK_V"])),
            scale, x, z, pulls, *statistics, scale.stride(0), x.stride(0), z.stride(0), N, V,
            1.0 / temperature, beta, **meta,
        )  # fmt: skip
    return losses
