"""Binary cross-entropy of logits, with weights and label smoothing.

    t = target·(1 − ε) + ε / 2
    loss = weight·(pos_weight·t·softplus(−x) + (1 − t)·softplus(x))        softplus(x) = log(1 + exp(x)) = −log σ(−x)

Source: ``torch.nn.functional.binary_cross_entropy_with_logits``. Smoothing moves every target towards 1/2, as
timm's ``BinaryCrossEntropy`` does with ``smooth_dense``. What that does to class indices is another thing: they become
1 − ε + ε / C and ε / C, which this computes if it is given them as targets.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import dispatch, sharding
from ..autograd import fused, vjp
from ..op import Call, Draw, ErrorInput, Excess, Op, Traffic
from . import binary_losses, checks
from .loss_weights import reduced


def reference(
    x: Tensor,
    target: Tensor,
    weight: Tensor | None,
    pos_weight: Tensor | None,
    *,
    reduction: str,
    label_smoothing: float,
) -> Tensor:
    """Binary cross-entropy in plain PyTorch: float32 (or wider) inside."""
    dtype = torch.promote_types(x.dtype, target.dtype)
    wide = x.to(torch.promote_types(dtype, torch.float32))
    t = target.to(wide.dtype)
    if label_smoothing:
        t = t * (1.0 - label_smoothing) + 0.5 * label_smoothing
    positive = t if pos_weight is None else t * pos_weight.to(wide.dtype)
    loss = -positive * F.logsigmoid(wide) - (1.0 - t) * F.logsigmoid(-wide)
    if weight is not None:
        loss = loss * weight.to(wide.dtype)
    return reduced(loss, reduction).to(dtype)


def binary_cross_entropy_with_logits(
    x: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    pos_weight: Tensor | None = None,
    *,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Tensor:
    """Binary cross-entropy, as ``torch.nn.functional.binary_cross_entropy_with_logits``, and label smoothing.

    Computed in float32 and rounded once. A loss that is reduced is not written to memory element by element; the
    backward pass recomputes it.

    Args:
        x: floating-point logits of any shape.
        target: probabilities like x; integers or booleans are taken for 0 and 1.
        weight: of each element's loss, broadcast to x.
        pos_weight: of the positive part of the loss, broadcast to x: [C] for x [..., C], [C, 1, 1] for images.
        reduction: "none", "mean" (over all elements, whatever their weights) or "sum".
        label_smoothing: ε in [0, 1]: targets become ``target·(1 − ε) + ε / 2``.

    Returns:
        The losses, like x, or their mean or sum, a scalar; in the wider dtype of x and target (float32 under autocast).

    Raises:
        TypeError: if x is not floating point, or target is complex.
        ValueError: if shapes do not fit, an option is out of range, or target or a weight requires a gradient: none
            flows to them.
    """
    name = "binary_cross_entropy_with_logits"
    checks.floating(name, x=x, weight=weight, pos_weight=pos_weight)
    checks.binary_targets(name, x, target)
    checks.broadcastable(name, x, weight=weight, pos_weight=pos_weight)
    checks.loss_options(name, reduction, label_smoothing, None, target=target, weight=weight, pos_weight=pos_weight)
    tensors = (x, target, weight, pos_weight)
    smoothing = float(label_smoothing)
    if reduction == "mean" and sharding.is_sharded(x):
        # The mean over all shards is not the mean of their means.
        total = dispatch.run(BINARY_CROSS_ENTROPY, *tensors, reduction="sum", label_smoothing=smoothing)
        return total / x.numel()
    return dispatch.run(BINARY_CROSS_ENTROPY, *tensors, reduction=reduction, label_smoothing=smoothing)


class BCEWithLogitsLoss(torch.nn.BCEWithLogitsLoss):
    """Drop-in for ``torch.nn.BCEWithLogitsLoss``: same arguments and buffers, and ``label_smoothing``.

    Runs :func:`binary_cross_entropy_with_logits`.
    """

    label_smoothing: float = 0.0

    def __init__(self, *args: Any, label_smoothing: float = 0.0, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.label_smoothing = label_smoothing

    def forward(self, x: Tensor, target: Tensor) -> Tensor:
        """Logits and targets of one shape → the loss."""
        return binary_cross_entropy_with_logits(
            x,
            target,
            self.weight,
            self.pos_weight,
            reduction=self.reduction,
            label_smoothing=self.label_smoothing,
        )


def _triton(x: Tensor, target: Tensor, weight: Tensor | None, pos_weight: Tensor | None, **options: Any) -> Tensor:
    from ..triton import binary_losses as kernels

    return fused(kernels.forward, kernels.backward, vjp(reference), (x, target, weight, pos_weight), options)


def _compiled(x: Tensor, target: Tensor, weight: Tensor | None, pos_weight: Tensor | None, **options: Any) -> Tensor:
    tensors = (x, target, weight, pos_weight)
    return fused(binary_losses.forward, binary_losses.backward, vjp(reference), tensors, options)


def _aten(
    x: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    pos_weight: Tensor | None = None,
    *,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Tensor:
    target = target.to(torch.promote_types(x.dtype, target.dtype))
    if label_smoothing:
        target = target * (1.0 - label_smoothing) + 0.5 * label_smoothing
    return F.binary_cross_entropy_with_logits(x, target, weight, reduction=reduction, pos_weight=pos_weight)


def _inputs(
    draw: Draw,
    *,
    N: int,
    D: int,
    weight: bool = False,
    pos_weight: bool = False,
    integers: bool = False,
    **options: Any,
) -> Call:
    x = draw.tensor(N, D)
    target = draw.integers(0, 2, N, D) if integers else draw.constant(N, D, low=0.0, high=1.0)
    rows = draw.constant(N, 1, low=0.5, high=2.0) if weight else None
    columns = draw.constant(D, low=0.5, high=2.0) if pos_weight else None
    return Call((x, target, rows, columns), options)


def _errors() -> Iterator[ErrorInput]:
    x, target = torch.zeros(2, 8), torch.ones(2, 8)
    wants = torch.ones(8, requires_grad=True)
    yield ErrorInput(Call((x.long(), target)), TypeError, r"x must be a floating-point.*int64")
    yield ErrorInput(Call((x, target.to(torch.complex64))), TypeError, r"target must be real.*complex64")
    yield ErrorInput(Call((x, target[0])), ValueError, r"target must have the shape of x, \(2, 8\), got \(8,\)")
    yield ErrorInput(Call((x, target, target[:, :7])), ValueError, r"weight must broadcast to x \(2, 8\), got \(2, 7\)")
    yield ErrorInput(Call((x, target, None, target[None])), ValueError, r"pos_weight must broadcast.*got \(1, 2, 8\)")
    yield ErrorInput(Call((x, target, wants)), ValueError, r"pass weight.detach\(\)")
    yield ErrorInput(Call((x, target, None, wants)), ValueError, r"pass pos_weight.detach\(\)")
    yield ErrorInput(Call((x, wants.expand(2, 8))), ValueError, r"pass target.detach\(\)")
    yield ErrorInput(Call((x, target), {"reduction": "avg"}), ValueError, "reduction must be one of.*got 'avg'")
    yield ErrorInput(Call((x, target), {"label_smoothing": 2}), ValueError, "label_smoothing.*between 0 and 1, got 2")


def _traffic(
    itemsize: int,
    *,
    N: int,
    D: int,
    weight: bool = False,
    pos_weight: bool = False,
    integers: bool = False,
    reduction: str = "mean",
    **_: Any,
) -> Traffic:
    """x and target, and the losses if they are wanted, forward; the same and dx backward; the weights in both."""
    read = itemsize + (8 if integers else itemsize)
    losses = itemsize if reduction == "none" else 0
    weights = (N * weight + D * pos_weight) * itemsize
    return Traffic(forward=N * D * (read + losses) + weights, backward=N * D * (read + losses + itemsize) + weights)


_WEIGHTS = "weights are read again with every element that they are for; caches serve them"

BINARY_CROSS_ENTROPY = Op(
    name="binary_cross_entropy_with_logits",
    replaces="`F.binary_cross_entropy_with_logits`, with label smoothing",
    fn=binary_cross_entropy_with_logits,
    reference=reference,
    impls={"triton": _triton, "compile": _compiled},
    inputs=_inputs,
    dims={"N": (0, 1, 2, 33, 129), "D": (0, 1, 31, 32, 33, 127, 257, 1025, 2049)},
    # A multi-label head of ImageNet-1k (ResNet strikes back), and of ImageNet-21k.
    bench=({"N": 256, "D": 1000}, {"N": 256, "D": 21_841}),
    audit=({"N": 128, "D": 256}, {"N": 256, "D": 1000}),
    traffic=_traffic,
    # Of 4-byte elements beside 8-byte targets; of elements, each beside two weights.
    excess={
        ("pos_weight, sum", "forward"): Excess(1 + 4 / 12, _WEIGHTS),
        ("pos_weight, sum", "backward"): Excess(1 + 4 / 16, _WEIGHTS),
        ("weighted, smoothed", "forward"): Excess(1 + 2 / 3, _WEIGHTS),
        ("weighted, smoothed", "backward"): Excess(1 + 2 / 4, _WEIGHTS),
    },
    flops=lambda N, D: 30 * N * D,
    aten=_aten,
    axes=lambda *_, reduction, **__: "..., ..., ..., ... -> " + ("..." if reduction == "none" else ""),
    errors=_errors,
    variants={
        "default": {},
        "pos_weight, sum": {"pos_weight": True, "integers": True, "reduction": "sum"},
        "weighted, smoothed": {"weight": True, "pos_weight": True, "label_smoothing": 0.2, "reduction": "none"},
    },
    modules=(BCEWithLogitsLoss,),
    autocast_to_float32=frozenset({"cpu", "cuda", "xpu"}),
)
