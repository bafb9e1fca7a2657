"""Sums along many elements, in blocks, for code that the compiler makes for the CPU.

It adds a row up in eight or sixteen lanes, each from one end to the other: in float32, 16,384 equal numbers came out
2e-6 too large, where ATen, which adds in a tree, is right to the last bit. Reductions of this module's table are taken
apart before the compiler sees them, into sums of blocks and the sum of these.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

#: Rows up to here are added up in one go: a sum of its own costs an allocation, a fifth of RMSNorm's time at 2,048
#: elements in the cache, a twentieth at 4,096 from memory.
LONGEST = 2_048
#: The same where operands are in half precision, of which there are twice as many lanes: the compiler runs one sum on a
#: row while it is in the cache, as it does not run sums of blocks. The gradient of softmax, bfloat16 [4096, 4096], took
#: 1.9 ms for 3.3 (two cores of an EPYC).
LONGEST_OF_HALF = 4_096
#: The same where all that there is gives one number: that is one allocation.
LONGEST_OF_ALL = 256
BLOCK = 1_024
#: A row of up to so many blocks (in half precision, times the longest) is cut into equal pieces, which are added up
#: element by element first: the compiler writes so few terms out in the loop that adds the rest up, and runs it on a
#: row while that is in the cache. The gradient of softmax, float32 [4096, 4096], took 11.8 ms for 16.6 in blocks (two
#: cores of an EPYC with AVX2).
MOST_PIECES = 4
#: Sums of fewer blocks are written out in the loop that uses them, which the compiler then does not run on a row while
#: the row is in the cache: LayerNorm's gradient of float32 [4096, 4096] took 51 ms in two blocks, 44 in eight.
FEWEST_BLOCKS = 8


def decompositions(*, half: bool) -> dict[Any, Callable[..., Any]]:
    """What the operators' reductions are taken apart by; ``half``: some of their operands are in half precision."""
    aten = torch.ops.aten
    sum, mean = functools.partial(_sum, half), functools.partial(_mean, half)
    return {
        aten.sum.default: lambda x, *, dtype=None: sum(x, None, dtype=dtype),
        aten.sum.dim_IntList: sum,
        aten.mean.default: lambda x, *, dtype=None: mean(x, None, dtype=dtype),
        aten.mean.dim: mean,
    }


def _sum(
    half: bool, x: Tensor, dims: Sequence[int] | None, keepdim: bool = False, *, dtype: torch.dtype | None = None
) -> Any:
    over = {dim % x.dim() for dim in dims or range(x.dim())} if x.dim() else set()
    longest, piece = (LONGEST_OF_HALF, LONGEST_OF_HALF) if half else (LONGEST, BLOCK)
    if len(over) == x.dim():
        longest, piece = LONGEST_OF_ALL, 0
    if x.dim() - 1 not in over or not x.is_floating_point() or math.prod(x.shape[dim] for dim in over) <= longest:
        return NotImplemented
    values = x if dtype is None else x.to(dtype)
    total = _row_sums(values, piece) if x.shape[-1] > longest else values.sum(-1, keepdim=True)
    others = sorted(over - {x.dim() - 1})
    if others:
        total = total.sum(others, keepdim=True)
    return total if keepdim else total.squeeze(tuple(over))


def _row_sums(x: Tensor, piece: int) -> Tensor:
    """[…, D] → […, 1]; ``piece``: elements that may be added up one after the other."""
    D = x.shape[-1]
    if isinstance(D, int):  # of a width that may change, whether it can be divided would be asked again and again
        for pieces in range(2, MOST_PIECES + 1):
            if D % pieces == 0 and D // pieces <= piece:
                return x.unflatten(-1, (pieces, -1)).sum(-2).sum(-1, keepdim=True)
    block = BLOCK if D > FEWEST_BLOCKS * BLOCK else D // FEWEST_BLOCKS
    rest = D % block
    total = x[..., : D - rest].unflatten(-1, (-1, block)).sum(-1).sum(-1, keepdim=True)
    return total + x[..., D - rest :].sum(-1, keepdim=True) if rest else total


def _mean(
    half: bool, x: Tensor, dims: Sequence[int] | None, keepdim: bool = False, *, dtype: torch.dtype | None = None
) -> Any:
    total = _sum(half, x, dims, keepdim, dtype=dtype)
    return total if total is NotImplemented else total / (x.numel() // max(total.numel(), 1))
