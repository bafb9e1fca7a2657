"""A table that prints the same in plain text and, where rich is installed, in colour."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


class Table:
    """Rows of text under a header; ``str(table)`` and ``rich.print(table)`` show them, with the notes below."""

    def __init__(
        self, header: Sequence[str], rows: Sequence[Sequence[str]], *, title: str = "", notes: Sequence[str] = ()
    ) -> None:
        self.title, self.header, self.rows, self.notes = title, tuple(header), [tuple(row) for row in rows], notes

    def __str__(self) -> str:
        rows = [self.header, *self.rows]
        widths = [max(len(row[column]) for row in rows) for column in range(len(self.header))]
        lines = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]
        lines.insert(1, "─" * max(map(len, lines)))
        return "\n".join([*([self.title] if self.title else []), *lines, *self.notes])

    def __rich__(self) -> Any:
        from rich import box
        from rich.console import Group
        from rich.table import Table as RichTable

        table = RichTable(box=box.SIMPLE_HEAD, title=self.title or None, title_justify="left")
        for name in self.header:
            table.add_column(name, overflow="fold")
        for row in self.rows:
            table.add_row(*row)
        return Group(table, *self.notes)
