"""One autograd.Function for every fused kernel.

A fused operator brings three functions:

- ``forward(*tensors, **options) -> (outputs, saved)`` launches the forward kernel;
- ``backward(grads, saved, needs, **options) -> gradients`` launches the backward kernel: one gradient, or None, for
  each tensor; ``needs`` says which are wanted;
- ``second(grads, saved, needs, **options) -> gradients`` is the same in plain PyTorch. It runs instead of ``backward``
  under ``create_graph=True``, so that every operator can be differentiated to any order.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import is_legacy_batchedtensor

Gradients = Sequence["Tensor | None"]


def fused(
    forward: Callable[..., tuple[Any, Sequence[Tensor | None]]],
    backward: Callable[..., Gradients],
    second: Callable[..., Gradients],
    tensors: Sequence[Tensor | None],
    options: dict[str, Any],
    *,
    statistics: int = 0,
) -> Any:
    """Run ``forward`` on ``tensors``, recorded for autograd only if one of them needs it (the record costs 1-2 us).

    A ``forward`` that returns one of its tensors has changed that one in place. No gradient flows to the last outputs,
    as many as there are ``statistics``; ``grads`` has none for them.
    """
    if torch.is_grad_enabled():
        for t in tensors:
            if t is not None and t.requires_grad:
                return _Fused.apply(forward, backward, second, options, statistics, *tensors)
    outputs = forward(*tensors, **options)[0]
    if any(outputs is t for t in tensors):
        torch.autograd.graph.increment_version(outputs)
    return outputs


class _Fused(torch.autograd.Function):
    @staticmethod
    def forward(ctx, forward, backward, second, options, statistics, *tensors):
        outputs, saved = forward(*tensors, **options)
        for t in tensors:
            if t is outputs:
                ctx.mark_dirty(t)
        ctx.statistics = statistics
        if statistics:
            ctx.mark_non_differentiable(*outputs[-statistics:])
            ctx.set_materialize_grads(False)  # or each of them would get a gradient of zeros
        ctx.save_for_backward(*saved)
        ctx.backward, ctx.second, ctx.options = backward, second, options
        return outputs

    @staticmethod
    def backward(ctx, *grads):
        needs = ctx.needs_input_grad[5:]
        # Lazily negated cotangents and batched ones (is_grads_batched) are more than the memory that a kernel reads.
        plain, batched = [], False
        for g in grads[: len(grads) - ctx.statistics]:
            plain.append(g.resolve_neg())
            batched = batched or is_legacy_batchedtensor(g)
        arguments = plain, ctx.saved_tensors, needs
        if batched:
            with torch.enable_grad():
                gradients = ctx.second(*arguments, **ctx.options)
        elif torch.is_grad_enabled():
            gradients = ctx.second(*arguments, **ctx.options)
        else:
            gradients = ctx.backward(*arguments, **ctx.options)
        wanted = [None] * 5
        for g, need in zip(gradients, needs, strict=True):
            wanted.append(g if need else None)
        return tuple(wanted)


@functools.cache
def vjp(reference: Callable[..., Any]) -> Callable[..., Gradients]:
    """The ``second`` of an operator that saves its own inputs first: autograd through ``reference``."""

    def second(
        grads: Sequence[Tensor], saved: Sequence[Tensor | None], needs: Sequence[bool], **options: Any
    ) -> Gradients:
        # Aliases cut the graph off: without them the gradient would flow on into the history of the inputs, where one
        # input may have been computed from another.
        inputs: list[Any] = [t if t is None else t.view_as(t) for t in saved[: len(needs)]]
        outputs = reference(*inputs, **options)
        wanted = [t for t, need in zip(inputs, needs, strict=True) if need]
        found = iter(torch.autograd.grad(outputs, wanted, grads, create_graph=True, allow_unused=True))
        return [next(found) if need else None for need in needs]

    return second
