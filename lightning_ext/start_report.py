"""One table of what was done to a model and its run before training, and why."""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Iterator, Mapping
from typing import TypeAlias

from torch.nn import Module

from braze.kernels import FusionReport
from braze.layouts import FormatReport

from .recompiles import RegionReport, pattern
from .table import Table

HEADER = ("", "where", "what", "saves traffic", "activations", "time", "worst error / budget, or why")
Row = tuple[str, ...]
#: A report; pairs (where, what); a text; or None for what is off.
Part: TypeAlias = FusionReport | RegionReport | FormatReport | list[tuple[str, str]] | str | None


@dataclasses.dataclass(frozen=True)
class Report:
    """What was done to a model; print it.

    Attributes:
        title: which plugin did it.
        fusion: the report of ``braze.kernels.fuse``, if it ran.
        skip: what it was told to leave alone.
        compiled: the report of regional compilation, or pairs of each part of the model and what was done, or None.
        formats: the report of ``braze.layouts.channels_last``, if it ran.
        precision: that of the Trainer, if there is one.
        fp8: pairs of each linear layer and what became of it, or None.
    """

    title: str
    fusion: FusionReport | None
    skip: tuple[str, ...]
    compiled: RegionReport | list[tuple[str, str]] | None
    formats: FormatReport | None
    precision: str | None
    fp8: list[tuple[str, str]] | None = None

    @property
    def parts(self) -> dict[str, Part]:
        """What each subject of the table at the start is about."""
        found: dict[str, Part] = {"modules": self.fusion}
        if self.fusion is not None and self.skip:
            found["skipped"] = [(one, "left, as skip says") for one in self.skip]
        found |= {"compiled": self.compiled, "layout": self.formats}
        if self.fp8 is not None:
            found["float8"] = self.fp8
        return found if self.precision is None else {**found, "precision": self.precision}

    def __str__(self) -> str:
        return str(start_table(self.parts, self.title))


#: Lightning converts a model again for every fit, validate and test: what it then says is what the first time said.
reports: weakref.WeakKeyDictionary[Module, Report] = weakref.WeakKeyDictionary()


def start_table(parts: Mapping[str, Part], title: str) -> Table:
    """A table with a row for each thing that was done or left, under the names of ``parts``.

    Args:
        parts: subject ("modules", "compiled", "layout", "precision", "loaders") → what was done.
        title: stands above the table.
    """
    rows = [
        ("" if number else subject, *row) for subject, part in parts.items() for number, row in enumerate(_rows(part))
    ]
    notes = [line for part in parts.values() if isinstance(part, FusionReport) for line in part.totals()]
    shown = [column for column in zip(HEADER, *rows, strict=True) if any(column[1:])]
    header, *lines = zip(*shown, strict=True)
    return Table(header, lines, title=title, notes=notes)


def _rows(part: Part) -> Iterator[Row]:
    if part is None:
        yield _row("", "off")
    elif isinstance(part, str):
        yield _row("", part)
    elif isinstance(part, FusionReport):
        yield from _swaps(part)
    elif isinstance(part, RegionReport):
        yield from _regions(part)
    elif isinstance(part, FormatReport):
        yield from _formats(part)
    else:
        yield from _pairs(part)


def _row(where: str, what: str, why: str = "") -> Row:
    return where, what, "", "", "", why


def _swaps(report: FusionReport) -> Iterator[Row]:
    for path, number, was, now, *savings, note in report.rows():
        # A joint that was left has no new name.
        yield f"{path} {number}".strip(), f"{was} → {now}" if now else was, *savings, note
    if not len(report):
        yield _row("", "nothing to swap", "no joint was found")


def _regions(report: RegionReport) -> Iterator[Row]:
    for region in report:
        yield _row(_where(region.paths), f"{region.kind} compiled")
    groups: dict[tuple[str, str], list[str]] = {}
    for left in report.left:
        groups.setdefault((left.was, left.reason), []).append(left.path)
    for (was, reason), paths in groups.items():
        yield _row(_where(paths), was, f"left: {reason}")
    if not groups and not report.regions:
        yield _row("", "nothing to compile", "no block repeats")


def _formats(report: FormatReport) -> Iterator[Row]:
    groups: dict[tuple[str, str], list[str]] = {}
    for record in report:
        groups.setdefault((record.status, record.reason), []).append(record.path or "(the model)")
    for (status, reason), paths in groups.items():
        yield _row(_where(paths), f"channels_last: {status}", reason)
    if not groups:
        yield _row("", "nothing to convert", "no 2-D convolution was found")


def _pairs(pairs: list[tuple[str, str]]) -> Iterator[Row]:
    groups: dict[str, list[str]] = {}
    for where, what in pairs:
        groups.setdefault(what, []).append(where)
    for what, places in groups.items():
        yield _row(_where(places), what)


def _where(paths: list[str]) -> str:
    return pattern(paths) + (f" ×{len(paths)}" if len(paths) > 1 else "")  # noqa: RUF001 (the multiplication sign is meant)
