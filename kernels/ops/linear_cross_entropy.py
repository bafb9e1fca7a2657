"""Cross-entropy of what a linear layer makes of its input, with no logits in memory.

    x = h·Wᵀ + b          loss_n = u_n · cross_entropy(x_n, t_n)        u: a weight of each token, 1 where there is none

with all that :func:`cross_entropy` has. "mean" divides the sum by Σ u_n·w_{t_n} over the tokens that count. The logits
exist for some tokens at a time (``head_chunks.py``); an ignored token costs nothing.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import dispatch, sharding
from ..autograd import vjp
from ..op import Call, Draw, ErrorInput, Excess, Op, Traffic
from . import checks, process_groups
from . import cross_entropy as cross_entropy_op
from . import linear_cross_entropy_chunks as chunks
from .linear_cross_entropy_chunks import loss_dtype
from .loss_weights import divisor, token_weights

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


def reference(*tensors: Any, **options: Any) -> Tensor:
    """In plain PyTorch; in a group in chunks, as the processes beside this one: they would wait for each other."""
    return (_implementation("eager") if "group" in options else _with_logits)(*tensors, **options)


def _with_logits(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    class_weight: Tensor | None,
    token_weight: Tensor | None,
    *,
    reduction: str,
    ignore_index: int,
    memory_budget: int | None,
    dtype: torch.dtype | None,
    **options: Any,
) -> Tensor:
    """Linear layer and cross-entropy in plain PyTorch: the product in the operands' dtype, the loss in float32."""
    dtype = dtype or loss_dtype(hidden)
    ignored = target.flatten() == ignore_index
    h = hidden.reshape(-1, hidden.shape[-1]).masked_fill(ignored[:, None], 0.0)
    x = F.linear(h, weight, bias)
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    losses = cross_entropy_op.reference(
        x, target.flatten(), class_weight, reduction="none", ignore_index=ignore_index, **options
    )
    u = token_weights(ignored, token_weight, x.dtype)
    losses = losses * u
    if reduction == "none":
        return losses.view(target.shape).to(dtype)
    total = losses.sum()
    if reduction == "mean":
        group = options.get("group")
        total = total / divisor(target, class_weight, token_weight, ignore_index=ignore_index, group=group)
    return total.to(dtype)


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None = None,
    *,
    class_weight: Tensor | None = None,
    token_weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    softcap: float | None = None,
    z_loss: float = 0.0,
    memory_budget: int | None = None,
    dtype: torch.dtype | None = None,
    group: ProcessGroup | None = None,
) -> Tensor:
    """``cross_entropy(F.linear(hidden, weight, bias), target)``, with no logits in memory.

    With "mean" and "sum" the gradients are computed on the way forward, in float32, and wait there for the backward
    pass: three matrix products, as many as without fusion. With "none", and for a second backward pass on a retained
    graph, the logits are computed again. Under ``create_graph=True`` they are in memory. Under autocast the products
    run in its dtype.

    Args:
        hidden: floating-point tensor [..., D].
        weight: of the linear layer, [C, D]. One of low rank, ``base + b @ a``, gets its gradient through both.
        target: integer class indices in [0, C) or ``ignore_index``, [...].
        bias: of the linear layer, [C], or None for none.
        class_weight: of each class, [C]; no gradient flows to it.
        token_weight: of each token's loss, [...]; no gradient flows to it.
        ignore_index: target value that marks a token as ignored.
        reduction: "none", "mean" or "sum"; "mean" is weighted.
        label_smoothing: in [0, 1].
        softcap: if given, the logits x are first replaced by ``softcap·tanh(x / softcap)``.
        z_loss: factor of lse², which keeps the normalizer near 1.
        memory_budget: bytes that the logits of a chunk of tokens, and their gradient, may take together. None is half
            as much as the weight takes, at least 64 MiB: on a chunk of about D / 4 tokens the products are as fast as
            on all.
        dtype: of the loss; None is hidden's (float32 under autocast).
        group: of processes that hold parts of the classes, in their order: weight, bias and class_weight are of this
            process's classes, and all else is the same in every process. So is the loss, and in the backward pass the
            gradient of hidden, which is added up over the processes: hidden is what they hold copies of, not what an
            all-reduce of their own has made whole. DTensors need no group: the weight may be sharded in classes where
            hidden is not, over one dim of the mesh; hidden's gradient comes out as ``Partial``.

    Returns:
        The losses [...], or their mean or sum, a scalar.

    Raises:
        RuntimeError: if there is a group, but torch.distributed is not initialized.
        TypeError: if hidden, weight or bias is not floating point, or they differ in dtype without autocast; or if the
            target is not of integers; or if group is no process group, or comes with a DTensor.
        ValueError: if shapes do not fit, an option is out of range, or class_weight or token_weight requires a
            gradient.
        IndexError: if a target on the CPU is out of range. On a GPU the loss of such a token is NaN.
    """
    name = "linear_cross_entropy"
    checks.linear_operands(name, hidden=(hidden, "D"), weight=(weight, "CD"), bias=(bias, "C"))
    _check(hidden, weight, target, class_weight, token_weight, memory_budget)
    checks.loss_options(name, reduction, label_smoothing, softcap, class_weight=class_weight, token_weight=token_weight)
    options: dict[str, Any] = {
        "ignore_index": int(ignore_index),
        "label_smoothing": float(label_smoothing),
        "softcap": None if softcap is None else float(softcap),
        "z_loss": float(z_loss),
        "memory_budget": memory_budget,
        "dtype": dtype,
    }
    if group is not None:
        process_groups.check_group(name, hidden, group)
    if group is not None and group.size() > 1:
        options["group"] = group
        hidden = process_groups.shared(hidden, group)
    else:
        checks.class_indices(name, target, len(weight), ignore_index)
    tensors = (hidden, weight, target, bias, class_weight, token_weight)
    if reduction == "mean" and sharding.is_sharded(hidden):
        # The mean over all shards is not the mean of their means.
        counted = functools.partial(divisor, ignore_index=int(ignore_index))
        whole = sharding.run(name, counted, "..., c+, ... -> ", (target, class_weight, token_weight))
        return dispatch.run(LINEAR_CROSS_ENTROPY, *tensors, reduction="sum", **options) / whole
    return dispatch.run(LINEAR_CROSS_ENTROPY, *tensors, reduction=reduction, **options)


class LinearCrossEntropyLoss(torch.nn.Module):
    """A linear layer and the cross-entropy of its logits, which are never in memory; runs :func:`linear_cross_entropy`.

    Its ``state_dict`` is that of ``torch.nn.LinearCrossEntropyLoss``. The layer ``linear`` holds the parameters and is
    not called: hooks on it do not run.

    Args:
        in_features: D.
        num_classes: C.
        bias: whether the linear layer has one.
        device: of the parameters.
        dtype: of the parameters.
        reduction: as in :func:`linear_cross_entropy`, and so are the others.
        weight: of each class, [C]; a buffer.
        ignore_index: likewise.
        label_smoothing: likewise.
        softcap: likewise.
        z_loss: likewise.
        memory_budget: likewise.
        group: likewise; num_classes and weight are then of this process's classes.
    """

    weight: Tensor | None

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        *,
        bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        reduction: str = "mean",
        weight: Tensor | None = None,
        ignore_index: int = -100,
        label_smoothing: float = 0.0,
        softcap: float | None = None,
        z_loss: float = 0.0,
        memory_budget: int | None = None,
        group: ProcessGroup | None = None,
    ) -> None:
        super().__init__()
        checks.loss_options("LinearCrossEntropyLoss", reduction, label_smoothing, softcap, weight=weight)
        self.register_buffer("weight", weight)
        self.linear = torch.nn.Linear(in_features, num_classes, bias, device=device, dtype=dtype)
        self.reduction, self.ignore_index, self.label_smoothing = reduction, ignore_index, label_smoothing
        self.softcap, self.z_loss, self.memory_budget, self.group = softcap, z_loss, memory_budget, group

    def forward(self, input: Tensor, target: Tensor, token_weight: Tensor | None = None) -> Tensor:
        """Hidden states [..., D] and targets [...] → the loss."""
        return linear_cross_entropy(
            input,
            self.linear.weight,
            target,
            self.linear.bias,
            class_weight=self.weight,
            token_weight=token_weight,
            ignore_index=self.ignore_index,
            reduction=self.reduction,
            label_smoothing=self.label_smoothing,
            softcap=self.softcap,
            z_loss=self.z_loss,
            memory_budget=self.memory_budget,
            group=self.group,
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> LinearCrossEntropyLoss:
        return process_groups.deepcopy(self, self.group, memo)

    def extra_repr(self) -> str:
        """What the linear layer does not say."""
        return f"reduction={self.reduction!r}, ignore_index={self.ignore_index}"


def _check(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    class_weight: Tensor | None,
    token_weight: Tensor | None,
    memory_budget: int | None,
) -> None:
    name = "linear_cross_entropy"
    if target.is_floating_point() or target.dtype == torch.bool or target.is_complex():
        raise TypeError(
            f"{name}: target must be integers, got {target.dtype}; convert it, or, for class probabilities, use "
            "torch.nn.functional.cross_entropy on the logits"
        )
    checks.each_token(name, hidden, target=target, token_weight=token_weight)
    if class_weight is not None and class_weight.shape != weight.shape[:1]:
        raise ValueError(
            f"{name}: class_weight must have one element for each class, ({len(weight)},), "
            f"got {tuple(class_weight.shape)}"
        )
    checks.memory_budget(name, memory_budget)


def _implementation(backend: str) -> Any:
    return functools.partial(chunks.run, backend, _second)


def _second(grads: Any, *arguments: Any, **options: Any) -> Any:
    return vjp(_with_logits)(grads, *arguments, dtype=grads[0].dtype, **options)


def _aten(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None = None,
    *,
    class_weight: Tensor | None = None,
    token_weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    memory_budget: int | None = None,
    dtype: torch.dtype | None = None,
    **options: Any,
) -> Tensor:
    x = F.linear(hidden, weight, bias).flatten(0, -2) if hidden.dim() > 1 else F.linear(hidden, weight, bias)[None]
    own = {"ignore_index": ignore_index, **options}
    x = x if dtype is None else x.to(dtype)
    if token_weight is None:
        loss = cross_entropy_op._aten(x, target.flatten(), class_weight, reduction=reduction, **own)
        return loss.view(target.shape) if reduction == "none" else loss
    losses = cross_entropy_op._aten(x, target.flatten(), class_weight, reduction="none", **own)
    loss = losses * token_weight.flatten().to(losses.dtype)
    if reduction == "none":
        return loss.view(target.shape)
    whole = divisor(target, class_weight, token_weight, ignore_index=ignore_index) if reduction == "mean" else 1
    return (loss.sum() / whole).to(loss.dtype)


def _inputs(
    draw: Draw,
    *,
    N: int,
    D: int,
    C: int,
    bias: bool = False,
    classes: bool = False,
    tokens: bool = False,
    sequences: bool = False,
    **options: Any,
) -> Call:
    shape = (N, 3) if sequences else (N,)
    positions = math.prod(shape)
    ignored = draw.permutation(positions).view(shape) < _ignored(positions)
    target = draw.integers(0, C, *shape).masked_fill(ignored, options.get("ignore_index", -100))
    # Weights are positive: with a sum near zero the mean would say nothing about the implementation.
    options["class_weight"] = draw.constant(C, low=0.1, high=1.0) if classes else None
    options["token_weight"] = draw.constant(*shape, low=0.1, high=1.0) if tokens else None
    operands = (draw.tensor(*shape, D), draw.tensor(C, D), target, draw.tensor(C) if bias else None)
    return Call(operands, options)


def _ignored(positions: int) -> int:
    """How many positions of a drawn call are ignored."""
    return positions // 5


def _errors() -> Iterator[ErrorInput]:
    h, w, t = torch.zeros(2, 8), torch.zeros(16, 8), torch.tensor([0, 1])
    learned = torch.ones(2, requires_grad=True)
    yield ErrorInput(Call((h.long(), w, t)), TypeError, r"hidden must be a floating-point.*int64")
    yield ErrorInput(Call((h, w.half(), t)), TypeError, r"weight must have the dtype of hidden.*got torch.float16")
    yield ErrorInput(Call((h, w.mT, t)), ValueError, r"weight must be \[C=8, D=8\], got \(8, 16\)")
    yield ErrorInput(Call((h, w, t, torch.zeros(8))), ValueError, r"bias must be \[C=16\], got \(8,\)")
    yield ErrorInput(Call((h, w, h)), TypeError, r"target must be integers, got torch.float32")
    yield ErrorInput(Call((h, w, t[:1])), ValueError, r"target must have one element.*\(2,\), got \(1,\)")
    yield ErrorInput(
        Call((h, w, t), {"token_weight": h[0]}), ValueError, r"token_weight must have .*\(2,\), got \(8,\)"
    )
    yield ErrorInput(Call((h, w, t), {"token_weight": learned}), ValueError, r"pass token_weight.detach\(\)")
    yield ErrorInput(
        Call((h, w, t), {"class_weight": h[0]}), ValueError, r"class_weight must have .*\(16,\), got \(8,\)"
    )
    yield ErrorInput(Call((h, w, t), {"reduction": "avg"}), ValueError, "reduction must be one of.*got 'avg'")
    yield ErrorInput(Call((h, w, t), {"label_smoothing": 2}), ValueError, "label_smoothing.*between 0 and 1, got 2")
    yield ErrorInput(Call((h, w, t), {"softcap": 0.0}), ValueError, "softcap must be positive, got 0.0")
    yield ErrorInput(Call((h, w, t), {"memory_budget": 0}), ValueError, "memory_budget must be positive.*got 0")
    yield ErrorInput(Call((h, w, t + 15)), IndexError, r"target must be in \[0, 16\) or ignore_index.*got 16")


def _traffic(itemsize: int, *, N: int, D: int, C: int, bias: bool = False, **options: Any) -> Traffic:
    """Operands and results of each product, and the logits to the loss and back; the gradients, to be scaled."""
    counted = (3 if options.get("sequences") else 1) * N
    counted -= _ignored(counted)
    product = counted * D + C * D + counted * C
    whole = 3 * product + 3 * counted * C
    if options.get("reduction") == "none":
        return Traffic(forward=(product + counted * C) * itemsize, backward=whole * itemsize)
    return Traffic(forward=whole * itemsize, backward=2 * (N * D + C * D + bias * C) * itemsize)


_PICKED = "rows that count are picked out and put back; the CPU widens half precision for the gradient of the weight"
_CHUNKED = "a chunk is of few tokens here, and each reads the weight, and its gradient's sum, again"

LINEAR_CROSS_ENTROPY = Op(
    name="linear_cross_entropy",
    replaces="`F.cross_entropy(linear(h), target)`, without the logits; `F.linear_cross_entropy`",
    fn=linear_cross_entropy,
    reference=reference,
    impls={"triton": _implementation("triton"), "compile": _implementation("compile")},
    traced=chunks.traced,
    inputs=_inputs,
    dims={"N": (0, 1, 2, 33, 129), "D": (1, 8, 31), "C": (1, 2, 33, 129, 1025)},
    # GPT-2, whose truth in float64 is there to be compared with; larger ones: python -m braze.benchmarks losses.
    bench=({"N": 1024, "D": 768, "C": 50_304},),
    audit=({"N": 64, "D": 128, "C": 512},),
    traffic=_traffic,
    excess={
        ("default", "forward"): Excess(2.4, _PICKED),
        ("every option", "forward"): Excess(2.5, _PICKED),
        ("chunks", "forward"): Excess(14, _CHUNKED),
        ("token by token", "forward"): Excess(13, _CHUNKED),
        ("token by token", "backward"): Excess(22, _CHUNKED),
    },
    flops=lambda N, D, C: 2 * N * D * C,
    aten=_aten,
    axes=lambda *_, reduction, **__: "... D, c+ D, ..., c+, c+, ... -> " + ("..." if reduction == "none" else ""),
    errors=_errors,
    variants={
        "default": {},
        "every option": {
            "bias": True,
            "classes": True,
            "tokens": True,
            "label_smoothing": 0.1,
            "softcap": 5.0,
            "z_loss": 1e-2,
        },
        "chunks": {"memory_budget": 16_384, "bias": True, "reduction": "sum", "ignore_index": 0},
        "token by token": {
            "reduction": "none",
            "tokens": True,
            "sequences": True,
            "memory_budget": 16_384,
            "dtype": torch.float32,
        },
    },
    modules=(LinearCrossEntropyLoss,),
)
