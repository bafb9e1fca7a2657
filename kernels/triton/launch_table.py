"""Launch parameters that were measured, in the place of those that were reasoned.

A launch works out its block sizes, its warps and its programs a multiprocessor, then asks :func:`measured`, which
answers with the same, unless the table of its GPU knows better: ``launches/<device>.json``, which
``python -m braze.benchmarks tune`` writes. What was reasoned is a function of the shape, so that it stands for a class
of shapes, and is the key of the table, with the kernel, the dtypes of its operands and its constants beside it.
"""

from __future__ import annotations

import contextlib
import functools
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

#: Where the tables lie, one for each device that any was written for.
FOLDER = Path(__file__).with_name("launches")


class Ask(NamedTuple):
    """What a launch asks.

    Attributes:
        kernel: its module and name.
        operands: the dtype of each tensor, None for one that is not there, float for a number that may be missing.
        free: what may be any power of two: the result does not depend on it, for any shape of the class.
        fixed: the kernel's other constants, and blocks that have to cover what they cover.
    """

    kernel: str
    operands: tuple[Any, ...]
    free: tuple[tuple[str, int], ...]
    fixed: tuple[tuple[str, Any], ...]


#: What to launch with; None: what was reasoned.
Answer = Callable[[Ask], "Mapping[str, int] | None"]
_answer: Answer | None = None


def measured(kernel: Any, operands: Sequence[Any], free: dict[str, int], **fixed: Any) -> dict[str, Any]:
    """``free`` and ``fixed``, to launch with: as they are, or with ``free`` as measured on the first operand's device.

    ``programs`` among them, those of a multiprocessor, is for the caller to take out.
    """
    chosen: Mapping[str, int] | None = None
    if _answer is not None:
        chosen = _answer(_ask(kernel, operands, free, fixed))
    else:
        # Of the host: 0.5 µs where there is no table, 0.6 where it lacks this kernel, 2.2 where it does not.
        table = _table(operands[0].device)
        entries = table.get(_name(kernel.fn)) if table else None
        if entries:
            chosen = entries.get(_ask(kernel, operands, free, fixed))
    return {**free, **chosen, **fixed} if chosen else {**free, **fixed}


@contextlib.contextmanager
def answering(answer: Answer) -> Iterator[None]:
    """Have ``answer`` decide in the place of the tables, in every thread: backward passes have their own."""
    global _answer
    before, _answer = _answer, answer
    try:
        yield
    finally:
        _answer = before


def path(device: str) -> Path:
    """The file of a device's table."""
    return FOLDER / f"{slug(device)}.json"


def slug(device: str) -> str:
    """A device's name as that of a file or a folder."""
    return re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")


def to_json(ask: Ask, choice: Mapping[str, int]) -> dict[str, Any]:
    """An entry of a table; there may be more in it, for the reader."""
    return {
        "kernel": ask.kernel,
        "operands": [_NAMES.get(kind) or str(kind).removeprefix("torch.") for kind in ask.operands],
        "fixed": dict(ask.fixed),
        "reasoned": dict(ask.free),
        "measured": dict(choice),
    }


def from_json(entry: Mapping[str, Any]) -> Ask:
    """The question of an entry.

    Raises:
        ValueError: if what it measured are other parameters than were reasoned, or any is not a power of two.
    """
    kinds = {name: kind for kind, name in _NAMES.items()}
    operands = tuple(kinds[name] if name in kinds else getattr(torch, name) for name in entry["operands"])
    reasoned, choice = entry["reasoned"], entry["measured"]
    if reasoned.keys() != choice.keys() or not all(n > 0 and n & (n - 1) == 0 for n in choice.values()):
        raise ValueError(f"what {entry['kernel']} measured must be powers of two for {list(reasoned)}, got {choice}")
    return Ask(entry["kernel"], operands, tuple(reasoned.items()), tuple(entry["fixed"].items()))


def read(file: Path) -> dict[Ask, dict[str, Any]]:
    """The entries of a table by their questions; none where there is no file.

    Raises:
        ValueError: if the file is no table.
    """
    if not file.exists():
        return {}
    try:
        return {from_json(entry): entry for entry in json.loads(file.read_text())["entries"]}
    except (ValueError, LookupError, AttributeError, TypeError) as error:
        raise ValueError(
            f"{file} must be a table of launch parameters, as `python -m braze.benchmarks tune OP --write` writes it; "
            f"delete it, and write it anew ({type(error).__name__}: {error})"
        ) from error


def text(device: str, entries: Iterable[Mapping[str, Any]]) -> str:
    """The file of a table, a line for each entry."""
    lines = ",\n".join(json.dumps(entry) for entry in entries)
    return f'{{"device": {json.dumps(device)}, "entries": [\n{lines}\n]}}\n'


def device_name(device: torch.device) -> str:
    """The device as its table names it."""
    if device.type == "xpu":
        return torch.xpu.get_device_name(device)
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


@functools.cache
def _table(device: torch.device) -> dict[str, dict[Ask, dict[str, int]]]:
    """By the kernel's name: most ask in vain, which this shows at once."""
    found: dict[str, dict[Ask, dict[str, int]]] = {}
    for ask, entry in read(path(device_name(device))).items():
        found.setdefault(ask.kernel, {})[ask] = entry["measured"]
    return found


def forget() -> None:
    """Read the tables again when they are asked next."""
    _table.cache_clear()


_NAMES: dict[Any, str] = {None: "absent", float: "number"}


def _ask(kernel: Any, operands: Sequence[Any], free: Mapping[str, int], fixed: Mapping[str, Any]) -> Ask:
    kinds = tuple([None if t is None else t.dtype if isinstance(t, Tensor) else float for t in operands])
    return Ask(_name(kernel.fn), kinds, tuple(free.items()), tuple(fixed.items()))


@functools.cache
def _name(function: Callable[..., Any]) -> str:
    return f"{function.__module__.rsplit('.', 1)[-1]}.{function.__name__}"
