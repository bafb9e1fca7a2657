"""The tensors of a batch, whatever the batch is."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Mapping, MutableMapping
from typing import Any

from torch import Tensor

#: What is done to a leaf: a tensor, or an object that knows how to move itself (``.to``).
OnLeaf = Callable[[Any], Any]


def map_leaves(batch: Any, on_leaf: OnLeaf) -> Any:
    """The same batch with ``on_leaf`` applied to its tensors and to objects of other kinds that have ``.to``.

    Goes into mappings, named and plain tuples, lists and dataclasses, and keeps their types; numbers, strings and
    anything else stay as they are. Of a dataclass only the fields are carried over, not what it has cached.
    """

    # No closure that calls itself: that would be a cycle, which keeps the tensors until the garbage collector runs.
    if isinstance(batch, Tensor):
        return on_leaf(batch)
    if isinstance(batch, Mapping):
        return _mapping(batch, {key: map_leaves(item, on_leaf) for key, item in batch.items()})
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*(map_leaves(item, on_leaf) for item in batch))
    if isinstance(batch, tuple | list):
        return type(batch)([map_leaves(item, on_leaf) for item in batch])
    if dataclasses.is_dataclass(batch) and not isinstance(batch, type):
        return _dataclass(batch, on_leaf)
    return on_leaf(batch) if hasattr(batch, "to") else batch


def tensors(batch: Any) -> list[Tensor]:
    """The tensors of a batch, in order."""
    found: list[Tensor] = []

    def note(leaf: Any) -> Any:
        if isinstance(leaf, Tensor):
            found.append(leaf)
        return leaf

    map_leaves(batch, note)
    return found


def _mapping(value: Mapping[Any, Any], items: dict[Any, Any]) -> Any:
    if isinstance(value, MutableMapping):  # a copy keeps what the type has besides its items
        clone = copy.copy(value)
        clone.update(items)
        return clone
    return type(value)(items)  # type: ignore[call-arg]


def _dataclass(value: Any, on_leaf: OnLeaf) -> Any:
    moved = object.__new__(type(value))  # no __init__: its checks have passed, and may look at the numbers
    for field in dataclasses.fields(value):
        if hasattr(value, field.name):
            object.__setattr__(moved, field.name, map_leaves(getattr(value, field.name), on_leaf))
    return moved
