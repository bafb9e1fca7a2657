"""What a run of a model does to memory: every dispatched operator, its tensors' strides, and the line that asked.

The line of a backward operator is that of the forward operator whose autograd node it belongs to. A node takes the next
sequence number of its thread when it is made, just before its operator is dispatched: so the number last given out,
read while an operator is dispatched, is that of its own node. The engine tells which node it is running.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from .convolutions import contiguous_backward, would_crash

Layout = Literal["channels_last", "contiguous", "either", "other"]

#: Frames of these folders are not what a user wrote.
LIBRARY = tuple(f"{Path(file).parent}{os.sep}" for file in (torch.__file__, __file__))

#: AccumulateGrad nodes all have this sequence number.
LAST_SEQUENCE_NUMBER = 2**64 - 1


@dataclass(frozen=True)
class Ref:
    """A tensor without its memory: which storage it looks into, and how."""

    storage: int
    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int
    dtype: torch.dtype

    @property
    def bytes(self) -> int:
        """Of the elements that it shows."""
        return torch.Size(self.size).numel() * self.dtype.itemsize

    @property
    def gaps(self) -> bool:
        """Whether memory between its elements belongs to others, as in a slice."""
        span = 1 + sum((size - 1) * stride for size, stride in zip(self.size, self.stride, strict=True))
        return span > torch.Size(self.size).numel()

    @property
    def order(self) -> tuple[int, ...] | None:
        """The dims longer than one, from the slowest in memory to the fastest; None where two overlap or tie."""
        dims = [d for d, size in enumerate(self.size) if size > 1]
        strides = [self.stride[d] for d in dims]
        if 0 in strides or len(set(strides)) < len(strides):
            return None
        return tuple(sorted(dims, key=lambda d: -self.stride[d]))

    @property
    def layout(self) -> Layout:
        """Of 4-D tensors [N, C, H, W]; a slice of a channels_last tensor counts as channels_last.

        ``"either"`` where sizes of one leave no difference (N1HW, NC11) or where the tensor is expanded.
        """
        if len(self.size) != 4:
            return "other"
        order = self.order
        if order is None or 1 not in order or not {2, 3} & set(order):
            return "either"
        orders: dict[tuple[int, ...], Layout] = {
            tuple(d for d in (0, 2, 3, 1) if d in order): "channels_last",
            tuple(d for d in (0, 1, 2, 3) if d in order): "contiguous",
        }
        return orders.get(order, "other")


@dataclass(frozen=True)
class Place:
    """Who asked for an operator: the module, the line of the model's source, and the pass."""

    module: str
    line: str
    backward: bool = False


@dataclass(frozen=True)
class Call:
    """One operator: its arguments and outputs, tensors replaced by :class:`Ref`."""

    op: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    outputs: Any
    place: Place
    crashes: bool = False

    @property
    def name(self) -> str:
        """As ``aten.convolution``."""
        return str(self.op.overloadpacket)

    def inputs(self) -> list[Ref]:
        """The tensors that it was called with."""
        return refs((self.args, self.kwargs))


def refs(tree: Any) -> list[Ref]:
    """The tensors in nested arguments or outputs."""
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Ref)]


class Storages:
    """Numbers for storages. Weak references keep a number from being given twice, and no memory alive."""

    def __init__(self) -> None:
        self._known: dict[int, tuple[StorageWeakRef, int]] = {}

    def ref(self, tensor: Tensor) -> Any:
        """``tensor`` as a :class:`Ref`; None where it has no strides (sparse, nested, opaque)."""
        if tensor.layout != torch.strided or tensor.is_nested:
            return None
        weak = StorageWeakRef(tensor.untyped_storage())
        _, number = self._known.setdefault(weak.cdata, (weak, len(self._known)))
        return Ref(number, tuple(tensor.shape), tuple(tensor.stride()), int(tensor.storage_offset()), tensor.dtype)

    def tree(self, values: Any) -> Any:
        """Nested arguments or outputs, with tensors as :class:`Ref`."""
        return tree_map(lambda leaf: self.ref(leaf) if isinstance(leaf, Tensor) else leaf, values)


class Trace(TorchDispatchMode):
    """Records the operators of ``model`` on ``calls`` while it is the innermost dispatch mode."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.calls: list[Call] = []
        self.storages = Storages()
        self._modules: list[str] = []
        self._nodes: dict[int, Place] = {}
        self._parameters = {p: name for name, p in model.named_parameters(remove_duplicate=True)}

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operator and record it. What would crash the process runs on contiguous copies, marked."""
        kwargs = kwargs or {}
        place = self._place()
        crashes = would_crash(op, args)
        seen_args, seen_kwargs = self.storages.tree((args, kwargs))
        outputs = contiguous_backward(op, args, kwargs) if crashes else op(*args, **kwargs)
        self.calls.append(Call(op, seen_args, seen_kwargs, self.storages.tree(outputs), place, crashes))
        return outputs

    def _place(self) -> Place:
        node = torch._C._current_autograd_node()
        if node is None:
            line = source_line()
            place = Place(self._modules[-1] if self._modules else "", line, backward=not line)
            # An operator that makes no node comes after one that did, and must not take its number.
            self._nodes.setdefault(torch.autograd._get_sequence_nr() - 1, place)
            return place
        number = node._sequence_nr()
        if number == LAST_SEQUENCE_NUMBER:
            parameter = node.variable  # type: ignore[attr-defined]
            return Place(self._parameters.get(parameter, ""), "gradient accumulation", True)
        found = self._nodes.get(number)
        return Place(found.module, found.line, True) if found else Place("", str(node.name()), True)

    @contextmanager
    def modules(self, model: nn.Module) -> Iterator[None]:
        """Follow which module of ``model`` is running."""
        handles = []
        for name, module in model.named_modules():
            handles.append(module.register_forward_pre_hook(lambda m, x, name=name: self._modules.append(name)))
            handles.append(module.register_forward_hook(self._left, always_call=True))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _left(self, module: nn.Module, args: Any, output: Any) -> None:
        self._modules.pop()


def source_line() -> str:
    """``file:line`` of the innermost frame outside of torch and of this package; empty where there is none."""
    frame = sys._getframe(1)
    while frame is not None:
        name = frame.f_code.co_filename
        if not name.startswith((*LIBRARY, "<")):
            return f"{name}:{frame.f_lineno}"
        frame = frame.f_back  # type: ignore[assignment]
    return ""
