"""``python -m braze.benchmarks audit``: which torchvision and timm models keep channels_last, and which lose it where.

Every model is audited in a process of its own, in training, forward and backward, on a batch of two. Where the audit
finds the convolution that crashes oneDNN, a second process takes plain steps to see whether the process dies. With
``--json`` the file is written after each model, and models that it already holds for these versions are not run again.
"""

from __future__ import annotations

import argparse
import collections
import json
from pathlib import Path
from typing import Any

from rich import box
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from . import records, tables
from .audit_child import audited, bare_steps, in_child
from .audit_models import MODELS, QUICK, SIDE, SIDES
from .child import ChildDied
from .records import Record

#: A model that takes longer has failed.
SECONDS = 900

VERDICTS = ("clean", "loses in forward", "loses in backward", "crashes", "cannot convert", "failed")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add ``--model`` and ``--fresh``."""
    parser.add_argument("--model", action="append", metavar="NAME", help="only this; torchvision:NAME or timm:NAME")
    parser.add_argument("--fresh", action="store_true", help="run again what the file of --json holds already")


def run(arguments: argparse.Namespace) -> list[Record]:
    """Audit, print the tables, and return one record for each model."""
    models = arguments.model or (QUICK if arguments.quick else MODELS)
    path: Path | None = arguments.json
    found = {} if path is None or arguments.fresh else kept(path)
    columns = (TextColumn("{task.description:44}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    console = tables.console()
    with Progress(*columns, console=console) as bar:
        task = bar.add_task("", total=len(models))
        for model in models:
            bar.update(task, description=model)
            if model not in found:
                found[model] = measure(model)
                arguments.keep(list(found.values()))
            bar.advance(task)
    shown = [found[model] for model in models]
    for table in (_models(shown), _totals(shown)):
        console.print(table)
    return list(found.values())


def kept(path: Path) -> dict[str, Record]:
    """The records of an earlier run into this file, if it had the same versions; without those that failed."""
    if not path.exists():
        return {}
    earlier = json.loads(path.read_text())
    held = {record["model"]: record for record in earlier["records"] if record["verdict"] != "failed"}
    return held if all(record["versions"] == _versions() for record in held.values()) else {}


def measure(model: str) -> Record:
    """Audit one model in a child process, and see in a second one whether it crashes."""
    record: Record = {"benchmark": "audit", "model": model, "versions": _versions()}
    try:
        record |= in_child(audited, model, SIDES.get(model, SIDE), seconds=SECONDS)
    except Exception as error:  # whatever a model raises
        return {**record, "verdict": "failed", "error": f"{type(error).__name__}: {error}"}
    record["verdict"] = "cannot convert" if record["conversion_error"] else record["cpu_verdict"]
    if record["verdict"] == "crashes":
        try:
            in_child(bare_steps, model, seconds=SECONDS)
            record["plain_steps"] = "survived"
        except ChildDied as death:
            record["plain_steps"] = str(death)
    return record


def _versions() -> str:
    found = records.environment()
    import timm
    import torchvision

    return f"torch {found['torch']}, torchvision {torchvision.__version__}, timm {timm.__version__}"


def _models(found: list[Record]) -> Table:
    table = Table(box=box.SIMPLE, title="Convolutions fed a contiguous [N, C, H, W] of all, forward and backward")
    for name in ("model", "verdict on the CPU", "on CUDA, predicted"):
        table.add_column(name, no_wrap=True)
    for name in ("cpu", "backward", "cuda", "backward", "lost, MiB"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("most bytes are lost by")
    for record in sorted(found, key=lambda record: (VERDICTS.index(record["verdict"]), record["model"])):
        failed = record["verdict"] == "failed"
        table.add_row(record["model"], *((f"failed: {record['error']}",) if failed else _cells(record)))
    return table


def _cells(record: Record) -> tuple[str, ...]:
    counts: list[Any] = []
    for device in ("cpu", "cuda"):
        total = record[f"{device}_convolutions"]
        counts += [f"{record[f'{device}_nchw{suffix}']}/{total}" for suffix in ("", "_backward")]
    plain = f" ({record['plain_steps']})" if "plain_steps" in record else ""
    lost = f"{record['cpu_bytes_lost'] / 2**20:.1f}"
    return record["verdict"] + plain, record["cuda_verdict"], *counts, lost, record["worst"]


def _totals(found: list[Record]) -> Table:
    table = Table(box=box.SIMPLE, title=f"{len(found)} models")
    for name in VERDICTS:
        table.add_column(name, justify="right")
    counts = collections.Counter(record["verdict"] for record in found)
    table.add_row(*(str(counts[verdict]) for verdict in VERDICTS))
    return table
