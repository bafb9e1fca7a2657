"""Dropout of N rows of D elements, one row every ``x_stride`` elements; the backward pass is the same of dy.

    y = x·scale where kept(seed, n, d), else 0

The seed is read from memory, so that a CUDA graph replays with a new one. The keys of a row are hashed once a row and
tile; an element costs two mixes, about 18 integer instructions: at 8 bytes an element in and out (float32) an H100 has
time for some 40 before memory stops being the limit, in bfloat16 for 20. One tile of 2,048 elements a program, as in
glu.py.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import elementwise_tiles, launch, rows


@triton.jit
def mix(b):
    """A hash of 32 bits."""
    b ^= b >> 15
    b *= 0x2C1B3C6D
    b ^= b >> 12
    b *= 0x297A2D39
    return b ^ (b >> 15)


@triton.jit
def row_keys(seed, n):
    """The two keys of each row in n; ``seed`` points to 64 bits."""
    key = tl.load(seed)
    first = mix(key.to(tl.uint32))
    second = mix(first ^ (key >> 32).to(tl.uint32))
    low = n.to(tl.uint32)
    high = (n.to(tl.int64) >> 32).to(tl.uint32)
    return mix(mix(low ^ first) ^ high ^ second), mix(mix(low + second) ^ high ^ first)


@triton.jit
def kept_in_row(k1, k2, d, threshold):
    """Whether the elements d of rows with these keys stay; d and the keys broadcast."""
    bits = mix(mix(d.to(tl.uint32) ^ k1) ^ k2)
    return (bits >> 1).to(tl.int32) >= threshold


@triton.jit
def kept(seed, n, d, threshold):
    """Whether element d of row n stays: [n, d]."""
    k1, k2 = row_keys(seed, n)
    return kept_in_row(k1[:, None], k2[:, None], d[None, :], threshold)


@triton.jit
def _dropout(x, seed, y, x_stride, N, D, threshold, scale, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr):
    blocks = tl.cdiv(D, BLOCK_D)
    n = (tl.program_id(0) // blocks).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    d = (tl.program_id(0) % blocks) * BLOCK_D + tl.arange(0, BLOCK_D)
    mask = (n < N)[:, None] & (d < D)[None, :]
    value = tl.load(x + n[:, None] * x_stride + d[None, :], mask, other=0.0).to(tl.float32) * scale
    value = tl.where(kept(seed, n, d, threshold), value, 0.0)
    tl.store(y + n[:, None] * D + d[None, :], value.to(y.dtype.element_ty), mask)


def forward(x, seed, *, threshold: int, scale: float):
    """Return y, and what the backward pass needs: the seed."""
    return _launch(x, seed, threshold, scale), (seed,)


def backward(grads, saved, needs, *, threshold: int, scale: float):
    """Return the gradient of x."""
    return _launch(grads[0], saved[0], threshold, scale), None


def _launch(x: Tensor, seed: Tensor, threshold: int, scale: float) -> Tensor:
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if x.numel():
        x_rows = rows(x)
        N, D = x_rows.shape
        grid, meta = elementwise_tiles(_dropout, (x_rows,), N, D)
        launch(_dropout, grid, x_rows, seed, y, x_rows.stride(0), N, D, threshold, scale, **meta)
    return y
