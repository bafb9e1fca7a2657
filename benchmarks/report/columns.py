"""How a figure of a record is written: one column, its unit, and the number behind it for sorting."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from ..records import Record

MIB = 2**20


def plain(value: float) -> str:
    """Three digits, or all of a large number."""
    if isinstance(value, int):
        return f"{value:,}"
    if not math.isfinite(value):
        return str(value)
    return f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}"


def milliseconds(seconds: float) -> str:
    """Seconds, written in milliseconds."""
    return plain(1e3 * seconds)


def mebibytes(count: float) -> str:
    """Bytes, written in MiB."""
    return plain(count / MIB)


def hundredths(ratio: float) -> str:
    """A ratio near 1."""
    return f"{ratio:.2f}"


def thousandths(ratio: float) -> str:
    """A ratio nearer 1."""
    return f"{ratio:.3f}"


def exponent(error: float) -> str:
    """An error."""
    return f"{error:.1e}"


@dataclass(frozen=True)
class Column:
    """A field of the records, its header, how its numbers are written, and the fields with the ends of its interval."""

    field: str
    header: str
    number: Callable[[float], str] = plain
    ends: tuple[str, str] | None = None

    def text(self, record: Record) -> str:
        """The cell as it is read; empty where the record has no such field."""
        value = record.get(self.field)
        if value is None or not _is_number(value):
            return _words(value)
        ends = [end for name in self.ends or () if _is_number(end := record.get(name)) and end is not None]
        interval = f" ({' … '.join(map(self.number, ends))})" if len(ends) == 2 else ""
        return self.number(value) + interval

    def key(self, record: Record) -> float | str | None:
        """What the cell is sorted by: the number itself, or nothing where there is none."""
        value = record.get(self.field)
        if isinstance(value, bool):
            return _words(value)
        return value if _is_number(value) or value is None else _words(value)


def present(columns: Sequence[Column], records: Sequence[Record], without: Sequence[str] = ()) -> list[Column]:
    """The columns that the records fill, and behind them one for every further field: nothing is left out."""
    fields = dict.fromkeys(name for record in records for name, value in record.items() if value is not None)
    known = {column.field for column in columns} | {end for column in columns for end in column.ends or ()}
    further = [Column(name, name.replace("_", " ")) for name in fields if name not in known and name not in without]
    return [column for column in columns if column.field in fields] + further


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _words(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, dict):
        return ", ".join(f"{name} {_words(count)}" for name, count in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(_words(one) for one in value)
    return str(value)
