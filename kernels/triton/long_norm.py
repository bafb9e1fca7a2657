"""Row normalization where a row does not fit into the registers of a program: the kernels of norm.py, block by block.

The same formulas and names. A row is read twice: once for its statistics (Chan's update), once to write the result. In
the backward pass one program a row finds the two means first; then a program owns a block of columns and walks down the
rows of its group, so that the columns' sums stay in registers.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .dropout import kept_in_row, row_keys


@triton.jit
def forward(
    x, residual, weight, bias, gate, seed, y, h, mean, rstd,
    x_stride, residual_stride, weight_stride, bias_stride, gate_stride, T, D, eps, offset, threshold, scale,
    CENTER: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One program a row."""
    n = tl.program_id(0).to(tl.int64)
    group = n // T
    if seed is not None:
        k1, k2 = row_keys(seed, n)
    mu = 0.0
    squares = 0.0
    for start in range(0, D, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        mask = d < D
        block = tl.load(x + n * x_stride + d, mask, other=0.0).to(tl.float32)
        if gate is not None:
            block *= tl.load(gate + group * gate_stride + d, mask, other=0.0).to(tl.float32)
        if seed is not None:
            block = tl.where(kept_in_row(k1, k2, d, threshold), block * scale, 0.0)
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
            block *= tl.load(weight + group * weight_stride + d, mask, other=0.0).to(tl.float32) + offset
        if bias is not None:
            block += tl.load(bias + group * bias_stride + d, mask, other=0.0).to(tl.float32)
        tl.store(y + n * D + d, block.to(y.dtype.element_ty), mask)


@triton.jit
def row_means(
    dy, h, weight, mean, rstd, mean_gn, mean_g,
    h_stride, weight_stride, T, D, offset,
    CENTER: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """The means of g·n and of g, one program a row."""
    n = tl.program_id(0).to(tl.int64)
    group = n // T
    r = tl.load(rstd + n)
    mu = 0.0
    if CENTER:
        mu = tl.load(mean + n)
    sum_gn = tl.zeros([BLOCK_D], tl.float32)  # added up at the end: a sum over a block waits for all warps
    sum_g = tl.zeros([BLOCK_D], tl.float32)
    for start in range(0, D, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        mask = d < D
        g = tl.load(dy + n * D + d, mask, other=0.0).to(tl.float32)
        if weight is not None:
            g *= tl.load(weight + group * weight_stride + d, mask, other=0.0).to(tl.float32) + offset
        normed = (tl.load(h + n * h_stride + d, mask, other=0.0).to(tl.float32) - mu) * r
        sum_gn += g * normed
        if CENTER:
            sum_g += g
    tl.store(mean_gn + n, tl.sum(sum_gn, 0) / D)
    if CENTER:
        tl.store(mean_g + n, tl.sum(sum_g, 0) / D)


@triton.jit
def backward(
    dy, dh_out, h, x, weight, gate, seed, mean, rstd, mean_gn, mean_g, dh, dx, dw_partial, db_partial, dgate_partial,
    h_stride, x_stride, weight_stride, gate_stride, P, T, D, offset, threshold, scale,
    CENTER: tl.constexpr, ROWS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One program a block of columns, down every P-th row of its group."""
    group = (tl.program_id(0) // P).to(tl.int64)
    p = tl.program_id(0) % P
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    mask = d < D
    if weight is not None:
        w = tl.load(weight + group * weight_stride + d, mask, other=0.0).to(tl.float32) + offset
    if gate is not None:
        a = tl.load(gate + group * gate_stride + d, mask, other=0.0).to(tl.float32)
    dw = tl.zeros([BLOCK_D], tl.float32)
    db = tl.zeros([BLOCK_D], tl.float32)
    dgate = tl.zeros([BLOCK_D], tl.float32)
    for t in range(p, T, P):
        n = group * T + t
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
        if ROWS:
            if weight is not None:
                g *= w
            out = g - normed * tl.load(mean_gn + n)
            if CENTER:
                out -= tl.load(mean_g + n)
            out *= r
            if dh_out is not None:
                out += tl.load(dh_out + n * D + d, mask, other=0.0).to(tl.float32)
            if dh is not None:
                tl.store(dh + n * D + d, out.to(dh.dtype.element_ty), mask)
            if dgate_partial is not None:
                dgate += out * tl.load(x + n * x_stride + d, mask, other=0.0).to(tl.float32)
            if gate is not None:
                out *= a
            if seed is not None:
                k1, k2 = row_keys(seed, n)
                out = tl.where(kept_in_row(k1, k2, d, threshold), out * scale, 0.0)
            if dx is not None:
                tl.store(dx + n * D + d, out.to(dx.dtype.element_ty), mask)
    at = (p * (tl.num_programs(0) // P) + group) * D + d
    if dw_partial is not None:
        tl.store(dw_partial + at, dw.to(dw_partial.dtype.element_ty), mask)
    if db_partial is not None:
        tl.store(db_partial + at, db.to(db_partial.dtype.element_ty), mask)
    if dgate_partial is not None:
        tl.store(dgate_partial + at, dgate.to(dgate_partial.dtype.element_ty), mask)
