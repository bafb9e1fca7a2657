"""Lion: the sign of a momentum.

    c = β₁·m + (1 − β₁)·g
    p ← (1 − η·λ)·p − η·sign(c)
    m ← β₂·m + (1 − β₂)·g

Source: Chen et al., Symbolic Discovery of Optimization Algorithms (2023), algorithm 2.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Unpack

import torch
from torch import Tensor

from .rule import Rule, Scalars
from .step import Extras, FusedStep, Params


def reference(
    p: Tensor, g: Tensor, states: Sequence[Tensor], scalars: Scalars, options: tuple[str, ...], first: bool
) -> tuple[Tensor, ...]:
    """One step in plain PyTorch."""
    lr, kept, beta1, beta2 = scalars
    (m,) = states
    c = beta1 * m + (1 - beta1) * g
    sign = torch.where(c > 0, 1.0, torch.where(c < 0, -1.0, c))  # torch.sign makes 0 of NaN, and hides it
    return p * kept - lr * sign, beta2 * m + (1 - beta2) * g


def _scalars(hyper: tuple[Any, ...], step: Any) -> tuple[Any, ...]:
    lr, beta1, beta2, weight_decay = hyper
    return lr, 1 - lr * weight_decay, beta1, beta2


RULE = Rule(
    name="lion",
    reference=reference,
    states=lambda group: ("exp_avg",),
    hyper=lambda group: (group["lr"], *group["betas"], group["weight_decay"]),
    scalars=_scalars,
    options=lambda group: ("maximize",) if group["maximize"] else (),
)


class Lion(FusedStep):
    """Lion, with one state, ``exp_avg``, for each parameter; a step is one launch.

    A tenth to a third of AdamW's learning rate suits it, with a weight decay as much larger.

    Args:
        params: parameters or parameter groups.
        lr: η; a float, or a tensor that may change between replays of a CUDA graph.
        betas: β₁ and β₂, in [0, 1).
        weight_decay: λ.
        maximize: whether to go up.
        extras: see :class:`braze.kernels.optim.FusedStep`.

    Raises:
        ValueError: if an argument is out of its range.
    """

    rule = RULE

    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 1e-4,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
        *,
        maximize: bool = False,
        **extras: Unpack[Extras],
    ) -> None:
        for name, value in (("lr", lr), ("weight_decay", weight_decay)):
            if not value >= 0.0:
                raise ValueError(f"Lion: {name} must not be negative, got {value}")
        if not all(0.0 <= beta < 1.0 for beta in betas):
            raise ValueError(f"Lion: betas must lie in [0, 1), got {betas}")
        self._set_extras(**extras)
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay, "maximize": maximize})
