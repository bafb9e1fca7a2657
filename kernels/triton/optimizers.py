"""One launch of an optimizer's step over all parameters of one kind.

A launch reads a table: of each tensor the addresses of what belongs to it, its size, its group and a random key; of
each tile of TILE elements the tensor and the place in it. Everything that a step does to an element happens while it is
in registers: parameter and state are read and written once, the gradient is read once.

    p parameter · g gradient · s₁ s₂ … states · a running average of p · c what rounding took from p

States in 8 bits are decoded and encoded on the way; a tile holds whole blocks of them.

Tiles that are whole run without a mask, whose end the compiler could not know to be a multiple of 16 bytes.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .dropout import mix
from .launch import launch
from .quantization import BLOCK, dequantized, quantized

#: With 4 warps, two 16-byte accesses of bfloat16 a thread and operand.
TILE = 2048

#: What a step may do besides, as bits of a kernel's OPTIONS.
OPTIONS = {
    name: 1 << bit
    for bit, name in enumerate(
        ("step", "maximize", "clear", "average", "stochastic", "kahan", "momentum", "nesterov", "decoupled", "amsgrad")
    )
}
_STEP = tl.constexpr(OPTIONS["step"])
_MAXIMIZE = tl.constexpr(OPTIONS["maximize"])
_CLEAR = tl.constexpr(OPTIONS["clear"])
_AVERAGE = tl.constexpr(OPTIONS["average"])
_STOCHASTIC = tl.constexpr(OPTIONS["stochastic"])
_KAHAN = tl.constexpr(OPTIONS["kahan"])
_MOMENTUM = tl.constexpr(OPTIONS["momentum"])
_NESTEROV = tl.constexpr(OPTIONS["nesterov"])
_DECOUPLED = tl.constexpr(OPTIONS["decoupled"])
_AMSGRAD = tl.constexpr(OPTIONS["amsgrad"])

#: From the role of a state to that of its scales.
_SCALES = tl.constexpr(5)

_TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.int8: tl.int8}


@triton.jit
def _pointer(addresses, role: tl.constexpr, t, N, TYPE: tl.constexpr, ALIGNED: tl.constexpr):
    pointer = tl.load(addresses + role * N + t).to(tl.pointer_type(TYPE))
    if ALIGNED:
        pointer = tl.multiple_of(pointer, 16)
    return pointer


@triton.jit
def _load(pointer, n, size, MASKED: tl.constexpr):
    x = tl.load(pointer + n, n < size, other=0.0) if MASKED else tl.load(pointer + n)
    return x.to(tl.float32)


@triton.jit
def _store(pointer, n, size, x, MASKED: tl.constexpr):
    x = x.to(pointer.dtype.element_ty)
    if MASKED:
        tl.store(pointer + n, x, n < size)
    else:
        tl.store(pointer + n, x)


@triton.jit
def _load_state(
    addresses, role: tl.constexpr, t, N, n, b, size,
    S: tl.constexpr, SIGNED: tl.constexpr, ALIGNED: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    if tl.int8 == S:
        codes = _load(_pointer(addresses, role, t, N, tl.int8 if SIGNED else tl.uint8, ALIGNED), n, size, MASKED)
        scale = _load(_pointer(addresses, role + _SCALES, t, N, tl.float32, False), b, tl.cdiv(size, BLOCK), MASKED)
        return dequantized(codes, scale, SIGNED, codes.shape[0])
    else:
        return _load(_pointer(addresses, role, t, N, S, ALIGNED), n, size, MASKED)


@triton.jit
def _store_state(
    addresses, role: tl.constexpr, t, N, n, b, size, x, draws,
    S: tl.constexpr, SIGNED: tl.constexpr, STOCHASTIC: tl.constexpr, ALIGNED: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    if tl.int8 == S:
        if MASKED:
            x = tl.where(n < size, x, 0.0)
        x, scale = quantized(x, draws, SIGNED, STOCHASTIC, x.shape[0])
        _store(_pointer(addresses, role + _SCALES, t, N, tl.float32, False), b, tl.cdiv(size, BLOCK), scale, MASKED)
        _store(_pointer(addresses, role, t, N, tl.int8 if SIGNED else tl.uint8, ALIGNED), n, size, x, MASKED)
    else:
        if STOCHASTIC and tl.bfloat16 == S:
            x = _rounded(x, draws)
        _store(_pointer(addresses, role, t, N, S, ALIGNED), n, size, x, MASKED)


@triton.jit
def _rounded(x, bits):
    """x to one of its two neighbours in bfloat16, the nearer one the likelier; ``bits`` are 16 random ones."""
    raw = x.to(tl.int32, bitcast=True)
    finite = (raw & 0x7F800000) != 0x7F800000
    raw = tl.where(finite, (raw + bits) & -65536, raw)
    return raw.to(tl.float32, bitcast=True)


@triton.jit
def _random(key, step, n):
    """32 random bits for each element n of a tensor with this key, at this step."""
    low = mix(key.to(tl.uint32) ^ step.to(tl.uint32))
    high = mix(mix(low ^ 0x5BD1E995) + step.to(tl.uint32))
    return mix(mix(n.to(tl.uint32) ^ low) ^ high).to(tl.int32, bitcast=True)


@triton.jit
def _sgd(p, g, s1, h, first, OPTIONS: tl.constexpr):
    # h: lr, momentum, dampening, weight_decay
    lr, momentum = tl.load(h).to(tl.float32), tl.load(h + 1).to(tl.float32)
    kept, weight_decay = (1.0 - tl.load(h + 2)).to(tl.float32), tl.load(h + 3).to(tl.float32)
    g += tl.where(weight_decay != 0.0, weight_decay * p, 0.0)
    if _MOMENTUM & OPTIONS:
        s1 = momentum * s1 + tl.where(first != 0, 1.0, kept) * g
        if _NESTEROV & OPTIONS:
            g += momentum * s1
        else:
            g = s1
    return p - lr * g, s1


@triton.jit
def _adam(p, g, s1, s2, s3, h, step, OPTIONS: tl.constexpr):
    # h: lr, beta1, beta2, eps, weight_decay
    lr, eps, weight_decay = tl.load(h), tl.load(h + 3).to(tl.float32), tl.load(h + 4)
    beta1, beta2 = tl.load(h + 1), tl.load(h + 2)
    t = step.to(tl.float64)
    size = (lr / (1.0 - tl.exp(t * tl.log(beta1)))).to(tl.float32)
    root = tl.sqrt(1.0 - tl.exp(t * tl.log(beta2))).to(tl.float32)
    if _DECOUPLED & OPTIONS:
        p *= (1.0 - lr * weight_decay).to(tl.float32)
    else:
        g += tl.where(weight_decay != 0.0, weight_decay.to(tl.float32) * p, 0.0)
    s1 += (1.0 - beta1).to(tl.float32) * (g - s1)
    s2 = beta2.to(tl.float32) * s2 + (1.0 - beta2).to(tl.float32) * g * g
    top = s2
    if _AMSGRAD & OPTIONS:
        s3 = tl.maximum(s3, s2, propagate_nan=tl.PropagateNan.ALL)
        top = s3
    return p - size * (s1 / (tl.sqrt(top) / root + eps)), s1, s2, s3


@triton.jit
def _lion(p, g, s1, h):
    # h: lr, beta1, beta2, weight_decay
    lr, beta1, beta2, weight_decay = tl.load(h), tl.load(h + 1), tl.load(h + 2), tl.load(h + 3)
    c = beta1.to(tl.float32) * s1 + (1.0 - beta1).to(tl.float32) * g
    sign = tl.where(c > 0.0, 1.0, tl.where(c < 0.0, -1.0, c))  # of zero zero, of NaN NaN
    s1 = beta2.to(tl.float32) * s1 + (1.0 - beta2).to(tl.float32) * g
    return p * (1.0 - lr * weight_decay).to(tl.float32) - lr.to(tl.float32) * sign, s1


@triton.jit
def _tile(
    addresses, N, t, n, b, size, key, first, h, factor, average,
    RULE: tl.constexpr, STATES: tl.constexpr, OPTIONS: tl.constexpr,
    P: tl.constexpr, G: tl.constexpr, S: tl.constexpr, ALIGNED: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    # Roles: parameter, gradient, step, states, running average, what rounding took, scales of the states.
    p_pointer = _pointer(addresses, 0, t, N, P, ALIGNED)
    g_pointer = _pointer(addresses, 1, t, N, G, ALIGNED)
    step = 0.0
    if _STEP & OPTIONS:
        step = tl.load(_pointer(addresses, 2, t, N, tl.float32, False))
    p = _load(p_pointer, n, size, MASKED)
    g = _load(g_pointer, n, size, MASKED) * factor
    if _CLEAR & OPTIONS:
        _store(g_pointer, n, size, tl.zeros_like(g), MASKED)
    if _MAXIMIZE & OPTIONS:
        g = -g
    s1 = p
    s2 = p
    s3 = p
    if STATES > 0:
        s1 = _load_state(addresses, 3, t, N, n, b, size, S, True, ALIGNED, MASKED)
    if STATES > 1:
        s2 = _load_state(addresses, 4, t, N, n, b, size, S, False, ALIGNED, MASKED)
    if STATES > 2:
        s3 = _load_state(addresses, 5, t, N, n, b, size, S, False, ALIGNED, MASKED)
    if _KAHAN & OPTIONS:
        c_pointer = _pointer(addresses, 7, t, N, P, ALIGNED)
        p += _load(c_pointer, n, size, MASKED)
    if RULE == "sgd":
        p, s1 = _sgd(p, g, s1, h, first, OPTIONS)
    elif RULE == "adam":
        p, s1, s2, s3 = _adam(p, g, s1, s2, s3, h, step, OPTIONS)
    else:
        p, s1 = _lion(p, g, s1, h)
    if _AVERAGE & OPTIONS:
        a_pointer = _pointer(addresses, 6, t, N, tl.float32, ALIGNED)
        a = _load(a_pointer, n, size, MASKED)
        _store(a_pointer, n, size, a + average * (p - a), MASKED)
    STOCHASTIC: tl.constexpr = _STOCHASTIC & OPTIONS != 0
    bits = n
    more = n
    if STOCHASTIC:
        bits = _random(key, step, n)
        more = mix(bits.to(tl.uint32, bitcast=True)).to(tl.int32, bitcast=True)
        if tl.bfloat16 == P:
            p = _rounded(p, bits & 65535)
    _store(p_pointer, n, size, p, MASKED)
    if _KAHAN & OPTIONS:
        _store(c_pointer, n, size, p - p.to(P).to(tl.float32), MASKED)
    if STATES > 0:
        draws = (bits >> 16) & 65535
        _store_state(addresses, 3, t, N, n, b, size, s1, draws, S, True, STOCHASTIC, ALIGNED, MASKED)
    if STATES > 1:
        _store_state(addresses, 4, t, N, n, b, size, s2, more & 65535, S, False, STOCHASTIC, ALIGNED, MASKED)
    if STATES > 2:
        draws = (more >> 16) & 65535
        _store_state(addresses, 5, t, N, n, b, size, s3, draws, S, False, STOCHASTIC, ALIGNED, MASKED)


@triton.jit
def _step(
    addresses, about, tiles, hyper, factor, found_inf, average, N, K: tl.constexpr,
    RULE: tl.constexpr, STATES: tl.constexpr, OPTIONS: tl.constexpr,
    P: tl.constexpr, G: tl.constexpr, S: tl.constexpr, ALIGNED: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    t = tl.load(tiles + 2 * tl.program_id(0))
    start = tl.load(tiles + 2 * tl.program_id(0) + 1).to(tl.int64) * TILE
    size, group = tl.load(about + t), tl.load(about + N + t)
    key, first = tl.load(about + 2 * N + t), tl.load(about + 3 * N + t)
    if found_inf is not None:
        size = tl.where(tl.load(found_inf) == 0.0, size, 0)
    scale = 1.0
    if factor is not None:
        scale = tl.load(factor)
    n = start + tl.arange(0, TILE)
    b = start // BLOCK + tl.arange(0, TILE // BLOCK)
    h = hyper + group * K
    if start + TILE <= size:
        _tile(
            addresses, N, t, n, b, size, key, first, h, scale, average,
            RULE, STATES, OPTIONS, P, G, S, ALIGNED, MASKED=False,
        )  # fmt: skip
    else:
        _tile(
            addresses, N, t, n, b, size, key, first, h, scale, average,
            RULE, STATES, OPTIONS, P, G, S, ALIGNED, MASKED=True,
        )  # fmt: skip


class Table(NamedTuple):
    """What a launch walks over.

    Attributes:
        hosts: what was copied to the device, which a replayed CUDA graph copies again.
        addresses: int64 [11, N], of what has a role for each of N tensors; 0 where nothing has.
        about: int64 [4, N]: elements, group, random key and whether this is its first step.
        hyper: float64 [groups, K]: hyperparameters.
        tiles: int32 [tiles, 2]: tensor, and number of the tile in it.
        types: of parameters, gradients and states.
        aligned: whether every address is a multiple of 16 bytes.
    """

    hosts: list[Tensor]
    addresses: Tensor
    about: Tensor
    hyper: Tensor
    tiles: Tensor
    types: tuple[torch.dtype, torch.dtype, torch.dtype]
    aligned: bool


def table(
    roles: Sequence[Sequence[Any]],
    groups: Sequence[int],
    keys: Sequence[int],
    first: Sequence[bool],
    hyper: Sequence[Sequence[Any]],
) -> Table:
    """The table of N tensors: 11 rows of N operands each, in the order of the kernel's roles.

    Hyperparameters may be tensors on the device.
    """
    parameters, gradients, states = roles[0], roles[1], roles[3]
    device = parameters[0].device
    rows = [[0 if t is None else t.data_ptr() for t in row] for row in roles]
    sizes = tuple(p.numel() for p in parameters)
    numbers = [[0.0 if isinstance(value, Tensor) else value for value in row] for row in hyper]
    pinned = device.type == "cuda"
    hosts = [
        torch.tensor(rows, dtype=torch.int64, pin_memory=pinned),
        torch.tensor([sizes, groups, keys, first], dtype=torch.int64, pin_memory=pinned),
        torch.tensor(numbers, dtype=torch.float64, pin_memory=pinned),
    ]
    addresses, about, scalars = (host.to(device, non_blocking=True) for host in hosts)
    for g, row in enumerate(hyper):
        for k, value in enumerate(row):
            if isinstance(value, Tensor):
                scalars[g, k] = value.squeeze()
    addresses.operands = [t for row in roles for t in row if t is not None]  # type: ignore[attr-defined]  # a guard of memory looks for them
    state = states[0].dtype if states[0] is not None else parameters[0].dtype
    types = (parameters[0].dtype, gradients[0].dtype, state)
    aligned = all(address % 16 == 0 for role, row in enumerate(rows[:8]) if role != 2 for address in row)
    return Table(hosts, addresses, about, scalars, _tiles(sizes, device), types, aligned)


@functools.lru_cache(maxsize=16)
def _tiles(sizes: tuple[int, ...], device: torch.device) -> Tensor:
    """Of each tile the tensor, and its number in it."""
    counts = torch.tensor([triton.cdiv(size, TILE) for size in sizes])
    tensors = torch.repeat_interleave(torch.arange(len(sizes)), counts)
    starts = torch.repeat_interleave(counts.cumsum(0) - counts, counts)
    return torch.stack([tensors, torch.arange(len(tensors)) - starts], 1).to(device, torch.int32)


def step(
    rule: str,
    table: Table,
    states: int,
    options: Sequence[str],
    *,
    factor: Tensor | None,
    found_inf: Tensor | None,
    average: float,
) -> None:
    """Take a step with every tensor of the table; none where ``found_inf`` is not 0."""
    if len(table.tiles):
        P, G, S = (_TYPES[dtype] for dtype in table.types)
        launch(
            _step, (len(table.tiles),),
            table.addresses, table.about, table.tiles, table.hyper, factor, found_inf, average,
            table.about.shape[1], table.hyper.shape[1],
            RULE=rule, STATES=states, OPTIONS=sum(OPTIONS[name] for name in options),
            P=P, G=G, S=S, ALIGNED=table.aligned, TILE=TILE, num_warps=4,
        )  # fmt: skip
