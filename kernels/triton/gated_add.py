"""A gated residual: N rows of D elements, of which T consecutive ones, a group, share a row a of the gate.

    forward   h = residual + a·x
    backward  dx = a·dh        da = Σ_group dh·x        the residual's gradient is dh

Memory-bound. A program owns a block of 256 columns of one group, 512 bytes of bf16 in a row, and walks down tiles of
4,096 elements (8 warps: 16 elements, two 16-byte accesses of bf16, a thread), so that the gate is read once and its
gradient stays in registers. Where every token has a gate of its own there is nothing to keep: a block of 2,048 columns
of one row. A second kernel adds up what the programs of a group found, in a fixed order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .launch import group_sum, groups, launch, multiprocessors, partial_sums, programs, rows
from .launch_table import measured


@triton.jit
def _forward(
    residual, x, gate, h, residual_stride, x_stride, gate_stride, P, T, D, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr
):
    group = (tl.program_id(0) // P).to(tl.int64)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    a = tl.load(gate + group * gate_stride + d, d < D, other=0.0).to(tl.float32)
    for tile in range(tl.program_id(0) % P, tl.cdiv(T, BLOCK_N), P):
        t = tile * BLOCK_N + tl.arange(0, BLOCK_N)
        n = (group * T + t)[:, None]
        mask = (t < T)[:, None] & (d < D)[None, :]
        row = tl.load(x + n * x_stride + d[None, :], mask, other=0.0).to(tl.float32) * a[None, :]
        row += tl.load(residual + n * residual_stride + d[None, :], mask, other=0.0).to(tl.float32)
        tl.store(h + n * D + d[None, :], row.to(h.dtype.element_ty), mask)


@triton.jit
def _backward(
    dh, x, gate, dx, dgate_partial, dh_stride, x_stride, gate_stride, P, T, D,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    group = (tl.program_id(0) // P).to(tl.int64)
    p = tl.program_id(0) % P
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    a = tl.load(gate + group * gate_stride + d, d < D, other=0.0).to(tl.float32)
    dgate = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    for tile in range(p, tl.cdiv(T, BLOCK_N), P):
        t = tile * BLOCK_N + tl.arange(0, BLOCK_N)
        n = (group * T + t)[:, None]
        mask = (t < T)[:, None] & (d < D)[None, :]
        g = tl.load(dh + n * dh_stride + d[None, :], mask, other=0.0).to(tl.float32)
        if dgate_partial is not None:
            dgate += g * tl.load(x + n * x_stride + d[None, :], mask, other=0.0).to(tl.float32)
        if dx is not None:
            tl.store(dx + n * D + d[None, :], (g * a[None, :]).to(dx.dtype.element_ty), mask)
    if dgate_partial is not None:
        at = (p * (tl.num_programs(0) // P) + group) * D + d
        tl.store(dgate_partial + at, tl.sum(dgate, 0).to(dgate_partial.dtype.element_ty), d < D)


def forward(residual, x, gate):
    """Return h, and what the backward pass needs: x and the gate."""
    h = torch.empty(x.shape, dtype=torch.promote_types(x.dtype, residual.dtype), device=x.device)
    if x.numel():
        inputs = [rows(t) for t in (residual, x, gate)]
        G, T, D, P, column_blocks, meta = _blocks(_forward, inputs, gate, 4)
        strides = [t.stride(0) for t in inputs]
        launch(_forward, (P * G, column_blocks), *inputs, h, *strides, P, T, D, **meta)
    return h, (x, gate)


def backward(grads, saved, needs):
    """Return the gradients of the residual, x and the gate."""
    x, gate = saved
    (dh,) = grads
    if x.numel() == 0:
        return dh, torch.zeros_like(x), torch.zeros_like(gate)
    inputs = [rows(t) for t in (dh, x, gate)]
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device) if needs[1] else None
    G, T, D, P, column_blocks, meta = _blocks(_backward, [*inputs, dx], gate, 2)
    partial = partial_sums(gate, P) if needs[2] else None
    strides = [t.stride(0) for t in inputs]
    launch(_backward, (P * G, column_blocks), *inputs, dx, partial, *strides, P, T, D, **meta)
    return dh, dx, None if partial is None else group_sum(partial, gate)


def _blocks(kernel, operands, gate, per_multiprocessor: int):
    """Groups, rows of one and columns; programs for a group and blocks of columns; and the sizes of a block."""
    N, D = operands[1].shape
    G, T = groups(N, D, gate)
    BLOCK_D = min(2048 if T == 1 else 256, triton.next_power_of_2(D))
    BLOCK_N = min(4096 // BLOCK_D, triton.next_power_of_2(T))
    free = {"BLOCK_N": BLOCK_N, "BLOCK_D": BLOCK_D, "num_warps": max(1, BLOCK_N * BLOCK_D // 512)}
    meta = measured(kernel, operands, {**free, "programs": per_multiprocessor})
    column_blocks = triton.cdiv(D, meta["BLOCK_D"])
    wanted = meta.pop("programs") * multiprocessors(operands[0].device)
    return G, T, D, programs(T, meta["BLOCK_N"], wanted, G * column_blocks), column_blocks, meta
