"""A linear layer and the loss behind it as one operator: eagerly, and as one opaque operator of a compiled graph.

With "mean" and "sum" the gradients are computed on the way forward (``head_chunks.py``) and wait for the backward pass;
with "none", and for a second backward pass on a retained graph, the logits are computed again.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import dispatch
from ..autograd import Gradients, fused
from .autocast import autocast_operands, without_autocast
from .head_chunks import Found, Losses, counted_rows, held_dtype, in_chunks, rows_within, scaled
from .loss_weights import token_weights

#: Not "braze" where this folder is found as a package of its own (transformers looks for one named ``kernels``): to
#: register an operator anew pulls the first one from under its users.
_NAMESPACE = __name__.partition(".")[0]

#: hidden, weight, target, bias, and what the loss has besides. Hidden, weight and bias learn.
Tensors = Sequence[Any]


def learned(tensors: Sequence[Any]) -> tuple[Any, Any, Any]:
    """What belongs to hidden, weight and bias."""
    return tensors[0], tensors[1], tensors[3]


class Ahead(NamedTuple):
    """What the forward pass computes of the backward pass: gradients of Σ u·loss, and what the mean divides by."""

    found: Found
    divisor: Tensor | None


@dataclass(frozen=True)
class HeadLoss:
    """A loss behind a linear layer, and how it runs. ``ignore_index`` and ``memory_budget`` are among its options."""

    name: str
    #: By backend, the loss of a chunk of logits, as ``losses_of`` calls it.
    impls: Mapping[str, Callable[..., Tensor]]
    #: ``losses_of(chunk, *tensors, **options)``: the losses behind the head, computed by ``chunk``, one of ``impls``.
    losses_of: Callable[..., Losses]
    #: ``divisor(*tensors, **options)``: what "mean" divides Σ u·loss by.
    divisor: Callable[..., Tensor]
    #: Its further tensors and its options, as the schema of an operator writes them.
    tensors: str
    options: str
    #: Which of the tensors go into a product, so that autocast casts them.
    operands: Sequence[int] = (0, 1, 3)
    #: Which of the tensors is u, a weight of each token, if one is.
    token_weight: int | None = None
    #: ``classes(*tensors, **options)``: how many, for the size of a chunk.
    classes: Callable[..., int] = lambda hidden, weight, *_, **__: len(weight)
    #: Which of the tensors is the weight of another head, if one is, whose logits a chunk holds too.
    other_head: int | None = None

    def run(
        self, backend: str, second: Callable[..., Gradients], *tensors: Any, reduction: str, **options: Any
    ) -> Tensor:
        """The loss in float32 or wider, computed by ``backend``; ``second`` differentiates it further."""
        chunk = self.impls[backend]
        tensors = self.cast(tensors)
        recorded = torch.is_grad_enabled()
        # Held here and not by autograd, so that the backward pass can hand out what it holds, once, without a copy.
        ahead: list[Ahead] = []

        def forward(*tensors: Any, reduction: str, **options: Any) -> tuple[Tensor, Tensors]:
            needs = tuple(recorded and t is not None and t.requires_grad for t in learned(tensors))
            loss, found, whole = self.loss(chunk, tensors, needs, reduction=reduction, **options)
            if any(needs) and reduction != "none":
                ahead.append(Ahead(found, whole))
            return loss, tensors

        def backward(grads: Any, saved: Any, needs: Any, **options: Any) -> Gradients:
            with without_autocast(grads[0].device.type):
                found = self.gradients(chunk, grads[0], saved, learned(needs), ahead, **options)
            return found.hidden, found.weight, None, found.bias, *[None] * (len(saved) - 4)

        with without_autocast(tensors[0].device.type):
            return fused(forward, backward, second, tensors, {"reduction": reduction, **options})

    def cast(self, tensors: Tensors) -> tuple[Any, ...]:
        """The tensors, those that go into a product in the dtype of autocast where that is on."""
        operands = dict(zip(self.operands, autocast_operands(*(tensors[i] for i in self.operands)), strict=True))
        return tuple(operands.get(i, t) for i, t in enumerate(tensors))

    def chosen(self, tensors: Tensors) -> Callable[..., Tensor]:
        """The loss of a chunk that suits these tensors."""
        return self.impls[dispatch.choose(self, tuple(tensors)).backend]

    def loss(
        self, chunk: Callable[..., Tensor], tensors: Tensors, needs: Sequence[bool], *, reduction: str, **options: Any
    ) -> tuple[Tensor, Found, Tensor | None]:
        """The loss in float32 or wider and, unless the reduction is "none", an :class:`Ahead`."""
        hidden = tensors[0]
        u = self._token_weights(tensors, options["ignore_index"])
        found = self._walk(chunk, tensors, u if any(needs) and reduction != "none" else None, needs, **options)
        losses = found.losses * u
        if reduction == "none":
            return losses.view(hidden.shape[:-1]), found, None
        if reduction == "sum":
            return losses.sum(), found, None
        whole = self.divisor(*tensors, **options).to(u.dtype)
        return losses.sum() / whole, found, whole

    def gradients(
        self,
        chunk: Callable[..., Tensor],
        grad: Tensor,
        tensors: Tensors,
        needs: Sequence[bool],
        ahead: list[Ahead],
        *,
        reduction: str,
        **options: Any,
    ) -> Found:
        """The gradients of hidden, weight and bias, taken from ``ahead`` if they are there."""
        dtype = tensors[0].dtype
        wide = torch.promote_types(dtype, torch.float32)
        if reduction == "none":
            u = self._token_weights(tensors, options["ignore_index"])
            found = self._walk(chunk, tensors, grad.flatten() * u, needs, **options)
            return scaled(found, torch.ones((), dtype=wide), dtype)
        found, whole = ahead.pop() if ahead else self.loss(chunk, tensors, needs, reduction=reduction, **options)[1:]
        return scaled(found, _factor(grad, whole, wide), dtype)

    def _walk(
        self,
        chunk: Callable[..., Tensor],
        tensors: Tensors,
        scale: Tensor | None,
        needs: Sequence[bool],
        *,
        ignore_index: int,
        memory_budget: int | None,
        **options: Any,
    ) -> Found:
        (hidden, weight, bias), target = learned(tensors), tensors[2]
        losses_of = self.losses_of(chunk, *tensors, ignore_index=ignore_index, **options)
        counted = None if target is None else counted_rows(ignored_tokens(hidden, target, ignore_index))
        classes = self.classes(*tensors, ignore_index=ignore_index, **options)
        other_head = None if self.other_head is None else tensors[self.other_head]
        most = rows_within(memory_budget, weight, classes, other_head)
        rows = hidden.reshape(-1, hidden.shape[-1])
        found = in_chunks(losses_of, rows, weight, bias, counted, scale, needs, most)
        return found._replace(hidden=None if found.hidden is None else found.hidden.view(hidden.shape))

    def _token_weights(self, tensors: Tensors, ignore_index: int) -> Tensor:
        hidden, target = tensors[0], tensors[2]
        u = None if self.token_weight is None else tensors[self.token_weight]
        wide = torch.promote_types(hidden.dtype, torch.float32)
        return token_weights(ignored_tokens(hidden, target, ignore_index), u, wide)


def ignored_tokens(hidden: Tensor, target: Tensor | None, ignore_index: int) -> Tensor:
    """Which tokens are ignored, [N]; with no target, none."""
    if target is None:
        return torch.zeros(hidden.shape[:-1].numel(), dtype=torch.bool, device=hidden.device)
    return target.flatten() == ignore_index


def called(function: Callable[..., Any], tensors: Sequence[Any], options: Mapping[str, Any]) -> Any:
    """What ``compiled_call`` does, but plainly."""
    return function(*tensors, **options)


def _factor(grad: Tensor, divisor: Tensor | None, dtype: torch.dtype) -> Tensor:
    """What is left to multiply by. Nothing counted has no mean, and no gradient."""
    grad = grad.to(dtype)
    return grad if divisor is None else torch.where(divisor == 0, 0.0, grad / divisor)


def as_one_node(law: HeadLoss) -> Callable[..., Tensor]:
    """What a compiler traces: one node, which neither Inductor nor the partitioner sees into."""
    operands = f"Tensor hidden, Tensor weight, Tensor target, Tensor? bias, {law.tensors}"
    T = operands.count("Tensor")
    names = [option.split()[-1] for option in law.options.split(", ")]

    def register(name: str, takes: str, returns: int) -> Any:
        schema = f"({takes}, {law.options}) -> ({', '.join(['Tensor'] * returns)})"
        return torch.library.custom_op(f"{_NAMESPACE}::{name}", mutates_args=(), schema=schema)

    @register(law.name, f"{operands}, bool[] needs, str reduction", 5)
    def opaque(*arguments: Any) -> tuple[Tensor, ...]:
        """The loss, what its mean divides by, and the gradients of hidden, weight and bias; empty where not needed."""
        tensors, (needs, reduction, *values) = arguments[:T], arguments[T:]
        options = dict(zip(names, values, strict=True))
        loss, found, whole = law.loss(law.chosen(tensors), tensors, needs, reduction=reduction, **options)
        return loss, torch.ones_like(loss) if whole is None else whole, *_filled(found, tensors[0])

    @opaque.register_fake
    def _(*arguments: Any) -> tuple[Tensor, ...]:
        hidden, weight, _ = learned(arguments)
        needs, reduction = arguments[T : T + 2]
        dtype = torch.promote_types(hidden.dtype, torch.float32)
        loss = hidden.new_empty(hidden.shape[:-1] if reduction == "none" else (), dtype=dtype)
        ahead = [need and reduction != "none" for need in needs]
        return loss, torch.empty_like(loss), *_shapes_of_gradients(arguments, ahead, held_dtype(weight.dtype))

    @register(f"{law.name}_backward", f"Tensor grad, {operands}, bool[] needs", 3)
    def opaque_backward(grad: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
        """The gradients of hidden, weight and bias, for losses that were not reduced; empty where not needed."""
        tensors, (needs, *values) = arguments[:T], arguments[T:]
        options = dict(zip(names, values, strict=True))
        found = law.gradients(law.chosen(tensors), grad, tensors, needs, [], reduction="none", **options)
        return _filled(found, tensors[0])

    @opaque_backward.register_fake
    def _(grad: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
        return _shapes_of_gradients(arguments, arguments[T], arguments[1].dtype)

    def set_up(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.needs, ctx.reduction, *ctx.options = inputs[T:]
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*(inputs[:T] if ctx.reduction == "none" else output[1:]))

    def differentiate(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        h: Tensor | None
        h = w = b = None
        if grad is not None:
            if ctx.reduction == "none":
                found = opaque_backward(grad, *ctx.saved_tensors, ctx.needs, *ctx.options)
            else:
                whole, *found = ctx.saved_tensors
                factor = _factor(grad, whole, grad.dtype)
                found = [(g * factor).to(found[0].dtype) for g in found]
            h, w, b = (g if need else None for g, need in zip(found, ctx.needs, strict=True))
        return h, w, None, b, *[None] * (T - 4 + 2 + len(ctx.options))

    opaque.register_autograd(differentiate, setup_context=set_up)

    def traced(*tensors: Any, reduction: str, **options: Any) -> Tensor:
        tensors = law.cast(tensors)
        recorded = torch.is_grad_enabled()
        needs = [recorded and t is not None and t.requires_grad for t in learned(tensors)]
        with without_autocast(tensors[0].device.type):
            return opaque(*tensors, needs, reduction, *(options[name] for name in names))[0]

    return traced


def _filled(found: Found, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    h, w, b = (hidden.new_empty(0) if g is None else g for g in (found.hidden, found.weight, found.bias))
    return h, w, b


def _shapes_of_gradients(tensors: Tensors, needs: Sequence[bool], dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """As :func:`_filled`; those of weight and bias are of ``dtype``."""
    hidden, weight, bias = learned(tensors)
    wanted = ((hidden, hidden.dtype), (weight, dtype), (bias, dtype))
    h, w, b = (
        torch.empty(t.shape, dtype=dtype, device=t.device) if need and t is not None else hidden.new_empty(0)
        for (t, dtype), need in zip(wanted, needs, strict=True)
    )
    return h, w, b
