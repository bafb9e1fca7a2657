"""Gradients of operators whose rows share parameters: one for each row, and sums down the columns of all rows.

A reduction along rows and one down columns are two loops to the compiler, each of which reads all operands.
:func:`by_rows` writes a few rows out together, so that one loop does both.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .compiled import known_shapes

#: What is summed down columns is the product of these.
Factors = tuple[Tensor, ...]
Tensors = Sequence[Tensor | None]

#: Rows that are written out together: as many as it takes for the sums over them to be fewer bytes than ``FRESH``.
TOGETHER = (4, 8)
#: They are where there are as many elements in a row, few enough operands for the processor to fetch ahead of so many
#: places in memory, and bytes that do not stay in a cache. Backward passes, one loop for two, on two cores of an EPYC
#: with AVX2 and pages that stay mapped: RMSNorm, float32 [4096, 4096], 16.8 ms for 23.0; scale_add, [12608, 768], 8.6
#: for 12.1; but gated_rms_norm, [65536, 128], 31.7 for 30.3; add_modulated_layer_norm, of four operands, [4096, 3072],
#: 30.7 for 28.7; add_layer_norm, bfloat16 [2048, 1024], 3.1 for 2.8.
SHORTEST = 512
MOST_OPERANDS = 3
LARGE = 16 * 2**20
#: glibc maps this much and more anew each time, whose pages cost more than a loop: LayerNorm of [4096, 4096] took 87 ms
#: with four rows, 67 with eight and 68 with two loops in float32, and 59, 38 and 39 in bfloat16 (on the same machine;
#: with pages that stay mapped 20, 18 and 25, and 16, 15 and 19).
FRESH = 32 * 2**20
#: Rows of this many elements or more are added up eight at a time, shorter ones 32 at a time. A block is read column by
#: column, and lines of more than eight long rows drive each other out of the cache: bfloat16 [4096, 4096] took 6.0 ms
#: for 11.5, [2048, 1024] 0.9 for 1.8, float32 [4096, 1152] 2.8 for 3.6; of [65536, 128], in eights, 11.0 for 6.0 (Σ g·n
#: and Σ g, one thread on two cores of an AMD EPYC, process time).
LONG_ROW = 1024
#: Sums of up to so many blocks are added up one after the other, more in blocks again: the gradient of the weight of
#: gated_rms_norm, float32 [65536, 128], was 1.4 times over its error budget as a sum of 2,048.
MOST_BLOCKS = 64


def by_rows(
    body: Callable[..., tuple[Tensors, Sequence[Factors | None]]],
    rows: Tensors,
    parameters: Tensors,
    *,
    costly: bool = False,
) -> tuple[Tensors, Tensors]:
    """The gradients of what has rows, and those of the parameters that rows share.

    Args:
        body: ``body(*rows, *parameters)`` returns the former, for the rows that it was given, and of each parameter the
            factors whose product, summed over rows, is the latter; None is not wanted.
        rows: [..., D], of one shape but for D, or None.
        parameters: [D] or [..., 1, D], all with as many rows, or None.
        costly: body costs more than its operands, which may stay in a cache; two loops run most of it twice.

    Returns:
        The former for all rows, and the latter, summed in float32 or wider.
    """
    together = _together(rows, parameters, 0 if costly else LARGE)
    if not together:
        results, factors = body(*rows, *parameters)
        return results, [
            column_sum(p, *f) if p is not None and f is not None else None
            for p, f in zip(parameters, factors, strict=True)
        ]
    blocks = [t if t is None else t.reshape(-1, together, t.shape[-1]) for t in rows]
    shared = [p if p is None else p.flatten() for p in parameters]
    found = [body(*(t if t is None else t[:, i] for t in blocks), *shared) for i in range(together)]
    shape = next(t.shape[:-1] for t in rows if t is not None)
    results = [_interleaved(parts, shape) for parts in zip(*(results for results, _ in found), strict=True)]
    return results, _sums_of_blocks(parameters, [factors for _, factors in found])


def _together(rows: Tensors, parameters: Tensors, large: int) -> int:
    """How many rows are written out together; 0 if each is on its own."""
    operands = [t for t in rows if t is not None]
    D = max(t.shape[-1] for t in operands)
    count = math.prod(operands[0].shape[:-1])
    shared = [p for p in parameters if p is not None]
    worth_it = (
        known_shapes()
        and len(shared) > 0
        and all(p.numel() == D for p in shared)
        and D >= SHORTEST
        and count > 0
        and sum(t.shape[-1] == D for t in operands) <= MOST_OPERANDS
        and sum(t.nbytes for t in operands) >= large
    )
    fitting = (n for n in TOGETHER if count % n == 0 and len(shared) * D * (count // n) * 4 < FRESH)
    return next(fitting, 0) if worth_it else 0


def _interleaved(parts: Tensors, shape: Sequence[int]) -> Tensor | None:
    """[blocks, D] each → [*shape, D], or None where they are."""
    present = [part for part in parts if part is not None]
    return torch.stack(present, 1).view(*shape, -1) if present else None


def _sums_of_blocks(parameters: Tensors, factors: Sequence[Sequence[Factors | None]]) -> Tensors:
    """The gradients of parameters from the factors of each row of a block."""
    products = {i: [_product(f) for f in of_rows if f] for i, of_rows in enumerate(zip(*factors, strict=True))}
    blocks = {i: functools.reduce(torch.add, of_rows) for i, of_rows in products.items() if of_rows}
    if not blocks:
        return [None] * len(parameters)
    # Beside each other: the compiler writes them in the loop that it has for rows, and adds all up in another one.
    beside = torch.cat([*blocks.values()], -1)
    total = _row_sum((beside.unsqueeze(0),), 16, beside.dtype)[0]
    sums = dict(zip(blocks, total.split([b.shape[-1] for b in blocks.values()]), strict=True))
    return [
        sums[i].view(p.shape).to(p.dtype) if p is not None and i in sums else None for i, p in enumerate(parameters)
    ]


def column_sum(parameter: Tensor, *factors: Tensor) -> Tensor:
    """Σ of the product over the rows that share a row of the parameter: the gradient of the parameter.

    It is summed up in blocks of rows, which stay in the cache, and then over the blocks; in float32 or wider.
    """
    wide = torch.promote_types(factors[0].dtype, torch.float32)
    D = parameter.shape[-1]
    groups = math.prod(parameter.shape[:-1])
    T = math.prod(factors[0].shape[:-1]) // max(groups, 1)
    factors = tuple(f.reshape(groups, T, D) for f in factors)
    total = _row_sum(factors, 8 if D >= LONG_ROW else 32, wide)
    return total.view(parameter.shape).to(parameter.dtype)


def _row_sum(factors: Sequence[Tensor], rows: int, wide: torch.dtype) -> Tensor:
    """[groups, T, D] each → [groups, D], the sum of their product over T."""
    T = factors[0].shape[1]
    if rows > T:
        return _product(factors).sum(1, dtype=wide)
    # Cut up before they are multiplied: the compiler would write a product that is read twice to memory.
    blocks = _product([f.unfold(1, rows, rows) for f in factors]).sum(-1, dtype=wide)
    rest = _product([f[:, T // rows * rows :] for f in factors])
    total = blocks.sum(1) if blocks.shape[1] <= MOST_BLOCKS else _row_sum((blocks,), 16, wide)
    return total + rest.sum(1, dtype=wide)


def _product(factors: Sequence[Tensor]) -> Tensor:
    return functools.reduce(torch.mul, factors)
