"""Cross-entropy as a loss behind a linear layer: of a chunk of logits, with weights of classes and tokens."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..autograd import Gradients
from ..compiled import compiled_call
from . import checks, cross_entropy_pieces, process_groups, vocab_parallel
from .autocast import autocasting
from .head_chunks import Losses
from .head_loss import HeadLoss, as_one_node, called
from .loss_weights import divisor

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


def loss_dtype(hidden: Tensor) -> torch.dtype:
    """The dtype of the loss: hidden's, or float32 under autocast."""
    return torch.float32 if autocasting(hidden.device.type) else hidden.dtype


def _torch_chunk(
    call: Callable[..., Any],
    logits: Tensor,
    target: Tensor,
    class_weight: Tensor | None,
    scale: Tensor | None,
    **options: Any,
) -> Tensor:
    """Two calls: compiled as one, torch 2.11 reads the target's logit after it has written the gradient over it."""
    operands = (logits, target, class_weight)
    losses, *statistics = call(cross_entropy_pieces.loss_and_statistics, operands, {**options, "reduction": "none"})
    if scale is not None:
        call(cross_entropy_pieces.replace_by_gradient, (*operands, scale, *statistics), options)
    return losses


def _triton_chunk(logits: Tensor, target: Tensor, class_weight: Tensor | None, scale: Any, **options: Any) -> Any:
    from ..triton import cross_entropy as kernels

    return kernels.losses_and_gradient(logits, target, class_weight, scale, **options)


_CHUNKS: dict[str, Callable[..., Tensor]] = {
    "eager": functools.partial(_torch_chunk, called),
    "compile": functools.partial(_torch_chunk, compiled_call),
    "triton": _triton_chunk,
}


def _chunk(backend: str, *tensors: Any, group: ProcessGroup | None, **options: Any) -> Tensor:
    if group is None:
        return _CHUNKS[backend](*tensors, **options)
    return vocab_parallel.chunk(backend, *tensors, group=group, **options)


def _found(group: ProcessGroup | str | None) -> ProcessGroup | None:
    """The group: in a compiled graph, whose operators take no objects, it goes by its name."""
    return process_groups.named(group) if isinstance(group, str) else group


def _losses_of(
    chunk: Callable[..., Tensor],
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    class_weight: Tensor | None,
    token_weight: Tensor | None,
    *,
    group: ProcessGroup | str | None = None,
    **options: Any,
) -> Losses:
    target, found = target.flatten(), _found(group)
    return lambda logits, index, scale: chunk(logits, target[index], class_weight, scale, group=found, **options)


def _divisor(*tensors: Any, ignore_index: int, group: ProcessGroup | str | None = None, **_: Any) -> Tensor:
    return divisor(tensors[2], *tensors[4:], ignore_index=ignore_index, group=_found(group))


def _classes(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    *_: Any,
    ignore_index: int,
    group: ProcessGroup | str | None = None,
    **__: Any,
) -> int:
    """Of the process that has most: all walk the same chunks, or they would wait for messages that nobody sends."""
    found = _found(group)
    if found is None:
        return len(weight)
    every = vocab_parallel.agreed_classes(_HEAD_LOSS.name, hidden, weight, found)
    checks.class_indices(_HEAD_LOSS.name, target, sum(every), ignore_index)
    return max(every)


_HEAD_LOSS = HeadLoss(
    name="linear_cross_entropy",
    impls={backend: functools.partial(_chunk, backend) for backend in _CHUNKS},
    losses_of=_losses_of,
    divisor=_divisor,
    classes=_classes,
    token_weight=5,
    tensors="Tensor? class_weight, Tensor? token_weight",
    options=(
        "SymInt ignore_index, float label_smoothing, float? softcap, float z_loss, SymInt? memory_budget, str? group"
    ),
)
_as_one_node = as_one_node(_HEAD_LOSS)


def run(
    backend: str, second: Callable[..., Gradients], *tensors: Any, dtype: torch.dtype | None, **options: Any
) -> Tensor:
    """The operator, its loss on a chunk of logits computed by ``backend``; ``second`` differentiates it further."""
    dtype = dtype or loss_dtype(tensors[0])
    return _HEAD_LOSS.run(backend, second, *tensors, **options).to(dtype)


def traced(*tensors: Any, dtype: torch.dtype | None, group: ProcessGroup | None = None, **options: Any) -> Tensor:
    """The operator as one node of a compiled graph."""
    dtype = dtype or loss_dtype(tensors[0])
    name = None if group is None else group.group_name
    return _as_one_node(*tensors, group=name, **options).to(dtype)
