"""Gated RMSNorm: N rows, each of K groups of D elements that are normalized on their own, and a gate z like x.

With a = act(z), u = x if BEFORE else x·a, r = 1/√(mean(u²) + ε) and n = u·r:

    forward   y = n·w (·a if BEFORE)
    backward  g = dy·w (·a if BEFORE)       du = r·(g − n·mean(g·n))       dw = Σ_rows dy·n (·a if BEFORE)
              BEFORE   dx = du              dz = act'(z)·dy·n·w
              after    dx = du·a            dz = act'(z)·du·x

Memory-bound, with the tiles and the long-lived programs of norm.py: 4,096 elements, 16 a thread; half as many elements
and threads in the backward pass, which takes up to 186 registers: two programs of 256 threads would not fit on a
multiprocessor. A program stays within one group of columns, so that its part of the weight is read, and of the weight's
gradient kept, once. act(z) is computed again in the backward pass. A group of more than MAX_TILE elements, which with
two operands would not fit into the registers of a program, is read twice, as in long_norm.py.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .activations import act
from .launch import column_sum, contiguous, launch, multiprocessors, programs, rows
from .launch_table import measured
from .norm import LONG_BLOCK, tile

#: Each of 512 threads may have 128 registers. The backward pass takes them all, six for each of a thread's elements.
MAX_TILE = 8_192


@triton.jit
def _load(x, z, at_x, at_z, mask, BEFORE: tl.constexpr, ACTIVATION: tl.constexpr):
    """x, the gate, act(gate) and what is normalized."""
    value = tl.load(x + at_x, mask, other=0.0).to(tl.float32)
    gate = tl.load(z + at_z, mask, other=0.0).to(tl.float32)
    a, _ = act(gate, gate, ACTIVATION)
    u = value
    if not BEFORE:
        u = value * a
    return value, gate, a, u


@triton.jit
def _forward(
    x, z, weight, y, rstd, x_stride, z_stride, P, N, K, D, eps,
    BEFORE: tl.constexpr, ACTIVATION: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    k = tl.program_id(0) // P
    in_row = tl.arange(0, BLOCK_D) < D
    d = k * D + tl.arange(0, BLOCK_D)
    if weight is not None:
        w = tl.load(weight + d, in_row, other=0.0).to(tl.float32)
    for block in range(tl.program_id(0) % P, tl.cdiv(N, BLOCK_N), P):
        n = block * BLOCK_N + tl.arange(0, BLOCK_N).to(tl.int64)
        row = n[:, None]
        mask = (n < N)[:, None] & in_row[None, :]
        _, _, a, u = _load(x, z, row * x_stride + d[None, :], row * z_stride + d[None, :], mask, BEFORE, ACTIVATION)
        r = 1.0 / tl.sqrt(tl.sum(u * u, 1) / D + eps)
        tl.store(rstd + n * K + k, r, n < N)
        u *= r[:, None]
        if weight is not None:
            u *= w[None, :]
        if BEFORE:
            u *= a
        tl.store(y + row * (K * D) + d[None, :], u.to(y.dtype.element_ty), mask)


@triton.jit
def _forward_long(
    x, z, weight, y, rstd, x_stride, z_stride, K, D, eps,
    BEFORE: tl.constexpr, ACTIVATION: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    n = (tl.program_id(0) // K).to(tl.int64)
    k = tl.program_id(0) % K
    squares = 0.0
    for start in range(0, D, BLOCK_D):
        mask = start + tl.arange(0, BLOCK_D) < D
        d = k * D + start + tl.arange(0, BLOCK_D)
        _, _, _, u = _load(x, z, n * x_stride + d, n * z_stride + d, mask, BEFORE, ACTIVATION)
        squares += tl.sum(u * u, 0)
    r = 1.0 / tl.sqrt(squares / D + eps)
    tl.store(rstd + tl.program_id(0), r)
    for start in range(0, D, BLOCK_D):
        mask = start + tl.arange(0, BLOCK_D) < D
        d = k * D + start + tl.arange(0, BLOCK_D)
        _, _, a, u = _load(x, z, n * x_stride + d, n * z_stride + d, mask, BEFORE, ACTIVATION)
        u *= r
        if weight is not None:
            u *= tl.load(weight + d, mask, other=0.0).to(tl.float32)
        if BEFORE:
            u *= a
        tl.store(y + n * (K * D) + d, u.to(y.dtype.element_ty), mask)


@triton.jit
def _backward(
    dy, x, z, weight, rstd, dx, dz, dw_partial, x_stride, z_stride, P, N, K, D,
    BEFORE: tl.constexpr, ACTIVATION: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    p = tl.program_id(0) % P
    k = tl.program_id(0) // P
    d = tl.arange(0, BLOCK_D)
    in_row = d < D
    if weight is not None:
        w = tl.load(weight + k * D + d, in_row, other=0.0).to(tl.float32)
    dw = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    for block in range(p, tl.cdiv(N, BLOCK_N), P):
        n = block * BLOCK_N + tl.arange(0, BLOCK_N).to(tl.int64)
        mask = (n < N)[:, None] & in_row[None, :]
        at_x, at_z, at = n * x_stride + k * D, n * z_stride + k * D, (n * K + k) * D
        value, gate, a, u = _load(
            x, z, at_x[:, None] + d[None, :], at_z[:, None] + d[None, :], mask, BEFORE, ACTIVATION
        )
        at = at[:, None] + d[None, :]
        r = tl.load(rstd + n * K + k, n < N, other=0.0)[:, None]
        u *= r
        g = tl.load(dy + at, mask, other=0.0).to(tl.float32)
        if BEFORE:
            if dz is not None:
                pulled = g * u
                if weight is not None:
                    pulled *= w[None, :]
                _, pulled = act(gate, pulled, ACTIVATION)
                tl.store(dz + at, pulled.to(dz.dtype.element_ty), mask)
            g *= a
        dw += g * u
        if weight is not None:
            g *= w[None, :]
        mean_gn = (tl.sum(g * u, 1) / D)[:, None]
        if BEFORE:
            du = r * (g - u * mean_gn)
        else:
            # Across the sum live g, x, a and act'(z), not u too, nor z; with them the registers of 8,192 would spill.
            _, slope = act(gate, 1.0, ACTIVATION)
            du = r * (g - value * (r * mean_gn) * a)
            if dz is not None:
                tl.store(dz + at, (du * value * slope).to(dz.dtype.element_ty), mask)
            du *= a
        if dx is not None:
            tl.store(dx + at, du.to(dx.dtype.element_ty), mask)
    if dw_partial is not None:
        tl.store(dw_partial + (p.to(tl.int64) * K + k) * D + d, tl.sum(dw, 0), in_row)


@triton.jit
def _row_means_long(
    dy, x, z, weight, rstd, mean_gn, x_stride, z_stride, K, D,
    BEFORE: tl.constexpr, ACTIVATION: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    n = (tl.program_id(0) // K).to(tl.int64)
    k = tl.program_id(0) % K
    r = tl.load(rstd + tl.program_id(0))
    total = 0.0
    for start in range(0, D, BLOCK_D):
        mask = start + tl.arange(0, BLOCK_D) < D
        d = k * D + start + tl.arange(0, BLOCK_D)
        _, _, a, u = _load(x, z, n * x_stride + d, n * z_stride + d, mask, BEFORE, ACTIVATION)
        g = tl.load(dy + n * (K * D) + d, mask, other=0.0).to(tl.float32)
        if weight is not None:
            g *= tl.load(weight + d, mask, other=0.0).to(tl.float32)
        if BEFORE:
            g *= a
        total += tl.sum(g * u * r, 0)
    tl.store(mean_gn + tl.program_id(0), total / D)


@triton.jit
def _backward_long(
    dy, x, z, weight, rstd, mean_gn, dx, dz, dw_partial, x_stride, z_stride, N, K, D,
    BEFORE: tl.constexpr, ACTIVATION: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(D, BLOCK_D)
    k = tl.program_id(0) // blocks
    in_group = (tl.program_id(0) % blocks) * BLOCK_D + tl.arange(0, BLOCK_D)
    mask = in_group < D
    d = k * D + in_group
    if weight is not None:
        w = tl.load(weight + d, mask, other=0.0).to(tl.float32)
    dw = tl.zeros([BLOCK_D], tl.float32)
    for row in range(tl.program_id(1), N, tl.num_programs(1)):
        n = tl.cast(row, tl.int64)
        value, gate, a, u = _load(x, z, n * x_stride + d, n * z_stride + d, mask, BEFORE, ACTIVATION)
        r = tl.load(rstd + n * K + k)
        u *= r
        g = tl.load(dy + n * (K * D) + d, mask, other=0.0).to(tl.float32)
        if BEFORE:
            if dz is not None:
                pulled = g * u
                if weight is not None:
                    pulled *= w
                _, pulled = act(gate, pulled, ACTIVATION)
                tl.store(dz + n * (K * D) + d, pulled.to(dz.dtype.element_ty), mask)
            g *= a
        dw += g * u
        if weight is not None:
            g *= w
        du = r * (g - u * tl.load(mean_gn + n * K + k))
        if not BEFORE:
            if dz is not None:
                _, pulled = act(gate, du * value, ACTIVATION)
                tl.store(dz + n * (K * D) + d, pulled.to(dz.dtype.element_ty), mask)
            du *= a
        if dx is not None:
            tl.store(dx + n * (K * D) + d, du.to(dx.dtype.element_ty), mask)
    if dw_partial is not None:
        tl.store(dw_partial + tl.program_id(1).to(tl.int64) * (K * D) + d, dw, mask)


def forward(x, gate, weight, *, eps: float, activation: str, norm_before_gate: bool, groups: int):
    """Return y, and what the backward pass needs."""
    x_rows, z_rows = rows(x), rows(gate)
    N, K, D = x_rows.shape[0], groups, x.shape[-1] // groups
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    rstd = torch.empty(N, K, dtype=torch.float32, device=x.device)
    pointers = (x_rows, z_rows, contiguous(weight), y, rstd, x_rows.stride(0), z_rows.stride(0))
    operands = (x_rows, z_rows, weight)
    which = {"BEFORE": norm_before_gate, "ACTIVATION": activation}
    if x.numel() == 0:
        pass
    elif D <= MAX_TILE:
        BLOCK_N, BLOCK_D, num_warps = tile(D)
        free = {"BLOCK_N": BLOCK_N, "num_warps": num_warps, "programs": 4}
        meta = measured(_forward, operands, free, BLOCK_D=BLOCK_D, **which)
        P = programs(N, meta["BLOCK_N"], meta.pop("programs") * multiprocessors(x.device), K)
        launch(_forward, (P * K,), *pointers, P, N, K, D, eps, **meta)
    else:
        meta = measured(_forward_long, operands, {"BLOCK_D": LONG_BLOCK, "num_warps": 8}, **which)
        launch(_forward_long, (N * K,), *pointers, K, D, eps, **meta)
    return y, (x, gate, weight, rstd)


def backward(grads, saved, needs, *, eps: float, activation: str, norm_before_gate: bool, groups: int):
    """Return the gradients of x, the gate and the weight."""
    x, gate, weight, rstd = saved
    dy = grads[0].contiguous()
    x_rows, z_rows = rows(x), rows(gate)
    N, K, D = x_rows.shape[0], groups, x.shape[-1] // groups
    dx, dz = (
        torch.empty(t.shape, dtype=t.dtype, device=t.device) if need else None
        for t, need in zip((x, gate), needs, strict=False)
    )
    long = D > MAX_TILE
    BLOCK_N, BLOCK_D, num_warps = (1, LONG_BLOCK, 8) if long else tile(D)
    if BLOCK_N > 1:
        BLOCK_N, num_warps = BLOCK_N // 2, num_warps // 2
    operands = (dy, x_rows, z_rows, weight)
    which = {"BEFORE": norm_before_gate, "ACTIVATION": activation}
    if long:
        free = {"BLOCK_D": BLOCK_D, "num_warps": num_warps, "programs": 2}
        meta = measured(_backward_long, operands, free, **which)
    else:
        free = {"BLOCK_N": BLOCK_N, "num_warps": num_warps, "programs": 2}
        meta = measured(_backward, operands, free, BLOCK_D=BLOCK_D, **which)
    column_blocks = K * triton.cdiv(D, meta["BLOCK_D"])
    P = programs(N, meta.get("BLOCK_N", 1), meta.pop("programs") * multiprocessors(x.device), column_blocks)
    partial = torch.empty(P, K * D, dtype=torch.float32, device=x.device) if needs[2] else None
    pointers = (dy, x_rows, z_rows, contiguous(weight), rstd)
    strides = (x_rows.stride(0), z_rows.stride(0))
    if x.numel() == 0:
        if partial is not None:
            partial.zero_()
    elif long:
        mean_gn = torch.empty(N, K, dtype=torch.float32, device=x.device)
        means = measured(_row_means_long, operands, {"BLOCK_D": BLOCK_D, "num_warps": num_warps}, **which)
        launch(_row_means_long, (N * K,), *pointers, mean_gn, *strides, K, D, **means)
        launch(_backward_long, (column_blocks, P), *pointers, mean_gn, dx, dz, partial, *strides, N, K, D, **meta)
    else:
        launch(_backward, (P * K,), *pointers, dx, dz, partial, *strides, P, N, K, D, **meta)
    return dx, dz, None if partial is None else column_sum(partial, weight.dtype)
