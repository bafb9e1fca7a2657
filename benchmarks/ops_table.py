"""The records of the ``ops`` benchmark as tables."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

from rich import box
from rich.table import Table

from . import tables
from .providers import BASELINE
from .records import Record

TITLE = (
    "Milliseconds: median (quartiles), with warm and with cold caches; ÷ braze: ratio of times (95 % interval); host: "
    "microseconds of the host a call; MiB: most allocated; % of a large copy's and of a matrix product's rate in this "
    "run; predicted: microseconds of braze's kernels, from their counted traffic, launches and the ceilings of this "
    "GPU; error: the largest, relative to the result's scale (!: over the budget)"
)
SHORT = {"forward": "fwd", "backward": "bwd", "forward+backward": "both"}
COLUMNS = ("ms", "÷ braze", "cold ms", "cold ÷ braze", "host", "MiB", "% copy", "% matmul", "predicted", "error")


def show(records: Sequence[Record]) -> None:
    """Print a row for each provider of each case and pass; the geometric means; what is over budget or absent."""
    console = tables.console()
    measured = [r for r in records if r["benchmark"] == "ops"]
    console.print(_times([r for r in measured if "median_ms" in r or "implementation" in r]))
    console.print(_means([r for r in records if r["benchmark"] == "ops geometric mean"]))
    reasons: dict[tuple[str, str], list[str]] = {}
    for record in measured:
        if record["status"] != "ok":
            where = f"{record['op']} {record['shape']} {record['dtype']}"
            reasons.setdefault((record["provider"], record["status"]), []).append(where)
    for (provider, status), places in reasons.items():
        first, *others = dict.fromkeys(places)
        more = f" and {len(others)} more" if others else ""
        console.print(f"[bold]{provider}[/]", status, f"[dim]({first}{more})[/]", highlight=False)


def _times(records: Sequence[Record]) -> Table:
    table = Table(box=box.SIMPLE, title=TITLE)
    for name in ("op, shape, dtype", "pass", "provider"):
        table.add_column(name, no_wrap=True)
    for name in COLUMNS:
        table.add_column(name, justify="right", no_wrap=True)
    for case, of_case in groupby(records, key=lambda r: (r["op"], r["shape"], r["dtype"])):
        labels = iter(case)  # one below the other, beside the providers
        for which, of_pass in groupby(of_case, key=lambda r: r["pass"]):
            for i, record in enumerate(of_pass):
                ran = f" ({record['implementation']})" if record["provider"] == BASELINE else ""
                cells = (next(labels, ""), "" if i else SHORT[which], record["provider"] + ran)
                table.add_row(*cells, *_cells(record))
        table.add_section()
    return table


def _cells(record: Record) -> list[str]:
    if "median_ms" not in record:
        return [f"[bold red]{record['status'].split(':')[0]}[/]", *[""] * (len(COLUMNS) - 2), _error(record)]
    quartiles = f" [dim]({record['quartile_low_ms']:.3g}, {record['quartile_high_ms']:.3g})[/]"
    ratio = ""
    if "ratio" in record:
        ratio = f"{record['ratio']:.2f} [dim]({record['ratio_low']:.2f}, {record['ratio_high']:.2f})[/]"
    peak = record.get("peak_bytes")
    return [
        f"{record['median_ms']:.3g}{quartiles}",
        ratio,
        _figure(record, "cold_median_ms", ".3g"),
        _figure(record, "cold_ratio", ".2f"),
        _figure(record, "host_us", ".0f"),
        "" if peak is None else f"{peak / 2**20:.3g}",
        _figure(record, "percent_of_copy", ".0f"),
        _figure(record, "percent_of_matmul", ".0f"),
        _figure(record, "predicted_us", ".1f"),
        _error(record),
    ]


def _figure(record: Record, name: str, form: str) -> str:
    return format(record[name], form) if record.get(name) is not None else ""


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


def _error(record: Record) -> str:
    if "error_outputs" not in record:
        return ""
    gradients = record["error_gradients"]
    largest = record["error_outputs"] if gradients is None else max(record["error_outputs"], gradients)
    return f"{largest:.1e}{'' if record['status'] == 'ok' else '[bold red]![/]'}"
