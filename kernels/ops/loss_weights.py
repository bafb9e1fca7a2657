"""Weights of tokens and of classes in a loss, what its mean divides by, and the plain mean."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from . import process_groups

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


def reduced(losses: Tensor, reduction: str) -> Tensor:
    """The losses, their sum or their mean."""
    if reduction == "none":
        return losses
    return losses.sum() if reduction == "sum" else losses.mean()


def token_weights(ignored: Tensor, token_weight: Tensor | None, dtype: torch.dtype) -> Tensor:
    """u of every token, [N]: 0 where it is ignored."""
    if token_weight is None:
        return (~ignored).to(dtype)
    return token_weight.flatten().to(dtype).masked_fill(ignored, 0.0)


def divisor(
    target: Tensor,
    class_weight: Tensor | None,
    token_weight: Tensor | None,
    *,
    ignore_index: int,
    group: ProcessGroup | None = None,
) -> Tensor:
    """Σ u_n·w_{t_n} over the tokens that count: what "mean" divides by.

    With a group, class_weight is of this process's classes.
    """
    target = target.flatten()
    ignored = target == ignore_index
    dtypes = [t.dtype for t in (class_weight, token_weight) if t is not None]
    u = token_weights(ignored, token_weight, functools.reduce(torch.promote_types, dtypes, torch.float32))
    if class_weight is None:
        return u.sum()
    if group is None:
        return (u * class_weight.to(u.dtype)[target.long().masked_fill(ignored, 0)]).sum()
    sizes = process_groups.gathered(target.new_full((1,), len(class_weight), dtype=torch.long), group)
    index = own_index(target.long() - sizes[: group.rank()].sum(), len(class_weight))
    return process_groups.all_reduce((u * or_zero(class_weight, index).to(u.dtype)).sum(), "sum", group)


def own_index(place: Tensor, classes: int) -> Tensor:
    """Of targets counted from this process's first class: ``classes`` where another process holds them."""
    return place.masked_fill((place < 0) | (place > classes), classes)


def or_zero(weight: Tensor, index: Tensor) -> Tensor:
    """``weight[index]``, and 0 at ``len(weight)``."""
    return F.pad(weight, (0, 1))[index]
