"""Cross-entropy as a loss behind a linear layer: of a chunk of logits, with weights of classes and tokens."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..autograd import Gradients
from ..compiled import compiled_call
from . import cross_entropy
from .autocast import autocasting
from .head_chunks import Losses
from .head_loss import HeadLoss, as_one_node, called, token_weights


def loss_dtype(hidden: Tensor) -> torch.dtype:
    """The dtype of the loss: hidden's, or float32 under autocast."""
    return torch.float32 if autocasting(hidden.device.type) else hidden.dtype


def divisor(target: Tensor, class_weight: Tensor | None, token_weight: Tensor | None, *, ignore_index: int) -> Tensor:
    """Σ u_n·w_{t_n} over the tokens that count: what "mean" divides by."""
    target = target.flatten()
    ignored = target == ignore_index
    dtypes = [t.dtype for t in (class_weight, token_weight) if t is not None]
    u = token_weights(ignored, token_weight, functools.reduce(torch.promote_types, dtypes, torch.float32))
    if class_weight is not None:
        u = u * class_weight.to(u.dtype)[target.long().masked_fill(ignored, 0)]
    return u.sum()


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
    losses, *statistics = call(cross_entropy.loss_and_statistics, operands, {**options, "reduction": "none"})
    if scale is not None:
        call(cross_entropy.replace_by_gradient, (*operands, scale, *statistics), options)
    return losses


def _triton_chunk(logits: Tensor, target: Tensor, class_weight: Tensor | None, scale: Any, **options: Any) -> Any:
    from ..triton import cross_entropy as kernels

    return kernels.losses_and_gradient(logits, target, class_weight, scale, **options)


def _losses_of(
    chunk: Callable[..., Tensor],
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    class_weight: Tensor | None,
    token_weight: Tensor | None,
    **options: Any,
) -> Losses:
    target = target.flatten()
    return lambda logits, index, scale: chunk(logits, target[index], class_weight, scale, **options)


def _divisor(*tensors: Any, ignore_index: int) -> Tensor:
    return divisor(tensors[2], *tensors[4:], ignore_index=ignore_index)


_HEAD_LOSS = HeadLoss(
    name="linear_cross_entropy",
    impls={
        "eager": functools.partial(_torch_chunk, called),
        "compile": functools.partial(_torch_chunk, compiled_call),
        "triton": _triton_chunk,
    },
    losses_of=_losses_of,
    divisor=_divisor,
    token_weight=5,
    tensors="Tensor? class_weight, Tensor? token_weight",
    options="SymInt ignore_index, float label_smoothing, float? softcap, float z_loss, SymInt? memory_budget",
)
_as_one_node = as_one_node(_HEAD_LOSS)


def run(
    backend: str, second: Callable[..., Gradients], *tensors: Any, dtype: torch.dtype | None, **options: Any
) -> Tensor:
    """The operator, its loss on a chunk of logits computed by ``backend``; ``second`` differentiates it further."""
    dtype = dtype or loss_dtype(tensors[0])
    return _HEAD_LOSS.run(backend, second, *tensors, **options).to(dtype)


def traced(*tensors: Any, dtype: torch.dtype | None, **options: Any) -> Tensor:
    """The operator as one node of a compiled graph."""
    dtype = dtype or loss_dtype(tensors[0])
    return _as_one_node(*tensors, **options).to(dtype)
