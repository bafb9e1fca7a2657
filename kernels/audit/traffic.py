"""Counting the bytes that kernel launches really move, in Triton's interpreter.

The interpreter executes a kernel program by program, and every access of global memory goes through a masked load, a
masked store or an atomic, as arrays of pointers. The masked-in elements of those are what a GPU asks its memory system
for. Caches are not modelled: a weight that each of 500 programs reads counts 500 times. Plain PyTorch operations around
the launches (a ``.contiguous()``, a sum of partial results) move memory too and are counted beside the kernels.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Meter:
    """Bytes read and written, by the name of the kernel or of the PyTorch operation."""

    def __init__(self) -> None:
        self.read: Counter[str] = Counter()
        self.written: Counter[str] = Counter()
        #: The kernel that is running; None outside a launch.
        self.kernel: str | None = None

    @property
    def moved(self) -> Counter[str]:
        """Bytes read plus bytes written."""
        return self.read + self.written

    @property
    def total(self) -> int:
        """All bytes moved."""
        return self.moved.total()


@contextmanager
def metered() -> Iterator[Meter]:
    """Count what moves inside the block.

    Raises:
        RuntimeError: if Triton was imported without TRITON_INTERPRET=1.
    """
    from triton import knobs
    from triton.runtime import interpreter

    if not knobs.runtime.interpret:
        raise RuntimeError(
            "traffic is counted in Triton's interpreter; set TRITON_INTERPRET=1 before triton is imported"
        )
    meter = Meter()
    builder, executor = interpreter.InterpreterBuilder, interpreter.GridExecutor
    with ExitStack() as stack:
        enter = stack.enter_context

        def count(method: str, *kinds: Counter[str], mask: int) -> None:
            plain = getattr(builder, method)

            def counted(self: Any, *args: Any) -> Any:
                assert meter.kernel is not None
                moved = int(args[mask].data.sum()) * _itemsize(args[0])
                for kind in kinds:
                    kind[meter.kernel] += moved
                return plain(self, *args)

            enter(mock.patch.object(builder, method, counted))

        # create_load and create_store, which have no mask, call these.
        count("create_masked_load", meter.read, mask=1)
        count("create_masked_store", meter.written, mask=2)
        atomic = builder.create_atomic_rmw

        def counted_atomic(self: Any, operation: Any, pointer: Any, value: Any, mask: Any, *rest: Any) -> Any:
            assert meter.kernel is not None
            moved = int(mask.data.sum()) * _itemsize(pointer)
            meter.read[meter.kernel] += moved
            meter.written[meter.kernel] += moved
            return atomic(self, operation, pointer, value, mask, *rest)

        enter(mock.patch.object(builder, "create_atomic_rmw", counted_atomic))
        launch = executor.__call__

        def named_launch(self: Any, *args: Any, **kwargs: Any) -> None:
            meter.kernel = self.fn.__name__
            try:
                launch(self, *args, **kwargs)
            finally:
                meter.kernel = None

        enter(mock.patch.object(executor, "__call__", named_launch))
        enter(_PlainOperations(meter))
        yield meter


def _itemsize(pointers: Any) -> int:
    return (pointers.get_element_ty().primitive_bitwidth + 7) // 8


class _PlainOperations(TorchDispatchMode):
    def __init__(self, meter: Meter) -> None:
        super().__init__()
        self.meter = meter

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        # Inside a launch it is the interpreter that copies its arguments about.
        if self.meter.kernel is None and not _only_allocates_or_views(func):
            name = func.overloadpacket.__name__
            self.meter.read[name] += _bytes((args, kwargs))
            self.meter.written[name] += _bytes(result)
        return result


def _only_allocates_or_views(func: Any) -> bool:
    if func.overloadpacket.__name__ in ("empty", "empty_like", "empty_strided", "new_empty", "detach", "_unsafe_view"):
        return True
    aliases = [result.alias_info for result in func._schema.returns]
    return bool(aliases) and all(alias is not None and not alias.is_write for alias in aliases)


def _bytes(tree: Any) -> int:
    return sum(leaf.numel() * leaf.element_size() for leaf in tree_leaves(tree) if isinstance(leaf, Tensor))
