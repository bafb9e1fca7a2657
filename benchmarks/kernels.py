"""``python -m braze.benchmarks kernels``: every Triton kernel judged on a machine with no GPU.

Traffic comes from Triton's interpreter, machine code from its compiler (``braze.kernels.audit``). Each row of the
table is one kernel of one pass and says the worst that was found over the variants, dtypes and sizes; ``--json`` keeps
them apart. The last table predicts times at the benchmark sizes on GPUs that are not here (``prediction.py``).
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Literal

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from braze.kernels.audit import vocab_parallel
from braze.kernels.audit.cases import audited_operators
from braze.kernels.audit.child import audit, audit_others
from braze.kernels.audit.machine_code import TARGETS

from . import ops_case, prediction, tables
from .records import Record

#: Above this ratio a reason must stand beside the operator.
ALLOWED = 1.02
#: Positions, and classes of each of eight processes, for which the kernels of classes in parts are predicted.
IN_PARTS = {"N": 8192, "V": 128_256 // 8}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add ``--op`` and ``--target``."""
    names = [*(op.name for op in audited_operators()), vocab_parallel.NAME]
    parser.add_argument("--op", action="append", choices=names, metavar="NAME", help=f"only this: {', '.join(names)}")
    targets = ", ".join(TARGETS)
    parser.add_argument(
        "--target", action="append", choices=TARGETS, metavar="NAME", help=f"machine code for this only: {targets}"
    )


def run(arguments: argparse.Namespace) -> list[Record]:
    """Audit, print the tables, and return one record for each pass (traffic) and each kernel and target (code)."""
    columns = (TextColumn("{task.description:13}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    console = tables.console()
    with Progress(*columns, console=console) as bar:
        whats: tuple[Literal["traffic", "code"], ...] = ("traffic", "code")
        targets = arguments.target or ()
        ops = [name for name in arguments.op or () if name != vocab_parallel.NAME]
        records: list[Record] = []
        for what, label in zip(whats, ("bytes moved", "machine code"), strict=True):
            if ops or not arguments.op:
                records += audit(what, quick=arguments.quick, ops=ops, targets=targets, progress=_onto(bar, label))
            if not arguments.op or vocab_parallel.NAME in arguments.op:
                records += audit_others("vocab_parallel", what, targets)
    console.print(_kernels(records))
    console.print(_reasons(records))
    predictions = predict(prediction.counts(records))
    console.print(_predictions(predictions))
    return [{**record, "shape": _shape(record["shape"])} for record in records] + predictions


def predict(counted: prediction.Counts) -> list[Record]:
    """A record for each assumed GPU, benchmark size, dtype and pass of every operator that was counted."""
    found = []
    for case in ops_case.cases(audited_operators(), (torch.bfloat16, torch.float32), torch.device("cpu"), quick=False):
        for gpu, ceilings in prediction.ASSUMED.items():
            for which in case.passes():
                microseconds = prediction.predicted_us(case, which, counted, ceilings)
                if microseconds is not None:
                    facts = case.record(which, "triton", measure="prediction", predicted_us=microseconds)
                    found.append({**facts, "benchmark": "kernels", "device": f"{gpu}, assumed"})
    return found + list(_predict_in_parts(counted))


def _predict_in_parts(counted: prediction.Counts) -> Iterator[Record]:
    for (op, which, dtype), found in counted.items():
        if op != vocab_parallel.NAME:
            continue
        case = vocab_parallel.Case("default", getattr(torch, dtype), **IN_PARTS)
        facts = vocab_parallel.facts(case, f"_{which}")
        for gpu, ceilings in prediction.ASSUMED.items():
            moved = found.ratio * vocab_parallel.least_bytes(case, facts["kernel"])
            yield {
                "benchmark": "kernels",
                "measure": "prediction",
                **facts,
                "shape": _shape(facts["shape"]),
                "device": f"{gpu}, assumed",
                "predicted_us": prediction.bytes_us(moved, found.launches, ceilings),
            }


def _predictions(records: Iterable[Record]) -> Table:
    assumed = "; ".join(
        f"{gpu} copies {c.copy_gbs / 1e3:.2f} TB/s, multiplies {c.matmul_tflops['torch.bfloat16']:.0f} TFLOP/s "
        f"(bfloat16) and {c.matmul_tflops['torch.float32']:.0f} (float32), {c.launch_us:.0f} µs a launch"
        for gpu, c in prediction.ASSUMED.items()
    )
    title = f"Predicted microseconds from counted traffic and launches, not measured. Assumed: {assumed}"
    table = Table(title=title)
    for name in ("op", "shape", "dtype", "pass"):
        table.add_column(name, no_wrap=True)
    rows: dict[tuple[str, ...], list[str]] = {}
    for record in records:
        row = tuple(record[name] for name in ("op", "shape", "dtype", "pass"))
        rows.setdefault(row, []).append(f"{record['predicted_us']:.1f}")
    for gpu in prediction.ASSUMED:
        table.add_column(gpu, justify="right")
    for row, cells in rows.items():
        table.add_row(*row, *cells)
    return table


def _onto(bar: Progress, label: str) -> Callable[[int, int], None]:
    task = bar.add_task(label, total=None)
    return lambda done, calls: bar.update(task, completed=done, total=calls)


def _kernels(records: Iterable[Record]) -> Table:
    table = Table(title="Worst over variants, dtypes and sizes: registers / bytes spilled / widest load, store in bits")
    for name in ("op", "pass", "kernel"):
        table.add_column(name, no_wrap=True)
    for name in ("bytes ÷ least", *TARGETS):
        table.add_column(name, justify="right", no_wrap=True)
    rows: dict[tuple[str, str], dict[str, list[Record]]] = {}
    traffic: dict[tuple[str, str], list[Record]] = {}
    for record in records:
        place = record["op"], record["pass"]
        if record["measure"] == "traffic":
            traffic.setdefault(place, []).append(record)
        else:
            rows.setdefault(place, {}).setdefault(record["kernel"], []).append(record)
    for (op, which), kernels in rows.items():
        for kernel, codes in kernels.items():
            cells = [_summary([code for code in codes if code["target"] == target]) for target in TARGETS]
            table.add_row(op, which, kernel, _ratio(traffic.get((op, which), []), kernel), *cells)
        if which == "backward":
            table.add_section()
    return table


def _ratio(passes: list[Record], kernel: str) -> str:
    """The plain call's ratio, and the worst in brackets; only of passes in which this kernel ran."""
    found = [record["ratio"] for record in passes if f"bytes of {kernel}" in record]
    if not found:
        return "not counted"
    return f"{found[0]:.3f}" + (f" ({max(found):.3f})" if max(found) > ALLOWED else "")


def _summary(codes: list[Record]) -> str:
    if not codes:
        return "-"
    cell = " / ".join(str(max(code[name] for code in codes)) for name in ("registers", "spills"))
    read = [code for code in codes if code["widest_load"] is not None]
    if read:
        cell += f" / {min(code['widest_load'] for code in read)}, {min(code['widest_store'] for code in read)}"
    return cell


def _reasons(records: Iterable[Record]) -> Table:
    table = Table(title=f"Where more than {ALLOWED} times the least bytes move, and why")
    for name in ("op", "pass", "variant", "dtype", "shape", "bytes ÷ least", "reason"):
        table.add_column(name)
    for record in records:
        if record["measure"] == "traffic" and record["ratio"] > ALLOWED:
            facts = (record[name] for name in ("op", "pass", "variant", "dtype"))
            reason = record["reason"] or "[bold red]none stated[/]"
            table.add_row(*facts, _shape(record["shape"]), f"{record['ratio']:.3f}", reason)
    return table


def _shape(dims: dict[str, Any]) -> str:
    return " ".join(f"{name}={size}" for name, size in dims.items())
