"""Adafactor: second moments kept as the row and column means of a matrix.

    R ← R + (g²'s mean over the last dim − R)·t^γ       C ← C + (g²'s mean over the last but one − C)·t^γ
    V = R·C / max(mean(R), ε₁)                           of a vector: V ← V + (g² − V)·t^γ
    U = g / √max(V, ε₁²)                                 α = max(ε₂, RMS(p))·min(η, 1/√t)
    p ← (1 − η·λ)·p − α·U / max(1, RMS(U) / d)

Source: ``torch.optim.Adafactor``; Shazeer and Stern, Adafactor: Adaptive Learning Rates with Sublinear Memory Cost
(2018).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Unpack

import torch
from torch import Tensor

from . import sgd
from .bucket import Bucket, Kind, part, whole
from .rule import Group, Rule
from .step import Extras, FusedStep, Params


def _directions(
    kind: Kind, bucket: Bucket, groups: Sequence[Group], factor: Tensor | None, found_inf: Tensor | None
) -> list[Tensor]:
    """α·U / max(1, RMS(U) / d) of every parameter; means are updated, unless ``found_inf`` is not 0."""
    found = []
    for i, p in enumerate(bucket.originals):
        group, means = groups[bucket.groups[i]], bucket.direction_states[i]
        eps1, eps2 = group["eps"]
        eps1 = torch.finfo(p.dtype).eps if eps1 is None else eps1
        factored = len(means) == 2
        g = whole(bucket.grads[i], like=p) if factored else bucket.grads[i]
        g = g.to(torch.promote_types(g.dtype, torch.float32))
        g = g if factor is None else g * factor
        g = -g if group["maximize"] else g
        step = bucket.steps[i]
        assert step is not None
        weight = step ** group["beta2_decay"]
        if factored:
            for mean, dim in zip(means, (-1, -2), strict=True):
                _move(mean, g.square().mean(dim, keepdim=True), weight, found_inf)
            row, column = (mean.to(g.dtype) for mean in means)
            v = row @ column / row.mean(-2, keepdim=True).clamp(min=eps1)
        else:
            _move(means[0], g.square(), weight, found_inf)
            v = means[0].to(g.dtype)
        u = g * v.clamp(min=eps1**2).rsqrt()
        rate = torch.minimum(torch.as_tensor(group["lr"], device=g.device), step.rsqrt())
        rate = rate * _rms(whole(bucket.params[i], like=p).to(g.dtype)).clamp(min=eps2)
        clip = (_rms(u if factored else whole(u, like=p)) / group["d"]).clamp(min=1.0)
        u = part(u, like=p) if factored else u
        found.append(torch.empty_like(bucket.params[i]).copy_(u * (rate / clip)))
    if "clear" in kind.options:
        torch._foreach_zero_(bucket.grads)
    return found


def _move(mean: Tensor, towards: Tensor, weight: Tensor, found_inf: Tensor | None) -> None:
    moved = mean.to(towards.dtype).lerp(towards, weight.to(towards.dtype))
    mean.copy_(moved if found_inf is None else torch.where(found_inf == 0, moved, mean))


def _rms(t: Tensor) -> Tensor:
    return torch.linalg.vector_norm(t) / max(t.numel(), 1) ** 0.5


def _shapes(p: Tensor) -> dict[str, tuple[int, ...]]:
    if p.dim() < 2:
        return {"variance": tuple(p.shape)}
    return {"row_var": (*p.shape[:-1], 1), "col_var": (*p.shape[:-2], 1, p.shape[-1])}


RULE = Rule(
    name="sgd",
    reference=sgd.reference,
    states=lambda group: (),
    hyper=lambda group: (1.0, 0.0, 0.0, group["lr"] * group["weight_decay"]),
    scalars=lambda hyper, step: hyper,
    options=lambda group: ("step",),
    aten=sgd.RULE.aten,
    direction=_directions,
    direction_states=_shapes,
)


class Adafactor(FusedStep, torch.optim.Adafactor):
    """Drop-in for ``torch.optim.Adafactor``: its arguments, parameter groups and state.

    The means and what they make of a gradient are plain PyTorch, without a wait for the device; what surrounds the step
    is in the launch that updates the parameters. Sharded gradients are put together for the means, on every rank.

    Args:
        params: as there, and so are the others.
        extras: see :class:`braze.kernels.optim.FusedStep`.
    """

    rule = RULE
    traced_as_torch = True

    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 1e-2,
        beta2_decay: float = -0.8,
        eps: tuple[float | None, float] = (None, 1e-3),
        d: float = 1.0,
        weight_decay: float = 0.0,
        *,
        foreach: bool | None = None,
        maximize: bool = False,
        **extras: Unpack[Extras],
    ) -> None:
        self._set_extras(**extras)
        super().__init__(params, lr, beta2_decay, eps, d, weight_decay, foreach=foreach, maximize=maximize)
