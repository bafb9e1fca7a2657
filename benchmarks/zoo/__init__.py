"""``python -m braze.benchmarks zoo``: ``fuse`` on every model of the zoo, against an independent count of its joints.

Each model is built, fused and compared in a process of its own. ``--json FILE`` is written after every model; a run
that was stopped goes on where it was with ``--resume``.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from .. import tables
from ..records import Record
from .models import names


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add ``--model`` and ``--resume``."""
    parser.add_argument(
        "--model", action="append", metavar="PATTERN", help="only these, e.g. 'timm:*' or 'causal:llama'"
    )
    parser.add_argument("--resume", action="store_true", help="keep what --json holds, except exceptions")


def run(arguments: argparse.Namespace) -> list[Record]:
    """Measure, print the tables, and return one record for each model."""
    patterns = arguments.model or (["causal:llama", "own:*", "timm:resnet10t"] if arguments.quick else ["*"])
    wanted = [name for name in names() if any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)]
    done = _kept(arguments.json) if arguments.resume else {}
    columns = (TextColumn("{task.description:40}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    console = tables.console()
    with Progress(*columns, console=console) as bar:
        task = bar.add_task("zoo", total=len(wanted), completed=sum(name in done for name in wanted))
        for record in _measured(name for name in wanted if name not in done):
            done[record["model"]] = record
            arguments.keep(list(done.values()))
            bar.update(task, advance=1, description=record["model"])
    found = [done[name] for name in names() if name in done]
    for table in (_models(found), _totals(found), _misses(found)):
        console.print(table)
    return found


def _kept(file: Path | None) -> dict[str, Record]:
    if file is None or not file.exists():
        return {}
    kept = json.loads(file.read_text())["records"]
    return {record["model"]: record for record in kept if "exception" not in record}


def _measured(wanted: Iterable[str]) -> Iterator[Record]:
    nursery = [sys.executable, "-m", "braze.benchmarks.zoo.nursery"]
    with subprocess.Popen(nursery, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        for name in wanted:
            process.stdin.write(f"{name}\n".encode())
            process.stdin.flush()
            answer = process.stdout.readline()
            if not answer:
                raise RuntimeError(f"the zoo's nursery must answer for every model, but ended; run {' '.join(nursery)}")
            yield json.loads(answer)
        process.stdin.close()


def _models(found: Iterable[Record]) -> Table:
    table = Table(title="Joints swapped of those counted; differences from the unfused model, float64 and float32")
    kinds = {"norm": "norm", "gated mlp": "gated", "rope": "rope", "batch norm and activation": "BN→act"}
    kinds |= {"group norm and activation": "GN→act", "residual tail": "tail", "dropout and sum": "drop+"}
    kinds |= {"modulated norm": "mod", "gated sum": "gate", "plain mlp, offered": "mlp?"}
    table.add_column("model", no_wrap=True)
    for header in (*kinds.values(), "all fused", "left", "output", "gradient", "output f32", "gradient f32"):
        table.add_column(header, justify="right", no_wrap=True)
    for header in ("kept", "unfuse =", "right", "build s", "fuse s"):
        table.add_column(header, justify="right", no_wrap=True)
    for one in found:
        if "exception" in one:
            table.add_row(one["model"], f"[bold red]{one['exception']}[/]")
            continue
        joints = (_of(one["swapped"].get(kind, 0), one["found"].get(kind, 0)) for kind in kinds)
        errors = ("output_error", "gradient_error", "output_difference_float32", "gradient_difference_float32")
        figures = (f"{one[name]:.0e}" if name in one else "-" for name in errors)
        facts = ("yes" if one[name] else "[bold red]no[/]" for name in ("kept", "unfuse_equal", "right"))
        times = (f"{one[name]:.1f}" for name in ("build_seconds", "fuse_seconds"))
        table.add_row(one["model"], *joints, str(one["fused"]), str(one["refused"]), *figures, *facts, *times)
    return table


def _of(swapped: int, found: int) -> str:
    return "" if not found else f"{swapped}/{found}" if swapped == found else f"[yellow]{swapped}/{found}[/]"


def _totals(found: Iterable[Record]) -> Table:
    table = Table(title="All models together")
    for header in ("joint", "counted", "swapped", "share"):
        table.add_column(header, justify="left" if header == "joint" else "right")
    counted, swapped = Counter[str](), Counter[str]()
    for one in found:
        counted.update(one.get("found", {}))
        swapped.update(one.get("swapped", {}))
    for kind in counted:
        table.add_row(kind, str(counted[kind]), str(swapped[kind]), f"{swapped[kind] / counted[kind]:.1%}")
    return table


def _misses(found: Iterable[Record]) -> Table:
    table = Table(title="Joints counted that were not swapped, and why")
    for header in ("joint and reason", "joints", "models"):
        table.add_column(header)
    joints, where = Counter[str](), dict[str, list[str]]()
    for one in found:
        joints.update(one.get("missed", {}))
        for reason in one.get("missed", {}):
            where.setdefault(reason, []).append(one["model"])
    for reason, count in joints.most_common():
        names = where[reason]
        table.add_row(
            reason, str(count), ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
        )
    return table
