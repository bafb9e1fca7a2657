"""What an audit found: one event for each operator that loses a layout, copies or transposes."""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Iterator, Sequence
from typing import Any, Literal

Device = Literal["cpu", "cuda"]
Kind = Literal["loses", "transposes", "copies", "crashes"]
KINDS: dict[Kind, str] = {
    "crashes": "oneDNN writes past a buffer and the process may die; the audit ran it on contiguous copies",
    "loses": "from channels_last (or from nothing) to a contiguous [N, C, H, W] that later operators get",
    "transposes": "bytes are put into another order, by a copy or inside of a convolution",
    "copies": "bytes are copied in the order that they had",
}
HEADER = ("", "module", "line", "operator", "pass", "cpu", "cuda", "MiB")
SHOWN = 25


@dataclasses.dataclass(frozen=True)
class Event:
    """One operator of one run: what it does, where, and to how many bytes."""

    kind: Kind
    op: str
    module: str
    line: str  #: ``file:line`` of the model's source
    backward: bool
    device: Device  #: "cpu": measured; "cuda": predicted
    bytes: int  #: of the tensor that is lost, copied or transposed


@dataclasses.dataclass(frozen=True)
class Convolutions:
    """2-D convolutions that ran, and how many of them were fed a contiguous [N, C, H, W], or channels_last with gaps.

    A slice of a channels_last tensor has gaps: convolutions copy it first, but in the order that it has.
    """

    forward: int = 0
    forward_nchw: int = 0
    forward_gaps: int = 0
    backward: int = 0
    backward_nchw: int = 0
    backward_gaps: int = 0


class LayoutReport:
    """The events of one audit, on the CPU and then on CUDA, each in the order in which they happened.

    ``str(report)`` is a table of them, equal ones grouped; ``rich.print(report)`` the same in colour;
    ``report.as_dicts()`` is ready for ``json.dumps``.
    """

    def __init__(
        self,
        events: Sequence[Event],
        convolutions: dict[Device, Convolutions],
        modules: Sequence[str] = (),
        unpredicted: Sequence[str] = (),
    ) -> None:
        self.events = list(events)
        self.convolutions = convolutions
        self.modules = list(modules)  #: modules that ran, in the order in which they first did
        self.unpredicted = list(unpredicted)  #: operators whose CUDA strides are taken from the CPU

    def __iter__(self) -> Iterator[Event]:
        return iter(self.events)

    def __len__(self) -> int:
        return len(self.events)

    def verdict(self, device: Device) -> str:
        """``"crashes"``, ``"loses in forward"``, ``"loses in backward"`` or ``"clean"``, judged by the convolutions.

        A loss that no convolution meets, such as the copy in ``flatten`` before a classifier, leaves a model clean.
        """
        if any(event.kind == "crashes" for event in self.events if event.device == device):
            return "crashes"
        found = self.convolutions[device]
        return "loses in forward" if found.forward_nchw else "loses in backward" if found.backward_nchw else "clean"

    def bytes(self, device: Device, *kinds: Kind) -> int:
        """All bytes of the events of these kinds."""
        return sum(event.bytes for event in self.events if event.device == device and event.kind in kinds)

    def as_dicts(self) -> list[dict[str, Any]]:
        """The events as plain values."""
        return [dataclasses.asdict(event) for event in self.events]

    def __str__(self) -> str:
        rows = [HEADER, *self._rows()]
        widths = [max(len(row[column]) for row in rows) for column in range(len(HEADER))]
        lines = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]
        lines.insert(1, "─" * max(map(len, lines)))
        return "\n".join([*lines, *self._summary()])

    def __rich__(self) -> Any:
        from rich.console import Group
        from rich.table import Table

        table = Table(box=None)
        for name in HEADER:
            table.add_column(name, justify="right" if name in ("cpu", "cuda", "MiB") else "left", overflow="fold")
        colours = {"crashes": "bold red", "loses": "red", "transposes": "yellow"}
        for row in self._rows():
            table.add_row(*row, style=colours.get(row[0], ""))
        return Group(table, *self._summary())

    def _rows(self) -> list[tuple[str, ...]]:
        """Groups of equal events, the costliest first: how many on each device, and the bytes on the worse one."""
        groups: dict[tuple[str, ...], dict[Device, list[int]]] = {}
        for event in self.events:
            module = re.sub(r"(?<![^.])\d+(?![^.])", "*", event.module) or "(the model)"
            line = _short(event.line)
            key = (event.kind, module, line, event.op, "backward" if event.backward else "forward")
            groups.setdefault(key, {"cpu": [], "cuda": []})[event.device].append(event.bytes)
        order = list(KINDS)
        ranked = sorted(groups.items(), key=lambda item: (order.index(item[0][0]), -_most(item[1])))  # type: ignore[arg-type]
        rows = [
            (*key, *(f"×{len(found[d])}" if found[d] else "-" for d in ("cpu", "cuda")), f"{_most(found) / 2**20:.2f}")  # noqa: RUF001
            for key, found in ranked
        ]
        if len(rows) > SHOWN:
            rows[SHOWN:] = [(f"… {len(rows) - SHOWN} more", *[""] * (len(HEADER) - 1))]
        return rows

    def _summary(self) -> list[str]:
        lines = []
        for device, how in (("cpu", "measured"), ("cuda", "predicted")):
            found = self.convolutions[device]  # type: ignore[index]
            text = f"{device}, {how}: {self.verdict(device)}; convolutions fed [N, C, H, W] contiguous: "  # type: ignore[arg-type]
            text += f"{found.forward_nchw} of {found.forward} in forward"
            text += f", {found.backward_nchw} of {found.backward} in backward" if found.backward else ""
            if gaps := found.forward_gaps + found.backward_gaps:
                text += f"; channels_last with gaps, copied first: {gaps}"
            lines.append(text)
        if self.unpredicted:
            lines.append(f"taken to be on CUDA as on the CPU: {', '.join(self.unpredicted)}")
        return lines


def _most(found: dict[Device, list[int]]) -> int:
    return max(sum(sizes) for sizes in found.values())


def _short(line: str) -> str:
    """The file's folder and name, and the line."""
    return os.sep.join(line.split(os.sep)[-2:])
