"""LayerNorm over the channels of contiguous images: [N, C, P] with P = H·W pixels, each normalized on its own.

    forward   μ = mean_c(x)        r = 1/√(mean_c((x − μ)²) + ε)      n = (x − μ)·r      y = n·w + b
    backward  g = dy·w             dx = r·(g − n·mean_c(g·n) − mean_c(g))
              dw = Σ_pixels dy·n   db = Σ_pixels dy

Memory-bound. Channels lie P elements apart, so a program takes all channels of a block of adjacent pixels, 32 at least
(64 bytes of bf16, two memory sectors) or 16 where there are more than 512 channels: about 4,096 elements, 16 a thread,
two 16-byte accesses of bf16; the largest, of 16,384, are 32 a thread, for 1,024 threads have but 64 registers each. The
backward pass holds two operands, and takes half as many pixels: of more than 512 channels half a sector of bf16, whose
other half the next program reads at about the same time. The channels are added up across warps, which costs a trip
through shared memory a tile. Programs are few and long-lived (four a multiprocessor forward, two backward) so that the
weight is read, and a partial weight gradient written, once a program; a second kernel adds the partial sums up in a
fixed order.

More than MAX_CHANNELS of even 16 pixels do not fit into the registers of a program. They are read twice: once for the
statistics, block by block (Chan's update), and once to write the result; the backward pass likewise.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .launch import column_sum, contiguous, launch, multiprocessors
from .launch_table import measured

MAX_CHANNELS = 1024
LONG_BLOCK_C, LONG_BLOCK_P = 64, 64


@triton.jit
def _pixels(tile, C, P, BLOCK_P: tl.constexpr):
    """The offset of a tile's image, and the tile's pixels."""
    blocks = tl.cdiv(P, BLOCK_P)
    n = (tile // blocks).to(tl.int64)
    return n, (tile % blocks) * BLOCK_P + tl.arange(0, BLOCK_P)


@triton.jit
def _forward(
    x, weight, bias, y, mean, rstd, N, C, P, eps, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr
):  # fmt: skip
    c = tl.arange(0, BLOCK_C)
    if weight is not None:
        w = tl.load(weight + c, c < C, other=0.0).to(tl.float32)
    if bias is not None:
        b = tl.load(bias + c, c < C, other=0.0).to(tl.float32)
    for tile in range(tl.program_id(0), N * tl.cdiv(P, BLOCK_P), tl.num_programs(0)):
        n, p = _pixels(tile, C, P, BLOCK_P)
        mask = (p < P)[:, None] & (c < C)[None, :]
        at = n * C * P + p[:, None] + c.to(tl.int64)[None, :] * P
        block = tl.load(x + at, mask, other=0.0).to(tl.float32)
        mu = tl.sum(block, 1) / C
        block = tl.where(mask, block - mu[:, None], 0.0)
        r = 1.0 / tl.sqrt(tl.sum(block * block, 1) / C + eps)
        tl.store(mean + n * P + p, mu, p < P)
        tl.store(rstd + n * P + p, r, p < P)
        block *= r[:, None]
        if weight is not None:
            block *= w[None, :]
        if bias is not None:
            block += b[None, :]
        tl.store(y + at, block.to(y.dtype.element_ty), mask)


@triton.jit
def _forward_long(
    x, weight, bias, y, mean, rstd, C, P, eps, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr
):  # fmt: skip
    n, p = _pixels(tl.program_id(0), C, P, BLOCK_P)
    mu = tl.zeros([BLOCK_P], tl.float32)
    squares = tl.zeros([BLOCK_P], tl.float32)
    for start in range(0, C, BLOCK_C):
        c = start + tl.arange(0, BLOCK_C)
        mask = (p < P)[:, None] & (c < C)[None, :]
        at = n * C * P + p[:, None] + c.to(tl.int64)[None, :] * P
        block = tl.load(x + at, mask, other=0.0).to(tl.float32)
        # Chan, Golub, LeVeque (1979): merge the mean and the sum of squared deviations of two sets.
        count = tl.minimum(BLOCK_C, C - start).to(tl.float32)
        block_mu = tl.sum(block, 1) / count
        block = tl.where(mask, block - block_mu[:, None], 0.0)
        delta = block_mu - mu
        squares += tl.sum(block * block, 1) + delta * delta * (count * start / (start + count))
        mu += delta * (count / (start + count))
    r = 1.0 / tl.sqrt(squares / C + eps)
    tl.store(mean + n * P + p, mu, p < P)
    tl.store(rstd + n * P + p, r, p < P)
    for start in range(0, C, BLOCK_C):
        c = start + tl.arange(0, BLOCK_C)
        mask = (p < P)[:, None] & (c < C)[None, :]
        at = n * C * P + p[:, None] + c.to(tl.int64)[None, :] * P
        block = tl.load(x + at, mask, other=0.0).to(tl.float32)
        block = (block - mu[:, None]) * r[:, None]
        if weight is not None:
            block *= tl.load(weight + c, c < C, other=0.0).to(tl.float32)[None, :]
        if bias is not None:
            block += tl.load(bias + c, c < C, other=0.0).to(tl.float32)[None, :]
        tl.store(y + at, block.to(y.dtype.element_ty), mask)


@triton.jit
def _cotangent_and_normed(dy, x, mean, rstd, n, c, p, C, P):
    """dy, (x − μ)·r and r of a tile; outside it n is not zero, but every use multiplies it by dy, which is."""
    mask = (p < P)[:, None] & (c < C)[None, :]
    at = n * C * P + p[:, None] + c.to(tl.int64)[None, :] * P
    g = tl.load(dy + at, mask, other=0.0).to(tl.float32)
    normed = tl.load(x + at, mask, other=0.0).to(tl.float32)
    mu = tl.load(mean + n * P + p, p < P, other=0.0)
    r = tl.load(rstd + n * P + p, p < P, other=0.0)
    return g, (normed - mu[:, None]) * r[:, None], r, at, mask


@triton.jit
def _backward(
    dy, x, weight, mean, rstd, dx, dw_partial, db_partial, N, C, P,
    BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    c = tl.arange(0, BLOCK_C)
    if weight is not None:
        w = tl.load(weight + c, c < C, other=0.0).to(tl.float32)
    dw = tl.zeros([BLOCK_C], tl.float32)
    db = tl.zeros([BLOCK_C], tl.float32)
    for tile in range(tl.program_id(0), N * tl.cdiv(P, BLOCK_P), tl.num_programs(0)):
        n, p = _pixels(tile, C, P, BLOCK_P)
        g, normed, r, at, mask = _cotangent_and_normed(dy, x, mean, rstd, n, c, p, C, P)
        if dw_partial is not None:
            dw += tl.sum(g * normed, 0)
        if db_partial is not None:
            db += tl.sum(g, 0)
        if dx is not None:
            if weight is not None:
                g *= w[None, :]
            out = g - normed * (tl.sum(g * normed, 1) / C)[:, None] - (tl.sum(g, 1) / C)[:, None]
            tl.store(dx + at, (out * r[:, None]).to(dx.dtype.element_ty), mask)
    if dw_partial is not None:
        tl.store(dw_partial + tl.program_id(0) * C + c, dw, c < C)
    if db_partial is not None:
        tl.store(db_partial + tl.program_id(0) * C + c, db, c < C)


@triton.jit
def _pixel_means_long(
    dy, x, weight, mean, rstd, mean_gn, mean_g, C, P, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr
):  # fmt: skip
    n, p = _pixels(tl.program_id(0), C, P, BLOCK_P)
    sum_gn = tl.zeros([BLOCK_P], tl.float32)
    sum_g = tl.zeros([BLOCK_P], tl.float32)
    for start in range(0, C, BLOCK_C):
        c = start + tl.arange(0, BLOCK_C)
        g, normed, _r, _at, _mask = _cotangent_and_normed(dy, x, mean, rstd, n, c, p, C, P)
        if weight is not None:
            g *= tl.load(weight + c, c < C, other=0.0).to(tl.float32)[None, :]
        sum_gn += tl.sum(g * normed, 1)
        sum_g += tl.sum(g, 1)
    tl.store(mean_gn + n * P + p, sum_gn / C, p < P)
    tl.store(mean_g + n * P + p, sum_g / C, p < P)


@triton.jit
def _backward_long(
    dy, x, weight, mean, rstd, mean_gn, mean_g, dx, dw_partial, db_partial, N, C, P,
    BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    if weight is not None:
        w = tl.load(weight + c, c < C, other=0.0).to(tl.float32)
    dw = tl.zeros([BLOCK_C], tl.float32)
    db = tl.zeros([BLOCK_C], tl.float32)
    for tile in range(tl.program_id(1), N * tl.cdiv(P, BLOCK_P), tl.num_programs(1)):
        n, p = _pixels(tile, C, P, BLOCK_P)
        g, normed, r, at, mask = _cotangent_and_normed(dy, x, mean, rstd, n, c, p, C, P)
        if dw_partial is not None:
            dw += tl.sum(g * normed, 0)
        if db_partial is not None:
            db += tl.sum(g, 0)
        if dx is not None:
            if weight is not None:
                g *= w[None, :]
            m_gn = tl.load(mean_gn + n * P + p, p < P, other=0.0)
            m_g = tl.load(mean_g + n * P + p, p < P, other=0.0)
            out = (g - normed * m_gn[:, None] - m_g[:, None]) * r[:, None]
            tl.store(dx + at, out.to(dx.dtype.element_ty), mask)
    if dw_partial is not None:
        tl.store(dw_partial + tl.program_id(1) * C + c, dw, c < C)
    if db_partial is not None:
        tl.store(db_partial + tl.program_id(1) * C + c, db, c < C)


def forward(x, weight, bias, *, eps: float):
    """Return y, and what the backward pass needs."""
    N, C, P = _sizes(x)
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    mean, rstd = (torch.empty(N, P, dtype=torch.float32, device=x.device) for _ in range(2))
    pointers = (x.contiguous(), contiguous(weight), contiguous(bias), y, mean, rstd)
    if x.numel():
        BLOCK_C, BLOCK_P, num_warps = _tile(C, P, pixels=32)
        free = {"BLOCK_P": BLOCK_P, "num_warps": num_warps}
        if C <= MAX_CHANNELS:
            meta = measured(_forward, pointers, {**free, "programs": 4}, BLOCK_C=BLOCK_C)
            programs = min(N * triton.cdiv(P, meta["BLOCK_P"]), meta.pop("programs") * multiprocessors(x.device))
            launch(_forward, (programs,), *pointers, N, C, P, eps, **meta)
        else:
            meta = measured(_forward_long, pointers, {**free, "BLOCK_C": BLOCK_C})
            launch(_forward_long, (N * triton.cdiv(P, meta["BLOCK_P"]),), *pointers, C, P, eps, **meta)
    return y, (x, weight, bias, mean, rstd)


def backward(grads, saved, needs, *, eps: float):
    """Return the gradients of x, weight and bias."""
    x, weight, bias, mean, rstd = saved
    N, C, P = _sizes(x)
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device) if needs[0] else None
    BLOCK_C, BLOCK_P, num_warps = _tile(C, P, pixels=16)
    if BLOCK_C * BLOCK_P <= 4096 and C <= MAX_CHANNELS:
        num_warps = max(1, num_warps // 2)  # 8 warps spilled 8 bytes on sm_100 (no affine, bf16)
    pointers = (grads[0].contiguous(), x.contiguous(), contiguous(weight), mean, rstd)
    operands = (*pointers, dx, *(t if need else None for t, need in zip((weight, bias), needs[1:], strict=True)))
    free = {"BLOCK_P": BLOCK_P, "num_warps": num_warps}
    if C <= MAX_CHANNELS:
        meta = measured(_backward, operands, {**free, "programs": 2}, BLOCK_C=BLOCK_C)
    else:
        meta = measured(_backward_long, operands, {**free, "BLOCK_C": BLOCK_C, "programs": 2})
    tiles = N * triton.cdiv(P, meta["BLOCK_P"])
    blocks = triton.cdiv(C, meta["BLOCK_C"])
    programs = min(tiles, triton.cdiv(meta.pop("programs") * multiprocessors(x.device), blocks))
    partial = [torch.empty(programs, C, dtype=torch.float32, device=x.device) if need else None for need in needs[1:]]
    if x.numel() and C <= MAX_CHANNELS:
        launch(_backward, (programs,), *pointers, dx, *partial, N, C, P, **meta)
    elif x.numel():
        mean_gn, mean_g = torch.empty_like(mean), torch.empty_like(mean)
        means = measured(_pixel_means_long, pointers, {**free, "BLOCK_C": BLOCK_C})
        grid = (N * triton.cdiv(P, means["BLOCK_P"]),)
        launch(_pixel_means_long, grid, *pointers, mean_gn, mean_g, C, P, **means)
        launch(_backward_long, (blocks, programs), *pointers, mean_gn, mean_g, dx, *partial, N, C, P, **meta)
    dw, db = (
        None if sums is None else column_sum(sums, parameter.dtype)
        for sums, parameter in zip(partial, (weight, bias), strict=True)
    )
    return dx, dw, db


def _sizes(x):
    """N, C and P = H·W."""
    N, C, H, W = x.shape
    return N, C, H * W


def _tile(C: int, P: int, *, pixels: int) -> tuple[int, int, int]:
    """Channels and pixels of a tile, at least so many of up to 512 channels, and the warps that work on it."""
    if C > MAX_CHANNELS:
        return LONG_BLOCK_C, min(LONG_BLOCK_P, triton.next_power_of_2(max(1, P))), 8
    BLOCK_C = triton.next_power_of_2(max(1, C))
    BLOCK_P = max(4096 // BLOCK_C, pixels if BLOCK_C <= 512 else pixels // 2)
    BLOCK_P = min(BLOCK_P, triton.next_power_of_2(max(1, P)))
    return BLOCK_C, BLOCK_P, min(16, max(4, BLOCK_C * BLOCK_P // 512))
