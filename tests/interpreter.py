"""Where Triton's interpreter is laxer than a GPU: it cuts off what a GPU rounds, and lets a kernel touch any memory.

And where it is less accurate: it adds a column up one by one.

And where it is slower than it need be: it looks the whole language up again at each call of a device function, and
computes every integer twice for an assertion that only debugging evaluates.
"""

from __future__ import annotations

import dataclasses
import types
from collections.abc import Iterator
from typing import Any

import numpy
import torch
from triton import language as tl
from triton.runtime import interpreter

Builder = interpreter.InterpreterBuilder


def as_on_a_gpu() -> None:
    """Round a float32 to the nearest bfloat16, and refuse an access outside the tensors that a kernel was given."""
    _round_to_bfloat16()
    _guard_memory()
    _add_in_a_tree()
    _replace_the_language_once()
    builder = interpreter.interpreter_builder
    builder.options = dataclasses.replace(builder.options, sanitize_overflow=False)


def _round_to_bfloat16() -> None:
    cast = Builder.cast_impl

    def rounded(self: Any, source: Any, target: Any) -> Any:
        if source.dtype.scalar != tl.float32 or target.scalar != tl.bfloat16:
            return cast(self, source, target)
        bits = torch.from_numpy(source.data.copy()).bfloat16().view(torch.uint16).numpy()
        return interpreter.TensorHandle(bits, target.scalar)

    Builder.cast_impl = rounded


def _guard_memory() -> None:
    spans: list[tuple[int, int]] = []  # of the kernel that is running
    launch = interpreter.GridExecutor.__call__

    def guarded_launch(self: Any, *args: Any, **kwargs: Any) -> Any:
        spans[:] = [_span(t) for t in _tensors((*args, *kwargs.values())) if t.numel()]
        try:
            return launch(self, *args, **kwargs)
        finally:
            spans.clear()

    def guard(method: str, pointer: int, mask: int) -> None:
        plain = getattr(Builder, method)

        def guarded(self: Any, *args: Any) -> Any:
            touched = args[pointer].data[numpy.broadcast_to(args[mask].data, args[pointer].data.shape)]
            if touched.size:
                size = args[pointer].get_element_ty().primitive_bitwidth // 8
                first, behind = int(touched.min()), int(touched.max()) + size
                if not any(start <= first and behind <= stop for start, stop in spans):
                    raise IndexError(f"{method}: a kernel touches [{first}, {behind}), outside its tensors {spans}")
            return plain(self, *args)

        setattr(Builder, method, guarded)

    interpreter.GridExecutor.__call__ = guarded_launch
    guard("create_masked_load", pointer=0, mask=1)
    guard("create_masked_store", pointer=0, mask=2)
    guard("create_atomic_rmw", pointer=1, mask=3)


def _add_in_a_tree() -> None:
    def total(self: Any, operand: Any) -> Any:
        values = operand.handle.data
        axes = range(values.ndim) if self.axis is None else [self.axis]
        for axis in axes:
            while values.shape[axis] > 1:  # always a power of two
                low, high = numpy.split(values, 2, axis)
                values = low + high
        if not self.keep_dims:
            values = values.squeeze(tuple(axes))
        return self.to_tensor(values, operand.dtype)

    interpreter.ReduceOps.sum = total


def _replace_the_language_once() -> None:
    """What the interpreter puts in place of the language's functions is found once, and set as a whole from then on."""
    find = interpreter._patch_lang
    # Kernels see the one, the language's own device functions the other.
    everything = types.SimpleNamespace(__globals__={"tl": tl, "core": tl.core})
    found: list[tuple[Any, str, Any, Any]] = []  # the owner of a name, the name, what it was, what it is meanwhile

    def replace(kernel: Any) -> interpreter._LangPatchScope:
        scope = interpreter._LangPatchScope()
        if not found:
            scope = find(everything)
            found.extend((owner, name, was, getattr(owner, name)) for owner, name, was in scope._changes)
        elif getattr(found[0][0], found[0][1]) is not found[0][3]:  # else within a kernel, where all is in place
            for owner, name, was, new in found:
                scope._changes.append((owner, name, was))
                setattr(owner, name, new)
        return scope

    interpreter._patch_lang = replace


def _tensors(values: Any) -> Iterator[torch.Tensor]:
    for value in values:
        if isinstance(value, torch.Tensor):
            yield value
            yield from getattr(value, "operands", ())  # of a table of addresses
        elif isinstance(value, tuple):
            yield from _tensors(value)


def _span(t: torch.Tensor) -> tuple[int, int]:
    """The addresses from a tensor's first element to behind its last."""
    last = sum((size - 1) * stride for size, stride in zip(t.shape, t.stride(), strict=True))
    return t.data_ptr(), t.data_ptr() + (last + 1) * t.element_size()
