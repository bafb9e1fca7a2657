"""Row normalization: RMSNorm, and LayerNorm as RMSNorm of the centred row; each with an optional residual add.

N rows of D elements, one row of x every ``x_stride`` elements; T consecutive rows, a group, share a weight w, a bias b
and a gate a (a plain norm has one group of all rows, a modulated norm one for each sample). With u = a·x, dropped
where a mask says so, and h = u (+ residual):

    forward   μ = mean(h) if CENTER else 0    r = 1/√(mean((h − μ)²) + ε)    n = (h − μ)·r    y = n·(w + offset) + b
    backward  g = dy·(w + offset)             dh = r·(g − n·mean(g·n) − [CENTER] mean(g)) + dh_out
              dw = Σ_group dy·n               db = Σ_group dy
              dx = mask·a·dh                  da = Σ_group dh·x                     the residual's gradient is dh

Memory-bound. A program walks over tiles of about 4,096 elements (8 warps: 16 elements, two 16-byte accesses of bf16, a
thread). On 132 multiprocessors four programs each keep 32 KB in flight per multiprocessor, twice what 3.35 TB/s at
0.6 µs latency asks for; the backward pass holds more registers and runs two. Programs are few and long-lived so that
the weight is read, and a partial weight gradient written, once per program instead of once per row; a second kernel
adds the partial sums up in a fixed order, which keeps the gradient deterministic. A program stays within one group;
where a group has only one, its sum is the gradient already. The mask is hashed anew from the seed in each pass.

A row of more than MAX_TILE elements (with a gate or a mask, MAX_BRANCHED_TILE) does not fit into the registers of a
program: long_norm.py reads it twice.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import long_norm
from .dropout import kept
from .launch import group_sum, groups, launch, multiprocessors, partial_sums, programs, rows
from .launch_table import measured

MAX_TILE = 16_384
#: With a gate or a mask a thread holds more: 16 elements in each of 512 threads, which may have 128 registers.
MAX_BRANCHED_TILE = 8_192
LONG_BLOCK = 4_096


@triton.jit
def _forward(
    x, residual, weight, bias, gate, seed, y, h, mean, rstd,
    x_stride, residual_stride, weight_stride, bias_stride, gate_stride, P, T, D, eps, offset, threshold, scale,
    CENTER: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    group = (tl.program_id(0) // P).to(tl.int64)
    d = tl.arange(0, BLOCK_D)
    in_row = d < D
    if weight is not None:
        w = tl.load(weight + group * weight_stride + d, in_row, other=0.0).to(tl.float32) + offset
    if bias is not None:
        b = tl.load(bias + group * bias_stride + d, in_row, other=0.0).to(tl.float32)
    if gate is not None:
        a = tl.load(gate + group * gate_stride + d, in_row, other=0.0).to(tl.float32)
    for tile in range(tl.program_id(0) % P, tl.cdiv(T, BLOCK_N), P):
        t = tile * BLOCK_N + tl.arange(0, BLOCK_N)
        n = group * T + t
        mask = (t < T)[:, None] & in_row[None, :]
        at = n[:, None] * D + d[None, :]
        row = tl.load(x + n[:, None] * x_stride + d[None, :], mask, other=0.0).to(tl.float32)
        if gate is not None:
            row *= a[None, :]
        if seed is not None:
            row = tl.where(kept(seed, n, d, threshold), row * scale, 0.0)
        if residual is not None:
            row += tl.load(residual + n[:, None] * residual_stride + d[None, :], mask, other=0.0).to(tl.float32)
            rounded = row.to(h.dtype.element_ty)
            tl.store(h + at, rounded, mask)
            row = rounded.to(tl.float32)
        if CENTER:
            mu = tl.sum(row, 1) / D
            row = tl.where(mask, row - mu[:, None], 0.0)
            tl.store(mean + n, mu, t < T)
        r = 1.0 / tl.sqrt(tl.sum(row * row, 1) / D + eps)
        tl.store(rstd + n, r, t < T)
        row *= r[:, None]
        if weight is not None:
            row *= w[None, :]
        if bias is not None:
            row += b[None, :]
        tl.store(y + at, row.to(y.dtype.element_ty), mask)


@triton.jit
def _backward(
    dy, dh_out, h, x, weight, gate, seed, mean, rstd, dh, dx, dw_partial, db_partial, dgate_partial,
    h_stride, x_stride, weight_stride, gate_stride, P, T, D, offset, threshold, scale,
    CENTER: tl.constexpr, ROWS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    group = (tl.program_id(0) // P).to(tl.int64)
    p = tl.program_id(0) % P
    d = tl.arange(0, BLOCK_D)
    in_row = d < D
    if weight is not None:
        w = tl.load(weight + group * weight_stride + d, in_row, other=0.0).to(tl.float32) + offset
    if gate is not None:
        a = tl.load(gate + group * gate_stride + d, in_row, other=0.0).to(tl.float32)
    dw = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    db = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dgate = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    for tile in range(p, tl.cdiv(T, BLOCK_N), P):
        t = tile * BLOCK_N + tl.arange(0, BLOCK_N)
        n = group * T + t
        mask = (t < T)[:, None] & in_row[None, :]
        at = n[:, None] * D + d[None, :]
        g = tl.load(dy + at, mask, other=0.0).to(tl.float32)
        normed = tl.load(h + n[:, None] * h_stride + d[None, :], mask, other=0.0).to(tl.float32)
        r = tl.load(rstd + n, t < T, other=0.0)
        if CENTER:
            normed = tl.where(mask, normed - tl.load(mean + n, t < T, other=0.0)[:, None], 0.0)
        normed *= r[:, None]
        if dw_partial is not None:
            dw += g * normed
        if db_partial is not None:
            db += g
        if ROWS:
            if weight is not None:
                g *= w[None, :]
            mean_gn = tl.sum(g * normed, 1) / D
            out = g - normed * mean_gn[:, None]
            if CENTER:
                # The mean of out. That of normed is a rounding error, which is all there is of a gradient at D = 2.
                out -= ((tl.sum(g, 1) - mean_gn * tl.sum(normed, 1)) / D)[:, None]
            out *= r[:, None]
            if dh_out is not None:
                out += tl.load(dh_out + at, mask, other=0.0).to(tl.float32)
            if dh is not None:
                tl.store(dh + at, out.to(dh.dtype.element_ty), mask)
            if dgate_partial is not None:
                dgate += out * tl.load(x + n[:, None] * x_stride + d[None, :], mask, other=0.0).to(tl.float32)
            if gate is not None:
                out *= a[None, :]
            if seed is not None:
                out = tl.where(kept(seed, n, d, threshold), out * scale, 0.0)
            if dx is not None:
                tl.store(dx + at, out.to(dx.dtype.element_ty), mask)
    at_partial = (p * (tl.num_programs(0) // P) + group) * D + d
    if dw_partial is not None:
        tl.store(dw_partial + at_partial, tl.sum(dw, 0).to(dw_partial.dtype.element_ty), in_row)
    if db_partial is not None:
        tl.store(db_partial + at_partial, tl.sum(db, 0).to(db_partial.dtype.element_ty), in_row)
    if dgate_partial is not None:
        tl.store(dgate_partial + at_partial, tl.sum(dgate, 0).to(dgate_partial.dtype.element_ty), in_row)


def forward(
    x, residual, weight, bias, gate, seed,
    *, eps: float, weight_offset: float, center: bool, threshold: int = 0, scale: float = 1.0,
):  # fmt: skip
    """Return y, or (y, h) where there is a residual, and what the backward pass needs."""
    x_rows = rows(x)
    N, D = x_rows.shape
    G, T = groups(N, D, weight, bias, gate)
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    h = None
    if residual is not None:
        h = torch.empty(x.shape, dtype=torch.promote_types(x.dtype, residual.dtype), device=x.device)
    mean = torch.empty(N, dtype=torch.float32, device=x.device) if center else None
    rstd = torch.empty(N, dtype=torch.float32, device=x.device)
    inputs = (x_rows, *_rows(residual, weight, bias, gate))
    pointers = (*inputs, seed, y, h, mean, rstd, *_strides(inputs))
    if x.numel() == 0:
        pass
    elif not _is_long(D, gate, seed):
        BLOCK_N, BLOCK_D, num_warps = tile(D, T)
        free = {"BLOCK_N": BLOCK_N, "num_warps": num_warps, "programs": 4}
        meta = measured(_forward, (*inputs, seed), free, CENTER=center, BLOCK_D=BLOCK_D)
        P = programs(T, meta["BLOCK_N"], meta.pop("programs") * multiprocessors(x.device), G)
        launch(_forward, (P * G,), *pointers, P, T, D, eps, weight_offset, threshold, scale, **meta)
    else:
        meta = measured(long_norm.forward, (*inputs, seed), {"BLOCK_D": LONG_BLOCK, "num_warps": 8}, CENTER=center)
        launch(long_norm.forward, (N,), *pointers, T, D, eps, weight_offset, threshold, scale, **meta)
    saved = (x if h is None else h, weight, bias, mean, rstd, None if gate is None else x, gate, seed)
    return (y if h is None else (y, h)), saved


def backward(
    grads, saved, needs,
    *, eps: float, weight_offset: float, center: bool, threshold: int = 0, scale: float = 1.0,
):  # fmt: skip
    """Return the gradients of x, residual, weight, bias and gate."""
    h, weight, bias, mean, rstd, x, gate, seed = saved
    dy = grads[0].contiguous()
    dh_out = grads[1].contiguous() if len(grads) == 2 else None
    h_rows = rows(h)
    N, D = h_rows.shape
    G, T = groups(N, D, weight, bias, gate)
    branched = gate is not None or seed is not None  # otherwise x and the residual have the same gradient
    device = h.device
    dh = torch.empty(h.shape, dtype=h.dtype, device=device) if needs[1] or (needs[0] and not branched) else None
    dx = torch.empty(h.shape, dtype=dy.dtype, device=device) if needs[0] and branched else None
    long = _is_long(D, gate, seed)
    # With 8 warps the long backward kernel spilled 8 bytes on sm_100 (residual add, bf16); with 4 and a gate, more.
    BLOCK_N, BLOCK_D, num_warps = (1, LONG_BLOCK, 8 if branched else 4) if long else tile(D, T)
    # A kernel that holds little is told of its two programs: the assembler by itself spilled 8 bytes to fit one more
    # (sm_80, long rows; sm_100, no parameters). Others hold more than that share of the registers, or just as much.
    lean = not branched and (long or (weight is None and bias is None and num_warps <= 16))
    side_by_side = 2 if lean else None
    shared = (weight, bias, gate)
    inputs = (h_rows, *_rows(x, weight, gate))
    operands = (*inputs, dy, dh_out, bias, seed)
    which = {"ROWS": any(needs[i] for i in (0, 1, 4)), "CENTER": center}
    if long:
        free = {"BLOCK_D": BLOCK_D, "num_warps": num_warps, "programs": 2}
        meta = measured(long_norm.backward, operands, free, **which)
    else:
        free = {"BLOCK_N": BLOCK_N, "num_warps": num_warps, "programs": 2}
        meta = measured(_backward, operands, free, BLOCK_D=BLOCK_D, **which)
    column_blocks = triton.cdiv(D, meta["BLOCK_D"])
    wanted = meta.pop("programs") * multiprocessors(device)
    P = programs(T, meta.get("BLOCK_N", 1), wanted, G * column_blocks)
    partial = [partial_sums(t, P) if need else None for t, need in zip(shared, needs[2:5], strict=True)]
    pointers = (dy, dh_out, *inputs, seed, mean, rstd)
    outputs = (dh, dx, *partial)
    sizes = (*_strides(inputs), P, T, D, weight_offset, threshold, scale)
    if h.numel() == 0:
        for unwritten in partial:
            if unwritten is not None:
                unwritten.zero_()
    elif long:
        mean_gn = torch.empty(N, dtype=torch.float32, device=device)
        mean_g = torch.empty(N, dtype=torch.float32, device=device) if center else None
        w = inputs[2]
        free = {"BLOCK_D": BLOCK_D, "num_warps": num_warps}
        launch(long_norm.row_means, (N,),
            dy, h_rows, w, mean, rstd, mean_gn, mean_g, h_rows.stride(0), *_strides((w,)), T, D, weight_offset,
            side_by_side=side_by_side, **measured(long_norm.row_means, (dy, h_rows, w), free, CENTER=center),
        )  # fmt: skip
        launch(long_norm.backward, (P * G, column_blocks),
            *pointers, mean_gn, mean_g, *outputs, *sizes, side_by_side=side_by_side, **meta,
        )  # fmt: skip
    else:
        launch(_backward, (P * G,), *pointers, *outputs, *sizes, side_by_side=side_by_side, **meta)
    dshared = (None if s is None else group_sum(s, t) for s, t in zip(partial, shared, strict=True))
    return (dx if branched else dh), dh, *dshared, None


def tile(D: int, T: int | None = None) -> tuple[int, int, int]:
    """Rows and elements of a tile that spans whole rows of D, T in a group, and the warps that work on it."""
    BLOCK_D = triton.next_power_of_2(D)
    BLOCK_N = 1 if T == 1 else max(1, 4096 // BLOCK_D)
    return BLOCK_N, BLOCK_D, min(32, max(1, BLOCK_N * BLOCK_D // 512))


def _is_long(D: int, gate: Tensor | None, seed: Tensor | None) -> bool:
    most = MAX_TILE if gate is None and seed is None else MAX_BRANCHED_TILE
    return most < D


def _rows(*tensors: Tensor | None) -> list[Tensor | None]:
    return [None if t is None else rows(t) for t in tensors]


def _strides(tensors: Sequence[Tensor | None]) -> list[int]:
    return [0 if t is None else t.stride(0) for t in tensors]
