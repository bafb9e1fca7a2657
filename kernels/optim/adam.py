"""Adam and AdamW.

    Adam:  d = g + λ·p          AdamW:  p ← (1 − η·λ)·p,  d = g
    m ← β₁·m + (1 − β₁)·d       v ← β₂·v + (1 − β₂)·d²       AMSGrad: v̂ ← max(v̂, v) in the place of v below
    p ← p − η / (1 − β₁ᵗ) · m / (√v / √(1 − β₂ᵗ) + ε)        t: the number of the step, from 1

Source: ``torch.optim.Adam`` and ``AdamW``; Kingma and Ba, Adam (2015); Loshchilov and Hutter, Decoupled Weight Decay
Regularization (2019); Reddi et al., On the Convergence of Adam and Beyond (2018).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Unpack

import torch
from torch import Tensor

from .rule import FusedCall, Group, Rule, Scalars, decay
from .step import Extras, FusedStep, Params


def reference(
    p: Tensor, g: Tensor, states: Sequence[Tensor], scalars: Scalars, options: tuple[str, ...], first: bool
) -> tuple[Tensor, ...]:
    """One step in plain PyTorch."""
    size, root, kept, weight_decay, to_m, beta2, to_v, eps = scalars
    m, v, *top = states
    if "decoupled" in options:
        p = p * kept
    else:
        g = g + decay(weight_decay, p)
    m = m + to_m * (g - m)
    v = beta2 * v + to_v * g * g
    if "amsgrad" in options:
        top = [torch.maximum(top[0], v)]
    return p - size * (m / ((top[0] if top else v).sqrt() / root + eps)), m, v, *top


def _aten(call: FusedCall) -> None:
    lr, beta1, beta2, eps, weight_decay = call.hyper
    m, v, *top = call.states
    fused: Any = torch._fused_adamw_ if "decoupled" in call.options else torch._fused_adam_
    fused(
        call.params,
        call.grads,
        m,
        v,
        *(top or [[]]),
        call.steps,
        lr=lr,
        beta1=beta1,
        beta2=beta2,
        weight_decay=weight_decay,
        eps=eps,
        amsgrad="amsgrad" in call.options,
        maximize="maximize" in call.options,
        grad_scale=call.scale,
    )


def _scalars(hyper: tuple[Any, ...], step: Any) -> tuple[Any, ...]:
    lr, beta1, beta2, eps, weight_decay = hyper
    size, root = lr / (1 - beta1**step), (1 - beta2**step) ** 0.5
    return size, root, 1 - lr * weight_decay, weight_decay, 1 - beta1, beta2, 1 - beta2, eps


def _options(group: Group) -> tuple[str, ...]:
    does = {"decoupled": group["decoupled_weight_decay"], **{name: group[name] for name in ("maximize", "amsgrad")}}
    return ("step", *(name for name, on in does.items() if on))


RULE = Rule(
    name="adam",
    reference=reference,
    states=lambda group: ("exp_avg", "exp_avg_sq", *(["max_exp_avg_sq"] if group["amsgrad"] else [])),
    hyper=lambda group: (group["lr"], *group["betas"], group["eps"], group["weight_decay"]),
    scalars=_scalars,
    options=_options,
    aten=_aten,
)


class Adam(FusedStep, torch.optim.Adam):
    """Drop-in for ``torch.optim.Adam``: its arguments, parameter groups and state; a step is one launch.

    Args:
        params: as there, and so are the others up to decoupled_weight_decay; differentiable must be False.
        extras: see :class:`braze.kernels.optim.FusedStep`.
    """

    rule = RULE
    traced_as_torch = True

    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0,
        amsgrad: bool = False,
        *,
        foreach: bool | None = None,
        maximize: bool = False,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        decoupled_weight_decay: bool = False,
        **extras: Unpack[Extras],
    ) -> None:
        self._set_extras(differentiable, **extras)
        super().__init__(
            params, lr, betas, eps, weight_decay, amsgrad, foreach=foreach, maximize=maximize, capturable=capturable,
            fused=fused, decoupled_weight_decay=decoupled_weight_decay,
        )  # fmt: skip


class AdamW(FusedStep, torch.optim.AdamW):
    """Drop-in for ``torch.optim.AdamW``: its arguments, parameter groups and state; a step is one launch.

    Args:
        params: as there, and so are the others up to fused; differentiable must be False.
        extras: see :class:`braze.kernels.optim.FusedStep`.
    """

    rule = RULE
    traced_as_torch = True

    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        **extras: Unpack[Extras],
    ) -> None:
        self._set_extras(differentiable, **extras)
        super().__init__(
            params, lr, betas, eps, weight_decay, amsgrad, foreach=foreach, maximize=maximize, capturable=capturable,
            fused=fused,
        )  # fmt: skip
