"""What the normalizations of images share: statistics of channels, or groups of them, and their application.

x is [B, R, C, S]: B samples that have statistics of their own, R·S elements of each channel, in groups of K channels.
Group normalization is [N, 1, C, S] with K = C/G; batch normalization is [1, N, C, S] with K = 1. With channels last
the elements of a sample are rows of C, and R is 1.

    moments    μ, σ² of each group                         z = (x − μ)/√(σ² + ε)·w + b (+ residual)
    normalize  y = act(z)                                  n = (x − μ)/√(σ² + ε)
    sums       Σ a·n and Σ a of each channel, where a = dy·act'(z); g = a·w
    gradient   dx = (g − n·mean(g·n) − mean(g))/√(σ² + ε)  dresidual = a

Memory-bound. A tile is BLOCK_C channels of BLOCK_S elements, about 4,096 (8 warps: 16 elements, two 16-byte accesses of
bf16, a thread): along an image of one channel where that is long enough, or with channels last 64 channels, a 128-byte
line of bf16. A program keeps its channels, whose parameters it reads once, and walks over every ``parts``-th of their
tiles; there are as many parts as fill the GPU, four programs a multiprocessor, however few the groups are. What the
parts find is merged in a second kernel, always in the same order: moments with Chan's update, which does not cancel as
Σx² − (Σx)² does. z is recomputed backward, so that nothing of x's size is kept beside the inputs.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .activations import act
from .launch import contiguous, launch, multiprocessors
from .launch_table import measured

TILE = 4096
LINE = 64


#: The name of an activation, and the slope of ``leaky_relu``.
Activation = tuple[str, float]


class View(NamedTuple):
    """How an [N, C, *] tensor is seen: B, R, C, S, K of the module docstring, and whether channels come last."""

    B: int
    R: int
    C: int
    S: int
    K: int
    last: bool


@triton.jit
def activate(z, dout, ACTIVATION: tl.constexpr, SLOPE: tl.constexpr):
    """act(z) and dout·act'(z)."""
    if ACTIVATION == "none":
        return z, dout
    else:
        return act(z, dout, ACTIVATION, SLOPE)


@triton.jit
def _channels(C, BLOCK_C: tl.constexpr):
    """A program's sample, and its channels."""
    blocks = tl.cdiv(C, BLOCK_C)
    return tl.program_id(0) // blocks, (tl.program_id(0) % blocks) * BLOCK_C + tl.arange(0, BLOCK_C)


@triton.jit
def _tile(tile, b, c, R, C, S, LAST: tl.constexpr, BLOCK_S: tl.constexpr):
    """Where the elements of a tile are, which of them exist, and how many of each channel."""
    blocks = tl.cdiv(S, BLOCK_S)
    start = (tile % blocks) * BLOCK_S
    s = start + tl.arange(0, BLOCK_S)
    image = (tl.cast(b, tl.int64) * R + tile // blocks) * C * S
    at = image + c.to(tl.int64)[:, None] * S + s[None, :]
    if LAST:
        at = image + s.to(tl.int64)[None, :] * C + c[:, None]
    return at, (c < C)[:, None] & (s < S)[None, :], tl.minimum(BLOCK_S, S - start).to(tl.float32)


@triton.jit
def _parameters(weight, bias, mean, var, b, c, C, K, eps):
    """μ, 1/√(σ² + ε), weight and bias of a program's channels."""
    group = b * (C // K) + c // K
    mu = tl.load(mean + group, c < C, other=0.0).to(tl.float32)
    r = 1.0 / tl.sqrt(tl.load(var + group, c < C, other=1.0).to(tl.float32) + eps)
    w = tl.full(c.shape, 1.0, tl.float32)
    if weight is not None:
        w = tl.load(weight + c, c < C, other=0.0).to(tl.float32)
    shift = tl.zeros(c.shape, tl.float32)
    if bias is not None:
        shift = tl.load(bias + c, c < C, other=0.0).to(tl.float32)
    return mu, r, w, shift


@triton.jit
def _place(b, c, C, K, length):
    """Where a part's finding about channels is kept: those of a group side by side, in runs of ``length``."""
    return (b * (C // K) + c // K) * length + tl.program_id(1) * K + c % K


@triton.jit
def _moments(
    x, partial, plane, length, R, C, S, K, LAST: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_S: tl.constexpr
):  # fmt: skip
    b, c = _channels(C, BLOCK_C)
    count = 0.0
    mu = tl.zeros([BLOCK_C], tl.float32)
    squares = tl.zeros([BLOCK_C], tl.float32)
    for tile in range(tl.program_id(1), R * tl.cdiv(S, BLOCK_S), tl.num_programs(1)):
        at, mask, size = _tile(tile, b, c, R, C, S, LAST, BLOCK_S)
        block = tl.load(x + at, mask, other=0.0).to(tl.float32)
        # Chan, Golub, LeVeque (1979): merge the mean and the sum of squared deviations of two sets.
        block_mu = tl.sum(block, 1) / size
        block = tl.where(mask, block - block_mu[:, None], 0.0)
        block_mu += tl.sum(block, 1) / size  # its rounding error, which a channel of equal values would show
        delta = block_mu - mu
        squares += tl.sum(block * block, 1) + delta * delta * (count * size / (count + size))
        mu += delta * (size / (count + size))
        count += size
    at = _place(b, c, C, K, length)
    tl.store(partial + at, tl.full([BLOCK_C], count, tl.float32), c < C)
    tl.store(partial + plane + at, mu, c < C)
    tl.store(partial + 2 * plane + at, squares, c < C)


@triton.jit
def _found(partial, j, found):
    """Elements j of a run, zero from ``found`` on. Whole groups of 16 are read, for accesses of 128 bits."""
    return tl.where(j < found, tl.load(partial + j, j // 16 < tl.cdiv(found, 16), other=0.0), 0.0)


@triton.jit
def _merge_moments(partial, mean, var, plane, length, found, BLOCK: tl.constexpr):
    counts = partial + tl.cast(tl.program_id(0), tl.int64) * length
    count = tl.zeros([BLOCK], tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, found, BLOCK):
        j = start + tl.arange(0, BLOCK)
        size = _found(counts, j, found)
        count += size
        total += size * _found(counts + plane, j, found)
    elements = tl.sum(count, 0)
    mu = tl.sum(total, 0) / elements
    squares = tl.zeros([BLOCK], tl.float32)
    error = tl.zeros([BLOCK], tl.float32)
    for start in range(0, found, BLOCK):
        j = start + tl.arange(0, BLOCK)
        delta = _found(counts + plane, j, found) - mu
        size = _found(counts, j, found)
        error += size * delta
        squares += _found(counts + 2 * plane, j, found) + size * delta * delta
    tl.store(mean + tl.program_id(0), mu + tl.sum(error, 0) / elements)
    tl.store(var + tl.program_id(0), tl.sum(squares, 0) / elements)


@triton.jit
def _normalize(
    x, residual, weight, bias, mean, var, y, R, C, S, K, eps,
    ACTIVATION: tl.constexpr, SLOPE: tl.constexpr, LAST: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    b, c = _channels(C, BLOCK_C)
    mu, r, w, shift = _parameters(weight, bias, mean, var, b, c, C, K, eps)
    for tile in range(tl.program_id(1), R * tl.cdiv(S, BLOCK_S), tl.num_programs(1)):
        at, mask, _size = _tile(tile, b, c, R, C, S, LAST, BLOCK_S)
        z = (tl.load(x + at, mask, other=0.0).to(tl.float32) - mu[:, None]) * r[:, None] * w[:, None] + shift[:, None]
        if residual is not None:
            z += tl.load(residual + at, mask, other=0.0).to(tl.float32)
        out, _ = activate(z, z, ACTIVATION, SLOPE)
        tl.store(y + at, out.to(y.dtype.element_ty), mask)


@triton.jit
def _pulled_back(dy, x, residual, at, mask, mu, r, w, shift, ACTIVATION: tl.constexpr, SLOPE: tl.constexpr):
    """a = dy·act'(z), zero outside the mask, and n."""
    dout = tl.load(dy + at, mask, other=0.0).to(tl.float32)
    normed = (tl.load(x + at, mask, other=0.0).to(tl.float32) - mu[:, None]) * r[:, None]
    z = normed * w[:, None] + shift[:, None]
    if residual is not None:
        z += tl.load(residual + at, mask, other=0.0).to(tl.float32)
    _, a = activate(z, dout, ACTIVATION, SLOPE)
    return tl.where(mask, a, 0.0), normed


@triton.jit
def _sums(
    dy, x, residual, weight, bias, mean, var, partial, plane, length, R, C, S, K, eps,
    ACTIVATION: tl.constexpr, SLOPE: tl.constexpr, LAST: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    b, c = _channels(C, BLOCK_C)
    mu, r, w, shift = _parameters(weight, bias, mean, var, b, c, C, K, eps)
    sum_an = tl.zeros([BLOCK_C, BLOCK_S], tl.float32)
    sum_a = tl.zeros([BLOCK_C, BLOCK_S], tl.float32)
    for tile in range(tl.program_id(1), R * tl.cdiv(S, BLOCK_S), tl.num_programs(1)):
        at, mask, _size = _tile(tile, b, c, R, C, S, LAST, BLOCK_S)
        a, normed = _pulled_back(dy, x, residual, at, mask, mu, r, w, shift, ACTIVATION, SLOPE)
        sum_an += tl.where(mask, a * normed, 0.0)
        sum_a += a
    at = _place(b, c, C, K, length)
    tl.store(partial + at, tl.sum(sum_an, 1), c < C)
    tl.store(partial + plane + at, tl.sum(sum_a, 1), c < C)


@triton.jit
def _merge_sums(partial, weight, mean_gn, mean_g, plane, length, found, C, K, elements, BLOCK: tl.constexpr):
    sums = partial + tl.cast(tl.program_id(0), tl.int64) * length
    first = tl.program_id(0) % (C // K) * K
    sum_gn = tl.zeros([BLOCK], tl.float32)
    sum_g = tl.zeros([BLOCK], tl.float32)
    for start in range(0, found, BLOCK):
        j = start + tl.arange(0, BLOCK)
        w = tl.full([BLOCK], 1.0, tl.float32)
        if weight is not None:
            w = tl.load(weight + first + j % K, j < found, other=0.0).to(tl.float32)
        sum_gn += w * _found(sums, j, found)
        sum_g += w * _found(sums + plane, j, found)
    tl.store(mean_gn + tl.program_id(0), tl.sum(sum_gn, 0) / elements)
    tl.store(mean_g + tl.program_id(0), tl.sum(sum_g, 0) / elements)


@triton.jit
def _gradient(
    dy, x, residual, weight, bias, mean, var, mean_gn, mean_g, dx, dresidual, R, C, S, K, eps,
    ACTIVATION: tl.constexpr, SLOPE: tl.constexpr, LAST: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    b, c = _channels(C, BLOCK_C)
    mu, r, w, shift = _parameters(weight, bias, mean, var, b, c, C, K, eps)
    if mean_gn is not None:
        group = b * (C // K) + c // K
        m_gn = tl.load(mean_gn + group, c < C, other=0.0)
        m_g = tl.load(mean_g + group, c < C, other=0.0)
    for tile in range(tl.program_id(1), R * tl.cdiv(S, BLOCK_S), tl.num_programs(1)):
        at, mask, _size = _tile(tile, b, c, R, C, S, LAST, BLOCK_S)
        a, normed = _pulled_back(dy, x, residual, at, mask, mu, r, w, shift, ACTIVATION, SLOPE)
        if dresidual is not None:
            tl.store(dresidual + at, a.to(dresidual.dtype.element_ty), mask)
        if dx is not None:
            out = a * w[:, None]
            if mean_gn is not None:
                out -= normed * m_gn[:, None] + m_g[:, None]
            tl.store(dx + at, (out * r[:, None]).to(dx.dtype.element_ty), mask)


def laid_out(x: Tensor, last: bool) -> Tensor:
    """x, copied only if it is not contiguous, or is not with its channels last."""
    return x.movedim(1, -1).contiguous().movedim(-1, 1) if last else x.contiguous()


def moments(x: Tensor, view: View) -> tuple[Tensor, Tensor]:
    """The mean and the variance (with divisor the number of elements) of each sample's groups, float32 [B, C / K]."""
    B, R, C, S, K, _ = view
    mean, var = (torch.empty(B, C // K, dtype=torch.float32, device=x.device) for _ in range(2))
    grid, meta = _programs(_moments, (x,), view)
    partial = _runs(3, view, grid[1], x.device)
    where = (partial[0].numel(), partial.shape[-1])
    launch(_moments, grid, x, partial, *where, R, C, S, K, **meta)
    meta = _merging(_merge_moments, (partial,), grid[1] * K)
    launch(_merge_moments, (mean.numel(),), partial, mean, var, *where, grid[1] * K, **meta)
    return mean, var


def normalize(x, residual, weight, bias, mean, var, view: View, *, eps: float, activation: Activation) -> Tensor:
    """act((x − μ)/√(σ² + ε)·w + b + residual), laid out as x."""
    _, R, C, S, K, _ = view
    y = torch.empty_like(x)
    pointers = (x, residual, contiguous(weight), contiguous(bias), mean, var, y)
    grid, meta = _programs(_normalize, pointers, view, **constants(activation))
    launch(_normalize, grid, *pointers, R, C, S, K, eps, **meta)
    return y


class Sums(NamedTuple):
    """Σ a·n and Σ a of the channels, as parts of every sample find them, in runs of so many."""

    partial: Tensor
    found: int


def sums(dy, x, residual, weight, bias, mean, var, view: View, *, eps: float, activation: Activation) -> Sums:
    """What the gradients of weight and bias, and those of the statistics, follow from."""
    _, R, C, S, K, _ = view
    pointers = (dy, x, residual, contiguous(weight), contiguous(bias), mean, var)
    grid, meta = _programs(_sums, pointers, view, **constants(activation))
    partial = _runs(2, view, grid[1], x.device)
    where = (partial[0].numel(), partial.shape[-1])
    launch(_sums, grid, *pointers, partial, *where, R, C, S, K, eps, **meta)
    return Sums(partial, grid[1] * K)


def group_means(sums: Sums, weight, view: View, elements: int) -> Tensor:
    """mean(g·n) and mean(g) of each sample's groups of so many elements: float32 [2, B, C / K]."""
    partial, found = sums
    means = torch.empty(partial.shape[:-1], dtype=torch.float32, device=partial.device)
    pointers = (partial, contiguous(weight), means[0], means[1])
    where = (partial[0].numel(), partial.shape[-1], found)
    meta = _merging(_merge_sums, (partial, weight), found)
    launch(_merge_sums, (means[0].numel(),), *pointers, *where, view.C, view.K, elements, **meta)
    return means


def parameter_gradients(sums: Sums, weight, bias, view: View, needs) -> tuple[Tensor | None, Tensor | None]:
    """The gradients of weight and bias: the sums over samples and parts."""
    if not any(needs):
        return None, None
    total = channel_sums(sums, view)
    dw, db = (t.to(p.dtype) if need else None for t, p, need in zip(total, (weight, bias), needs, strict=True))
    return dw, db


def channel_sums(sums: Sums, view: View) -> Tensor:
    """Σ a·n and Σ a of each channel, over samples and parts: float32 [2, C]."""
    return sums.partial[..., : sums.found].unflatten(-1, (-1, view.K)).sum((1, 3)).view(2, view.C)


def gradient(
    dy, x, residual, weight, bias, mean, var, means, view: View, needs, *, eps: float, activation: Activation
) -> tuple[Tensor | None, Tensor | None]:
    """The gradients of x and residual; ``means`` is None where the statistics do not depend on x."""
    _, R, C, S, K, _ = view
    dx = torch.empty_like(x) if needs[0] else None
    dresidual = torch.empty_like(residual) if needs[1] else None
    mean_gn, mean_g = (None, None) if means is None else means
    pointers = (dy, x, residual, contiguous(weight), contiguous(bias), mean, var, mean_gn, mean_g, dx, dresidual)
    grid, meta = _programs(_gradient, pointers, view, **constants(activation))
    launch(_gradient, grid, *pointers, R, C, S, K, eps, **meta)
    return dx, dresidual


def constants(activation: Activation) -> dict[str, Any]:
    """The activation, for a kernel."""
    return dict(zip(("ACTIVATION", "SLOPE"), activation, strict=True))


def _programs(kernel, operands, view: View, **which: Any) -> tuple[tuple[int, int], dict[str, Any]]:
    """Samples × blocks of channels, and the parts that walk over the tiles of each; a kernel's constants."""
    B, R, C, S, _, last = view
    if last:
        BLOCK_C = min(LINE, triton.next_power_of_2(C))
        BLOCK_S = min(TILE // BLOCK_C, triton.next_power_of_2(S))
    else:
        BLOCK_S = min(TILE, triton.next_power_of_2(S))
        BLOCK_C = min(TILE // BLOCK_S, triton.next_power_of_2(C))
    num_warps = min(8, max(1, BLOCK_C * BLOCK_S // 512))
    free = {"BLOCK_C": BLOCK_C, "BLOCK_S": BLOCK_S, "num_warps": num_warps, "programs": 4}
    meta = measured(kernel, operands, free, LAST=last, **which)
    blocks = B * triton.cdiv(C, meta["BLOCK_C"])
    wanted = meta.pop("programs") * multiprocessors(operands[0].device)
    return (blocks, min(R * triton.cdiv(S, meta["BLOCK_S"]), triton.cdiv(wanted, blocks))), meta


def _runs(planes: int, view: View, parts: int, device: torch.device) -> Tensor:
    """Room for what the parts find: a run for each group of each sample, of a multiple of 16 elements."""
    return torch.empty(
        planes, view.B, view.C // view.K, -(-parts * view.K // 16) * 16, dtype=torch.float32, device=device
    )


def _merging(kernel, operands, found: int) -> dict[str, Any]:
    """Accesses of four elements by each thread of a warp, of 64 threads too."""
    BLOCK = min(1024, max(256, triton.next_power_of_2(found)))
    return measured(kernel, operands, {"BLOCK": BLOCK, "num_warps": BLOCK // 256})
