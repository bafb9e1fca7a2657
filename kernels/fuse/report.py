"""What a fuse did: one record for each joint that was found."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator
from typing import Any

from .verify import Check


@dataclasses.dataclass(frozen=True)
class Record:
    """One joint: where it is, what it was, what it is now, and why."""

    path: str
    was: str
    now: str
    status: str  #: "fused", "planned", "left" or "already fused"
    reason: str = ""
    check: Check | None = None


class FusionReport:
    """The records of one call of ``fuse``, in the order of the modules; printing it groups equal ones."""

    def __init__(self, records: list[Record]) -> None:
        self.records = records

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

    def __str__(self) -> str:
        groups: dict[tuple[str, ...], list[Record]] = {}
        for record in self.records:
            pattern = re.sub(r"(?<![^._])\d+(?![^._])", "*", record.path)
            groups.setdefault((pattern, record.was, record.now, record.status, record.reason), []).append(record)
        header = ("module", "", "was", "now", "worst error / budget")
        rows = [header, *(_row(key, records) for key, records in groups.items())]
        widths = [max(len(row[column]) for row in rows) for column in range(4)]
        lines = ["  ".join((*map(str.ljust, row, widths), row[4])).rstrip() for row in rows]
        lines.insert(1, "─" * max(map(len, lines)))
        found, planned = len(self.records), sum(record.status == "planned" for record in self.records)
        done = f"{planned} of {found} joint{'s' * (found != 1)} would be" if planned else ""
        lines.append(f"{done or f'{len(self.fused)} of {found} joint' + 's' * (found != 1)} fused")
        return "\n".join(lines)


def _row(key: tuple[str, ...], records: list[Record]) -> tuple[str, ...]:
    pattern, was, now, status, reason = key
    path = pattern if len(records) > 1 else records[0].path
    checks = [record.check for record in records if record.check]
    note = f"{status}: {reason}" if reason else status
    if status in ("fused", "planned") and checks:
        worst = max(checks, key=lambda check: check.error / check.budget)
        note = f"{worst.error:.1e} / {worst.budget:.1e}  {worst.where}" if worst.where else "0, exact"
        note += f"; {reason}" if reason else ""
    return path or "(the model)", f"×{len(records)}" if len(records) > 1 else "", was, now, note  # noqa: RUF001 (the multiplication sign is meant)
