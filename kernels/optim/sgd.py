"""Stochastic gradient descent.

    d = g + λ·p
    b ← μ·b + (1 − τ)·d       the first time b ← d       μ: momentum, τ: dampening
    p ← p − η·b               Nesterov: p ← p − η·(d + μ·b)

Source: ``torch.optim.SGD``; Sutskever et al., On the importance of initialization and momentum (2013).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Unpack

import torch
from torch import Tensor

from .rule import FusedCall, Rule, Scalars, decay
from .step import Extras, FusedStep, Params


def reference(
    p: Tensor, g: Tensor, states: Sequence[Tensor], scalars: Scalars, options: tuple[str, ...], first: bool
) -> tuple[Tensor, ...]:
    """One step in plain PyTorch."""
    lr, momentum, dampening, weight_decay = scalars
    g = g + decay(weight_decay, p)
    if "momentum" not in options:
        return (p - lr * g,)
    b = g if first else momentum * states[0] + (1 - dampening) * g
    return p - lr * (g + momentum * b if "nesterov" in options else b), b


def _aten(call: FusedCall) -> None:
    lr, momentum, dampening, weight_decay = call.hyper
    torch._fused_sgd_(
        call.params,
        call.grads,
        *(call.states or [[]]),
        weight_decay=weight_decay,
        momentum=momentum,
        lr=lr,
        dampening=dampening,
        nesterov="nesterov" in call.options,
        maximize="maximize" in call.options,
        is_first_step=call.first,
        grad_scale=call.scale,
    )


RULE = Rule(
    name="sgd",
    reference=reference,
    states=lambda group: ("momentum_buffer",) if group["momentum"] else (),
    hyper=lambda group: (group["lr"], group["momentum"], group["dampening"], group["weight_decay"]),
    scalars=lambda hyper, step: hyper,
    options=lambda group: tuple(name for name in ("maximize", "nesterov", "momentum") if group[name]),
    aten=_aten,
)


class SGD(FusedStep, torch.optim.SGD):
    """Drop-in for ``torch.optim.SGD``: its arguments, parameter groups and state; a step is one launch.

    Args:
        params: as there, and so are the others up to differentiable, which must be False.
        extras: see :class:`braze.kernels.optim.FusedStep`.
    """

    rule = RULE
    traced_as_torch = True

    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 1e-3,
        momentum: float = 0,
        dampening: float = 0,
        weight_decay: float = 0,
        nesterov: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        differentiable: bool = False,
        fused: bool | None = None,
        **extras: Unpack[Extras],
    ) -> None:
        self._set_extras(differentiable, **extras)
        super().__init__(
            params, lr, momentum, dampening, weight_decay, nesterov, maximize=maximize, foreach=foreach, fused=fused
        )
