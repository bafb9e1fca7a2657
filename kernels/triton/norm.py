"""Row normalization: RMSNorm, and LayerNorm as RMSNorm of the centred row; each with an optional residual add.

N rows of D elements, one row of x every ``x_stride`` elements. With h = x (+ residual):

    forward   μ = mean(h) if CENTER else 0    r = 1/√(mean((h − μ)²) + ε)    n = (h − μ)·r    y = n·(w + offset) + b
    backward  g = dy·(w + offset)             dh = r·(g − n·mean(g·n) − [CENTER] mean(g)) + dh_out
              dw = Σ_rows dy·n                db = Σ_rows dy

Memory-bound. A program walks over tiles of about 4,096 elements (8 warps: 16 elements, two 16-byte accesses of bf16, a
thread). On 132 multiprocessors four programs each keep 32 KB in flight per multiprocessor, twice what 3.35 TB/s at
0.6 µs latency asks for; the backward pass holds more registers and runs two. Programs are few and long-lived so that
the weight is read, and a partial weight gradient written, once per program instead of once per row; a second kernel
adds the partial sums up in a fixed order, which keeps the gradient deterministic.

A row of more than MAX_TILE elements does not fit into the registers of a program. It is read twice: once for the
statistics, block by block (Chan's update), and once to write the result; the backward pass likewise.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .launch import column_sum, contiguous, launch, multiprocessors, rows

MAX_TILE = 16_384
LONG_BLOCK = 4_096


@triton.jit
def _forward(
    x, residual, weight, bias, y, h, mean, rstd,
    x_stride, residual_stride, N, D, eps, offset,
    CENTER: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    d = tl.arange(0, BLOCK_D)
    in_row = d < D
    if weight is not None:
        w = tl.load(weight + d, in_row, other=0.0).to(tl.float32) + offset
    if bias is not None:
        b = tl.load(bias + d, in_row, other=0.0).to(tl.float32)
    for tile in range(tl.program_id(0), tl.cdiv(N, BLOCK_N), tl.num_programs(0)):
        n = tile * BLOCK_N + tl.arange(0, BLOCK_N).to(tl.int64)
        mask = (n < N)[:, None] & in_row[None, :]
        at = n[:, None] * D + d[None, :]
        row = tl.load(x + n[:, None] * x_stride + d[None, :], mask, other=0.0).to(tl.float32)
        if residual is not None:
            row += tl.load(residual + n[:, None] * residual_stride + d[None, :], mask, other=0.0).to(tl.float32)
            rounded = row.to(h.dtype.element_ty)
            tl.store(h + at, rounded, mask)
            row = rounded.to(tl.float32)
        if CENTER:
            mu = tl.sum(row, 1) / D
            row = tl.where(mask, row - mu[:, None], 0.0)
            tl.store(mean + n, mu, n < N)
        r = 1.0 / tl.sqrt(tl.sum(row * row, 1) / D + eps)
        tl.store(rstd + n, r, n < N)
        row *= r[:, None]
        if weight is not None:
            row *= w[None, :]
        if bias is not None:
            row += b[None, :]
        tl.store(y + at, row.to(y.dtype.element_ty), mask)


@triton.jit
def _forward_long(
    x, residual, weight, bias, y, h, mean, rstd,
    x_stride, residual_stride, D, eps, offset,
    CENTER: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0).to(tl.int64)
    mu = 0.0
    squares = 0.0
    for start in range(0, D, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        mask = d < D
        block = tl.load(x + n * x_stride + d, mask, other=0.0).to(tl.float32)
        if residual is not None:
            block += tl.load(residual + n * residual_stride + d, mask, other=0.0).to(tl.float32)
            rounded = block.to(h.dtype.element_ty)
            tl.store(h + n * D + d, rounded, mask)
            block = rounded.to(tl.float32)
        if CENTER:
            # Chan, Golub, LeVeque (1979): merge the mean and the sum of squared deviations of two sets.
            count = tl.minimum(BLOCK_D, D - start).to(tl.float32)
            block_mu = tl.sum(block, 0) / count
            block = tl.where(mask, block - block_mu, 0.0)
            delta = block_mu - mu
            squares += tl.sum(block * block, 0) + delta * delta * (count * start / (start + count))
            mu += delta * (count / (start + count))
        else:
            squares += tl.sum(block * block, 0)
    r = 1.0 / tl.sqrt(squares / D + eps)
    if CENTER:
        tl.store(mean + n, mu)
    tl.store(rstd + n, r)
    for start in range(0, D, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        mask = d < D
        if residual is not None:
            block = tl.load(h + n * D + d, mask, other=0.0).to(tl.float32)
        else:
            block = tl.load(x + n * x_stride + d, mask, other=0.0).to(tl.float32)
        block = (block - mu) * r
        if weight is not None:
            block *= tl.load(weight + d, mask, other=0.0).to(tl.float32) + offset
        if bias is not None:
            block += tl.load(bias + d, mask, other=0.0).to(tl.float32)
        tl.store(y + n * D + d, block.to(y.dtype.element_ty), mask)


@triton.jit
def _backward(
    dy, dh_out, h, weight, mean, rstd, dh, dw_partial, db_partial,
    h_stride, N, D, offset,
    CENTER: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    d = tl.arange(0, BLOCK_D)
    in_row = d < D
    if weight is not None:
        w = tl.load(weight + d, in_row, other=0.0).to(tl.float32) + offset
    dw = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    db = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    for tile in range(tl.program_id(0), tl.cdiv(N, BLOCK_N), tl.num_programs(0)):
        n = tile * BLOCK_N + tl.arange(0, BLOCK_N).to(tl.int64)
        mask = (n < N)[:, None] & in_row[None, :]
        at = n[:, None] * D + d[None, :]
        g = tl.load(dy + at, mask, other=0.0).to(tl.float32)
        normed = tl.load(h + n[:, None] * h_stride + d[None, :], mask, other=0.0).to(tl.float32)
        r = tl.load(rstd + n, n < N, other=0.0)
        if CENTER:
            normed -= tl.load(mean + n, n < N, other=0.0)[:, None]
        normed *= r[:, None]  # not zero outside the mask; every use multiplies it by g, which is
        if dw_partial is not None:
            dw += g * normed
        if db_partial is not None:
            db += g
        if dh is not None:
            if weight is not None:
                g *= w[None, :]
            out = g - normed * (tl.sum(g * normed, 1) / D)[:, None]
            if CENTER:
                out -= (tl.sum(g, 1) / D)[:, None]
            out *= r[:, None]
            if dh_out is not None:
                out += tl.load(dh_out + at, mask, other=0.0).to(tl.float32)
            tl.store(dh + at, out.to(dh.dtype.element_ty), mask)
    if dw_partial is not None:
        tl.store(dw_partial + tl.program_id(0) * D + d, tl.sum(dw, 0), in_row)
    if db_partial is not None:
        tl.store(db_partial + tl.program_id(0) * D + d, tl.sum(db, 0), in_row)


@triton.jit
def _row_means_long(
    dy, h, weight, mean, rstd, mean_gn, mean_g, h_stride, D, offset, CENTER: tl.constexpr, BLOCK_D: tl.constexpr
):
    n = tl.program_id(0).to(tl.int64)
    r = tl.load(rstd + n)
    mu = 0.0
    if CENTER:
        mu = tl.load(mean + n)
    sum_gn = 0.0
    sum_g = 0.0
    for start in range(0, D, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        mask = d < D
        g = tl.load(dy + n * D + d, mask, other=0.0).to(tl.float32)
        if weight is not None:
            g *= tl.load(weight + d, mask, other=0.0).to(tl.float32) + offset
        normed = (tl.load(h + n * h_stride + d, mask, other=0.0).to(tl.float32) - mu) * r
        sum_gn += tl.sum(g * normed, 0)
        sum_g += tl.sum(g, 0)
    tl.store(mean_gn + n, sum_gn / D)
    if CENTER:
        tl.store(mean_g + n, sum_g / D)


@triton.jit
def _backward_long(
    dy, dh_out, h, weight, mean, rstd, mean_gn, mean_g, dh, dw_partial, db_partial,
    h_stride, N, D, offset,
    CENTER: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    d = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    mask = d < D
    if weight is not None:
        w = tl.load(weight + d, mask, other=0.0).to(tl.float32) + offset
    dw = tl.zeros([BLOCK_D], tl.float32)
    db = tl.zeros([BLOCK_D], tl.float32)
    for row in range(tl.program_id(1), N, tl.num_programs(1)):
        n = tl.cast(row, tl.int64)
        g = tl.load(dy + n * D + d, mask, other=0.0).to(tl.float32)
        normed = tl.load(h + n * h_stride + d, mask, other=0.0).to(tl.float32)
        r = tl.load(rstd + n)
        if CENTER:
            normed -= tl.load(mean + n)
        normed *= r
        if dw_partial is not None:
            dw += g * normed
        if db_partial is not None:
            db += g
        if dh is not None:
            if weight is not None:
                g *= w
            out = g - normed * tl.load(mean_gn + n)
            if CENTER:
                out -= tl.load(mean_g + n)
            out *= r
            if dh_out is not None:
                out += tl.load(dh_out + n * D + d, mask, other=0.0).to(tl.float32)
            tl.store(dh + n * D + d, out.to(dh.dtype.element_ty), mask)
    if dw_partial is not None:
        tl.store(dw_partial + tl.program_id(1) * D + d, dw, mask)
    if db_partial is not None:
        tl.store(db_partial + tl.program_id(1) * D + d, db, mask)


def forward(x, residual, weight, bias, *, eps: float, weight_offset: float, center: bool):
    """Return y, or (y, h) where there is a residual, and what the backward pass needs."""
    x_rows = rows(x)
    N, D = x_rows.shape
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    h, residual_rows, residual_stride = None, None, 0
    if residual is not None:
        h = torch.empty(x.shape, dtype=torch.promote_types(x.dtype, residual.dtype), device=x.device)
        residual_rows = rows(residual)
        residual_stride = residual_rows.stride(0)
    mean = torch.empty(N, dtype=torch.float32, device=x.device) if center else None
    rstd = torch.empty(N, dtype=torch.float32, device=x.device)
    pointers = (x_rows, residual_rows, contiguous(weight), contiguous(bias), y, h, mean, rstd)
    if x.numel() == 0:
        pass
    elif D <= MAX_TILE:
        BLOCK_N, BLOCK_D, num_warps = tile(D)
        grid = (min(triton.cdiv(N, BLOCK_N), 4 * multiprocessors(x.device)),)
        launch(_forward, grid,
            *pointers, x_rows.stride(0), residual_stride, N, D, eps, weight_offset,
            CENTER=center, BLOCK_N=BLOCK_N, BLOCK_D=BLOCK_D, num_warps=num_warps,
        )  # fmt: skip
    else:
        launch(_forward_long, (N,),
            *pointers, x_rows.stride(0), residual_stride, D, eps, weight_offset,
            CENTER=center, BLOCK_D=LONG_BLOCK, num_warps=8,
        )  # fmt: skip
    saved = (x if h is None else h, weight, bias, mean, rstd)
    return (y if h is None else (y, h)), saved


def backward(grads, saved, needs, *, eps: float, weight_offset: float, center: bool):
    """Return the gradients of x, residual, weight and bias."""
    h, weight, bias, mean, rstd = saved
    dy = grads[0].contiguous()
    dh_out = grads[1].contiguous() if len(grads) == 2 else None
    h_rows = rows(h)
    N, D = h_rows.shape
    device = h.device
    dh = torch.empty(h.shape, dtype=h.dtype, device=device) if needs[0] or needs[1] else None
    long = D > MAX_TILE
    BLOCK_N, BLOCK_D, num_warps = (1, LONG_BLOCK, 8) if long else tile(D)
    column_blocks = triton.cdiv(D, BLOCK_D)
    programs = min(triton.cdiv(N, BLOCK_N), triton.cdiv(2 * multiprocessors(device), column_blocks))
    partial = [torch.empty(programs, D, dtype=torch.float32, device=device) if need else None for need in needs[2:]]
    w = contiguous(weight)
    if h.numel() == 0:
        for unwritten in partial:
            if unwritten is not None:
                unwritten.zero_()
    elif long:
        mean_gn = torch.empty(N, dtype=torch.float32, device=device)
        mean_g = torch.empty(N, dtype=torch.float32, device=device) if center else None
        launch(_row_means_long, (N,),
            dy, h_rows, w, mean, rstd, mean_gn, mean_g, h_rows.stride(0), D, weight_offset,
            CENTER=center, BLOCK_D=BLOCK_D, num_warps=num_warps,
        )  # fmt: skip
        launch(_backward_long, (column_blocks, programs),
            dy, dh_out, h_rows, w, mean, rstd, mean_gn, mean_g, dh, *partial, h_rows.stride(0), N, D, weight_offset,
            CENTER=center, BLOCK_D=BLOCK_D, num_warps=num_warps,
        )  # fmt: skip
    else:
        launch(_backward, (programs,),
            dy, dh_out, h_rows, w, mean, rstd, dh, *partial, h_rows.stride(0), N, D, weight_offset,
            CENTER=center, BLOCK_N=BLOCK_N, BLOCK_D=BLOCK_D, num_warps=num_warps,
        )  # fmt: skip
    dw, db = (
        None if sums is None else column_sum(sums, parameter.dtype)
        for sums, parameter in zip(partial, (weight, bias), strict=True)
    )
    return dh, dh, dw, db


def tile(D: int) -> tuple[int, int, int]:
    """Rows and elements of a tile that spans whole rows of D, and the warps that work on it."""
    BLOCK_D = triton.next_power_of_2(D)
    BLOCK_N = max(1, 4096 // BLOCK_D)
    return BLOCK_N, BLOCK_D, min(32, max(4, BLOCK_N * BLOCK_D // 512))
