"""Gated linear units: N rows of D elements, gate and up each one row every ``gate_stride``, ``up_stride`` elements.

    forward   y  = act(g)·u
    backward  dg = dy·u·act'(g)      du = dy·act(g)

Memory-bound, with nothing to reduce: one tile of 2,048 elements a program (4 warps: 16 elements, two 16-byte accesses
of bf16, a thread). The backward pass recomputes act(g), which costs nothing beside the reads. Row strides let both
halves of a packed tensor, and both halves of its gradient, be read and written where they are. Where every tensor is
contiguous, they are one long row: no row end, and so no misaligned row start, interrupts the 16-byte accesses.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .activations import act
from .launch import elementwise_tiles, launch, rows


@triton.jit
def _forward(
    gate, up, y, gate_stride, up_stride, N, D,
    ACTIVATION: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(D, BLOCK_D)
    n = (tl.program_id(0) // blocks).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)[:, None]
    d = (tl.program_id(0) % blocks).to(tl.int64) * BLOCK_D + tl.arange(0, BLOCK_D)[None, :]
    mask = (n < N) & (d < D)
    g = tl.load(gate + n * gate_stride + d, mask, other=0.0).to(tl.float32)
    u = tl.load(up + n * up_stride + d, mask, other=0.0).to(tl.float32)
    activated, _ = act(g, u, ACTIVATION)
    tl.store(y + n * D + d, (activated * u).to(y.dtype.element_ty), mask)


@triton.jit
def _backward(
    dy, gate, up, dgate, dup, dy_stride, gate_stride, up_stride, gradient_stride, N, D,
    ACTIVATION: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(D, BLOCK_D)
    n = (tl.program_id(0) // blocks).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)[:, None]
    d = (tl.program_id(0) % blocks).to(tl.int64) * BLOCK_D + tl.arange(0, BLOCK_D)[None, :]
    mask = (n < N) & (d < D)
    dout = tl.load(dy + n * dy_stride + d, mask, other=0.0).to(tl.float32)
    g = tl.load(gate + n * gate_stride + d, mask, other=0.0).to(tl.float32)
    u = tl.load(up + n * up_stride + d, mask, other=0.0).to(tl.float32)
    activated, pulled = act(g, dout * u, ACTIVATION)
    if dgate is not None:
        tl.store(dgate + n * gradient_stride + d, pulled.to(dgate.dtype.element_ty), mask)
    if dup is not None:
        tl.store(dup + n * gradient_stride + d, (dout * activated).to(dup.dtype.element_ty), mask)


def forward(gate, up, *, activation: str):
    """Return y, and what the backward pass needs: gate and up themselves."""
    y = torch.empty(gate.shape, dtype=torch.promote_types(gate.dtype, up.dtype), device=gate.device)
    g, u = _rows(gate, up)
    _launch_forward(g, u, y, activation)
    return y, (gate, up)


def backward(grads, saved, needs, *, activation: str):
    """Return the gradients of gate and up."""
    gate, up = saved
    dgate, dup = (
        torch.empty(t.shape, dtype=t.dtype, device=t.device) if need else None
        for t, need in zip(saved, needs, strict=True)
    )
    dy, g, u = _rows(grads[0], gate, up)
    _launch_backward(dy, g, u, dgate, dup, g.shape[-1], activation)
    return dgate, dup


def packed_forward(x, *, activation: str, gate_first: bool):
    """Return y, and what the backward pass needs: x itself."""
    y = torch.empty(*x.shape[:-1], x.shape[-1] // 2, dtype=x.dtype, device=x.device)
    gate, up = _halves(rows(x), gate_first)
    _launch_forward(gate, up, y, activation)
    return y, (x,)


def packed_backward(grads, saved, needs, *, activation: str, gate_first: bool):
    """Return the gradient of x, both halves written in place."""
    (x,) = saved
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    gate, up = _halves(rows(x), gate_first)
    dgate, dup = _halves(rows(dx), gate_first)
    _launch_backward(rows(grads[0]), gate, up, dgate, dup, dx.shape[-1], activation)
    return (dx,)


def _rows(*tensors: Tensor) -> list[Tensor]:
    """The tensors as rows; as one long row if all are contiguous."""
    if all(t.is_contiguous() for t in tensors):
        return [t.view(1, -1) for t in tensors]
    return [rows(t) for t in tensors]


def _halves(x: Tensor, gate_first: bool) -> tuple[Tensor, Tensor]:
    """Gate and up of packed rows [N, 2D]."""
    first, second = x.chunk(2, -1)
    return (first, second) if gate_first else (second, first)


def _launch_forward(gate: Tensor, up: Tensor, y: Tensor, activation: str) -> None:
    if gate.numel():
        N, D = gate.shape
        grid, meta = elementwise_tiles(_forward, (gate, up), N, D, ACTIVATION=activation)
        launch(_forward, grid, gate, up, y, gate.stride(0), up.stride(0), N, D, **meta)


def _launch_backward(dy, gate, up, dgate, dup, gradient_stride: int, activation: str) -> None:
    if gate.numel():
        N, D = gate.shape
        grid, meta = elementwise_tiles(_backward, (dy, gate, up, dgate, dup), N, D, ACTIVATION=activation)
        strides = (dy.stride(0), gate.stride(0), up.stride(0), gradient_stride)
        launch(_backward, grid, dy, gate, up, dgate, dup, *strides, N, D, **meta)
