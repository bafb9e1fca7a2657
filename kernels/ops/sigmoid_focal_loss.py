"""Focal loss of logits: binary cross-entropy that counts less where the prediction is right already.

    p = σ(x)          p_t = p·t + (1 − p)·(1 − t)          α_t = α·t + (1 − α)·(1 − t), or 1 if α < 0
    loss = α_t·(1 − p_t)^γ·(t·softplus(−x) + (1 − t)·softplus(x))

Source: Lin et al., Focal Loss for Dense Object Detection (2017), as in ``torchvision.ops.sigmoid_focal_loss``, which
takes targets between 0 and 1 by the same formula.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import dispatch, sharding
from ..autograd import fused, vjp
from ..op import Call, Draw, ErrorInput, Op, Traffic
from . import binary_losses, checks
from .loss_weights import reduced


def reference(x: Tensor, target: Tensor, *, alpha: float | None, gamma: float, reduction: str) -> Tensor:
    """Focal loss in plain PyTorch: float32 (or wider) inside."""
    dtype = torch.promote_types(x.dtype, target.dtype)
    wide = x.to(torch.promote_types(dtype, torch.float32))
    t = target.to(wide.dtype)
    log_p, log_not_p = F.logsigmoid(wide), F.logsigmoid(-wide)
    loss = -t * log_p - (1.0 - t) * log_not_p
    if gamma:
        # 1 − p_t as a logarithm: of 0, a power below 1 has no derivative. Between the labels it cannot be 0.
        label = (t == 0.0) | (t == 1.0)
        wrong = torch.where(label, 1.0, t * torch.sigmoid(-wide) + (1.0 - t) * torch.sigmoid(wide)).log()
        wrong = torch.where(t == 0.0, log_p, torch.where(t == 1.0, log_not_p, wrong))
        loss = loss * torch.exp(gamma * wrong)
    if alpha is not None:
        loss = loss * (alpha * t + (1.0 - alpha) * (1.0 - t))
    return reduced(loss, reduction).to(dtype)


def sigmoid_focal_loss(
    x: Tensor, target: Tensor, *, alpha: float = 0.25, gamma: float = 2.0, reduction: str = "none"
) -> Tensor:
    """Focal loss, as ``torchvision.ops.sigmoid_focal_loss``, in one pass over memory in each direction.

    Computed in float32 and rounded once; loss and gradient are finite for every finite logit and any γ ≥ 0. A loss that
    is reduced is not written to memory element by element. With γ = 0 and α < 0 it is the binary cross-entropy.

    Args:
        x: floating-point logits of any shape.
        target: probabilities like x; integers or booleans are taken for 0 and 1.
        alpha: weight of the positive class, at most 1; that of the negative one is 1 − α. Negative for no weights.
        gamma: how fast an element counts less as it is predicted right.
        reduction: "none", "mean" (over all elements) or "sum".

    Returns:
        The losses, like x, or their mean or sum, a scalar; in the wider dtype of x and target (float32 under autocast).

    Raises:
        TypeError: if x is not floating point, or target is complex.
        ValueError: if shapes do not fit, an option is out of range, or target requires a gradient: none flows to it.
    """
    name = "sigmoid_focal_loss"
    checks.floating(name, x=x)
    checks.binary_targets(name, x, target)
    checks.loss_options(name, reduction, 0.0, None, target=target)
    _check_focus(name, alpha, gamma)
    options = {"alpha": float(alpha) if alpha >= 0.0 else None, "gamma": float(gamma)}
    if reduction == "mean" and sharding.is_sharded(x):
        # The mean over all shards is not the mean of their means.
        return dispatch.run(SIGMOID_FOCAL_LOSS, x, target, reduction="sum", **options) / x.numel()
    return dispatch.run(SIGMOID_FOCAL_LOSS, x, target, reduction=reduction, **options)


class SigmoidFocalLoss(torch.nn.Module):
    """Focal loss of logits; runs :func:`sigmoid_focal_loss`.

    Args:
        alpha: as in :func:`sigmoid_focal_loss`, and so the others.
        gamma: how fast an element counts less as it is predicted right.
        reduction: "none", "mean" or "sum".
    """

    def __init__(self, alpha: float = 0.25, gamma: float = 2.0, reduction: str = "none") -> None:
        super().__init__()
        _check_focus("SigmoidFocalLoss", alpha, gamma)
        self.alpha, self.gamma, self.reduction = alpha, gamma, reduction

    def forward(self, x: Tensor, target: Tensor) -> Tensor:
        """Logits and targets of one shape → the loss."""
        return sigmoid_focal_loss(x, target, alpha=self.alpha, gamma=self.gamma, reduction=self.reduction)

    def extra_repr(self) -> str:
        """The arguments."""
        return f"alpha={self.alpha}, gamma={self.gamma}, reduction={self.reduction!r}"


def _check_focus(name: str, alpha: float, gamma: float) -> None:
    if not alpha <= 1.0:
        raise ValueError(f"{name}: alpha must be at most 1, got {alpha}; -1 is no weighting")
    if not gamma >= 0.0:
        raise ValueError(f"{name}: gamma must not be negative, got {gamma}; 0 is binary cross-entropy")


def _triton(x: Tensor, target: Tensor, **options: Any) -> Tensor:
    from ..triton import binary_losses as kernels

    return fused(kernels.forward, kernels.backward, vjp(reference), (x, target), options)


def _compiled(x: Tensor, target: Tensor, **options: Any) -> Tensor:
    return fused(binary_losses.forward, binary_losses.backward, vjp(reference), (x, target), options)


def _aten(x: Tensor, target: Tensor, *, alpha: float = 0.25, gamma: float = 2.0, reduction: str = "none") -> Tensor:
    target = target.to(torch.promote_types(x.dtype, target.dtype))
    p = torch.sigmoid(x)
    loss = F.binary_cross_entropy_with_logits(x, target, reduction="none")
    loss = loss * (1 - (p * target + (1 - p) * (1 - target))) ** gamma
    if alpha >= 0:
        loss = (alpha * target + (1 - alpha) * (1 - target)) * loss
    return reduced(loss, reduction)


def _inputs(draw: Draw, *, N: int, D: int, targets: str = "labels", **options: Any) -> Call:
    x = draw.tensor(N, D)
    if targets == "probabilities":
        return Call((x, draw.constant(N, D, low=0.0, high=1.0)), options)
    labels = draw.integers(0, 2, N, D)
    return Call((x, labels if targets == "integers" else labels.to(x.dtype)), options)


def _errors() -> Iterator[ErrorInput]:
    x, target = torch.zeros(2, 8), torch.ones(2, 8)
    wants = torch.ones(2, 8, requires_grad=True)
    yield ErrorInput(Call((x.long(), target)), TypeError, r"x must be a floating-point.*int64")
    yield ErrorInput(Call((x, target.to(torch.complex64))), TypeError, r"target must be real.*complex64")
    yield ErrorInput(Call((x, target[:, :1])), ValueError, r"target must have the shape of x, \(2, 8\), got \(2, 1\)")
    yield ErrorInput(Call((x, wants)), ValueError, r"pass target.detach\(\)")
    yield ErrorInput(Call((x, target), {"alpha": 1.5}), ValueError, "alpha must be at most 1, got 1.5")
    yield ErrorInput(Call((x, target), {"gamma": -1.0}), ValueError, "gamma must not be negative, got -1.0")
    yield ErrorInput(Call((x, target), {"reduction": "avg"}), ValueError, "reduction must be one of.*got 'avg'")


def _traffic(itemsize: int, *, N: int, D: int, targets: str = "labels", reduction: str = "none", **_: Any) -> Traffic:
    """x and target, and the losses if they are wanted, forward; the same and dx backward."""
    element = itemsize + (8 if targets == "integers" else itemsize) + (itemsize if reduction == "none" else 0)
    return Traffic(forward=N * D * element, backward=N * D * (element + itemsize))


SIGMOID_FOCAL_LOSS = Op(
    name="sigmoid_focal_loss",
    replaces="`torchvision.ops.sigmoid_focal_loss`",
    fn=sigmoid_focal_loss,
    reference=reference,
    impls={"triton": _triton, "compile": _compiled},
    inputs=_inputs,
    dims={"N": (0, 1, 2, 33, 129), "D": (0, 1, 31, 32, 33, 127, 257, 1025, 2049)},
    # The anchors of RetinaNet on one image, and 300 queries of a DETR on 16, with the classes of COCO.
    bench=({"N": 100_000, "D": 91}, {"N": 4800, "D": 91}),
    audit=({"N": 1024, "D": 91}, {"N": 100_000, "D": 91}),
    traffic=_traffic,
    flops=lambda N, D: 40 * N * D,
    aten=_aten,
    axes=lambda *_, reduction, **__: "..., ... -> " + ("..." if reduction == "none" else ""),
    errors=_errors,
    variants={
        "default": {},
        "soft targets, gamma 0.5, mean": {"targets": "probabilities", "alpha": -1.0, "gamma": 0.5, "reduction": "mean"},
        "gamma 1.5, sum": {"targets": "integers", "alpha": 0.6, "gamma": 1.5, "reduction": "sum"},
        "gamma 0": {"gamma": 0.0},
    },
    modules=(SigmoidFocalLoss,),
    autocast_to_float32=frozenset({"cpu", "cuda", "xpu"}),
)
