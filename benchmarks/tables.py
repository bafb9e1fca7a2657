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


def ratio(record: Mapping[str, Any], decimals: int = 2) -> str:
    """A record's ratio and its 95 % interval."""
    value, low, high = (f"{record[name]:.{decimals}f}" for name in ("ratio", "ratio_low", "ratio_high"))
    return f"{value} ({low} … {high})"
