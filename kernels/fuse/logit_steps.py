"""The steps that logits may take on the way to a loss, and what is left of them when the logits are deferred.

All but the classes' dim of logits = hidden·Wᵀ + b are dims of hidden, too: to view, cut or exchange them is to do so
with hidden. A step is a function of (form, like, call, *arguments of the call): the form before it, a meta tensor like
the logits, and the call for any tensor in their place. It returns like and form after it, or None if it cannot.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Form(NamedTuple):
    """What a loss needs to know: the logits are scale·x or, with a cap, cap·tanh(scale·x), where x = hidden·Wᵀ + b."""

    hidden: Tensor  #: [*rest, D], where rest are the dims of the logits without the classes
    classes: int  #: the dim of the logits that the classes are
    scale: float = 1.0
    cap: float | None = None


Call = Callable[[Tensor], Tensor]
Followed = tuple[Tensor, Form] | None


def _cast(form: Form, like: Tensor, call: Call, *args: Any, **kwargs: Any) -> Followed:
    """To float32: ``linear_cross_entropy`` computes in it what it multiplied in half precision."""
    if any(type(argument) is not torch.dtype for argument in (*args, *kwargs.values())):
        return None
    after = call(like)
    widened = like.element_size() == 2 and after.dtype == torch.float32
    return (after, form) if widened or after.dtype == like.dtype else None


def _contiguous(form: Form, like: Tensor, call: Call, **kwargs: Any) -> Followed:
    """A copy or none: the same numbers."""
    return (call(like), form) if not kwargs else None


def _view(form: Form, like: Tensor, call: Call, *args: Any, **kwargs: Any) -> Followed:
    """The elements in their order: where the last dim stays what it is, the others of hidden are viewed likewise."""
    after = call(like)
    if form.classes != like.dim() - 1 or after.shape[-1:] != like.shape[-1:] or after.dtype != like.dtype:
        return None
    hidden = form.hidden.reshape(*after.shape[:-1], form.hidden.shape[-1])
    return after, form._replace(hidden=hidden, classes=after.dim() - 1)


def _permute(form: Form, like: Tensor, call: Call, *args: Any, **kwargs: Any) -> Followed:
    """Dims change places: which, a tensor tells whose sizes are all different."""
    order = [size - 1 for size in call(torch.empty(*range(1, like.dim() + 1), device="meta")).shape]
    rest = [dim - (dim > form.classes) for dim in order if dim != form.classes]
    return call(like), form._replace(hidden=form.hidden.permute(*rest, -1), classes=order.index(form.classes))


def _index(form: Form, like: Tensor, call: Call, index: Any) -> Followed:
    """Integers and slices, of any dims but the classes."""
    items = index if isinstance(index, tuple) else (index,)
    if not items or not all(map(_basic, items)) or form.classes != like.dim() - 1:
        return None
    indexed = sum(item is not None and item is not Ellipsis for item in items)
    reaches_classes = Ellipsis in items[:-1] or indexed == like.dim()
    if reaches_classes and items[-1] != slice(None):
        return None
    after = call(like)
    return after, form._replace(hidden=form.hidden[index], classes=after.dim() - 1)


def _basic(item: Any) -> bool:
    if isinstance(item, slice):
        return all(bound is None or type(bound) is int for bound in (item.start, item.stop, item.step))
    return item is None or item is Ellipsis or type(item) is int


def _times(form: Form, like: Tensor, call: Call, *args: Any, inverse: bool = False, **kwargs: Any) -> Followed:
    """A number, positive after a cap. The loss multiplies hidden by it: a rounding more, unless by a power of two."""
    number: Any = args[0] if len(args) == 1 and not kwargs else None
    if type(number) not in (int, float) or not math.isfinite(number) or number == 0:
        return None
    factor = 1 / number if inverse else number
    if form.cap is None:
        return call(like), form._replace(scale=form.scale * factor)
    return (call(like), form._replace(cap=form.cap * factor)) if factor > 0 else None


def _over(form: Form, like: Tensor, call: Call, *args: Any, **kwargs: Any) -> Followed:
    """Likewise."""
    return _times(form, like, call, *args, inverse=True, **kwargs)


def _tanh(form: Form, like: Tensor, call: Call, **kwargs: Any) -> Followed:
    """The soft cap x ↦ cap·tanh(x / cap), whose cap follows."""
    return (call(like), form._replace(cap=1.0)) if form.cap is None and not kwargs else None


def named(*names: str) -> list[Any]:
    """Methods and functions of torch with these names."""
    return [getattr(home, name) for name in names for home in (Tensor, torch) if hasattr(home, name)]


#: Torch's function → what it does.
STEPS: dict[Any, Callable[..., Followed]] = {
    **dict.fromkeys((Tensor.float, Tensor.half, Tensor.bfloat16, Tensor.double, Tensor.to), _cast),
    Tensor.contiguous: _contiguous,
    **dict.fromkeys(named("view", "reshape", "flatten", "unflatten", "squeeze", "unsqueeze"), _view),
    **dict.fromkeys(named("transpose", "swapaxes", "swapdims", "permute", "movedim", "moveaxis"), _permute),
    Tensor.mT.__get__: _permute,  # type: ignore[attr-defined]
    Tensor.__getitem__: _index,
    **dict.fromkeys(named("mul", "multiply", "__mul__", "__rmul__"), _times),
    **dict.fromkeys(named("div", "divide", "true_divide", "__truediv__"), _over),
    **dict.fromkeys(named("tanh"), _tanh),
}
