"""Sums along many elements, in blocks, for code that the compiler makes for the CPU.

It adds a row up in eight or sixteen lanes, each from one end to the other: in float32, 16,384 equal numbers came out
2e-6 too large, where ATen, which adds in a tree, is right to the last bit. Reductions of this module's table are taken
apart before the compiler sees them, into sums of blocks, or in more lanes, and the sum of these.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

#: Rows up to here are added up in one go: a sum of its own costs an allocation, a fifth of RMSNorm's time at 2,048
#: elements in the cache, a twentieth at 4,096 from memory.
LONGEST = 2_048
#: The same where all that there is gives one number: that is one allocation.
LONGEST_OF_ALL = 256
#: Rows up to here are added up in 32 or 64 lanes, as many numbers to a lane as there are at LONGEST. The compiler runs
#: that on a row while the row is in the cache, as it does not run sums of blocks: the gradient of softmax, bfloat16
#: [4096, 4096], took 1.9 ms for 3.3 in blocks, [4096, 8192] 5.6 for 8.5 (two cores of an EPYC). Blocks of lanes are no
#: faster than other blocks.
LONGEST_IN_LANES = 8_192
BLOCK = 1_024


def decompositions() -> dict[Any, Callable[..., Any]]:
    """What the operators' reductions are taken apart by."""
    aten = torch.ops.aten
    return {
        aten.sum.default: lambda x, *, dtype=None: _sum(x, None, dtype=dtype),
        aten.sum.dim_IntList: _sum,
        aten.mean.default: lambda x, *, dtype=None: _mean(x, None, dtype=dtype),
        aten.mean.dim: _mean,
    }


def _sum(x: Tensor, dims: Sequence[int] | None, keepdim: bool = False, *, dtype: torch.dtype | None = None) -> Any:
    over = {dim % x.dim() for dim in dims or range(x.dim())} if x.dim() else set()
    longest = LONGEST_OF_ALL if len(over) == x.dim() else LONGEST
    if x.dim() - 1 not in over or not x.is_floating_point() or math.prod(x.shape[dim] for dim in over) <= longest:
        return NotImplemented
    values = x if dtype is None else x.to(dtype)
    total = _row_sums(values) if x.shape[-1] > longest else values.sum(-1, keepdim=True)
    others = sorted(over - {x.dim() - 1})
    if others:
        total = total.sum(others, keepdim=True)
    return total if keepdim else total.squeeze(tuple(over))


def _row_sums(x: Tensor) -> Tensor:
    """[…, D] → […, 1]."""
    D = x.shape[-1]
    if D > LONGEST_IN_LANES:
        width, inner = BLOCK, -1
    else:
        width, inner = 32 if D <= LONGEST_IN_LANES // 2 else 64, -2
    rest = D % width
    total = x[..., : D - rest].unflatten(-1, (-1, width)).sum(inner).sum(-1, keepdim=True)
    return total + x[..., D - rest :].sum(-1, keepdim=True) if rest else total


def _mean(x: Tensor, dims: Sequence[int] | None, keepdim: bool = False, *, dtype: torch.dtype | None = None) -> Any:
    total = _sum(x, dims, keepdim, dtype=dtype)
    return total if total is NotImplemented else total / (x.numel() // max(total.numel(), 1))
