"""Cross-entropy of logits and class indices, with everything the torch function has, a soft cap and a z-loss.

Over the C classes of one position with target t, class weights w (1 where there are none) and smoothing ε:

    s = softcap·tanh(x / softcap) where there is a cap, else x          lse = log Σ exp(s)
    loss = (1 − ε)·w_t·(lse − s_t) + (ε / C)·Σ_c w_c·(lse − s_c) + z_loss·w_t·lse²

and 0 where t is ``ignore_index``. "mean" divides the sum of the losses by Σ w_t over the positions that count.

Source: ``torch.nn.functional.cross_entropy``; the soft cap is Gemma 2's, the z-loss PaLM's.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function_unary

from .. import dispatch, sharding
from ..autograd import Gradients, fused, vjp
from ..compiled import compiled_call
from ..op import Call, Draw, ErrorInput, Excess, Op, Traffic
from . import checks, process_groups, vocab_parallel
from .channel_norm import channels_last
from .cross_entropy_pieces import as_rows, gradient, loss_and_statistics, loss_of, scores
from .loss_weights import divisor
from .soft_target_cross_entropy import soft_target_cross_entropy

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


def reference(
    x: Tensor, target: Tensor, weight: Tensor | None, *, softcap: float | None, z_loss: float, **options: Any
) -> Tensor:
    """Cross-entropy in plain PyTorch: x [N, C, d1, …] and target [N, d1, …], or x [C] and a scalar target."""
    if "group" in options:
        return vocab_parallel.reference(x, target, weight, softcap=softcap, z_loss=z_loss, **options)
    classes = 1 if x.dim() > 1 else 0
    s = scores(x, target == options["ignore_index"], softcap)
    lse = torch.logsumexp(s, classes) if z_loss else None
    return loss_of(torch.log_softmax(s, classes), lse, target, weight, z_loss=z_loss, **options).to(x.dtype)


def cross_entropy(
    x: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    *,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    softcap: float | None = None,
    z_loss: float = 0.0,
    group: ProcessGroup | None = None,
) -> Tensor:
    """Cross-entropy between logits and class indices, as ``torch.nn.functional.cross_entropy``, and more.

    Computed in float32 and rounded once; the logits are read once forward and once backward. An ignored position adds
    nothing to the loss, and its gradient is 0 whatever its logits hold.

    Args:
        x: floating-point logits [C], [N, C] or [N, C, d1, …].
        target: integer class indices in [0, C) or ``ignore_index``: [], [N] or [N, d1, …]. Class probabilities like x
            are handed to :func:`soft_target_cross_entropy`.
        weight: of each class, [C]; no gradient flows to it.
        ignore_index: target value that marks a position as ignored.
        reduction: "none", "mean" (weighted) or "sum".
        label_smoothing: ε in [0, 1].
        softcap: if given, x is first replaced by ``softcap·tanh(x / softcap)``.
        z_loss: factor of lse², which keeps the normalizer near 1.
        group: of processes that hold parts of the classes, in their order: x and weight are of this process's classes,
            and all else is the same in every process, the loss too. See ``vocab_parallel.py``. DTensors need none:
            their classes may be sharded, over one dim of the mesh.

    Returns:
        The losses, like target, or their mean or sum, a scalar; in x's dtype (float32 under autocast).

    Raises:
        RuntimeError: if there is a group, but torch.distributed is not initialized.
        TypeError: if x is not floating point, or target is boolean; or if group is no process group, or comes with a
            DTensor.
        ValueError: if shapes do not fit, an option is out of range, weight requires a gradient, or class probabilities
            are combined with z_loss, an ``ignore_index`` or a group.
        IndexError: if a target on the CPU is out of range. On a GPU, where looking would stall the stream, the loss of
            such a position is NaN, and so is its gradient.
    """
    if group is None and type(x) is not Tensor and has_torch_function_unary(x):  # deferred logits (fuse/deferred.py)
        loss: Tensor = handle_torch_function(
            cross_entropy, (x,), x, target, weight, ignore_index=ignore_index, reduction=reduction,
            label_smoothing=label_smoothing, softcap=softcap, z_loss=z_loss,
        )  # fmt: skip
        return loss
    if target.is_floating_point() and not (z_loss or group is not None):
        if ignore_index >= 0:
            raise ValueError(
                f"cross_entropy: class probabilities have no ignore_index, got {ignore_index}; leave it out"
            )
        return soft_target_cross_entropy(
            x, target, weight, reduction=reduction, label_smoothing=label_smoothing, softcap=softcap
        )
    _check(x, target, weight)
    checks.loss_options("cross_entropy", reduction, label_smoothing, softcap, weight=weight)
    options: dict[str, Any] = {
        "ignore_index": int(ignore_index),
        "label_smoothing": float(label_smoothing),
        "softcap": None if softcap is None else float(softcap),
        "z_loss": float(z_loss),
    }
    if group is not None:
        process_groups.check_group("cross_entropy", x, group)
    if group is not None and group.size() > 1:
        options["group"] = group
    else:
        checks.class_indices("cross_entropy", target, x.shape[1 if x.dim() > 1 else 0], ignore_index)
    if reduction == "mean" and sharding.is_sharded(x):
        # The mean over all shards is not the mean of their means.
        counted = functools.partial(divisor, token_weight=None, ignore_index=int(ignore_index))
        normalizer = sharding.run("cross_entropy", counted, "n ..., c+ -> ", (target, weight))
        return dispatch.run(CROSS_ENTROPY, x, target, weight, reduction="sum", **options) / normalizer
    return dispatch.run(CROSS_ENTROPY, x, target, weight, reduction=reduction, **options)


class CrossEntropyLoss(torch.nn.CrossEntropyLoss):
    """Drop-in for ``torch.nn.CrossEntropyLoss``: same arguments and three more; runs :func:`cross_entropy`."""

    softcap: float | None = None
    z_loss: float = 0.0
    group: ProcessGroup | None = None

    def __init__(
        self,
        *args: Any,
        softcap: float | None = None,
        z_loss: float = 0.0,
        group: ProcessGroup | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.softcap, self.z_loss, self.group = softcap, z_loss, group

    def forward(self, x: Tensor, target: Tensor) -> Tensor:
        """Logits [N, C, …] and targets [N, …] → the loss."""
        return cross_entropy(
            x,
            target,
            self.weight,
            ignore_index=self.ignore_index,
            reduction=self.reduction,
            label_smoothing=self.label_smoothing,
            softcap=self.softcap,
            z_loss=self.z_loss,
            group=self.group,
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> CrossEntropyLoss:
        return process_groups.deepcopy(self, self.group, memo)


def _check(x: Tensor, target: Tensor, weight: Tensor | None) -> None:
    checks.floating("cross_entropy", x=x)
    if target.is_floating_point():
        raise ValueError(
            "cross_entropy: z_loss and group need class indices as target, got class probabilities "
            f"({target.dtype}); leave them out, or pass integers"
        )
    if target.dtype == torch.bool or target.is_complex():
        raise TypeError(f"cross_entropy: target must be integers or probabilities, got {target.dtype}; target.long()?")
    if x.dim() == 0:
        raise ValueError("cross_entropy: x must have a dimension of classes, got a scalar")
    wanted = x.shape[:1] + x.shape[2:] if x.dim() > 1 else x.shape[:0]
    if target.shape != wanted:
        raise ValueError(
            f"cross_entropy: target must have the shape of x {tuple(x.shape)} without the classes (dim 1), "
            f"{tuple(wanted)}, got {tuple(target.shape)}; flatten tokens, e.g. x.flatten(0, -2), target.flatten()"
        )
    classes = x.shape[1 if x.dim() > 1 else 0]
    if weight is not None and weight.shape != (classes,):
        raise ValueError(
            f"cross_entropy: weight must have one element for each class, ({classes},), got {tuple(weight.shape)}"
        )


def _triton(x: Tensor, target: Tensor, weight: Tensor | None, **options: Any) -> Tensor:
    if "group" in options:
        return vocab_parallel.run("triton", x, target, weight, **options)
    from ..triton import cross_entropy as kernels

    run = functools.partial(fused, kernels.forward, kernels.backward, vjp(reference))
    return _of_rows(run, x, target, weight, options)


def _small(
    x: Tensor, target: Tensor, weight: Tensor | None, *, softcap: float | None, z_loss: float, **options: Any
) -> Tensor:
    """ATen's, of what it has."""
    if z_loss or "group" in options:
        return reference(x, target, weight, softcap=softcap, z_loss=z_loss, **options)
    s = scores(x, target == options["ignore_index"], softcap)
    return F.cross_entropy(s, target.long(), None if weight is None else weight.to(s.dtype), **options).to(x.dtype)


#: Classes of images in channels_last, which lie side by side, that are worth a loop of their own for each pixel; its
#: gradient lies as x does, which that of fewer classes does not. With 150, both ways of [4, 150, 128, 128] took 18.5 ms
#: for 57.6 in float32 and 23.0 for 66.0 in bfloat16; with 21 6.6 for 10.3 and 8.9 for 12.6, with 16 5.2 for 4.9 and 6.7
#: for 5.6 (two cores of an EPYC with AVX2).
MANY_CLASSES = 20


def _compiled(x: Tensor, target: Tensor, weight: Tensor | None, **options: Any) -> Tensor:
    if "group" in options:
        return vocab_parallel.run("compile", x, target, weight, **options)
    run = functools.partial(fused, _compiled_forward, _compiled_backward, vjp(reference))
    if channels_last(x) and x.shape[1] >= MANY_CLASSES:
        return _of_rows(run, x, target, weight, options)
    return run((x, target, weight), options)


def _of_rows(
    run: Callable[..., Tensor], x: Tensor, target: Tensor, weight: Tensor | None, options: dict[str, Any]
) -> Tensor:
    if x.dim() == 2:
        return run((x, target, weight), options)
    loss = run((as_rows(x), target.flatten(), weight), options)
    return loss.view(target.shape) if options["reduction"] == "none" else loss


def _compiled_forward(x: Tensor, target: Tensor, weight: Tensor | None, **options: Any) -> Any:
    loss, peak, log_sum = compiled_call(_with_statistics, (x, target, weight), options)
    return loss, (x, target, weight, peak, log_sum)


def _compiled_backward(grads: Any, saved: Any, needs: Any, **options: Any) -> Gradients:
    return compiled_call(gradient, (*grads, *saved), options), None, None


def _with_statistics(x: Tensor, target: Tensor, weight: Tensor | None, **options: Any) -> tuple[Tensor, ...]:
    loss, *statistics = loss_and_statistics(x, target, weight, **options)
    return loss.to(x.dtype), *statistics


def _aten(
    x: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    *,
    softcap: float | None = None,
    z_loss: float = 0.0,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Tensor:
    classes = 1 if x.dim() > 1 else 0
    s = x if softcap is None else softcap * torch.tanh(x / softcap)
    weight = None if weight is None else weight.to(s.dtype)
    loss = F.cross_entropy(
        s, target, weight, ignore_index=ignore_index, reduction=reduction, label_smoothing=label_smoothing
    )
    if not z_loss:
        return loss
    w = (target != ignore_index).to(s.dtype)
    if weight is not None:
        w = w * weight[target.masked_fill(target == ignore_index, 0)]
    z = z_loss * w * torch.logsumexp(s, classes).square()
    return loss + (z if reduction == "none" else z.sum() if reduction == "sum" else z.sum() / w.sum()).to(loss.dtype)


def _ignored(positions: int) -> int:
    """How many positions of a drawn call are ignored."""
    return positions // 5


def _inputs(draw: Draw, *, N: int, C: int, weight: bool = False, spatial: bool = False, **options: Any) -> Call:
    x = draw.tensor(N, C, 3) if spatial else draw.tensor(N, C)
    shape = (N, 3) if spatial else (N,)
    positions = math.prod(shape)
    ignored = draw.permutation(positions).view(shape) < _ignored(positions)
    target = draw.integers(0, C, *shape).masked_fill(ignored, options.get("ignore_index", -100))
    # Weights are positive: with a sum near zero the mean would say nothing about the implementation.
    weights = draw.constant(C, low=0.1, high=1.0) if weight else None
    return Call((x, target, weights), options)


def _errors() -> Iterator[ErrorInput]:
    x, target = torch.zeros(2, 8), torch.tensor([0, 1])
    wrong = torch.tensor([0, 8])
    weight = torch.ones(8, requires_grad=True)
    yield ErrorInput(Call((x.long(), target)), TypeError, r"x must be a floating-point.*int64")
    yield ErrorInput(Call((x, target > 0)), TypeError, r"target must be integers or probabilities, got torch.bool")
    yield ErrorInput(Call((x, x), {"z_loss": 1e-4}), ValueError, "need class indices as target")
    yield ErrorInput(Call((x, x), {"ignore_index": 0}), ValueError, "probabilities have no ignore_index, got 0")
    yield ErrorInput(Call((torch.tensor(1.0), target)), ValueError, "dimension of classes, got a scalar")
    yield ErrorInput(Call((x, target[:1])), ValueError, r"target must have the shape.*\(2,\), got \(1,\)")
    yield ErrorInput(Call((x, target, torch.ones(7))), ValueError, r"weight must have one.*\(8,\), got \(7,\)")
    yield ErrorInput(Call((x, target, weight)), ValueError, r"pass weight.detach\(\)")
    yield ErrorInput(Call((x, target), {"reduction": "avg"}), ValueError, "reduction must be one of.*got 'avg'")
    yield ErrorInput(Call((x, target), {"label_smoothing": 2}), ValueError, "label_smoothing.*between 0 and 1, got 2")
    yield ErrorInput(Call((x, target), {"softcap": 0.0}), ValueError, "softcap must be positive, got 0.0")
    yield ErrorInput(Call((x, wrong)), IndexError, r"target must be in \[0, 8\) or ignore_index \(-100\), got 8")


def _traffic(
    itemsize: int,
    *,
    N: int,
    C: int,
    weight: bool = False,
    spatial: bool = False,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
    **_: Any,
) -> Traffic:
    """x where it counts, target forward; the same and dx backward; a position's statistics, its loss if it is asked."""
    positions = 3 * N if spatial else N
    counted = positions - _ignored(positions)
    # Smoothing takes the weights of all classes, otherwise those of the targets are enough.
    classes = (C if label_smoothing else min(C, counted)) * itemsize if weight else 0
    return Traffic(
        forward=counted * C * itemsize + positions * (8 + (12 if reduction == "none" else 8)) + classes,
        backward=(counted + positions) * C * itemsize + positions * (8 + 8) + classes,
    )


def _axes(*_: Tensor | None, reduction: str, **__: Any) -> str:
    return "n c+ ..., n ..., c+ -> " + ("n ..." if reduction == "none" else "")


_SHARED_WEIGHTS = "every row reads the class weights again; caches serve them"
_COPIED_WEIGHTS = "classes along another dim are copied together first, and every row reads the class weights again"
# In rows of which four fifths count: x is read by those, the weights by all, and forward N-D copies all, in and out.
_EXCESS = {
    ("weighted, smoothed", "forward"): Excess(1 + 1 / 0.8, _SHARED_WEIGHTS),
    ("weighted, smoothed", "backward"): Excess(1 + 1 / 1.8, _SHARED_WEIGHTS),
    ("everything, N-D", "forward"): Excess(1 + 3 / 0.8, _COPIED_WEIGHTS),
    ("everything, N-D", "backward"): Excess(1 + 1 / 1.8, _SHARED_WEIGHTS),
}

CROSS_ENTROPY = Op(
    name="cross_entropy",
    replaces="`F.cross_entropy`, with logit soft cap and z-loss",
    fn=cross_entropy,
    reference=reference,
    impls={"triton": _triton, "compile": _compiled},
    small=_small,
    inputs=_inputs,
    dims={"N": (0, 1, 2, 5, 129), "C": (1, 2, 10, 31, 33, 127, 129, 256, 1025, 4096, 4097, 10_001)},
    bench=({"N": 4096, "C": 32_000}, {"N": 8192, "C": 256}),
    audit=({"N": 16, "C": 8192}, {"N": 512, "C": 256}, {"N": 16, "C": 262_144}),
    traffic=_traffic,
    excess=_EXCESS,
    flops=lambda N, C: 4 * N * C,
    aten=_aten,
    axes=_axes,
    errors=_errors,
    variants={
        "default": {},
        "smoothed": {"label_smoothing": 0.1},
        "weighted": {"weight": True, "reduction": "sum", "ignore_index": 0},
        "weighted, smoothed": {"weight": True, "label_smoothing": 0.2},
        "softcap": {"softcap": 30.0, "reduction": "none"},
        "z-loss": {"z_loss": 1e-2, "reduction": "none"},
        "everything, N-D": {"spatial": True, "weight": True, "label_smoothing": 0.1, "softcap": 5.0, "z_loss": 1e-2},
    },
    modules=(CrossEntropyLoss,),
    autocast_to_float32=frozenset({"cpu", "cuda", "xpu"}),
)
