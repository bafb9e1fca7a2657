"""What the tables of all benchmarks share."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Console

#: Columns where the output is a file or a pipe, for which rich assumes 80.
FILE_WIDTH = 190


def console() -> Console:
    """Where tables are printed."""
    found = Console()
    if not found.is_terminal:
        found.width = FILE_WIDTH
    return found


def ratio(record: Mapping[str, Any]) -> str:
    """A record's ratio and its 95 % interval."""
    return f"{record['ratio']:.2f} ({record['ratio_low']:.2f} … {record['ratio_high']:.2f})"
