"""The error budget of the contract, for results that a test computes itself."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def excess(got: Sequence[Tensor], plain: Sequence[Tensor], exact: Sequence[Tensor]) -> float:
    """The worst error as a multiple of its budget: twice the plain form's own, plus a rounding step of the largest."""
    worst = 0.0
    for mine, theirs, truth in zip(got, plain, exact, strict=True):
        if not truth.numel():
            continue
        error, own = ((t.double() - truth).abs().max().item() for t in (mine, theirs))
        assert error == error
        budget = 2 * (own + torch.finfo(mine.dtype).eps * truth.abs().max().item())
        worst = max(worst, error / budget if budget else float("inf") if error else 0.0)
    return worst
