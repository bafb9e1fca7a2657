"""Normalization of heads, then rotary position embedding, in one pass: T tokens of H heads of D elements.

The first R elements turn, in pairs, and the rest passes through. With n = (x − μ)·r and z = n·(w + offset) + b as in
norm.py, and c and s as in rope.py:

    forward   y₁ = z₁c₁ − z₂s₁       y₂ = z₂c₂ + z₁s₂        y₃ = z₃
    backward  dz₁ = dy₁c₁ + dy₂s₂    dz₂ = dy₂c₂ − dy₁s₁     dz₃ = dy₃
              g = dz·(w + offset)    dx = r·(g − n·mean(g·n) − [CENTER] mean(g))
              dw = Σ dz·n            db = Σ dz

Memory-bound. A tile holds whole heads, about 2,048 elements (2 warps: 32 elements, two 16-byte accesses of bf16 in
either half, a thread; one in each where a warp has 64 threads). The backward pass holds x, dy and the sums of dw and
db: up to 255 registers a thread, so larger tiles would spill, and fewer elements a thread would narrow the accesses.
Programs are few and long-lived, as in norm.py, for the same reason: 8 on each multiprocessor, 4 in the backward pass,
keep 32 KB of bf16 in flight. cos and sin are read once for up to HEAD_TILES tiles of heads, as in rope.py. The backward
pass has whole rows of x at hand and computes μ and r again: saved, those of a head of 128 bf16 would add 1 to 3 % to
the traffic.

A head of more than MAX_HEAD elements, which no model has, goes through the kernels of norm.py and rope.py in turn.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from . import norm, rope
from .launch import column_sum, contiguous, launch, multiprocessors
from .launch_table import measured

TILE = 2048
MAX_HEAD = 2048
HEAD_TILES = 4


@triton.jit
def _load(
    pointer, at, inside, R, D,
    INTERLEAVED: tl.constexpr, A: tl.constexpr, B: tl.constexpr, P: tl.constexpr, REST: tl.constexpr,
):  # fmt: skip
    """[A, B] rows in float32: of every pair the first elements, the second, and the elements that do not turn."""
    if INTERLEAVED:
        d = tl.arange(0, 2 * P)[None, None, :]
        pairs = tl.load(pointer + at + d, inside & (d < R), other=0.0).to(tl.float32)
        first, second = tl.split(tl.reshape(pairs, [A, B, P, 2]))
    else:
        d = tl.arange(0, P)[None, None, :]
        mask = inside & (d < R // 2)
        first = tl.load(pointer + at + d, mask, other=0.0).to(tl.float32)
        second = tl.load(pointer + at + R // 2 + d, mask, other=0.0).to(tl.float32)
    rest = first  # unused where all turn
    if REST > 0:
        d = R + tl.arange(0, REST)[None, None, :]
        rest = tl.load(pointer + at + d, inside & (d < D), other=0.0).to(tl.float32)
    return first, second, rest


@triton.jit
def _turns(table, at, token, R, INTERLEAVED: tl.constexpr, A: tl.constexpr, P: tl.constexpr):
    """A row of cos or sin for each token."""
    first, second, _ = _load(table, at, token, R, R, INTERLEAVED, A, 1, P, 0)
    return first, second


@triton.jit
def _store(
    pointer, at, inside, first, second, rest, R, D,
    INTERLEAVED: tl.constexpr, A: tl.constexpr, B: tl.constexpr, P: tl.constexpr, REST: tl.constexpr,
):  # fmt: skip
    dtype = pointer.dtype.element_ty
    if INTERLEAVED:
        d = tl.arange(0, 2 * P)[None, None, :]
        pairs = tl.reshape(tl.join(first, second), [A, B, 2 * P])
        tl.store(pointer + at + d, pairs.to(dtype), inside & (d < R))
    else:
        d = tl.arange(0, P)[None, None, :]
        mask = inside & (d < R // 2)
        tl.store(pointer + at + d, first.to(dtype), mask)
        tl.store(pointer + at + R // 2 + d, second.to(dtype), mask)
    if REST > 0:
        d = R + tl.arange(0, REST)[None, None, :]
        tl.store(pointer + at + d, rest.to(dtype), inside & (d < D))


@triton.jit
def _sum(first, second, rest, REST: tl.constexpr):
    total = tl.sum(first, 2) + tl.sum(second, 2)
    if REST > 0:
        total += tl.sum(rest, 2)
    return total[:, :, None]


@triton.jit
def _normed(x1, x2, x3, inside, R, D, per_element, eps, CENTER: tl.constexpr, P: tl.constexpr, REST: tl.constexpr):
    """n of rows, and r; both 0 in rows that are not inside."""
    if CENTER:
        mu = _sum(x1, x2, x3, REST) * per_element
        turning = tl.arange(0, P)[None, None, :] < R // 2
        # Where there is no element, x is 0 and stays it. To select after subtracting spilled 8 bytes on sm_100.
        x1 -= tl.where(turning, mu, 0.0)
        x2 -= tl.where(turning, mu, 0.0)
        if REST > 0:
            x3 -= tl.where(R + tl.arange(0, REST)[None, None, :] < D, mu, 0.0)
    # With exact divisions and roots, which are subroutines, the backward pass spilled 8 bytes on sm_90.
    r = tl.where(inside, tl.rsqrt(_sum(x1 * x1, x2 * x2, x3 * x3, REST) * per_element + eps), 0.0)
    return x1 * r, x2 * r, x3 * r, r


@triton.jit
def _tokens(tile, groups, T, T1, BLOCK_T: tl.constexpr):
    """The tokens of a tile as two indices, and whether they exist."""
    t = tile // groups * BLOCK_T + tl.arange(0, BLOCK_T)[:, None, None]
    return (t // T1).to(tl.int64), (t % T1).to(tl.int64), t < T


@triton.jit
def _heads(tile, groups, head_tile, head_tiles, H, H1, BLOCK_H: tl.constexpr):
    h = (tile % groups * head_tiles + head_tile) * BLOCK_H + tl.arange(0, BLOCK_H)[None, :, None]
    return (h // H1).to(tl.int64), (h % H1).to(tl.int64), h < H


@triton.jit
def _forward(
    x, weight, bias, cos, sin, y, T, T1, H, H1, D, R, head_tiles, eps, offset,
    x_t0, x_t1, x_h0, x_h1, y_t0, y_t1, y_h0, y_h1, cos_t0, cos_t1, sin_t0, sin_t1,
    CENTER: tl.constexpr, INTERLEAVED: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_REST: tl.constexpr,
):  # fmt: skip
    one_row = tl.full([1, 1, 1], 1, tl.int1)
    if weight is not None:
        w1, w2, w3 = _load(weight, 0, one_row, R, D, INTERLEAVED, 1, 1, BLOCK_P, BLOCK_REST)
    if bias is not None:
        b1, b2, b3 = _load(bias, 0, one_row, R, D, INTERLEAVED, 1, 1, BLOCK_P, BLOCK_REST)
    per_element = 1.0 / D
    groups = tl.cdiv(H, BLOCK_H * head_tiles)
    for tile in range(tl.program_id(0), tl.cdiv(T, BLOCK_T) * groups, tl.num_programs(0)):
        t0, t1, token = _tokens(tile, groups, T, T1, BLOCK_T)
        c1, c2 = _turns(cos, t0 * cos_t0 + t1 * cos_t1, token, R, INTERLEAVED, BLOCK_T, BLOCK_P)
        s1, s2 = _turns(sin, t0 * sin_t0 + t1 * sin_t1, token, R, INTERLEAVED, BLOCK_T, BLOCK_P)
        for head_tile in range(head_tiles):
            h0, h1, head = _heads(tile, groups, head_tile, head_tiles, H, H1, BLOCK_H)
            inside = token & head
            at = t0 * x_t0 + t1 * x_t1 + h0 * x_h0 + h1 * x_h1
            x1, x2, x3 = _load(x, at, inside, R, D, INTERLEAVED, BLOCK_T, BLOCK_H, BLOCK_P, BLOCK_REST)
            z1, z2, z3, _ = _normed(x1, x2, x3, inside, R, D, per_element, eps, CENTER, BLOCK_P, BLOCK_REST)
            if weight is not None:
                z1 *= w1 + offset
                z2 *= w2 + offset
                z3 *= w3 + offset
            if bias is not None:
                z1 += b1
                z2 += b2
                z3 += b3
            at = t0 * y_t0 + t1 * y_t1 + h0 * y_h0 + h1 * y_h1
            y1 = z1 * c1 - z2 * s1
            y2 = z2 * c2 + z1 * s2
            _store(y, at, inside, y1, y2, z3, R, D, INTERLEAVED, BLOCK_T, BLOCK_H, BLOCK_P, BLOCK_REST)


@triton.jit
def _store_partial(
    partial, first, second, rest, R, D, INTERLEAVED: tl.constexpr, P: tl.constexpr, REST: tl.constexpr
):  # fmt: skip
    first = tl.sum(tl.sum(first, 1), 0)[None, None, :]
    second = tl.sum(tl.sum(second, 1), 0)[None, None, :]
    rest = tl.sum(tl.sum(rest, 1), 0)[None, None, :]
    one_row = tl.full([1, 1, 1], 1, tl.int1)
    _store(partial, tl.program_id(0) * D, one_row, first, second, rest, R, D, INTERLEAVED, 1, 1, P, REST)


@triton.jit
def _backward(
    x, dy, weight, cos, sin, dx, dw_partial, db_partial, T, T1, H, H1, D, R, head_tiles, eps, offset,
    x_t0, x_t1, x_h0, x_h1, dy_t0, dy_t1, dy_h0, dy_h1, dx_t0, dx_t1, dx_h0, dx_h1, cos_t0, cos_t1, sin_t0, sin_t1,
    CENTER: tl.constexpr, INTERLEAVED: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_REST: tl.constexpr,
):  # fmt: skip
    one_row = tl.full([1, 1, 1], 1, tl.int1)
    if weight is not None:
        w1, w2, w3 = _load(weight, 0, one_row, R, D, INTERLEAVED, 1, 1, BLOCK_P, BLOCK_REST)
    dw1 = tl.zeros([BLOCK_T, BLOCK_H, BLOCK_P], tl.float32)
    dw2 = tl.zeros([BLOCK_T, BLOCK_H, BLOCK_P], tl.float32)
    dw3 = tl.zeros([BLOCK_T, BLOCK_H, max(1, BLOCK_REST)], tl.float32)
    db1 = tl.zeros([BLOCK_T, BLOCK_H, BLOCK_P], tl.float32)
    db2 = tl.zeros([BLOCK_T, BLOCK_H, BLOCK_P], tl.float32)
    db3 = tl.zeros([BLOCK_T, BLOCK_H, max(1, BLOCK_REST)], tl.float32)
    per_element = 1.0 / D
    groups = tl.cdiv(H, BLOCK_H * head_tiles)
    for tile in range(tl.program_id(0), tl.cdiv(T, BLOCK_T) * groups, tl.num_programs(0)):
        t0, t1, token = _tokens(tile, groups, T, T1, BLOCK_T)
        c1, c2 = _turns(cos, t0 * cos_t0 + t1 * cos_t1, token, R, INTERLEAVED, BLOCK_T, BLOCK_P)
        s1, s2 = _turns(sin, t0 * sin_t0 + t1 * sin_t1, token, R, INTERLEAVED, BLOCK_T, BLOCK_P)
        for head_tile in range(head_tiles):
            h0, h1, head = _heads(tile, groups, head_tile, head_tiles, H, H1, BLOCK_H)
            inside = token & head
            at = t0 * x_t0 + t1 * x_t1 + h0 * x_h0 + h1 * x_h1
            x1, x2, x3 = _load(x, at, inside, R, D, INTERLEAVED, BLOCK_T, BLOCK_H, BLOCK_P, BLOCK_REST)
            at = t0 * dy_t0 + t1 * dy_t1 + h0 * dy_h0 + h1 * dy_h1
            y1, y2, g3 = _load(dy, at, inside, R, D, INTERLEAVED, BLOCK_T, BLOCK_H, BLOCK_P, BLOCK_REST)
            n1, n2, n3, r = _normed(x1, x2, x3, inside, R, D, per_element, eps, CENTER, BLOCK_P, BLOCK_REST)
            g1 = y1 * c1 + y2 * s2
            g2 = y2 * c2 - y1 * s1
            if dw_partial is not None:
                dw1 += g1 * n1
                dw2 += g2 * n2
                if BLOCK_REST > 0:
                    dw3 += g3 * n3
            if db_partial is not None:
                db1 += g1
                db2 += g2
                if BLOCK_REST > 0:
                    db3 += g3
            if dx is not None:
                if weight is not None:
                    g1 *= w1 + offset
                    g2 *= w2 + offset
                    g3 *= w3 + offset
                mean_gn = _sum(g1 * n1, g2 * n2, g3 * n3, BLOCK_REST) * per_element
                mean_g = 0.0
                if CENTER:
                    mean_g = _sum(g1, g2, g3, BLOCK_REST) * per_element
                at = t0 * dx_t0 + t1 * dx_t1 + h0 * dx_h0 + h1 * dx_h1
                g1 = r * (g1 - n1 * mean_gn - mean_g)
                g2 = r * (g2 - n2 * mean_gn - mean_g)
                g3 = r * (g3 - n3 * mean_gn - mean_g)
                _store(dx, at, inside, g1, g2, g3, R, D, INTERLEAVED, BLOCK_T, BLOCK_H, BLOCK_P, BLOCK_REST)
    if dw_partial is not None:
        _store_partial(dw_partial, dw1, dw2, dw3, R, D, INTERLEAVED, BLOCK_P, BLOCK_REST)
    if db_partial is not None:
        _store_partial(db_partial, db1, db2, db3, R, D, INTERLEAVED, BLOCK_P, BLOCK_REST)


def forward(x, weight, bias, cos, sin, *, eps: float, weight_offset: float, center: bool, interleaved: bool):
    """Return y, and what the backward pass needs: the inputs, and of long heads the mean and 1/√(…) of each."""
    options: dict[str, Any] = {"eps": eps, "weight_offset": weight_offset, "center": center}
    if x.shape[-1] > MAX_HEAD:
        z, (_, _, _, mean, rstd, *_) = norm.forward(x, None, weight, bias, None, None, **options)
        return rope.turned(z, cos, sin, interleaved), (x, weight, bias, cos, sin, mean, rstd)
    saved = (x, weight, bias, cos, sin)
    x, cos, sin = (rope.adjacent(t) for t in (x, cos, sin))
    y = torch.empty_like(x)
    axes = rope.axes((x, y), cos, sin)
    if x.numel() == 0:
        pass
    elif axes is None:
        rows, tables = rope.flat(x, cos, sin)
        y = forward(rows, weight, bias, *tables, **options, interleaved=interleaved)[0].view(x.shape)
    else:
        operands = (x, weight, bias, cos)
        which = {"CENTER": center, "INTERLEAVED": interleaved}
        programs, sizes, meta = _plan(_forward, operands, axes, x.shape[-1], cos.shape[-1], 8, **which)
        launch(_forward, (programs,),
            x, contiguous(weight), contiguous(bias), cos, sin, y, *sizes, eps, weight_offset, *rope.strides(axes),
            **meta,
        )  # fmt: skip
    return y, saved


def backward(grads, saved, needs, *, eps: float, weight_offset: float, center: bool, interleaved: bool):
    """Return the gradients of x, weight and bias."""
    (dy,), (x, weight, bias, cos, sin, *statistics) = grads, saved
    options: dict[str, Any] = {"eps": eps, "weight_offset": weight_offset, "center": center}
    if statistics:
        dz = rope.turned(dy.float(), cos, sin, interleaved, transpose=True)
        normed = (x, weight, bias, *statistics, None, None, None)
        dx, _, dw, db, *_ = norm.backward((dz,), normed, (needs[0], False, *needs[1:3], False), **options)
        return dx, dw, db, None, None
    x, dy, cos, sin = (rope.adjacent(t) for t in (x, dy, cos, sin))
    dx = torch.empty_like(x)
    axes = rope.axes((x, dy, dx), cos, sin)
    if axes is None:
        rows, tables = rope.flat(x, cos, sin)
        flat = (rows, weight, bias, *tables)
        dx, *others = backward((dy.reshape(rows.shape),), flat, needs, **options, interleaved=interleaved)
        return dx.view(x.shape), *others
    operands = (x, dy, weight, cos, *(t if need else None for t, need in zip((x, weight, bias), needs, strict=False)))
    which = {"CENTER": center, "INTERLEAVED": interleaved}
    programs, sizes, meta = _plan(_backward, operands, axes, x.shape[-1], cos.shape[-1], 4, **which)
    if x.numel() == 0:
        programs = 0
    dw, db = (
        torch.empty(programs, x.shape[-1], dtype=torch.float32, device=x.device) if need else None
        for need in needs[1:3]
    )
    if programs:
        launch(_backward, (programs,),
            x, dy, contiguous(weight), cos, sin, dx if needs[0] else None, dw, db,
            *sizes, eps, weight_offset, *rope.strides(axes), **meta,
        )  # fmt: skip
    dw, db = (
        None if partial is None else column_sum(partial, parameter.dtype)
        for partial, parameter in ((dw, weight), (db, bias))
    )
    return dx, dw, db, None, None


def _plan(
    kernel, operands, axes: rope.Axes, D: int, R: int, per_multiprocessor: int, **which
) -> tuple[int, tuple[int, ...], dict[str, Any]]:
    """The number of programs, the sizes that a kernel takes, and its constants."""
    T, _, H, _ = rope.sizes(axes)
    rows = max(1, TILE // triton.next_power_of_2(D))
    BLOCK_H = min(rows, triton.next_power_of_2(H))
    BLOCK_T = min(rows // BLOCK_H, triton.next_power_of_2(T))
    free = {
        "BLOCK_T": BLOCK_T,
        "BLOCK_H": BLOCK_H,
        "num_warps": max(1, BLOCK_T * BLOCK_H * triton.next_power_of_2(D) // 1024),
        "programs": per_multiprocessor,
    }
    BLOCK_P = triton.next_power_of_2(max(1, R // 2))
    BLOCK_REST = triton.next_power_of_2(D - R) if D > R else 0
    meta = measured(kernel, operands, free, BLOCK_P=BLOCK_P, BLOCK_REST=BLOCK_REST, **which)
    head_tiles = min(HEAD_TILES, triton.cdiv(H, meta["BLOCK_H"]))
    tiles = triton.cdiv(T, meta["BLOCK_T"]) * triton.cdiv(H, meta["BLOCK_H"] * head_tiles)
    programs = min(tiles, meta.pop("programs") * multiprocessors(operands[0].device))
    return programs, (*rope.sizes(axes), D, R, head_tiles), meta
