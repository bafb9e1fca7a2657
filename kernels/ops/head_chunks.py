"""A linear layer and the loss behind it, some tokens at a time: the logits of all tokens are never in memory.

For each chunk of rows the logits x = h·Wᵀ + b are computed, the loss turns them into losses and replaces them by dx,
and three sums are all that stays:

    dh = dx·W        dW = Σ dxᵀ·h        db = Σ dx

in float32 (or wider). Everything is computed on the way forward, for an upstream gradient of 1, by which the backward
pass multiplies: three matrix products in all, as without chunks. Sources: Hsu et al., Liger Kernel (2024), for the
gradients on the way forward; Wijmans et al., Cut Your Losses (2024), for leaving out what is ignored.
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
    budget: int | None,
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
        budget: bytes that the tensors of a chunk may take; None for half of the weight's own, at least LEAST_BUDGET.
    """
    wide = torch.promote_types(hidden.dtype, torch.float32)
    wants_hidden, wants_weight, wants_bias = needs if scale is not None else (False, False, False)
    losses = torch.zeros(len(hidden), dtype=wide, device=hidden.device)
    dh = torch.zeros_like(hidden, memory_format=torch.contiguous_format) if wants_hidden else None
    dw = torch.zeros(weight.shape, dtype=wide, device=weight.device) if wants_weight else None
    db = torch.zeros(len(weight), dtype=wide, device=weight.device) if wants_bias else None
    rows = rows_within(budget, weight)
    memory = hidden.new_empty(min(rows, len(hidden)), len(weight))
    for index in _chunks(len(hidden), counted, rows):
        h = hidden[index]
        x = memory[: len(h)]
        torch.mm(h, weight.mT, out=x) if bias is None else torch.addmm(bias, h, weight.mT, out=x)
        losses[index] = losses_of(x, index, None if scale is None else scale[index]).to(wide)
        if dh is not None:
            dh[index] = x @ weight
        if dw is not None:
            _add_product(dw, x, h)
        if db is not None:
            db += x.sum(0, dtype=wide)
    return Found(losses, dh, None if dw is None else dw.to(weight.dtype), None if db is None else db.to(weight.dtype))


def rows_within(budget: int | None, weight: Tensor) -> int:
    """How many rows a chunk may have. The gradient takes the place of the logits; the CPU widens it for one product."""
    if budget is None:
        budget = max(LEAST_BUDGET, weight.numel() * weight.element_size() // 2)
    each = weight.element_size() + (4 if weight.element_size() < 4 and weight.device.type == "cpu" else 0)
    return max(1, budget // max(1, len(weight) * each))


def _chunks(N: int, counted: Tensor | None, most: int) -> Iterator[slice | Tensor]:
    """The rows that count, in as few chunks of about one size as ``most`` rows to a chunk allow."""
    total = N if counted is None else len(counted)
    size = math.ceil(total / max(1, math.ceil(total / most)))
    for start in range(0, total, max(size, 1)):
        stop = min(start + size, total)
        yield slice(start, stop) if counted is None else counted[start:stop]


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += aᵀ·b, summed up in total's dtype."""
    if a.dtype == total.dtype:
        total.addmm_(a.mT, b)
    elif a.device.type == "cpu":
        total.addmm_(a.mT.to(total.dtype), b.to(total.dtype))
    else:
        total += torch.mm(a.mT, b, out_dtype=total.dtype)


def counted_rows(target: Tensor, ignore_index: int) -> Tensor | None:
    """The places that are not ignored; None if that is all of them."""
    counted = (target != ignore_index).nonzero().squeeze(1)
    return None if len(counted) == len(target) else counted


def scaled(found: Found, grad: Tensor) -> Found:
    """The gradients times that of the loss, in place."""
    if grad.device.type == "cpu" and grad.item() == 1.0:
        return found
    hidden, weight, bias = (g if g is None else g.mul_(grad.to(g.dtype)) for g in found[1:])
    return Found(found.losses, hidden, weight, bias)
