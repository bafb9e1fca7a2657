"""The tensors of a batch, whatever the batch is."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from typing import Any

from torch import Tensor

#: What is done to a leaf: a tensor, or an object that knows how to move itself (``.to``).
OnLeaf = Callable[[Any], Any]


def map_leaves(batch: Any, on_leaf: OnLeaf) -> Any:
    """The same batch with ``on_leaf`` applied to its tensors and to objects of other kinds that have ``.to``.

    Goes into mappings, named and plain tuples, lists and dataclasses, and keeps their types; numbers, strings and
    anything else stay as they are. Of a dataclass only the fields are carried over, not what it has cached.
    """

    def walk(value: Any) -> Any:
        if isinstance(value, Tensor):
            return on_leaf(value)
        if isinstance(value, Mapping):
            return _mapping(value, {key: walk(item) for key, item in value.items()})
        if isinstance(value, tuple) and hasattr(value, "_fields"):
            return type(value)(*(walk(item) for item in value))
        if isinstance(value, tuple | list):
            return type(value)([walk(item) for item in value])
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            return _dataclass(value, walk)
        return on_leaf(value) if hasattr(value, "to") else value

    return walk(batch)


def tensors(batch: Any) -> Iterator[Tensor]:
    """The tensors of a batch, in order."""
    found: list[Tensor] = []

    def note(leaf: Any) -> Any:
        if isinstance(leaf, Tensor):
            found.append(leaf)
        return leaf

    map_leaves(batch, note)
    yield from found


def _mapping(value: Mapping[Any, Any], items: dict[Any, Any]) -> Any:
    if isinstance(value, MutableMapping):  # a copy keeps what the type has besides its items
        clone = copy.copy(value)
        clone.update(items)
        return clone
    return type(value)(items)  # type: ignore[call-arg]


def _dataclass(value: Any, walk: OnLeaf) -> Any:
    moved = object.__new__(type(value))  # no __init__: its checks have passed, and may look at the numbers
    for field in dataclasses.fields(value):
        if hasattr(value, field.name):
            object.__setattr__(moved, field.name, walk(getattr(value, field.name)))
    return moved
