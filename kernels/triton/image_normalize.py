"""Normalization of uint8 images, flipped and mixed on the way: N images of C channels of H rows of W pixels.

With b the partner of image a, both flipped where their flags say so, and own = 0 inside the box, λ outside:

    v = own·a + (1 − own)·b         y = v·scale_c + shift_c         scale = 1 / (255·std), shift = −mean / std

Memory-bound: 1 byte in, 2 or 4 out. Either side may be planar (NCHW) or packed (NHWC). The unit is a group of 16 pixels
of a row: 16·C adjacent bytes of a packed image, C times 16 of a planar one, and so whole 16-byte accesses on both sides
wherever the rows are a multiple of 16 pixels long. Where the sides differ, or a flag reverses the group, its columns
are gathered anew on the way, through shuffles or shared memory. A program takes about 4,096 columns, padded to a power
of two (4 warps: two 16-byte loads a thread, and four or eight stores).

The two images are read where they count, group by group: inside the box only b, outside it without λ only a.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import launch
from .launch_table import measured

TILE = 4_096


@triton.jit
def _at(image, row, start, W, x_n, x_c, x_h, C: tl.constexpr, PACKED: tl.constexpr, PAD: tl.constexpr):
    """Where the columns of groups [G] are, [G, 16·PAD], and which of them there are."""
    at = image * x_n + row * x_h
    if PACKED:
        column = tl.arange(0, 16 * PAD)[None, :]
        element = start[:, None] * C + column
        exists = (column < 16 * C) & (element >= 0) & (element < W * C)
        return at[:, None] + element, exists
    c = tl.arange(0, PAD)[None, :, None]
    w = start[:, None, None] + tl.arange(0, 16)[None, None, :]
    at = at[:, None, None] + c.to(tl.int64) * x_c + w
    exists = (c < C) & (w >= 0) & (w < W)
    G: tl.constexpr = start.shape[0]
    return tl.reshape(at, [G, 16 * PAD]), tl.reshape(exists, [G, 16 * PAD])


@triton.jit
def _column(C: tl.constexpr, PACKED: tl.constexpr, PAD: tl.constexpr):
    """The channel and the pixel of each column of a group."""
    column = tl.arange(0, 16 * PAD)
    if PACKED:
        return column % C, tl.minimum(column // C, 15)
    return column // 16, column % 16


@triton.jit
def _pixels(
    x, flip, image, row, group, read, W, x_n, x_c, x_h,
    C: tl.constexpr, PACKED: tl.constexpr, TO_PACKED: tl.constexpr, PAD: tl.constexpr,
):  # fmt: skip
    """The groups of an image as the result has them."""
    start = group * 16
    mirrored = 0
    if flip is not None:
        mirrored = tl.load(flip + image).to(tl.int32)
        # Multiplied, not selected: so the compiler sees that it stays a multiple of 16.
        start = mirrored * (W - 16) + (1 - 2 * mirrored) * start
    at, exists = _at(image, row, start, W, x_n, x_c, x_h, C, PACKED, PAD)
    v = tl.load(x + at, exists & read[:, None], other=0).to(tl.float32)
    if flip is not None or PACKED != TO_PACKED:
        c, p = _column(C, TO_PACKED, PAD)
        p = mirrored * 15 + (1 - 2 * mirrored) * p
        source = p * C + c if PACKED else c * 16 + p
        v = tl.gather(v, tl.broadcast_to(source[None, :], v.shape), 1)
    return v


@triton.jit
def _normalize(
    x, y, table, flip, partner, lam, box, N, H, W, groups, blocks, x_n, x_c, x_h, y_n, y_c, y_h, lam_n, box_n,
    C: tl.constexpr, PACKED: tl.constexpr, TO_PACKED: tl.constexpr, PAD: tl.constexpr, BLOCK_G: tl.constexpr,
):  # fmt: skip
    n = (tl.program_id(0) // blocks).to(tl.int64)
    t = (tl.program_id(0) % blocks) * BLOCK_G + tl.arange(0, BLOCK_G)
    row = (t // groups).to(tl.int64)
    group = t % groups
    there = t < H * groups
    c, p = _column(C, TO_PACKED, PAD)
    if partner is None:
        v = _pixels(x, flip, n, row, group, there, W, x_n, x_c, x_h, C, PACKED, TO_PACKED, PAD)
    else:
        asked = tl.load(partner + n)
        other = tl.minimum(tl.maximum(asked, 0), N - 1)
        # As a block: the interpreter spreads a boolean scalar into a mask that it does not take.
        valid = tl.full([BLOCK_G], asked, tl.int64) == other
        own = 1.0
        if lam is not None:
            own = tl.load(lam + n * lam_n).to(tl.float32)
        weight = tl.full([BLOCK_G, 16 * PAD], own, tl.float32)
        a_counts = there
        b_counts = there & valid
        if box is not None:
            x1 = tl.load(box + n * box_n)
            y1 = tl.load(box + n * box_n + 1)
            x2 = tl.load(box + n * box_n + 2)
            y2 = tl.load(box + n * box_n + 3)
            beside = (row >= y1) & (row < y2)
            w = group[:, None] * 16 + p[None, :]
            weight = tl.where(beside[:, None] & (w >= x1) & (w < x2), 0.0, weight)
            last = tl.minimum(group * 16 + 16, W)
            a_counts = there & ~(beside & (group * 16 >= x1) & (last <= x2))
            if lam is None:
                b_counts = b_counts & beside & (last > x1) & (group * 16 < x2)
        a = _pixels(x, flip, n, row, group, a_counts, W, x_n, x_c, x_h, C, PACKED, TO_PACKED, PAD)
        b = _pixels(x, flip, other, row, group, b_counts, W, x_n, x_c, x_h, C, PACKED, TO_PACKED, PAD)
        # A partner out of range shows as NaN, as a target out of range does.
        v = tl.where(valid[:, None], weight * a + (1.0 - weight) * b, float("nan"))
    scale = tl.zeros([16 * PAD], tl.float32)
    shift = tl.zeros([16 * PAD], tl.float32)
    for channel in tl.static_range(C):
        scale = tl.where(c == channel, tl.load(table + channel), scale)
        shift = tl.where(c == channel, tl.load(table + C + channel), shift)
    v = v * scale[None, :] + shift[None, :]
    at, exists = _at(n, row, group * 16, W, y_n, y_c, y_h, C, TO_PACKED, PAD)
    tl.store(y + at, v.to(y.dtype.element_ty), exists & there[:, None])


def forward(x, flip, partner, lam, box, out, *, mean, std, dtype: torch.dtype, channels_last: bool):
    """Return the normalized images, in ``out`` if there is one."""
    N, C, H, W = x.shape
    layout = torch.channels_last if channels_last else torch.contiguous_format
    y = torch.empty(x.shape, dtype=dtype, device=x.device, memory_format=layout) if out is None else out
    if not y.numel():
        return y
    packed = x.stride(1) == 1 and x.stride(3) == C and C > 1
    if not packed and x.stride(3) != 1 and W > 1:
        x = x.contiguous()
    if partner is not None:
        partner = partner.contiguous()
    if lam is not None:
        lam = lam.contiguous()
    if box is not None:
        box = box.contiguous()
    PAD = triton.next_power_of_2(C)
    meta = measured(
        _normalize, (x, y, flip, partner, lam, box), {"BLOCK_G": max(1, TILE // (16 * PAD)), "num_warps": 4},
        C=C, PACKED=packed, TO_PACKED=channels_last and C > 1, PAD=PAD,
    )  # fmt: skip
    groups = triton.cdiv(W, 16)
    blocks = triton.cdiv(H * groups, meta["BLOCK_G"])
    launch(_normalize, (N * blocks,),
        x, y, _table(tuple(mean), tuple(std), x.device), None if flip is None else flip.contiguous().view(torch.uint8),
        partner, lam, box, N, H, W, groups, blocks, x.stride(0), x.stride(1), x.stride(2),
        y.stride(0), y.stride(1), y.stride(2),
        0 if lam is None or lam.numel() == 1 else 1, 0 if box is None or box.dim() == 1 else 4, **meta,
    )  # fmt: skip
    return y


@functools.cache
def _table(mean: tuple[float, ...], std: tuple[float, ...], device: torch.device) -> Tensor:
    """The factor and the summand of each channel, [2, C], rounded once."""
    scale = [1.0 / (255.0 * s) for s in std]
    shift = [-m / s for m, s in zip(mean, std, strict=True)]
    return torch.tensor([scale, shift], dtype=torch.float32, device=device)
