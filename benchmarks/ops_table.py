"""The records of the ``ops`` benchmark as tables."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich import box
from rich.table import Table

from . import tables

Record = dict[str, Any]
PROVIDERS = ("aten", "compiled", "braze")
SHORT = {"forward": "fwd", "forward+backward": "fwd+bwd"}


def show(records: Sequence[Record]) -> None:
    """Print one row for each operator, shape, dtype and pass; the geometric means; what is over budget or absent."""
    console = tables.console()
    rows: dict[tuple[str, ...], dict[str, Record]] = {}
    for record in records:
        if record["benchmark"] == "ops":
            key = tuple(record[name] for name in ("op", "shape", "dtype", "pass"))
            rows.setdefault(key, {})[record["provider"]] = record
    console.print(_times(rows))
    console.print(_means([r for r in records if r["benchmark"] == "ops geometric mean"]))
    for key, row in rows.items():
        for provider, record in row.items():
            if record["status"] != "ok":
                console.print(" ".join(key), f"[bold]{provider}[/]", record["status"], highlight=False)


def _times(rows: dict[tuple[str, ...], dict[str, Record]]) -> Table:
    table = Table(
        box=box.SIMPLE,
        title="Median milliseconds; ratio of times (95 % interval); largest error relative to the result's scale "
        "(!: over the budget)",
    )
    for name in ("op", "shape", "dtype", "pass"):
        table.add_column(name, no_wrap=True)
    for name in (*PROVIDERS, "copy", "runs", "aten/braze", "compiled/braze"):
        table.add_column(name, justify="right", no_wrap=True)
    for name in PROVIDERS:
        table.add_column(f"{name}\nerror", justify="right", no_wrap=True)
    previous = None
    for key, row in rows.items():
        if previous not in (None, key[0]):
            table.add_section()
        previous = key[0]
        cells = [_milliseconds(row.get(p)) for p in (*PROVIDERS, "copy")]
        ran = row["braze"].get("implementation", "")
        ratios = [_ratio(row.get(p)) for p in ("aten", "compiled")]
        table.add_row(*key[:3], SHORT[key[3]], *cells, ran, *ratios, *(_error(row.get(p)) for p in PROVIDERS))
    return table


def _means(means: Sequence[Record]) -> Table:
    table = Table(box=box.SIMPLE, title="Geometric means over shapes and dtypes: above 1, braze is faster")
    table.add_column("op")
    columns = list(dict.fromkeys((r["provider"], r["pass"]) for r in means))
    for provider, which in columns:
        table.add_column(f"{provider}/braze {which}", justify="right")
    for op in dict.fromkeys(r["op"] for r in means):
        found = {(r["provider"], r["pass"]): f"{r['ratio']:.2f}" for r in means if r["op"] == op}
        table.add_row(op, *(found.get(column, "-") for column in columns))
    return table


def _milliseconds(record: Record | None) -> str:
    if record is None:
        return "-"
    if "median_ms" not in record:
        return f"[bold red]{record['status'].split(':')[0]}[/]"
    return f"{record['median_ms']:.3g}" if record["median_ms"] < 1000 else f"{record['median_ms']:.0f}"


def _ratio(record: Record | None) -> str:
    if record is None or "ratio" not in record:
        return "-"
    return f"{record['ratio']:.2f} [dim]({record['ratio_low']:.2f}, {record['ratio_high']:.2f})[/]"


def _error(record: Record | None) -> str:
    if record is None or "error_outputs" not in record:
        return "-"
    gradients = record["error_gradients"]
    largest = record["error_outputs"] if gradients is None else max(record["error_outputs"], gradients)
    return f"{largest:.1e}{'' if record['status'] == 'ok' else '[bold red]![/]'}"
