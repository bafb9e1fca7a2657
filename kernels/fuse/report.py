"""What a fuse did: one record for each joint that was found."""

from __future__ import annotations

import dataclasses
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any

from .savings import Saving
from .tune import Timing
from .verify import Check


@dataclasses.dataclass(frozen=True)
class Record:
    """One joint: where it is, what it was, what it is now, and why."""

    path: str
    was: str
    now: str
    #: "fused", "planned", "offered" (swapped only where it is asked for by the operator's name, or timed), "left",
    #: "already fused"; of ``fold``: "folded", "left", "already folded".
    status: str
    reason: str = ""
    check: Check | None = None
    saving: Saving | None = None
    timing: Timing | None = None


class FusionReport:
    """The records of one call of ``fuse``, ``plan`` or ``fold``, in the order of the modules; printed, it groups them.

    ``done`` is the status of what that call did.
    """

    def __init__(self, records: list[Record], done: str = "fused") -> None:
        self.records, self.done = records, done

    def __iter__(self) -> Iterator[Record]:
        return iter(self.records)

    def __len__(self) -> int:
        return len(self.records)

    @property
    def fused(self) -> list[Record]:
        """The records of what this call swapped."""
        return [record for record in self.records if record.status == "fused"]

    def as_dicts(self) -> list[dict[str, Any]]:
        """The records as plain values, ready for ``json.dumps``."""
        return [dataclasses.asdict(record) for record in self.records]

    @property
    def folded(self) -> list[Record]:
        """The records of what this call folded."""
        return [record for record in self.records if record.status == "folded"]

    @property
    def savings(self) -> dict[str, Saving]:
        """The savings of all joints that were swapped, or would be, added up by unit.

        Pixels are those of each joint's own image. What is told for an element of a joint's input has no sum.
        """
        swapped = (record for record in self.records if record.status != "offered")
        return _added(record for record in swapped if record.saving and record.saving.unit != "element")

    @property
    def offered(self) -> list[Record]:
        """The records of what is swapped only where it is asked for by the operator's name, or timed."""
        return [record for record in self.records if record.status == "offered"]

    def rows(self) -> list[tuple[str, ...]]:
        """Of each group of like joints: path, number, was, now, traffic, activations, time, error or reason."""
        groups: dict[tuple[str, ...], list[Record]] = {}
        for record in self.records:
            unit = "" if record.saving is None else record.saving.unit
            key = (_pattern(record.path), record.was, _pattern(record.now), record.status, record.reason, unit)
            groups.setdefault(key, []).append(record)
        return [_row(key, records) for key, records in groups.items()]

    def totals(self) -> list[str]:
        """How many joints were fused, and what they save together, in words."""
        count = sum(record.status == self.done for record in self.records)
        offered = Counter(record.now for record in self.offered)
        found = f"{count} of {len(self.records)} joint{'s' * (len(self.records) != 1)}"
        return [
            f"{found} {'would be fused' if self.done == 'planned' else self.done}",
            *(f"only={now!r} would fuse {number} more" for now, number in offered.items()),
            *(f"saves {_moved(one)} of traffic, {_kept(one)} of activations" for one in self.savings.values()),
        ]

    def __str__(self) -> str:
        header = ("module", "", "was", "now", "saves traffic", "activations", "time", "worst error / budget")
        figures = list(zip(header, *self.rows(), strict=True))
        shown = [column for i, column in enumerate(figures) if i not in (4, 5, 6) or any(column[1:])]
        widths = [*(max(map(len, column)) for column in shown[:-1]), 0]
        lines = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in zip(*shown, strict=True)]
        lines.insert(1, "─" * max(map(len, lines)))
        return "\n".join([*lines, *self.totals()])


def _pattern(path: str) -> str:
    """With a star for each number."""
    return re.sub(r"(?<![^._ ])\d+(?![^._])", "*", path)


def _added(records: Iterable[Record]) -> dict[str, Saving]:
    totals: dict[str, Saving] = {}
    for saving in (record.saving for record in records):
        if saving is not None:
            before = totals.get(saving.unit, Saving(0.0, 0.0, saving.unit))
            traffic, activations = before.traffic + saving.traffic, before.activations + saving.activations
            totals[saving.unit] = Saving(traffic, activations, saving.unit)
    return totals


def _times(records: list[Record]) -> str:
    """The slowest of the times, over that of the original."""
    timings = [record.timing for record in records if record.timing]
    return f"×{max(timings, key=lambda timing: timing.ratio)}" if timings else ""  # noqa: RUF001 (as below)


def _moved(saving: Saving) -> str:
    return f"{_bytes(saving.traffic)}/{saving.unit}"


def _kept(saving: Saving) -> str:
    return f"{_bytes(saving.activations)}/{saving.unit}"


def _bytes(number: float) -> str:
    """Three digits: 0 B, 256 B, 7.48 kB."""
    for unit in ("B", "kB", "MB"):
        if abs(number) < 999.5:
            return f"{number:.3g} {unit}"
        number /= 1000
    return f"{number:.3g} GB"


def _row(key: tuple[str, ...], records: list[Record]) -> tuple[str, ...]:
    pattern, was, now, status, reason, _ = key
    path, now = (pattern, now) if len(records) > 1 else (records[0].path, records[0].now)
    checks = [record.check for record in records if record.check]
    note = f"{status}: {reason}" if reason else status
    if status in ("fused", "planned", "folded") and checks:
        worst = max(checks, key=lambda check: check.error / check.budget)
        note = f"{worst.error:.1e} / {worst.budget:.1e}  {worst.where}" if worst.where else "0, exact"
        note += f"; {reason}" if reason else ""
    number = f"×{len(records)}" if len(records) > 1 else ""  # noqa: RUF001 (the multiplication sign is meant)
    saved = [(_moved(saving), _kept(saving)) for saving in _added(records).values()] or [("", "")]
    return path or "(the model)", number, was, now, *saved[0], _times(records), note
