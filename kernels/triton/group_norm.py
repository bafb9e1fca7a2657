"""Group normalization and the activation behind it: N·G groups of K = C/G channels of S elements.

    forward   z = (x − μ)/√(σ² + ε)·w + b      y = act(z)           μ, σ² of each group
    backward  a = dy·act'(z)    g = a·w        dx = (g − n·mean(g·n) − mean(g))/√(σ² + ε)
              dw = Σ a·n        db = Σ a       n = (x − μ)/√(σ² + ε)

In the contiguous format a group is one run of K·S elements. Up to MAX_TILE of them fit into the registers of a program,
16 elements a thread: x is read once. Such a program belongs to one group of channels and walks over samples, so that
it reads the weights, and writes a partial gradient of them, once; four programs a multiprocessor run forward, two,
which hold more registers, backward. Even one sample of 32 such groups is done in a launch, which for so little data
counts more than filling the GPU does.

Groups of the early stages of a U-Net (10·64·64 elements, 4·512·512) do not fit, and are too few to fill a GPU one by
one. Parts of them are summed up side by side and merged, then everything is read again: see ``channel_norm``. So are
groups with channels last, whose runs of K elements are shorter than a sector of memory.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import channel_norm
from .channel_norm import Activation, View, activate
from .launch import column_sum, contiguous, launch, multiprocessors
from .launch_table import measured

MAX_TILE = 16_384


@triton.jit
def _group(weight, bias, S, K, BLOCK_K: tl.constexpr, BLOCK_S: tl.constexpr):
    """A program's channels, weight and bias; its elements within a group."""
    k = tl.arange(0, BLOCK_K)
    s = tl.arange(0, BLOCK_S)
    c = tl.program_id(0) * K + k
    w = tl.full([BLOCK_K], 1.0, tl.float32)
    if weight is not None:
        w = tl.load(weight + c, k < K, other=0.0).to(tl.float32)
    shift = tl.zeros([BLOCK_K], tl.float32)
    if bias is not None:
        shift = tl.load(bias + c, k < K, other=0.0).to(tl.float32)
    return c, k < K, w, shift, c.to(tl.int64)[:, None] * S + s[None, :], (k < K)[:, None] & (s < S)[None, :]


@triton.jit
def _forward(
    x, weight, bias, y, mean, var, N, C, S, K, eps,
    ACTIVATION: tl.constexpr, SLOPE: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    _c, _in_group, w, shift, offset, mask = _group(weight, bias, S, K, BLOCK_K, BLOCK_S)
    for n in range(tl.program_id(1), N, tl.num_programs(1)):
        at = tl.cast(n, tl.int64) * C * S + offset
        block = tl.load(x + at, mask, other=0.0).to(tl.float32)
        mu = tl.sum(tl.sum(block, 1), 0) / (K * S)
        block = tl.where(mask, block - mu, 0.0)
        squares = tl.sum(tl.sum(block * block, 1), 0) / (K * S)
        group = n * tl.num_programs(0) + tl.program_id(0)
        tl.store(mean + group, mu)
        tl.store(var + group, squares)
        z = block * (1.0 / tl.sqrt(squares + eps)) * w[:, None] + shift[:, None]
        out, _ = activate(z, z, ACTIVATION, SLOPE)
        tl.store(y + at, out.to(y.dtype.element_ty), mask)


@triton.jit
def _backward(
    dy, x, weight, bias, mean, var, dx, dw_partial, db_partial, N, C, S, K, eps,
    ACTIVATION: tl.constexpr, SLOPE: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    c, in_group, w, shift, offset, mask = _group(weight, bias, S, K, BLOCK_K, BLOCK_S)
    dw = tl.zeros([BLOCK_K], tl.float32)
    db = tl.zeros([BLOCK_K], tl.float32)
    for n in range(tl.program_id(1), N, tl.num_programs(1)):
        at = tl.cast(n, tl.int64) * C * S + offset
        group = n * tl.num_programs(0) + tl.program_id(0)
        r = 1.0 / tl.sqrt(tl.load(var + group) + eps)
        dout = tl.load(dy + at, mask, other=0.0).to(tl.float32)
        normed = (tl.load(x + at, mask, other=0.0).to(tl.float32) - tl.load(mean + group)) * r
        _, a = activate(normed * w[:, None] + shift[:, None], dout, ACTIVATION, SLOPE)
        a = tl.where(mask, a, 0.0)
        normed = tl.where(mask, normed, 0.0)
        sum_an = tl.sum(a * normed, 1)
        sum_a = tl.sum(a, 1)
        dw += sum_an
        db += sum_a
        if dx is not None:
            mean_gn = tl.sum(w * sum_an, 0) / (K * S)
            mean_g = tl.sum(w * sum_a, 0) / (K * S)
            out = (a * w[:, None] - normed * mean_gn - mean_g) * r
            tl.store(dx + at, out.to(dx.dtype.element_ty), mask)
    if dw_partial is not None:
        tl.store(dw_partial + tl.program_id(1) * C + c, dw, in_group)
    if db_partial is not None:
        tl.store(db_partial + tl.program_id(1) * C + c, db, in_group)


def forward(x, weight, bias, *, num_groups: int, eps: float, activation: Activation):
    """Return y, and what the backward pass needs."""
    view = _view(x, num_groups)
    laid = channel_norm.laid_out(x, view.last)
    if _fits(view):
        N, _, C, S, K, _ = view
        y = torch.empty_like(laid)
        mean, var = (torch.empty(N, num_groups, dtype=torch.float32, device=x.device) for _ in range(2))
        programs, meta = _programs(_forward, (laid, weight, bias), view, 4, **channel_norm.constants(activation))
        pointers = (laid, contiguous(weight), contiguous(bias), y, mean, var)
        if x.numel():
            launch(_forward, (num_groups, programs), *pointers, N, C, S, K, eps, **meta)
    else:
        mean, var = channel_norm.moments(laid, view)
        y = channel_norm.normalize(laid, None, weight, bias, mean, var, view, eps=eps, activation=activation)
    return y, (x, weight, bias, mean, var)


def backward(grads, saved, needs, *, num_groups: int, eps: float, activation: Activation):
    """Return the gradients of x, weight and bias."""
    x, weight, bias, mean, var = saved
    view = _view(x, num_groups)
    dy, laid = (channel_norm.laid_out(t, view.last) for t in (grads[0], x))
    options: dict[str, Any] = {"eps": eps, "activation": activation}
    if _fits(view):
        return _backward_of_whole_groups(dy, laid, weight, bias, mean, var, view, needs, **options)
    found = channel_norm.sums(dy, laid, None, weight, bias, mean, var, view, **options)
    means = channel_norm.group_means(found, weight, view, view.K * view.S)
    dx, _ = channel_norm.gradient(dy, laid, None, weight, bias, mean, var, means, view, (needs[0], False), **options)
    return dx, *channel_norm.parameter_gradients(found, weight, bias, view, needs[1:])


def _backward_of_whole_groups(dy, x, weight, bias, mean, var, view: View, needs, *, eps: float, activation: Activation):
    N, _, C, S, K, _ = view
    dx = torch.empty_like(x) if needs[0] else None
    which = channel_norm.constants(activation)
    programs, meta = _programs(_backward, (dy, x, weight, bias, dx), view, 2, **which)
    partial = [torch.empty(programs, C, dtype=torch.float32, device=x.device) if need else None for need in needs[1:]]
    pointers = (dy, x, contiguous(weight), contiguous(bias), mean, var, dx)
    if x.numel():
        launch(_backward, (C // K, programs), *pointers, *partial, N, C, S, K, eps, **meta)
    else:
        for unwritten in partial:
            if unwritten is not None:
                unwritten.zero_()
    dw, db = (
        None if sums is None else column_sum(sums, parameter.dtype)
        for sums, parameter in zip(partial, (weight, bias), strict=True)
    )
    return dx, dw, db


def _view(x: Tensor, num_groups: int) -> View:
    N, C = x.shape[:2]
    last = x.stride(1) == 1 and not x.is_contiguous() and x.numel() > 0
    return View(N, 1, C, x.shape[2:].numel(), C // num_groups, last)


def _programs(kernel, operands, view: View, per_multiprocessor: int, **which: Any) -> tuple[int, dict[str, Any]]:
    """How many programs share the samples of a group, and a kernel's constants."""
    BLOCK_K, BLOCK_S, num_warps = _tile(view)
    free = {"num_warps": num_warps, "programs": per_multiprocessor}
    meta = measured(kernel, operands, free, BLOCK_K=BLOCK_K, BLOCK_S=BLOCK_S, **which)
    wanted = meta.pop("programs") * multiprocessors(operands[0].device)
    return min(view.B, triton.cdiv(wanted, view.C // view.K)), meta


def _fits(view: View) -> bool:
    """Whether a program holds a group; trivially so where there is none."""
    BLOCK_K, BLOCK_S, _ = _tile(view)
    return view.B == 0 or (not view.last and BLOCK_K * BLOCK_S <= MAX_TILE)


def _tile(view: View) -> tuple[int, int, int]:
    """Channels and elements of a whole group, and the warps that work on it."""
    BLOCK_K, BLOCK_S = (triton.next_power_of_2(max(1, size)) for size in (view.K, view.S))
    return BLOCK_K, BLOCK_S, min(32, max(1, BLOCK_K * BLOCK_S // 512))
