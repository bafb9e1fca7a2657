"""Rotary position embedding: T tokens of H heads of D elements, of which the first R turn and the rest pass through.

    forward   y₁ = x₁c₁ − x₂s₁      y₂ = x₂c₂ + x₁s₂
    backward  the transposed rotation: the same of dy, with s₁, s₂ ← −s₂, −s₁

"Heads" are whatever dims cos and sin are broadcast over, "tokens" whatever dims they differ along. A program turns a
tile of about 4,096 elements (4 warps: 16 pairs, two 16-byte accesses of bf16 on either side, a thread; one on each side
where a warp has 64 threads): all heads of one token if there are 32 of 128. Its cos and sin are read once and serve up
to HEAD_TILES such tiles, so that they add at most 1 / (BLOCK_H · HEAD_TILES) to the traffic.

The result lies in memory as x does, and both are addressed through their strides: Hugging Face's transposed
[B, H, S, D] queries are read and written as the [B, S, H, D] that they are, with no copy. The q and k of a packed qkv
are such a view, and one launch rotates both, also in place: a program has read what it writes before it writes it. If
they are not in place, v passes through a second launch in which nothing turns.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import launch
from .launch_table import measured

TILE = 4096
MAX_PAIRS = 1024
HEAD_TILES = 4  # passed at run time: unrolled, the loop over them ran out of predicate registers on sm_80 and sm_100


@triton.jit
def _rotate(
    x, cos, sin, y, T, T1, H, H1, D, R, head_tiles,
    x_t0, x_t1, x_h0, x_h1, y_t0, y_t1, y_h0, y_h1, cos_t0, cos_t1, sin_t0, sin_t1,
    INTERLEAVED: tl.constexpr, TRANSPOSE: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_REST: tl.constexpr,
):  # fmt: skip
    t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    t0 = (t // T1).to(tl.int64)
    t1 = (t % T1).to(tl.int64)
    x_token = (t0 * x_t0 + t1 * x_t1)[:, None, None]
    y_token = (t0 * y_t0 + t1 * y_t1)[:, None, None]
    cos_token = (t0 * cos_t0 + t1 * cos_t1)[:, None]
    sin_token = (t0 * sin_t0 + t1 * sin_t1)[:, None]
    token = t < T
    first_head = tl.program_id(1) * (BLOCK_H * head_tiles)
    half = R // 2

    for start in range(0, half, BLOCK_P):
        if INTERLEAVED:
            # Neighbours are loaded together and split in registers: an element's pair is in the same 16 bytes.
            d = 2 * start + tl.arange(0, 2 * BLOCK_P)
            in_row = token[:, None] & (d < R)[None, :]
            c = tl.load(cos + cos_token + d[None, :], in_row, other=0.0).to(tl.float32)
            s = tl.load(sin + sin_token + d[None, :], in_row, other=0.0).to(tl.float32)
            c1, c2 = tl.split(tl.reshape(c, [BLOCK_T, BLOCK_P, 2]))
            s1, s2 = tl.split(tl.reshape(s, [BLOCK_T, BLOCK_P, 2]))
        else:
            d = start + tl.arange(0, BLOCK_P)
            in_row = token[:, None] & (d < half)[None, :]
            c1 = tl.load(cos + cos_token + d[None, :], in_row, other=0.0).to(tl.float32)
            c2 = tl.load(cos + cos_token + half + d[None, :], in_row, other=0.0).to(tl.float32)
            s1 = tl.load(sin + sin_token + d[None, :], in_row, other=0.0).to(tl.float32)
            s2 = tl.load(sin + sin_token + half + d[None, :], in_row, other=0.0).to(tl.float32)
        if TRANSPOSE:
            s1, s2 = -s2, -s1
        c1 = c1[:, None, :]
        c2 = c2[:, None, :]
        s1 = s1[:, None, :]
        s2 = s2[:, None, :]
        for head_tile in range(head_tiles):
            h = first_head + head_tile * BLOCK_H + tl.arange(0, BLOCK_H)
            h0 = (h // H1).to(tl.int64)
            h1 = (h % H1).to(tl.int64)
            mask = in_row[:, None, :] & (h < H)[None, :, None]
            x_at = x + x_token + (h0 * x_h0 + h1 * x_h1)[None, :, None] + d[None, None, :]
            y_at = y + y_token + (h0 * y_h0 + h1 * y_h1)[None, :, None] + d[None, None, :]
            if INTERLEAVED:
                pairs = tl.load(x_at, mask, other=0.0).to(tl.float32)
                x1, x2 = tl.split(tl.reshape(pairs, [BLOCK_T, BLOCK_H, BLOCK_P, 2]))
                turned = tl.join(x1 * c1 - x2 * s1, x2 * c2 + x1 * s2)
                turned = tl.reshape(turned, [BLOCK_T, BLOCK_H, 2 * BLOCK_P])
                tl.store(y_at, turned.to(y.dtype.element_ty), mask)
            else:
                x1 = tl.load(x_at, mask, other=0.0).to(tl.float32)
                x2 = tl.load(x_at + half, mask, other=0.0).to(tl.float32)
                tl.store(y_at, (x1 * c1 - x2 * s1).to(y.dtype.element_ty), mask)
                tl.store(y_at + half, (x2 * c2 + x1 * s2).to(y.dtype.element_ty), mask)

    if BLOCK_REST > 0:
        for start in range(R, D, BLOCK_REST):
            d = start + tl.arange(0, BLOCK_REST)
            for head_tile in range(head_tiles):
                h = first_head + head_tile * BLOCK_H + tl.arange(0, BLOCK_H)
                h0 = (h // H1).to(tl.int64)
                h1 = (h % H1).to(tl.int64)
                mask = token[:, None, None] & (h < H)[None, :, None] & (d < D)[None, None, :]
                x_at = x + x_token + (h0 * x_h0 + h1 * x_h1)[None, :, None] + d[None, None, :]
                y_at = y + y_token + (h0 * y_h0 + h1 * y_h1)[None, :, None] + d[None, None, :]
                tl.store(y_at, tl.load(x_at, mask), mask)


def forward(x, cos, sin, *, interleaved: bool):
    """Return the rotated x, and what the backward pass needs: cos and sin."""
    return turned(x, cos, sin, interleaved), (cos, sin)


def backward(grads, saved, needs, *, interleaved: bool):
    """Return the gradient of x: the cotangent under the transposed rotation."""
    cos, sin = saved
    return turned(grads[0], cos, sin, interleaved, transpose=True), None, None


def packed_forward(qkv, cos, sin, *, dim: int, turning: int, interleaved: bool, inplace: bool):
    """Return qkv with its first entries along dim, q and k, rotated, and what the backward pass needs: cos and sin."""
    if not inplace:
        return _packed(qkv, cos, sin, dim, turning, interleaved), (cos, sin)
    qk = qkv.narrow(dim, 0, turning)[..., : cos.shape[-1]]
    if qk.stride(-1) == 1:
        _turn(qk, qk, cos, sin, interleaved)
    else:
        qk.copy_(turned(qk, cos, sin, interleaved))
    return qkv, (cos, sin)


def packed_backward(grads, saved, needs, *, dim: int, turning: int, interleaved: bool, inplace: bool):
    """Return the gradient of qkv: never in place, as autograd may hand the same cotangent to others."""
    cos, sin = saved
    return _packed(grads[0], cos, sin, dim, turning, interleaved, transpose=True), None, None


def turned(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, transpose: bool = False) -> Tensor:
    """x rotated, or under the transposed rotation, in x's order of dims."""
    x = adjacent(x)
    y = torch.empty_like(x)
    _turn(x, y, cos, sin, interleaved, transpose)
    return y


def _packed(
    qkv: Tensor, cos: Tensor, sin: Tensor, dim: int, turning: int, interleaved: bool, transpose: bool = False
) -> Tensor:
    qkv = adjacent(qkv)
    y = torch.empty_like(qkv)
    sizes = (turning, qkv.shape[dim] - turning)
    (qk, v), (qk_turned, v_copied) = qkv.split(sizes, dim), y.split(sizes, dim)
    _turn(qk, qk_turned, cos, sin, interleaved, transpose)
    _turn(v, v_copied, cos[..., :0], sin[..., :0], interleaved)  # nothing turns: all passes through
    return y


def adjacent(x: Tensor) -> Tensor:
    """x, copied only if the elements of a row are not adjacent."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _turn(x: Tensor, y: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, transpose: bool = False) -> None:
    """Write the rotated x into y; both have adjacent elements in a row, and may be one tensor."""
    if x.numel() == 0:
        return
    D, R = x.shape[-1], cos.shape[-1]
    cos, sin = adjacent(cos), adjacent(sin)
    found = axes((x, y), cos, sin)
    if found is None:
        rows, tables = flat(x, cos, sin)
        y.copy_(turned(rows, *tables, interleaved=interleaved, transpose=transpose).view(x.shape))
        return
    T, T1, H, H1 = sizes(found)
    rows = max(1, TILE // triton.next_power_of_2(D))
    BLOCK_H = min(rows, triton.next_power_of_2(H))
    BLOCK_T = min(rows // BLOCK_H, triton.next_power_of_2(T))
    BLOCK_P = min(MAX_PAIRS, triton.next_power_of_2(max(1, R // 2)))
    BLOCK_REST = min(2 * MAX_PAIRS, triton.next_power_of_2(D - R)) if D > R else 0
    # With 512 pairs a warp, triton 3.6 spilled 40 bytes on sm_100 (interleaved, partial, tables for each token).
    num_warps = min(4, max(1, BLOCK_T * BLOCK_H * max(2 * BLOCK_P, BLOCK_REST) // 512))
    meta = measured(
        _rotate, (x, cos), {"BLOCK_T": BLOCK_T, "BLOCK_H": BLOCK_H, "BLOCK_P": BLOCK_P, "num_warps": num_warps},
        BLOCK_REST=BLOCK_REST, INTERLEAVED=interleaved, TRANSPOSE=transpose,
    )  # fmt: skip
    head_tiles = min(HEAD_TILES, triton.cdiv(H, meta["BLOCK_H"]))
    grid = (triton.cdiv(T, meta["BLOCK_T"]), triton.cdiv(H, meta["BLOCK_H"] * head_tiles))
    launch(_rotate, grid, x, cos, sin, y, T, T1, H, H1, D, R, head_tiles, *strides(found), **meta)


#: A dim's size, then its strides: in the tensors that are read or written, in cos and in sin.
Axis = tuple[int, ...]
#: Two dims of tokens, and two of heads.
Axes = tuple[Axis, Axis, Axis, Axis]


def axes(tensors: Sequence[Tensor], cos: Tensor, sin: Tensor) -> Axes | None:
    """The dims that cos and sin differ along, and those that they are broadcast over; outermost in memory first.

    What is missing has the size 1. None: two dims each cannot describe these views, which :func:`flat` has to copy.
    """
    shape = tensors[0].shape[:-1]
    cos, sin = (t.expand(*shape, t.shape[-1]) for t in (cos, sin))
    found = list(zip(shape, *(t.stride()[:-1] for t in (*tensors, cos, sin)), strict=True))
    found = sorted((axis for axis in found if axis[0] > 1), key=lambda axis: -axis[len(tensors)])
    tokens = _merged(axis for axis in found if any(axis[-2:]))
    heads = _merged(axis for axis in found if not any(axis[-2:]))
    if len(tokens) > 2 or len(heads) > 2:
        return None
    absent = (1, *[0] * (len(tensors) + 2))
    (t0, t1), (h0, h1) = ([absent] * (2 - len(some)) + some for some in (tokens, heads))
    return t0, t1, h0, h1


def sizes(found: Axes) -> tuple[int, int, int, int]:
    """(T, T1, H, H1), as the kernels take them."""
    t0, t1, h0, h1 = found
    return t0[0] * t1[0], t1[0], h0[0] * h1[0], h1[0]


def strides(found: Axes) -> tuple[int, ...]:
    """Those of tokens and heads in each tensor, then those of tokens in cos and in sin, as the kernels take them."""
    *tensors, cos, sin = list(zip(*found, strict=True))[1:]
    return tuple(stride for of in (*tensors, cos[:2], sin[:2]) for stride in of)


def flat(x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """x as rows [N, D], with a row of cos and sin for each."""
    N = x.shape[:-1].numel()
    cos, sin = (t.expand(*x.shape[:-1], t.shape[-1]).reshape(N, t.shape[-1]) for t in (cos, sin))
    return x.reshape(N, x.shape[-1]), (cos, sin)


def _merged(axes: Iterable[Axis]) -> list[Axis]:
    """The axes, each merged into the one outside it where every stride allows that."""
    merged: list[Axis] = []
    for size, *strides in axes:
        if merged and all(outer == size * inner for outer, inner in zip(merged[-1][1:], strides, strict=True)):
            merged[-1] = (merged[-1][0] * size, *strides)
        else:
            merged.append((size, *strides))
    return merged
