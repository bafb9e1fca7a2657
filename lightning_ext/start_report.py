"""One table of what was done to a model and its run before training, and why."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

from braze.kernels import FusionReport

from .recompiles import RegionReport, pattern
from .table import Table

Row = tuple[str, str, str]


def fit_report(parts: Mapping[str, object], title: str = "") -> Table:
    """A table with a row for each thing that was done or left, under the names of ``parts``.

    Args:
        parts: subject ("modules", "regions", "layout", "precision", "loaders", …) → a FusionReport; a RegionReport;
            pairs (what, why); a text; or None for what is off.
        title: stands above the table.

    Raises:
        TypeError: if a part is none of these.
    """
    rows: list[Row] = []
    for subject, part in parts.items():
        for number, (what, why) in enumerate(_rows(subject, part)):
            rows.append((subject if number == 0 else "", what, why))
    return Table(("", "what", "why"), rows, title=title)


def _rows(subject: str, part: object) -> Iterator[tuple[str, str]]:
    if part is None:
        yield "off", ""
    elif isinstance(part, str):
        yield part, ""
    elif isinstance(part, FusionReport):
        yield from _swaps(part)
    elif isinstance(part, RegionReport):
        yield from _regions(part)
    elif isinstance(part, Iterable):
        yield from part
    else:
        raise TypeError(
            f"fit_report: {subject} must be a report, pairs (what, why), a text or None, got {type(part).__name__}"
        )


def _swaps(report: FusionReport) -> Iterator[tuple[str, str]]:
    groups: dict[tuple[str, ...], int] = {}
    for record in report:
        key = (record.status, record.was, record.now, record.reason)
        groups[key] = groups.get(key, 0) + 1
    for (status, was, now, reason), count in groups.items():
        # A joint that was left has no new name.
        yield f"{status}: {was}{f' → {now}' if now else ''}{_times(count)}", reason
    if not groups:
        yield "nothing to swap", "no joint was found"


def _regions(report: RegionReport) -> Iterator[tuple[str, str]]:
    for region in report:
        yield f"compiled: {region.kind}{_times(len(region.paths))}", f"repeats at {pattern(region.paths)}"
    groups: dict[tuple[str, str], int] = {}
    for left in report.left:
        groups[left.was, left.reason] = groups.get((left.was, left.reason), 0) + 1
    for (was, reason), count in groups.items():
        yield f"left: {was}{_times(count)}", reason
    if not groups and not report.regions:
        yield "nothing to compile", "no block repeats"


def _times(count: int) -> str:
    return f" ×{count}" if count > 1 else ""  # noqa: RUF001 (the multiplication sign is meant)
