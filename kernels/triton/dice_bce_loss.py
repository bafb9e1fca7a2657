"""Dice and binary cross-entropy of R rows of D logits, each row a mask. With p = σ(x), a = smooth, and weights λ and β:

    forward   I = Σ p·t      P = Σ p      T = Σ t      B = Σ t·softplus(−x) + (1 − t)·softplus(x)
              loss = λ·(1 − (2I + a) / (P + T + a)) + (β / D)·B
    backward  c = −2λ / (P + T + a)       e = λ·(2I + a) / (P + T + a)²
              dx = g·((c·t + e)·p·(1 − p) + (β / D)·(p − t))

Memory-bound: x and t are read once in each pass. Masks are long and few, so that several programs share a row: each
adds up the four sums over its tiles, and a second kernel adds these up in a fixed order and finds loss, c and e of each
row.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .binary_losses import binary_loss, eighths
from .launch import elementwise_tiles, launch, multiprocessors


@triton.jit
def _sigmoid(x):
    """σ(x) and σ(x)·σ(−x), from exp(−|x|), which cannot overflow."""
    z = tl.exp(-tl.abs(x))
    inverse = 1.0 / (1.0 + z)
    return tl.where(x >= 0.0, 1.0, z) * inverse, z * inverse * inverse


@triton.jit
def _forward(
    x, target, partial, stride, R, D, WITH_BCE: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr
):  # fmt: skip
    r = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    both = eighths(tl.zeros([BLOCK_N, BLOCK_D], tl.float32))
    predicted, true, entropy = both, both, both
    for tile in range(tl.program_id(1), tl.cdiv(D, BLOCK_D), tl.num_programs(1)):
        d = tile * BLOCK_D + tl.arange(0, BLOCK_D)
        mask = (r < R)[:, None] & (d < D)[None, :]
        at = r[:, None] * D + d[None, :]
        h = tl.load(x + at, mask, other=float("-inf")).to(tl.float32)
        t = tl.load(target + at, mask, other=0).to(tl.float32)
        p, _ = _sigmoid(h)  # 0 outside
        both += eighths(p * t)
        predicted += eighths(p)
        true += eighths(t)
        if WITH_BCE:
            loss, _ = binary_loss(h, t, None, None, None, None, None, 0)
            entropy += eighths(tl.where(mask, loss, 0.0))
    out = partial + tl.program_id(1).to(tl.int64) * R + r
    tl.store(out, tl.sum(both, 1), r < R)
    tl.store(out + stride, tl.sum(predicted, 1), r < R)
    tl.store(out + 2 * stride, tl.sum(true, 1), r < R)
    if WITH_BCE:
        tl.store(out + 3 * stride, tl.sum(entropy, 1), r < R)


@triton.jit
def _sum(partial, r, R, P, BLOCK_P: tl.constexpr, BLOCK_R: tl.constexpr):
    total = tl.zeros([BLOCK_P, BLOCK_R], tl.float32)
    for start in range(0, P, BLOCK_P):
        p = start + tl.arange(0, BLOCK_P)
        at = p.to(tl.int64)[:, None] * R + r[None, :]
        total += tl.load(partial + at, (p < P)[:, None] & (r < R)[None, :], other=0.0)
    return tl.sum(total, 0)


@triton.jit
def _finish(
    partial, losses, slopes, stride, R, P, D, dice_weight, bce_weight, smooth,
    BLOCK_P: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    r = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    top = 2.0 * _sum(partial, r, R, P, BLOCK_P, BLOCK_R) + smooth
    bottom = _sum(partial + stride, r, R, P, BLOCK_P, BLOCK_R)
    bottom += _sum(partial + 2 * stride, r, R, P, BLOCK_P, BLOCK_R) + smooth
    loss = dice_weight * ((bottom - top) / bottom)
    if bce_weight is not None:
        loss += bce_weight * (_sum(partial + 3 * stride, r, R, P, BLOCK_P, BLOCK_R) / D)
    tl.store(losses + r, loss, r < R)
    tl.store(slopes + r, -2.0 * dice_weight / bottom, r < R)
    tl.store(slopes + R + r, dice_weight * (top / bottom) / bottom, r < R)


@triton.jit
def _backward(
    grad, x, target, slopes, dx, grad_stride, divisor, R, D, bce_weight, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr
):  # fmt: skip
    across = tl.cdiv(D, BLOCK_D)
    r = (tl.program_id(0) // across).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    d = tl.program_id(0) % across * BLOCK_D + tl.arange(0, BLOCK_D)
    mask = (r < R)[:, None] & (d < D)[None, :]
    at = r[:, None] * D + d[None, :]
    g = tl.load(grad + r * grad_stride, r < R, other=0.0).to(tl.float32) / divisor
    c = tl.load(slopes + r, r < R, other=0.0)
    e = tl.load(slopes + R + r, r < R, other=0.0)
    h = tl.load(x + at, mask, other=0.0).to(tl.float32)
    t = tl.load(target + at, mask, other=0).to(tl.float32)
    _, slope = _sigmoid(h)
    out = (c[:, None] * t + e[:, None]) * slope
    if bce_weight is not None:
        _, slope = binary_loss(h, t, None, None, None, None, None, 0)
        out += bce_weight / D * slope
    tl.store(dx + at, (out * g[:, None]).to(dx.dtype.element_ty), mask)


def forward(x, target, *, reduction: str, dice_weight: float, bce_weight: float, smooth: float):
    """Return the loss of rows [R, D], and what the backward pass needs."""
    R, D = x.shape
    logits, truth = _contiguous(x, target)
    losses = torch.empty(R, dtype=torch.float32, device=x.device)
    slopes = torch.empty(2, R, dtype=torch.float32, device=x.device)
    if R:
        operands = (logits, truth)
        _, meta = elementwise_tiles(_forward, operands, R, max(1, D), WITH_BCE=bce_weight != 0.0)
        blocks = triton.cdiv(R, meta["BLOCK_N"])
        # Eight programs of 4 warps fill a multiprocessor; a program that reads one tile is mostly start and end.
        most = triton.cdiv(8 * multiprocessors(x.device), blocks)
        P = max(1, min(triton.cdiv(D, 4 * meta["BLOCK_D"]), most))
        partial = torch.empty(4 if bce_weight else 3, P, R, dtype=torch.float32, device=x.device)
        launch(_forward, (blocks, P), logits, truth, partial, P * R, R, D, **meta)
        launch(_finish, (triton.cdiv(R, 32),),
            partial, losses, slopes, P * R, R, P, D, dice_weight, bce_weight or None, smooth,
            BLOCK_P=32, BLOCK_R=32, num_warps=4,
        )  # fmt: skip
    loss = losses if reduction == "none" else losses.sum()
    if reduction == "mean":
        loss = loss / R
    return loss.to(torch.promote_types(x.dtype, target.dtype)), (x, target, slopes)


def backward(grads, saved, needs, *, reduction: str, dice_weight: float, bce_weight: float, smooth: float):
    """Return the gradient of x."""
    x, target, slopes = saved
    R, D = x.shape
    logits, truth = _contiguous(x, target)
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    grad = grads[0]
    if x.numel():
        grid, meta = elementwise_tiles(_backward, (logits, truth, bce_weight or None), R, D)
        launch(_backward, grid,
            grad, logits, truth, slopes, dx, grad.stride(0) if grad.dim() else 0,
            float(R) if reduction == "mean" else 1.0, R, D, bce_weight or None, **meta,
        )  # fmt: skip
    return dx, None


def _contiguous(x, target):
    target = target.contiguous()
    return x.contiguous(), target.view(torch.uint8) if target.dtype == torch.bool else target
