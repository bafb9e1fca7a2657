"""What reaches the joints of a model when it runs on an example."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .joint import Joint, as_original
from .rewritten import rewriting
from .rotary import Rotary
from .sites import Site


class Place(NamedTuple):
    """A joint that was found at a module."""

    module: nn.Module
    joint: Joint | Site


#: The tensors that reach a place first; None for a call with anything else.
Reached = dict[int, tuple[Tensor, ...] | None]


def reached(model: nn.Module, example: Any, places: Sequence[Place]) -> Reached:
    """What the joint of each place is given when the model runs once on the example, by the place's number.

    The hooks of the model run with it; its buffers and classes are then what they were.

    Args:
        model: runs without gradients, as it is set, in training or not.
        example: the model's argument, or a tuple or list of its arguments, or a mapping of them by name.
        places: where to look.

    Raises:
        ValueError: if the model does not run on the example.
    """
    found: Reached = {}
    sites: dict[int, list[int]] = {}
    with ExitStack() as stack:
        stack.enter_context(_unchanged(model))
        for number, (module, joint) in enumerate(places):
            if isinstance(joint, (Site, Rotary)):
                sites.setdefault(id(module), []).append(number)
            else:
                stack.enter_context(_hook(module, functools.partial(_note, found, number, joint)))
        for numbers in sites.values():
            module = places[numbers[0]].module
            joints = [places[number].joint for number in numbers]
            stack.enter_context(_watched(module, joints, _watch(found, dict(zip(joints, numbers, strict=True)))))
        _run(model, example)
    return found


def _run(model: nn.Module, example: Any) -> None:
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = {}
    if isinstance(example, Mapping):
        form, kwargs = "model(**example)", dict(example)
    elif isinstance(example, (tuple, list)):
        form, args = "model(*example)", tuple(example)
    else:
        form, args = "model(example)", (example,)
    try:
        with torch.no_grad():
            model(*args, **kwargs)
    except Exception as error:
        raise ValueError(
            "fuse: example must be what the model takes: a tensor, a tuple or list of its arguments, or a dict of them "
            f"by name; {form} raised {type(error).__name__}: {error}"
        ) from error


def _note(found: Reached, number: int, joint: Joint | Site, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    if number not in found:
        operands = None if kwargs else joint.operands(args)
        plain = operands is not None and all(isinstance(t, Tensor) for t in operands)
        found[number] = tuple(t.detach().clone() for t in operands) if operands is not None and plain else None


def _watch(found: Reached, numbers: Mapping[Joint | Site, int]) -> Callable[..., Any]:
    def watch(joint: Joint | Site, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def watched(*args: Any, **kwargs: Any) -> Any:
            _note(found, numbers[joint], joint, args, kwargs)
            return function(*args, **kwargs)

        return watched

    return watch


@contextmanager
def _hook(module: nn.Module, note: Callable[..., None]) -> Iterator[None]:
    handle = module.register_forward_pre_hook(lambda _, args, kwargs: note(args, kwargs), with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def _watched(module: nn.Module, joints: Sequence[Joint | Site], watch: Callable[..., Any]) -> Iterator[None]:
    """A class for the time being, whose places are watched."""
    with as_original(module) as original:
        members = rewriting(joints).members(original, watch)
        module.__class__ = type(original)(original.__name__, (original,), members)
        yield


@contextmanager
def _unchanged(model: nn.Module) -> Iterator[None]:
    """Buffers hold afterwards what they held before: a norm in training moves its statistics."""
    buffers = [(module, dict(module._buffers)) for module in model.modules()]
    tensors = [b for _, own in buffers for b in own.values() if b is not None and not b.is_inference()]
    values = [(b, b.clone()) for b in tensors]
    try:
        yield
    finally:
        for module, own in buffers:
            module._buffers.update(own)
        with torch.no_grad():
            for buffer, value in values:
                buffer.copy_(value)
