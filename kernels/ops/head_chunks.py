"""A linear layer and the loss behind it, some tokens at a time: the logits of all tokens are never in memory.

For each chunk of rows the logits x = h·Wᵀ + b are computed, the loss turns them into losses and replaces them by dx,
and three sums are all that stays:

    dh = dx·W        dW = Σ dxᵀ·h        db = Σ dx

in float32 (or wider). Everything is computed on the way forward, as for a sum of losses, and multiplied in the backward
pass by what that finds out: three matrix products in all, as without chunks. Sources: Hsu et al., Liger Kernel (2024),
for the gradients on the way forward; Wijmans et al., Cut Your Losses (2024), for leaving out what is ignored.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

#: ``(logits, index, scale) -> losses``: the losses [n] of the rows of logits [n, C] that are ``index`` of all, in
#: float32 or wider. Unless scale is None, the gradient of Σ scale·loss replaces the logits.
Losses = Callable[[Tensor, "slice | Tensor", "Tensor | None"], Tensor]

#: The least memory, in bytes, that a chunk gets by default.
LEAST_BUDGET = 64 * 2**20


class Found(NamedTuple):
    """The losses [N], 0 where left out, and the gradients of Σ scale·loss that were wanted."""

    losses: Tensor
    hidden: Tensor | None
    weight: Tensor | None
    bias: Tensor | None


def in_chunks(
    losses_of: Losses,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    counted: Tensor | None,
    scale: Tensor | None,
    needs: Sequence[bool],
    rows: int,
) -> Found:
    """Losses and gradients of hidden [N, D] before a head [C, D].

    Args:
        losses_of: the loss behind the head.
        hidden: what goes into the head.
        weight: of the head.
        bias: of the head, [C].
        counted: the rows that count; None for all. The others cost nothing.
        scale: [N], of each loss in the sum that is differentiated; None if no gradient is needed.
        needs: whether hidden, weight and bias need a gradient.
        rows: how many a chunk may have.
    """
    wide = torch.promote_types(hidden.dtype, torch.float32)
    wants_hidden, wants_weight, wants_bias = needs if scale is not None else (False, False, False)
    losses = torch.zeros(len(hidden), dtype=wide, device=hidden.device)
    dh = torch.zeros_like(hidden, memory_format=torch.contiguous_format) if wants_hidden else None
    dw = db = None
    memory = hidden.new_empty(min(rows, len(hidden)), len(weight))
    for index in _chunks(len(hidden), counted, rows):
        h = hidden[index]
        x = memory[: len(h)]
        torch.mm(h, weight.mT, out=x) if bias is None else torch.addmm(bias, h, weight.mT, out=x)
        losses[index] = losses_of(x, index, None if scale is None else scale[index]).to(wide)
        if dh is not None:
            dh[index] = x @ weight
        if wants_weight:
            dw = _product(x.mT, h, wide) if dw is None else _add_product(dw, x.mT, h)
        if wants_bias:
            found = x.sum(0, dtype=wide)
            db = found if db is None else db.add_(found)
    return Found(losses, dh, _held(dw, weight, wants_weight), _held(db, bias, wants_bias))


def rows_within(budget: int | None, weight: Tensor, classes: int, other_head: Tensor | None = None) -> int:
    """How many rows a chunk may have, before a head of so many classes that is otherwise like weight [·, D].

    The gradient takes the place of the logits; the CPU widens it for one product. Those of another head, [classes, E],
    are there beside them. The budget is the bytes that all may take; None for half of the heads' own, at least
    LEAST_BUDGET.
    """
    itemsize = weight.element_size()
    each = itemsize + (4 if itemsize < 4 and weight.device.type == "cpu" else 0)
    heads = classes * weight.shape[1] * itemsize
    if other_head is not None:
        each += other_head.element_size()
        heads += other_head.nbytes
    if budget is None:
        budget = max(LEAST_BUDGET, heads // 2)
    return max(1, budget // max(1, classes * each))


def _chunks(N: int, counted: Tensor | None, most: int) -> Iterator[slice | Tensor]:
    """The rows that count, in as few chunks of about one size as ``most`` rows to a chunk allow."""
    total = N if counted is None else len(counted)
    size = math.ceil(total / max(1, math.ceil(total / most)))
    for start in range(0, total, max(size, 1)):
        stop = min(start + size, total)
        yield slice(start, stop) if counted is None else counted[start:stop]


def _product(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """a·b, summed up in ``dtype`` and not rounded after."""
    if a.dtype == dtype or a.device.type == "cpu":
        return torch.mm(a.to(dtype), b.to(dtype))
    return torch.mm(a, b, out_dtype=dtype)


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """total += a·b, likewise."""
    if a.dtype == total.dtype or a.device.type == "cpu":
        return total.addmm_(a.to(total.dtype), b.to(total.dtype))
    return total.add_(_product(a, b, total.dtype))


def held_dtype(dtype: torch.dtype) -> torch.dtype:
    """In what a sum waits for the gradient of the loss: float16 may be too narrow for it before, if not after."""
    return torch.float32 if dtype == torch.float16 else dtype


def _held(total: Tensor | None, parameter: Tensor | None, wanted: bool) -> Tensor | None:
    """The sum over the chunks, of which there may have been none."""
    if not wanted or parameter is None:
        return None
    dtype = held_dtype(parameter.dtype)
    return torch.zeros_like(parameter, dtype=dtype) if total is None else total.to(dtype)


def counted_rows(ignored: Tensor) -> Tensor | None:
    """The places that are not ignored; None if that is all of them."""
    counted = (~ignored).nonzero().squeeze(1)
    return None if len(counted) == len(ignored) else counted


def scaled(found: Found, factor: Tensor, dtype: torch.dtype) -> Found:
    """The gradients times a factor, in place, and in ``dtype``."""
    one = factor.device.type == "cpu" and factor.item() == 1.0
    hidden, weight, bias = (g if g is None else (g if one else g.mul_(factor)).to(dtype) for g in found[1:])
    return Found(found.losses, hidden, weight, bias)
