"""How linear_cross_entropy runs: in chunks of tokens, eagerly and as one opaque operator of a compiled graph."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from .. import dispatch
from ..autograd import Gradients, fused
from ..compiled import compiled_call
from . import checks, cross_entropy_pieces, process_groups, vocab_parallel
from .autocast import autocast_operands, autocasting, without_autocast
from .head_chunks import Found, counted_rows, held_dtype, in_chunks, rows_within, scaled
from .loss_weights import divisor, token_weights

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

#: Not "braze" where this folder is found as a package of its own (transformers looks for one named ``kernels``): to
#: register an operator anew pulls the first one from under its users.
_NAMESPACE = __name__.partition(".")[0]

#: hidden, weight, target, bias, class_weight, token_weight.
Tensors = Sequence[Any]


def loss_dtype(hidden: Tensor) -> torch.dtype:
    """The dtype of the loss: hidden's, or float32 under autocast."""
    return torch.float32 if autocasting(hidden.device.type) else hidden.dtype


def run(
    backend: str,
    second: Callable[..., Gradients],
    *tensors: Any,
    reduction: str,
    dtype: torch.dtype | None,
    **options: Any,
) -> Tensor:
    """The operator, its loss on a chunk of logits computed by ``backend``; ``second`` differentiates it further."""
    chunk = _chunk(backend, options.get("group"))
    hidden, weight, target, bias, *constants = tensors
    dtype = dtype or loss_dtype(hidden)
    hidden, weight, bias = autocast_operands(hidden, weight, bias)
    recorded = torch.is_grad_enabled()
    # Held here and not by autograd, so that the backward pass can hand out what it holds, once, without a copy.
    ahead: list[Ahead] = []

    def forward(*tensors: Any, dtype: torch.dtype, **options: Any) -> tuple[Tensor, Tensors]:
        needs = tuple(recorded and t is not None and t.requires_grad for t in _learned(tensors))
        loss, found, whole = _loss(chunk, tensors, needs, **options)
        if any(needs) and reduction != "none":
            ahead.append(Ahead(found, whole))
        return loss.to(dtype), tensors

    def backward(grads: Any, saved: Any, needs: Any, *, dtype: torch.dtype, **options: Any) -> Gradients:
        with without_autocast(grads[0].device.type):
            gradients = _gradients(chunk, grads[0], saved, _learned(needs), ahead, **options)
        return gradients.hidden, gradients.weight, None, gradients.bias, None, None

    with without_autocast(hidden.device.type):
        operands = (hidden, weight, target, bias, *constants)
        return fused(forward, backward, second, operands, {"reduction": reduction, "dtype": dtype, **options})


def traced(
    *tensors: Any, reduction: str, dtype: torch.dtype | None, group: ProcessGroup | None = None, **options: Any
) -> Tensor:
    """The operator as one node of a compiled graph, which neither Inductor nor the partitioner sees into."""
    hidden, weight, target, bias, *constants = tensors
    dtype = dtype or loss_dtype(hidden)
    hidden, weight, bias = autocast_operands(hidden, weight, bias)
    recorded = torch.is_grad_enabled()
    needs = [recorded and t is not None and t.requires_grad for t in (hidden, weight, bias)]
    with without_autocast(hidden.device.type):
        operands = (hidden, weight, target, bias, *constants)
        options["group"] = None if group is None else group.group_name
        return _opaque(*operands, needs, reduction=reduction, **options)[0].to(dtype)


def _learned(tensors: Sequence[Any]) -> tuple[Any, Any, Any]:
    """What belongs to hidden, weight and bias."""
    return tensors[0], tensors[1], tensors[3]


class Ahead(NamedTuple):
    """What the forward pass computes of the backward pass: gradients of Σ u·loss, and what the mean divides by."""

    found: Found
    divisor: Tensor | None


def _loss(
    chunk: Callable[..., Any], tensors: Tensors, needs: Sequence[bool], *, reduction: str, **options: Any
) -> tuple[Tensor, Found, Tensor | None]:
    """The loss in float32 or wider and, unless the reduction is "none", an :class:`Ahead`."""
    hidden, _, target, _, class_weight, token_weight = tensors
    ignored = target.flatten() == options["ignore_index"]
    u = token_weights(ignored, token_weight, torch.promote_types(hidden.dtype, torch.float32))
    found = _walk(chunk, tensors, u if any(needs) and reduction != "none" else None, needs, **options)
    losses = found.losses * u
    if reduction == "none":
        return losses.view(target.shape), found, None
    if reduction == "sum":
        return losses.sum(), found, None
    shared = {"ignore_index": options["ignore_index"], "group": options.get("group")}
    whole = divisor(target, class_weight, token_weight, **shared).to(u.dtype)
    return losses.sum() / whole, found, whole


def _gradients(
    chunk: Callable[..., Any],
    grad: Tensor,
    tensors: Tensors,
    needs: Sequence[bool],
    ahead: list[Ahead],
    *,
    reduction: str,
    **options: Any,
) -> Found:
    dtype = tensors[0].dtype
    wide = torch.promote_types(dtype, torch.float32)
    if reduction == "none":
        ignored = tensors[2].flatten() == options["ignore_index"]
        u = token_weights(ignored, tensors[5], wide)
        found = _walk(chunk, tensors, grad.flatten() * u, needs, **options)
        return scaled(found, torch.ones((), dtype=wide), dtype)
    found, whole = ahead.pop() if ahead else _loss(chunk, tensors, needs, reduction=reduction, **options)[1:]
    return scaled(found, _factor(grad, whole, wide), dtype)


def _factor(grad: Tensor, divisor: Tensor | None, dtype: torch.dtype) -> Tensor:
    """What is left to multiply by. Nothing counted has no mean, and no gradient."""
    grad = grad.to(dtype)
    return grad if divisor is None else torch.where(divisor == 0, 0.0, grad / divisor)


def _walk(
    chunk: Callable[..., Any],
    tensors: Tensors,
    scale: Tensor | None,
    needs: Sequence[bool],
    *,
    ignore_index: int,
    memory_budget: int | None,
    **options: Any,
) -> Found:
    hidden, weight, target, bias, class_weight, _ = tensors
    target = target.flatten()
    classes = len(weight)
    if "group" in options:
        # All processes walk the same chunks: whoever had more would wait for messages that nobody sends.
        every = vocab_parallel.agreed_classes("linear_cross_entropy", hidden, weight, options["group"])
        checks.class_indices("linear_cross_entropy", target, sum(every), ignore_index)
        classes = max(every)

    def losses_of(logits: Tensor, index: Any, scale: Tensor | None) -> Tensor:
        return chunk(logits, target[index], class_weight, scale, ignore_index=ignore_index, **options)

    rows, counted = hidden.reshape(-1, hidden.shape[-1]), counted_rows(target, ignore_index)
    most = rows_within(memory_budget, weight, classes)
    found = in_chunks(losses_of, rows, weight, bias, counted, scale, needs, most)
    return found._replace(hidden=None if found.hidden is None else found.hidden.view(hidden.shape))


def _called(function: Callable[..., Any], tensors: Sequence[Any], options: dict[str, Any]) -> Any:
    return function(*tensors, **options)


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


_CHUNKS: dict[str, Callable[..., Any]] = {
    "eager": functools.partial(_torch_chunk, _called),
    "compile": functools.partial(_torch_chunk, compiled_call),
    "triton": _triton_chunk,
}


def _chunk(backend: str, group: ProcessGroup | None) -> Callable[..., Any]:
    return _CHUNKS[backend] if group is None else functools.partial(vocab_parallel.chunk, backend)


def _chosen(tensors: Tensors, group: str | None) -> tuple[Callable[..., Any], dict[str, Any]]:
    """What computes a chunk, and the option that it takes beside the others."""
    from .linear_cross_entropy import LINEAR_CROSS_ENTROPY

    backend = dispatch.choose(LINEAR_CROSS_ENTROPY, tuple(tensors)).backend
    if group is None:
        return _chunk(backend, None), {}
    found = process_groups.named(group)
    return _chunk(backend, found), {"group": found}


@torch.library.custom_op(f"{_NAMESPACE}::linear_cross_entropy", mutates_args=())
def _opaque(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    class_weight: Tensor | None,
    token_weight: Tensor | None,
    needs: list[bool],
    reduction: str,
    ignore_index: int,
    label_smoothing: float,
    softcap: float | None,
    z_loss: float,
    memory_budget: int | None,
    group: str | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The loss, what its mean divides by, and the gradients of hidden, weight and bias; empty where not needed."""
    tensors = (hidden, weight, target, bias, class_weight, token_weight)
    chunk, more = _chosen(tensors, group)
    loss, found, whole = _loss(
        chunk, tensors, needs, reduction=reduction, ignore_index=ignore_index, label_smoothing=label_smoothing,
        softcap=softcap, z_loss=z_loss, memory_budget=memory_budget, **more,
    )  # fmt: skip
    return loss, torch.ones_like(loss) if whole is None else whole, *_filled(found, hidden)


@_opaque.register_fake
def _(hidden: Tensor, weight: Tensor, target: Tensor, bias: Tensor | None, *others: Any) -> tuple[Tensor, ...]:
    _, _, needs, reduction, *_ = others
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    loss = hidden.new_empty(target.shape if reduction == "none" else (), dtype=dtype)
    ahead = [need and reduction != "none" for need in needs]
    return loss, torch.empty_like(loss), *_shapes_of_gradients(hidden, weight, bias, ahead, held_dtype(weight.dtype))


@torch.library.custom_op(f"{_NAMESPACE}::linear_cross_entropy_backward", mutates_args=())
def _opaque_backward(
    grad: Tensor,
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    class_weight: Tensor | None,
    token_weight: Tensor | None,
    needs: list[bool],
    ignore_index: int,
    label_smoothing: float,
    softcap: float | None,
    z_loss: float,
    memory_budget: int | None,
    group: str | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of hidden, weight and bias, for losses that were not reduced; empty where not needed."""
    tensors = (hidden, weight, target, bias, class_weight, token_weight)
    chunk, more = _chosen(tensors, group)
    found = _gradients(
        chunk, grad, tensors, needs, [], reduction="none", ignore_index=ignore_index, label_smoothing=label_smoothing,
        softcap=softcap, z_loss=z_loss, memory_budget=memory_budget, **more,
    )  # fmt: skip
    return _filled(found, hidden)


@_opaque_backward.register_fake
def _(
    grad: Tensor, hidden: Tensor, weight: Tensor, target: Tensor, bias: Tensor | None, *others: Any
) -> tuple[Tensor, ...]:
    _, _, needs, *_ = others
    return _shapes_of_gradients(hidden, weight, bias, needs, weight.dtype)


def _filled(found: Found, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    h, w, b = (hidden.new_empty(0) if g is None else g for g in (found.hidden, found.weight, found.bias))
    return h, w, b


def _shapes_of_gradients(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, needs: Sequence[bool], dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """As :func:`_filled`; those of weight and bias are of ``dtype``."""
    learned = ((hidden, hidden.dtype), (weight, dtype), (bias, dtype))
    h, w, b = (
        torch.empty(t.shape, dtype=dtype, device=t.device) if need and t is not None else hidden.new_empty(0)
        for (t, dtype), need in zip(learned, needs, strict=True)
    )
    return h, w, b


def _set_up(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    tensors, (needs, reduction, *options) = inputs[:6], inputs[6:]
    ctx.needs, ctx.reduction, ctx.options = needs, reduction, options
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*(tensors if reduction == "none" else output[1:]))


def _differentiate(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    h: Tensor | None
    h = w = b = None
    if grad is not None:
        if ctx.reduction == "none":
            found = _opaque_backward(grad, *ctx.saved_tensors, ctx.needs, *ctx.options)
        else:
            whole, *found = ctx.saved_tensors
            factor = _factor(grad, whole, grad.dtype)
            found = [(g * factor).to(found[0].dtype) for g in found]
        h, w, b = (g if need else None for g, need in zip(found, ctx.needs, strict=True))
    return h, w, None, b, None, None, *[None] * (2 + len(ctx.options))


_opaque.register_autograd(_differentiate, setup_context=_set_up)
