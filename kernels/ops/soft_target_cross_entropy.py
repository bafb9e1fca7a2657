"""Cross-entropy of logits and class probabilities, such as MixUp, CutMix and distillation give.

Over the C classes of one position with target probabilities t, class weights w (1 where there are none), smoothing ε:

    s = softcap·tanh(x / softcap) where there is a cap, else x          lse = log Σ exp(s)
    loss = Σ_c w_c·((1 − ε)·t_c + ε / C)·(lse − s_c)

"mean" divides the sum of the losses by the number of positions, whatever the weights.

Source: ``torch.nn.functional.cross_entropy`` of probabilities; timm's ``SoftTargetCrossEntropy``.
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
from ..op import Call, Draw, ErrorInput, Excess, Op, Traffic
from . import checks
from .loss_weights import reduced


def reference(
    x: Tensor,
    target: Tensor,
    weight: Tensor | None,
    *,
    reduction: str,
    label_smoothing: float,
    softcap: float | None,
) -> Tensor:
    """Cross-entropy in plain PyTorch: x and target [N, C, d1, …] or [C]."""
    s, pull = _operands(x, target, weight, label_smoothing, softcap)
    losses = -(pull * torch.log_softmax(s, _classes(x))).sum(_classes(x))
    return reduced(losses, reduction).to(torch.promote_types(x.dtype, target.dtype))


def _classes(x: Tensor) -> int:
    """The dim of the classes."""
    return 1 if x.dim() > 1 else 0


def _operands(
    x: Tensor, target: Tensor, weight: Tensor | None, label_smoothing: float, softcap: float | None
) -> tuple[Tensor, Tensor]:
    """The capped logits, and the smoothed and weighted probabilities, in float32 or wider."""
    dtype = torch.promote_types(torch.promote_types(x.dtype, target.dtype), torch.float32)
    s, pull = x.to(dtype), target.to(dtype)
    if softcap is not None:
        s = softcap * torch.tanh(s / softcap)
    if label_smoothing:
        pull = pull * (1.0 - label_smoothing) + label_smoothing / x.shape[_classes(x)]
    if weight is not None:
        pull = pull * _per_class(weight.to(dtype), x)
    return s, pull


def _per_class(weight: Tensor, x: Tensor) -> Tensor:
    return weight.view(-1, *[1] * (x.dim() - _classes(x) - 1))


def soft_target_cross_entropy(
    x: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    *,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    softcap: float | None = None,
) -> Tensor:
    """Cross-entropy between logits and class probabilities, as ``torch.nn.functional.cross_entropy``, and a soft cap.

    Computed in float32 and rounded once; logits and probabilities are read once forward and once backward. The
    probabilities of a position need not sum to 1, and get a gradient if they require one.

    Args:
        x: floating-point logits [C], [N, C] or [N, C, d1, …].
        target: floating-point class probabilities like x.
        weight: of each class, [C]; no gradient flows to it.
        reduction: "none", "mean" (over the positions) or "sum".
        label_smoothing: ε in [0, 1].
        softcap: if given, x is first replaced by ``softcap·tanh(x / softcap)``.

    Returns:
        The losses [], [N] or [N, d1, …], or their mean or sum, a scalar; in the wider dtype of x and target (float32
        under autocast).

    Raises:
        TypeError: if x or target is not floating point.
        ValueError: if shapes do not fit, an option is out of range, or weight requires a gradient.
    """
    name = "soft_target_cross_entropy"
    checks.floating(name, x=x, target=target)
    if x.dim() == 0:
        raise ValueError(f"{name}: x must have a dimension of classes, got a scalar")
    checks.like(name, x, target=target)
    classes = x.shape[_classes(x)]
    if weight is not None and weight.shape != (classes,):
        raise ValueError(
            f"{name}: weight must have one element for each class, ({classes},), got {tuple(weight.shape)}"
        )
    checks.loss_options(name, reduction, label_smoothing, softcap, weight=weight)
    options = {
        "label_smoothing": float(label_smoothing),
        "softcap": None if softcap is None else float(softcap),
    }
    if reduction == "mean" and sharding.is_sharded(x):
        # The mean over all shards is not the mean of their means.
        total = dispatch.run(SOFT_TARGET_CROSS_ENTROPY, x, target, weight, reduction="sum", **options)
        return total / (x.numel() // classes)
    return dispatch.run(SOFT_TARGET_CROSS_ENTROPY, x, target, weight, reduction=reduction, **options)


class SoftTargetCrossEntropy(torch.nn.Module):
    """Drop-in for timm's ``SoftTargetCrossEntropy``; runs :func:`soft_target_cross_entropy`."""

    def forward(self, x: Tensor, target: Tensor) -> Tensor:
        """Logits and probabilities [..., C] → the mean of the losses."""
        if x.dim() > 2 and target.shape == x.shape:
            x, target = x.flatten(0, -2), target.flatten(0, -2)
        return soft_target_cross_entropy(x, target)


def _rows(t: Tensor) -> Tensor:
    """[N, C, d1, …] or [C] as [positions, C]."""
    return t.movedim(1, -1).flatten(0, -2) if t.dim() > 2 else t if t.dim() == 2 else t[None]


def _triton(x: Tensor, target: Tensor, weight: Tensor | None, **options: Any) -> Tensor:
    from ..triton import soft_target_cross_entropy as kernels

    loss = fused(kernels.forward, kernels.backward, vjp(reference), (_rows(x), _rows(target), weight), options)
    return loss.view(x.shape[:1] + x.shape[2:] if x.dim() > 1 else ()) if options["reduction"] == "none" else loss


def _compiled(x: Tensor, target: Tensor, weight: Tensor | None, **options: Any) -> Tensor:
    return fused(_compiled_forward, _compiled_backward, vjp(reference), (x, target, weight), options)


def _compiled_forward(x: Tensor, target: Tensor, weight: Tensor | None, **options: Any) -> Any:
    loss, *statistics = compiled_call(_with_statistics, (x, target, weight), options)
    return loss, (x, target, weight, *statistics)


def _compiled_backward(grads: Any, saved: Any, needs: Any, **options: Any) -> Gradients:
    return compiled_call(_gradients, (*grads, *saved), {"needs": needs, **options})


def _with_statistics(
    x: Tensor, target: Tensor, weight: Tensor | None, *, reduction: str, **options: Any
) -> tuple[Tensor, ...]:
    """The loss, max s, log Σ exp(s − max s) and the sum of the probabilities.

    All sums are of s − max s and the probabilities, so that one loop over the row finds them.
    """
    classes = _classes(x)
    s, pull = _operands(x, target, weight, **options)
    peak = s.amax(classes, keepdim=True)
    log_sum = (s - peak).exp().sum(classes, keepdim=True).log()
    mass, along = (t.sum(classes, keepdim=True) for t in (pull, pull * (s - peak)))
    losses = (log_sum * mass - along).squeeze(classes)
    return reduced(losses, reduction).to(torch.promote_types(x.dtype, target.dtype)), peak, log_sum, mass


def _gradients(
    grad: Tensor,
    x: Tensor,
    target: Tensor,
    weight: Tensor | None,
    peak: Tensor,
    log_sum: Tensor,
    mass: Tensor,
    *,
    needs: tuple[bool, ...],
    reduction: str,
    label_smoothing: float,
    softcap: float | None,
) -> Gradients:
    """In closed form: autograd through the reference would compute the statistics of the rows again."""
    s, pull = _operands(x, target, weight, label_smoothing, softcap)
    if grad.dim():
        grad = grad.unsqueeze(_classes(x))
    if reduction == "mean":
        grad = grad / peak.numel()
    dx = ((s - peak - log_sum).exp() * mass - pull) * grad
    if softcap is not None:
        dx = dx * (1.0 - (s / softcap).square())
    dtarget = None
    if needs[1]:
        dtarget = (peak - s + log_sum) * grad * (1.0 - label_smoothing)
        if weight is not None:
            dtarget = dtarget * _per_class(weight.to(s.dtype), x)
        dtarget = dtarget.to(target.dtype)
    return dx.to(x.dtype) if needs[0] else None, dtarget, None


def _aten(
    x: Tensor, target: Tensor, weight: Tensor | None = None, *, softcap: float | None = None, **options: Any
) -> Tensor:
    s = x if softcap is None else softcap * torch.tanh(x / softcap)
    return F.cross_entropy(s, target, None if weight is None else weight.to(s.dtype), **options)


def _inputs(
    draw: Draw, *, N: int, C: int, weight: bool = False, spatial: bool = False, learned: bool = False, **options: Any
) -> Call:
    shape = (N, C, 3) if spatial else (N, C)
    x = draw.tensor(*shape)
    target = draw.constant(*shape, low=0.0, high=1.0)
    target = (target / target.float().sum(1, keepdim=True)).to(target.dtype).requires_grad_(learned)
    weights = draw.constant(C, low=0.1, high=1.0) if weight else None
    return Call((x, target, weights), options)


def _errors() -> Iterator[ErrorInput]:
    x = torch.zeros(2, 8)
    weight = torch.ones(8, requires_grad=True)
    yield ErrorInput(Call((x.long(), x)), TypeError, r"x must be a floating-point.*int64")
    yield ErrorInput(Call((x, x.long())), TypeError, r"target must be a floating-point.*int64")
    yield ErrorInput(Call((x, x[:1])), ValueError, r"target must have the shape of x, \(2, 8\), got \(1, 8\)")
    yield ErrorInput(Call((torch.tensor(1.0), torch.tensor(1.0))), ValueError, "dimension of classes, got a scalar")
    yield ErrorInput(Call((x, x, torch.ones(7))), ValueError, r"weight must have one.*\(8,\), got \(7,\)")
    yield ErrorInput(Call((x, x, weight)), ValueError, r"pass weight.detach\(\)")
    yield ErrorInput(Call((x, x), {"reduction": "avg"}), ValueError, "reduction must be one of.*got 'avg'")
    yield ErrorInput(Call((x, x), {"label_smoothing": 2}), ValueError, "label_smoothing.*between 0 and 1, got 2")
    yield ErrorInput(Call((x, x), {"softcap": 0.0}), ValueError, "softcap must be positive, got 0.0")


def _traffic(
    itemsize: int, *, N: int, C: int, weight: bool = False, spatial: bool = False, learned: bool = False, **_: Any
) -> Traffic:
    """x and target forward; the same and the gradients backward; the class weights; 16 bytes of loss and statistics."""
    positions = 3 * N if spatial else N
    weights = C * itemsize if weight else 0
    return Traffic(
        forward=2 * positions * C * itemsize + 16 * positions + weights,
        backward=(3 + learned) * positions * C * itemsize + 12 * positions + weights,
    )


_SHARED_WEIGHTS = "every row reads the class weights again; caches serve them"
_COPIED = "classes along another dim are copied together first, logits and probabilities"

SOFT_TARGET_CROSS_ENTROPY = Op(
    name="soft_target_cross_entropy",
    replaces="`F.cross_entropy` of class probabilities; timm's `SoftTargetCrossEntropy`",
    fn=soft_target_cross_entropy,
    reference=reference,
    impls={"triton": _triton, "compile": _compiled},
    inputs=_inputs,
    dims={"N": (0, 1, 2, 5, 129), "C": (1, 2, 31, 33, 127, 129, 1025, 4096, 4097, 10_001)},
    # MixUp on ImageNet-1k; distillation over the vocabulary of GPT-2.
    bench=({"N": 256, "C": 1000}, {"N": 2048, "C": 50_304}),
    audit=({"N": 16, "C": 8192}, {"N": 256, "C": 1024}, {"N": 16, "C": 262_144}),
    traffic=_traffic,
    excess={
        ("weighted, smoothed, sum", "forward"): Excess(1 + 1 / 2, _SHARED_WEIGHTS),
        ("weighted, smoothed, sum", "backward"): Excess(1 + 1 / 3, _SHARED_WEIGHTS),
        ("learned targets, softcap", "forward"): Excess(1 + 1 / 2, _SHARED_WEIGHTS),
        ("learned targets, softcap", "backward"): Excess(1 + 1 / 4, _SHARED_WEIGHTS),
        ("N-D", "forward"): Excess(1 + 4 / 2, _COPIED),
    },
    flops=lambda N, C: 6 * N * C,
    aten=_aten,
    axes=lambda *_, reduction, **__: "n C ..., n C ..., C -> " + ("n ..." if reduction == "none" else ""),
    errors=_errors,
    variants={
        "default": {},
        "weighted, smoothed, sum": {"weight": True, "label_smoothing": 0.2, "reduction": "sum"},
        "learned targets, softcap": {
            "learned": True,
            "weight": True,
            "label_smoothing": 0.1,
            "softcap": 5.0,
            "reduction": "none",
        },
        "N-D": {"spatial": True},
    },
    modules=(SoftTargetCrossEntropy,),
    autocast_to_float32=frozenset({"cpu", "cuda", "xpu"}),
)
