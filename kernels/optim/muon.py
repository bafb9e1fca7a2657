"""Muon: momentum made orthogonal, for matrices; AdamW for all other parameters.

    B ← μ·B + (1 − μ)·g          U = (1 − μ)·g + μ·B (Nesterov), or B
    X₀ = U / ‖U‖                 Xₖ₊₁ = a·Xₖ + (b·XₖXₖᵀ + c·(XₖXₖᵀ)²)·Xₖ        in bfloat16, on the shorter side
    p ← (1 − η·λ)·p − η·r·X      r: for the shape of the matrix, see ``adjust_lr_fn``

Matrices of one shape are made orthogonal together, in batched products.

Source: ``torch.optim.Muon``; Jordan et al., Muon: An optimizer for hidden layers in neural networks (2024); Liu et al.,
Muon is Scalable for LLM Training (2025).
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from typing import Any, Unpack

import torch
from torch import Tensor

from . import adam, sgd
from .bucket import Bucket, Kind, part, whole
from .rule import Group, Rule
from .step import Extras, FusedStep, Params

#: ``adjust_lr_fn`` → r of an [m, n] matrix.
ADJUSTMENTS = {
    "original": lambda m, n: math.sqrt(max(1.0, m / n)),
    "match_rms_adamw": lambda m, n: 0.2 * math.sqrt(max(m, n)),
    "spectral_unclamped": lambda m, n: math.sqrt(m / n),
}


def orthogonal(matrices: Tensor, coefficients: Sequence[float], steps: int, eps: float) -> Tensor:
    """U·Vᵀ, about, of each of the matrices U·S·Vᵀ, [K, m, n], by Newton-Schulz iteration in bfloat16."""
    a, b, c = coefficients
    x = matrices.bfloat16()
    x = x.mT if x.shape[1] > x.shape[2] else x
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=eps)
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if matrices.shape[1] > matrices.shape[2] else x


def _directions(
    kind: Kind, bucket: Bucket, groups: Sequence[Group], factor: Tensor | None, found_inf: Tensor | None
) -> list[Tensor]:
    """r·X of every matrix; momenta are updated, unless ``found_inf`` is not 0."""
    alike: dict[Any, list[int]] = defaultdict(list)
    updates = []
    for i, (g, (momentum,), index) in enumerate(zip(bucket.grads, bucket.direction_states, bucket.groups, strict=True)):
        group = groups[index]
        wide = g.to(torch.promote_types(g.dtype, torch.float32))
        if factor is not None:
            wide = wide * factor
        b = momentum.lerp(wide.to(momentum.dtype), 1 - group["momentum"])
        momentum.copy_(b if found_inf is None else torch.where(found_inf == 0, b, momentum))
        update = wide.lerp(b.to(wide.dtype), group["momentum"]) if group["nesterov"] else b
        updates.append(whole(update, like=bucket.originals[i]))
        alike[index, updates[i].shape].append(i)
    found: list[Tensor] = list(updates)
    for (index, (m, n)), own in alike.items():
        group = groups[index]
        ratio = ADJUSTMENTS[group["adjust_lr_fn"] or "original"](m, n)
        matrices = torch.stack([updates[i] for i in own])
        x = orthogonal(matrices, group["ns_coefficients"], group["ns_steps"], group["eps"])
        for i, direction in zip(own, x, strict=True):
            found[i] = torch.empty_like(bucket.params[i]).copy_(part(direction, like=bucket.originals[i])).mul_(ratio)
    if "clear" in kind.options:
        torch._foreach_zero_(bucket.grads)
    return found


def _nothing(group: Group) -> tuple[str, ...]:
    return ()


MATRICES = Rule(
    name="sgd",
    reference=sgd.reference,
    states=_nothing,
    hyper=lambda group: (group["lr"], 0.0, 0.0, group["weight_decay"]),
    scalars=lambda hyper, step: hyper,
    options=_nothing,
    aten=sgd.RULE.aten,
    direction=_directions,
    direction_states=lambda p: {"momentum_buffer": tuple(p.shape)},
)

OTHERS = Rule(
    name="adam",
    reference=adam.reference,
    states=lambda group: ("exp_avg", "exp_avg_sq"),
    hyper=lambda group: (group["adamw_lr"], *group["betas"], group["adamw_eps"], group["weight_decay"]),
    scalars=adam.RULE.scalars,
    options=lambda group: ("step", "decoupled"),
    aten=adam.RULE.aten,
)


class Muon(FusedStep):
    """Muon for parameters of two dims and AdamW for the others; a state of ``torch.optim.Muon`` resumes here.

    Embeddings and the head of a language model have two dims but belong to AdamW: put them into a parameter group with
    ``"algorithm": "adamw"``. Sharded matrices are put together for the products, on every rank.

    Args:
        params: parameters or parameter groups.
        lr: η of matrices.
        weight_decay: λ, of all parameters.
        momentum: μ.
        nesterov: whether the newest gradient counts once more.
        ns_coefficients: a, b and c.
        eps: the least norm that a matrix is divided by.
        ns_steps: how many times.
        adjust_lr_fn: r of an [m, n] matrix: "original" (None), √max(1, m / n); "match_rms_adamw", 0.2·√max(m, n), with
            which ``lr`` may be AdamW's; or "spectral_unclamped", √(m / n).
        adamw_lr: η of the other parameters.
        betas: AdamW's.
        adamw_eps: AdamW's ε.
        algorithm: "muon", or "adamw" for all parameters of a group.
        extras: see :class:`braze.kernels.optim.FusedStep`.

    Raises:
        ValueError: if an argument is out of its range.
    """

    rule = MATRICES

    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 1e-3,
        weight_decay: float = 0.1,
        momentum: float = 0.95,
        nesterov: bool = True,
        ns_coefficients: tuple[float, float, float] = (3.4445, -4.7750, 2.0315),
        eps: float = 1e-7,
        ns_steps: int = 5,
        adjust_lr_fn: str | None = None,
        *,
        adamw_lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        adamw_eps: float = 1e-8,
        algorithm: str = "muon",
        **extras: Unpack[Extras],
    ) -> None:
        for name, value in (("lr", lr), ("adamw_lr", adamw_lr), ("weight_decay", weight_decay)):
            if not value >= 0.0:
                raise ValueError(f"Muon: {name} must not be negative, got {value}")
        if not all(0.0 <= value < 1.0 for value in (momentum, *betas)):
            raise ValueError(f"Muon: momentum and betas must lie in [0, 1), got {momentum} and {betas}")
        if adjust_lr_fn is not None and adjust_lr_fn not in ADJUSTMENTS:
            raise ValueError(f"Muon: adjust_lr_fn must be one of {', '.join(ADJUSTMENTS)}, got {adjust_lr_fn!r}")
        self._set_extras(**extras)
        super().__init__(
            params,
            {
                "lr": lr,
                "weight_decay": weight_decay,
                "momentum": momentum,
                "nesterov": nesterov,
                "ns_coefficients": ns_coefficients,
                "eps": eps,
                "ns_steps": ns_steps,
                "adjust_lr_fn": adjust_lr_fn,
                "adamw_lr": adamw_lr,
                "betas": betas,
                "adamw_eps": adamw_eps,
                "algorithm": algorithm,
            },
        )

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As in torch, after a look at the group's algorithm."""
        algorithm = param_group.get("algorithm", self.defaults["algorithm"])
        if algorithm not in ("muon", "adamw"):
            raise ValueError(f"Muon: the algorithm of a group must be 'muon' or 'adamw', got {algorithm!r}")
        super().add_param_group(param_group)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for group in self.param_groups:
            for name in ("adamw_lr", "betas", "adamw_eps", "algorithm"):  # torch.optim.Muon has none
                group.setdefault(name, self.defaults[name])

    def _rule_of(self, p: Tensor, group: dict[str, Any]) -> Rule:
        return MATRICES if p.dim() == 2 and group["algorithm"] == "muon" else OTHERS
