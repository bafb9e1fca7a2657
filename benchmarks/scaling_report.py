"""The records of the ``scaling`` benchmark as tables and as a figure."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table

from . import tables
from .records import Record

PROVIDERS = ("aten", "compiled", "braze")
COLOURS = {"aten": "tab:orange", "compiled": "tab:green", "braze": "tab:blue"}
LABELS = {"aten": "PyTorch eager", "compiled": "torch.compile", "braze": "braze"}
#: What is drawn first is wider, so that of equal curves all show.
WIDTHS = {"aten": 3.8, "compiled": 2.5, "braze": 1.3}
COLUMNS = 4


def show(found: Sequence[Record]) -> None:
    """Print a row for each size, the slopes, and what is wrong or absent."""
    console = tables.console()
    for table in (_sizes(found), _slopes(found)):
        console.print(table)
    for status in dict.fromkeys(_complaint(r) for r in found if r.get("status", "ok") != "ok"):
        console.print(status, highlight=False)


def _complaint(record: Record) -> str:
    return f"{record['op']} by {record['axis']} [bold]{record['provider']}[/] {record['status']}"


def _sizes(found: Sequence[Record]) -> Table:
    table = Table(
        box=box.SIMPLE,
        title="Forward and backward: median milliseconds; ratio of times (95 % interval), above 1 braze is faster; "
        "peak memory (!: over the error budget)",
    )
    for name in ("op", "axis", "shape"):
        table.add_column(name, no_wrap=True)
    for name in (*PROVIDERS, "roofline", "aten/braze", "compiled/braze", *(f"{name}\nMiB" for name in PROVIDERS)):
        table.add_column(name, justify="right", no_wrap=True)
    previous = None
    for (op, axis, _), row in _rows(found).items():
        if previous not in (None, (op, axis)):
            table.add_section()
        first = row[PROVIDERS[0]]
        title = (op, axis) if previous != (op, axis) else ("", "")
        previous = (op, axis)
        times = [_time(row[name]) for name in PROVIDERS]
        ratios = [tables.ratio(row[name]) if "ratio" in row[name] else "-" for name in PROVIDERS[:2]]
        peaks = [f"{row[name]['peak_bytes'] / 2**20:.1f}" if "peak_bytes" in row[name] else "-" for name in PROVIDERS]
        table.add_row(*title, first["shape"], *times, f"{first['roofline_ms']:.3g}", *ratios, *peaks)
    return table


def _rows(found: Sequence[Record]) -> dict[tuple[str, str, int], dict[str, Record]]:
    rows: dict[tuple[str, str, int], dict[str, Record]] = {}
    for record in found:
        if record["benchmark"] == "scaling":
            rows.setdefault((record["op"], record["axis"], record["size"]), {})[record["provider"]] = record
    return rows


def _time(record: Record) -> str:
    if "median_ms" not in record:
        return f"[bold red]{record['status'].split(':')[0]}[/]"
    return f"{record['median_ms']:.3g}{'' if record['status'] == 'ok' else '[bold red]![/]'}"


def _slopes(found: Sequence[Record]) -> Table:
    table = Table(box=box.SIMPLE, title="Time grows as this power of the size, over the upper sizes")
    for name in ("op", "axis", "sizes"):
        table.add_column(name, no_wrap=True)
    for name in PROVIDERS:
        table.add_column(name, justify="right")
    curves: dict[tuple[str, str, str], dict[str, str]] = {}
    for record in found:
        if record["benchmark"] == "scaling slope":
            curve = curves.setdefault((record["op"], record["axis"], record["shape"]), {})
            curve[record["provider"]] = f"{record['slope']:.2f}"
    for key, curve in curves.items():
        table.add_row(*key, *(curve.get(name, "-") for name in PROVIDERS))
    return table


def plot(found: Sequence[Record], path: Path) -> None:
    """Draw time and, under it, memory over size, a pair of panels for each sweep."""
    import matplotlib

    matplotlib.use("agg")  # no display needed
    from matplotlib import pyplot

    sweeps = list(dict.fromkeys((r["op"], r["axis"]) for r in found if r["benchmark"] == "scaling"))
    columns = min(COLUMNS, len(sweeps))
    rows = 2 * -(-len(sweeps) // columns)
    figure, grid = pyplot.subplots(
        rows, columns, figsize=(3.9 * columns, 2.9 * rows), squeeze=False, layout="constrained"
    )
    for i, (op, axis) in enumerate(sweeps):
        curves = [r for r in found if r["benchmark"] == "scaling" and (r["op"], r["axis"]) == (op, axis)]
        time, memory = (grid[2 * (i // columns) + below][i % columns] for below in range(2))
        time.set_title(f"{op}, by {axis}", fontsize=11)
        _draw(time, curves, "median_ms", 1.0, "roofline_ms", "ms")
        _draw(memory, curves, "peak_bytes", 2**-20, "gradient_bytes", "peak MiB")
        memory.set_xlabel(axis)
    for i in range(len(sweeps), rows // 2 * columns):
        for below in range(2):
            grid[2 * (i // columns) + below][i % columns].set_visible(False)
    handles, labels = grid[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False)
    first = found[0]
    figure.suptitle(
        f"Forward and backward, {first['dtype']}, {first['device']}: time with the roofline "
        f"({first['copy_ceiling_gbs']:.0f} GB/s copied, {first['matmul_ceiling_tflops']:.2g} Tflop/s multiplied), "
        "and memory with its floor, the gradients"
    )
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def _draw(axes: Any, curves: Sequence[Record], figure: str, scale: float, floor: str, label: str) -> None:
    floors = {r["size"]: r[floor] * scale for r in curves if floor in r}
    for provider in PROVIDERS:
        points = {r["size"]: r[figure] * scale for r in curves if r["provider"] == provider and figure in r}
        line = {"color": COLOURS[provider], "label": LABELS[provider], "linewidth": WIDTHS[provider], "markersize": 3.5}
        axes.plot(points.keys(), points.values(), "o-", **line)
    axes.plot(floors.keys(), floors.values(), "--", color="grey", label="roofline, floor", linewidth=1.3)
    axes.set(xscale="log", yscale="log", ylabel=label)
    axes.set_xticks(list(floors), [_short(size) for size in floors], minor=False)
    axes.set_xticks([], minor=True)
    axes.yaxis.set_minor_formatter("")
    axes.grid(alpha=0.3)


def _short(size: int) -> str:
    """Such as "16k" for 16,384."""
    return f"{size // 1024}k" if size >= 1024 else str(size)
