"""Logits that are computed only if somebody looks at them.

A language model's head returns :class:`DeferredLogits`, which hold its operands. The steps on the way to a loss (casts,
views, shifts, a scale, a soft cap) are noted, and cross-entropy of what they give runs ``linear_cross_entropy``: no
logits in memory. Anything else computes the ordinary tensor, by the very calls that were noted, and goes on with it.
"""

from __future__ import annotations

import functools
import sys
import weakref
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import tree_map_only
from torch.utils.hooks import RemovableHandle

from ..ops.autocast import autocast_operands, autocasting, without_autocast
from ..ops.cross_entropy import cross_entropy
from ..ops.linear_cross_entropy import linear_cross_entropy
from .logit_steps import STEPS, Call, Form, named

Hook = Callable[[Tensor], "Tensor | None"]


def defer(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``F.linear(hidden, weight, bias)``, not computed yet. Gradients must be enabled, and wanted of some operand."""
    global _handle
    if _handle is _call and "torch._dynamo" in sys.modules:
        # Code that was compiled leaves these tensors to Python; Dynamo would go on to trace what that does.
        _handle = torch.compiler.disable(_call)
    operands = autocast_operands(hidden, weight, bias)
    shape = (*hidden.shape[:-1], len(weight))
    like = torch.empty(shape, dtype=operands[0].dtype, device="meta")
    head = Head(operands)
    return _tensor(Logits(head, like, Form(head.operands[0], len(shape) - 1)))


class Head:
    """The operands of the linear layer when it ran, and all that was derived from its logits and is still there."""

    def __init__(self, operands: Sequence[Tensor | None]) -> None:
        # Aliases: from them a gradient does not flow on into the history of hidden, where a tied weight is, too.
        self.operands: list[Any] = [t if t is None else t.view_as(t) for t in operands]
        self.versions = [None if t is None else t._version for t in self.operands]
        self.family: weakref.WeakSet[Logits] = weakref.WeakSet()

    def checked(self) -> list[Any]:
        """The operands, if they are still what they were.

        Raises:
            RuntimeError: if one was written to, or its memory was freed.
        """
        for name, tensor, version in zip(("input", "weight", "bias"), self.operands, self.versions, strict=True):
            if tensor is not None and tensor._version != version:
                raise RuntimeError(
                    f"deferred logits: the head's {name} must be what it was when the head ran, but was changed in "
                    "place since, by an optimizer's step perhaps; use the logits before that, or leave the head as it "
                    'is: fuse(model, skip=["linear_cross_entropy"])'
                )
            if tensor is not None and tensor.numel() and not tensor.is_meta and not tensor.untyped_storage().nbytes():
                raise RuntimeError(
                    f"deferred logits: the head's {name} must be in memory, but was freed since the head ran (FSDP "
                    "does that after the backward pass, or after the forward); use the logits before that, or leave "
                    'the head as it is: fuse(model, skip=["linear_cross_entropy"])'
                )
        return self.operands


class Logits:
    """What one :class:`DeferredLogits` stands for: a form for the loss, and a step from other logits for the rest.

    ``like`` is a meta tensor of the same shape, strides and dtype.
    """

    def __init__(
        self, head: Head, like: Tensor, form: Form, before: Logits | None = None, step: Call | None = None
    ) -> None:
        self.head, self.like, self.form = head, like, form
        self.before, self.step = before, step
        self.value: Tensor | None = None
        self.hooks: OrderedDict[int, Hook] = OrderedDict()
        head.family.add(self)

    def computed(self) -> Tensor:
        """The ordinary tensor, with its history.

        The whole family is computed at once, so that whoever then writes to a tensor reaches the views of it, and not
        the copies, as ever.
        """
        if self.value is None:
            device = self.form.hidden.device.type
            with torch.inference_mode(False), torch.enable_grad(), without_autocast(device):
                for logits in tuple(self.head.family):
                    logits._compute()
        assert self.value is not None
        return self.value

    def _compute(self) -> Tensor:
        if self.value is None:
            if self.before is None or self.step is None:
                self.value = F.linear(*self.head.checked())
            else:
                self.value = self.step(self.before._compute())
                self.before = self.step = None
            if self.hooks:
                self.value.register_hook(functools.partial(_run_hooks, self.hooks))
        return self.value

    def hook(self, hook: Hook) -> RemovableHandle:
        """Run ``hook`` on the gradient of the logits: FSDP sets one on all that a model returns, after the loss."""
        handle = RemovableHandle(self.hooks)
        self.hooks[handle.id] = hook
        return handle

    def gradients(self, grad: Tensor, needs: Sequence[bool]) -> list[Tensor | None]:
        """Of the operands, for a function that autograd recorded and that no ``__torch_function__`` saw."""
        wanted = [t for t, need in zip(self.head.operands, needs, strict=True) if need]
        with torch.inference_mode(False):
            found = iter(
                torch.autograd.grad(
                    self.computed(), wanted, grad, retain_graph=True, create_graph=torch.is_grad_enabled()
                )
            )
        return [next(found) if need else None for need in needs]


class DeferredLogits(Tensor):
    """Looks like the logits; computes them when something other than a step towards a loss is done with it.

    A loss that is compiled by itself breaks the graph there, and runs eagerly; with ``fullgraph=True`` it refuses.
    """

    _logits: Logits

    @staticmethod
    def __new__(cls: type[DeferredLogits], logits: Logits) -> DeferredLogits:
        """A tensor with no memory."""
        like = logits.like
        tensor: DeferredLogits = Tensor._make_wrapper_subclass(
            cls,
            like.shape,
            strides=like.stride(),
            storage_offset=like.storage_offset(),
            dtype=like.dtype,
            device=logits.form.hidden.device,
        )
        tensor._logits = logits
        return tensor

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Note a step, run a loss, or compute the logits and call ``func`` with them."""
        return _handle(func, args, kwargs or {})

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        """What did not come by ``__torch_function__`` (an ``autograd.Function``, say) has been recorded already."""
        args, kwargs = tree_map_only(cls, lambda t: t._logits.computed().detach(), (args, kwargs or {}))
        return func(*args, **kwargs)


class _Defer(torch.autograd.Function):
    """Makes deferred logits a function of their operands, so that autograd never loses them."""

    @staticmethod
    def forward(ctx: Any, logits: Logits, *operands: Tensor | None) -> DeferredLogits:
        ctx.set_materialize_grads(False)
        ctx.logits = logits
        return DeferredLogits(logits)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> Any:
        needs = ctx.needs_input_grad[1:]
        return None, *([None] * len(needs) if grad is None else ctx.logits.gradients(grad, needs))


def _call(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    first = args[0]._logits if args and isinstance(args[0], DeferredLogits) else None
    if first is not None and first.value is None:
        if func is Tensor.register_hook:
            return first.hook(*args[1:], **kwargs)
        if func in _METADATA:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        found = _loss(first, *args[1:], **kwargs) if func in _LOSSES else _step(args[0], func, args[1:], kwargs)
        if found is not None:
            return found
    args, kwargs = tree_map_only(DeferredLogits, lambda t: t._logits.computed(), (args, kwargs))
    return func(*args, **kwargs)


_handle = _call


def _run_hooks(hooks: OrderedDict[int, Hook], grad: Tensor) -> Tensor:
    for hook in tuple(hooks.values()):
        found = hook(grad)
        grad = grad if found is None else found
    return grad


def _tensor(logits: Logits) -> Tensor:
    tensor: Tensor = _Defer.apply(logits, *logits.head.operands)
    return tensor


def _step(tensor: DeferredLogits, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    """What ``func`` returns, if that can be deferred; None if not."""
    logits, follow = tensor._logits, STEPS.get(func)
    # Inside an autograd.Function, for one, gradients are off, and what is derived there has no history.
    if follow is None or not torch.is_grad_enabled():
        return None
    followed = follow(logits.form, logits.like, lambda like: func(like, *args, **kwargs), *args, **kwargs)
    if followed is None:
        return None
    like, form = followed
    if like is logits.like:
        return tensor
    return _tensor(Logits(logits.head, like, form, logits, lambda value: func(value, *args, **kwargs)))


# ---- The loss.

_LOSSES = frozenset({F.cross_entropy, cross_entropy})


def _loss(
    logits: Logits,
    target: Any,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    softcap: float | None = None,
    z_loss: float = 0.0,
) -> Tensor | None:
    """The cross-entropy, by torch's signature or by braze's; None if it needs the logits."""
    form, like = logits.form, logits.like
    hidden, head_weight, bias = logits.head.operands
    factor = form.scale if form.cap is None else form.scale * form.cap
    if (
        type(target) is not Tensor
        or target.dtype != torch.int64
        or target.shape != form.hidden.shape[:-1]
        or form.classes != min(like.dim() - 1, 1)
        or (weight is not None and weight.requires_grad)
        or not (size_average is None and reduce is None)
        or (softcap is not None and form.cap is not None)
        or (factor != 1.0 and hidden.dtype == torch.float16)  # a scaled input might overflow
        or any(one.hooks for one in logits.head.family)  # without logits they have no gradient
    ):
        return None
    logits.head.checked()
    hidden = form.hidden
    if factor != 1.0:
        hidden, bias = hidden * factor, None if bias is None else bias * factor
    dtype = torch.promote_types(like.dtype, torch.float32) if autocasting(hidden.device.type) else like.dtype
    # The head ran in the dtype of its operands, whatever holds where the loss is.
    with without_autocast(hidden.device.type):
        return linear_cross_entropy(
            hidden,
            head_weight,
            target,
            bias,
            class_weight=weight,
            ignore_index=ignore_index,
            reduction=reduction,
            label_smoothing=label_smoothing,
            softcap=form.cap if softcap is None else softcap,
            z_loss=z_loss,
            dtype=dtype,
        )


# ---- What the tensor itself answers.

_PROPERTIES = (
    "shape", "dtype", "device", "layout", "ndim", "requires_grad", "is_leaf", "grad_fn", "itemsize", "nbytes",
    "is_cpu", "is_cuda", "is_xpu", "is_mps", "is_meta", "is_sparse", "is_quantized", "is_nested", "_base",
)  # fmt: skip
_METHODS = (
    "size", "dim", "ndimension", "numel", "nelement", "stride", "storage_offset", "is_contiguous", "element_size",
    "get_device", "__len__", "is_floating_point", "is_complex", "is_signed",
)  # fmt: skip
_METADATA = frozenset([getattr(Tensor, name).__get__ for name in _PROPERTIES] + named(*_METHODS))
