"""Dice loss and binary cross-entropy of segmentation masks, over the D pixels of one sample and channel:

    p = σ(x)          dice = 1 − (2·Σ p·t + smooth) / (Σ p + Σ t + smooth)
    loss = dice_weight·dice + bce_weight·(1 / D)·Σ (t·softplus(−x) + (1 − t)·softplus(x))

Sources: Milletari et al., V-Net (2016), whose denominator has squares; Drozdzal et al., The Importance of Skip
Connections (2016), without them; Isensee et al., nnU-Net (2021), for Dice and cross-entropy together. MONAI's
``DiceLoss`` with ``sigmoid=True`` and ``smooth_nr = smooth_dr = smooth`` is this for every sample and channel; that of
segmentation_models.pytorch adds up over the samples of a batch first.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import dispatch, sharding
from ..autograd import Gradients, fused, vjp
from ..compiled import compiled_call
from ..op import Call, Draw, ErrorInput, Op, Traffic
from . import checks
from .binary_losses import loss_and_slope
from .loss_weights import reduced


def reference(
    x: Tensor, target: Tensor, *, reduction: str, dice_weight: float, bce_weight: float, smooth: float
) -> Tensor:
    """Dice and binary cross-entropy in plain PyTorch: float32 (or wider) inside; pixels from dim 2 on, or dim 1."""
    h, t = _masks(x, target)
    top, bottom = _overlap(torch.sigmoid(h), t, smooth)
    loss = dice_weight * ((bottom - top) / bottom)
    if bce_weight:
        loss = loss - bce_weight * (t * F.logsigmoid(h) + (1.0 - t) * F.logsigmoid(-h)).mean(-1)
    return reduced(loss, reduction).to(torch.promote_types(x.dtype, target.dtype))


def _masks(x: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Both with the pixels in one dim, in float32 or wider."""
    dtype = torch.promote_types(torch.promote_types(x.dtype, target.dtype), torch.float32)
    return x.to(dtype).flatten(_pixels(x)), target.to(dtype).flatten(_pixels(x))


def _overlap(p: Tensor, t: Tensor, smooth: float) -> tuple[Tensor, Tensor]:
    """The numerator and the denominator of Dice."""
    return 2.0 * (p * t).sum(-1) + smooth, p.sum(-1) + t.sum(-1) + smooth


def _pixels(x: Tensor) -> int:
    """The first dim of the pixels."""
    return 2 if x.dim() > 2 else 1


def dice_bce_loss(
    x: Tensor,
    target: Tensor,
    *,
    dice_weight: float = 1.0,
    bce_weight: float = 1.0,
    smooth: float = 1.0,
    reduction: str = "mean",
) -> Tensor:
    """Dice loss and binary cross-entropy of masks, from their logits, in one pass over memory in each direction.

    Computed in float32 and rounded once. Dice is that of each sample and channel, not of the whole batch.

    Args:
        x: floating-point logits [N, K, d1, …] with K channels, or [N, D], one mask a sample. Masks of images without
            channels, [N, H, W], want ``x.unsqueeze(1)``.
        target: probabilities like x; integers or booleans are taken for 0 and 1.
        dice_weight: of the Dice loss.
        bce_weight: of the binary cross-entropy, the mean over pixels.
        smooth: positive; added above and below, so that two empty masks agree.
        reduction: "none", "mean" (over samples and channels) or "sum".

    Returns:
        The losses [N, K] or [N], or their mean or sum, a scalar; in the wider dtype of x and target (float32 under
        autocast).

    Raises:
        TypeError: if x is not floating point, or target is complex.
        ValueError: if shapes do not fit, an option is out of range, or target requires a gradient: none flows to it.
    """
    return _run("dice_bce_loss", x, target, dice_weight, bce_weight, smooth, reduction)


def dice_loss(x: Tensor, target: Tensor, *, smooth: float = 1.0, reduction: str = "mean") -> Tensor:
    """Dice loss of masks, from their logits: :func:`dice_bce_loss` with no cross-entropy, and its arguments."""
    return _run("dice_loss", x, target, 1.0, 0.0, smooth, reduction)


def _run(
    name: str, x: Tensor, target: Tensor, dice_weight: float, bce_weight: float, smooth: float, reduction: str
) -> Tensor:
    checks.floating(name, x=x)
    if x.dim() < 2:
        raise ValueError(f"{name}: x must be [N, K, ...] or [N, D], got {tuple(x.shape)}; one mask is x.view(1, -1)")
    checks.binary_targets(name, x, target)
    checks.loss_options(name, reduction, 0.0, None, target=target)
    if not smooth > 0.0:
        raise ValueError(f"{name}: smooth must be positive, got {smooth}; with 0 two empty masks would be 0 / 0")
    options = {"dice_weight": float(dice_weight), "bce_weight": float(bce_weight), "smooth": float(smooth)}
    if reduction == "mean" and sharding.is_sharded(x):
        # The mean over all shards is not the mean of their means.
        total = dispatch.run(DICE_BCE_LOSS, x, target, reduction="sum", **options)
        return total / x.shape[: _pixels(x)].numel()
    return dispatch.run(DICE_BCE_LOSS, x, target, reduction=reduction, **options)


class DiceBCELoss(torch.nn.Module):
    """Dice loss and binary cross-entropy of masks, from their logits; runs :func:`dice_bce_loss`.

    Args:
        dice_weight: as in :func:`dice_bce_loss`, and so the others.
        bce_weight: of the binary cross-entropy; 0 for Dice alone.
        smooth: positive.
        reduction: "none", "mean" or "sum".
    """

    def __init__(
        self, *, dice_weight: float = 1.0, bce_weight: float = 1.0, smooth: float = 1.0, reduction: str = "mean"
    ) -> None:
        super().__init__()
        self.dice_weight, self.bce_weight, self.smooth, self.reduction = dice_weight, bce_weight, smooth, reduction

    def forward(self, x: Tensor, target: Tensor) -> Tensor:
        """Logits and masks [N, K, …] → the loss."""
        return dice_bce_loss(
            x,
            target,
            dice_weight=self.dice_weight,
            bce_weight=self.bce_weight,
            smooth=self.smooth,
            reduction=self.reduction,
        )

    def extra_repr(self) -> str:
        """The arguments."""
        return (
            f"dice_weight={self.dice_weight}, bce_weight={self.bce_weight}, smooth={self.smooth}, "
            f"reduction={self.reduction!r}"
        )


def _triton(x: Tensor, target: Tensor, **options: Any) -> Tensor:
    from ..triton import dice_bce_loss as kernels

    lead = x.shape[: _pixels(x)]
    masks, truth = (t.flatten(_pixels(x)).flatten(0, -2) for t in (x, target))
    loss = fused(kernels.forward, kernels.backward, vjp(reference), (masks, truth), options)
    return loss.view(lead) if options["reduction"] == "none" else loss


def _compiled(x: Tensor, target: Tensor, **options: Any) -> Tensor:
    return fused(_compiled_forward, _compiled_backward, vjp(reference), (x, target), options)


def _compiled_forward(x: Tensor, target: Tensor, **options: Any) -> Any:
    loss, *overlap = compiled_call(_with_overlap, (x, target), options)
    return loss, (x, target, *overlap)


def _compiled_backward(grads: Any, saved: Any, needs: Any, **options: Any) -> Gradients:
    return compiled_call(_gradient, (*grads, *saved), options), None


def _with_overlap(
    x: Tensor, target: Tensor, *, reduction: str, dice_weight: float, bce_weight: float, smooth: float
) -> tuple[Tensor, Tensor, Tensor]:
    h, t = _masks(x, target)
    z = (-h.abs()).exp()
    top, bottom = _overlap(torch.where(h >= 0.0, 1.0, z) / (1.0 + z), t, smooth)
    loss = dice_weight * ((bottom - top) / bottom)
    if bce_weight:
        loss = loss + bce_weight * loss_and_slope(h, t, z=z)[0].mean(-1)
    return reduced(loss, reduction).to(torch.promote_types(x.dtype, target.dtype)), top, bottom


def _gradient(
    grad: Tensor,
    x: Tensor,
    target: Tensor,
    top: Tensor,
    bottom: Tensor,
    *,
    reduction: str,
    dice_weight: float,
    bce_weight: float,
    smooth: float,
) -> Tensor:
    """In closed form: autograd through the reference would add up the rows again."""
    h, t = _masks(x, target)
    top, bottom = top.unsqueeze(-1), bottom.unsqueeze(-1)
    z = (-h.abs()).exp()
    dx = dice_weight * ((top / bottom - 2.0 * t) / bottom) * (z / (1.0 + z).square())
    if bce_weight:
        dx = dx + bce_weight / h.shape[-1] * loss_and_slope(h, t, z=z)[1]
    grad = (grad.unsqueeze(-1) if grad.dim() else grad).to(dx.dtype)
    return (dx * (grad / top.numel() if reduction == "mean" else grad)).view(x.shape).to(x.dtype)


def _aten(
    x: Tensor,
    target: Tensor,
    *,
    dice_weight: float = 1.0,
    bce_weight: float = 1.0,
    smooth: float = 1.0,
    reduction: str = "mean",
) -> Tensor:
    x, target = x.flatten(2), target.to(torch.promote_types(x.dtype, target.dtype)).flatten(2)
    p = torch.sigmoid(x)
    dice = 1 - (2 * (p * target).sum(-1) + smooth) / (p.sum(-1) + target.sum(-1) + smooth)
    bce = F.binary_cross_entropy_with_logits(x, target, reduction="none").mean(-1)
    return reduced(dice_weight * dice + bce_weight * bce, reduction)


def _inputs(draw: Draw, *, N: int, K: int, S: int, labels: bool = False, **options: Any) -> Call:
    x = draw.tensor(N, K, S)
    target = draw.booleans(N, K, S) if labels else draw.constant(N, K, S, low=0.0, high=1.0)
    return Call((x, target), options)


def _errors() -> Iterator[ErrorInput]:
    x, target = torch.zeros(2, 1, 8), torch.ones(2, 1, 8)
    wants = torch.ones(2, 1, 8, requires_grad=True)
    yield ErrorInput(Call((x.long(), target)), TypeError, r"x must be a floating-point.*int64")
    yield ErrorInput(Call((x[0, 0], target[0, 0])), ValueError, r"x must be \[N, K, ...\].*got \(8,\)")
    yield ErrorInput(Call((x, target.to(torch.complex64))), TypeError, r"target must be real.*complex64")
    yield ErrorInput(Call((x, target[:, 0])), ValueError, r"target must have the shape of x.*got \(2, 8\)")
    yield ErrorInput(Call((x, wants)), ValueError, r"pass target.detach\(\)")
    yield ErrorInput(Call((x, target), {"smooth": 0.0}), ValueError, "smooth must be positive, got 0.0")
    yield ErrorInput(Call((x, target), {"reduction": "avg"}), ValueError, "reduction must be one of.*got 'avg'")


def _traffic(itemsize: int, *, N: int, K: int, S: int, labels: bool = False, **_: Any) -> Traffic:
    """x and target forward; the same and dx backward."""
    read = N * K * S * (itemsize + (1 if labels else itemsize))
    return Traffic(forward=read, backward=read + N * K * S * itemsize)


def _axes(x: Tensor, *_: Tensor | None, reduction: str, **__: Any) -> str:
    names, rows = ("n k *", "n k") if x.dim() > 2 else ("n D", "n")
    return f"{names}, {names} -> " + (rows if reduction == "none" else "")


DICE_BCE_LOSS = Op(
    name="dice_bce_loss",
    replaces="MONAI's `DiceLoss(sigmoid=True)` plus `F.binary_cross_entropy_with_logits`",
    fn=dice_bce_loss,
    reference=reference,
    impls={"triton": _triton, "compile": _compiled},
    inputs=_inputs,
    dims={"N": (0, 1, 2, 5), "K": (1, 3, 33), "S": (1, 31, 33, 129, 1024, 1025, 4097, 10_001)},
    # Binary masks of 512 × 512; the three regions of BraTS in a patch of 128³.
    bench=({"N": 8, "K": 1, "S": 512 * 512}, {"N": 2, "K": 3, "S": 128**3}),
    audit=({"N": 4, "K": 4, "S": 8192}, {"N": 16, "K": 2, "S": 512 * 512}),
    traffic=_traffic,
    flops=lambda N, K, S: 40 * N * K * S,
    aten=_aten,
    axes=_axes,
    errors=_errors,
    variants={
        "default": {},
        "labels, none": {"labels": True, "reduction": "none", "dice_weight": 0.5, "bce_weight": 2.0},
        "dice alone, sum": {"bce_weight": 0.0, "smooth": 1e-3, "reduction": "sum"},
    },
    modules=(DiceBCELoss,),
    autocast_to_float32=frozenset({"cpu", "cuda", "xpu"}),
)
