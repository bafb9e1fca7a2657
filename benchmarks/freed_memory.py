"""``python -m braze.benchmarks freed_memory``: whole models with and without ``keep_freed_memory``, on the CPU.

Two processes that have the same model, fused by braze, take turns; one of them keeps what it frees. Beside the times
stand the page faults of a step, which are what it is about, and the most memory that each process has held.
"""

from __future__ import annotations

import argparse
import functools
import multiprocessing
import os
import resource
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from typing import Any

import torch
from rich import box
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from braze.layouts import keep_freed_memory

from . import tables, timing
from .model_child import build
from .model_providers import BRAZE, Learner
from .ops_case import device_name
from .records import Record
from .workloads import WORKLOADS, Scale, shape

KEPT, GIVEN_BACK = "kept", "given back"
ROUNDS, QUICK_ROUNDS = 20, 3
WARM_UP = 3


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add ``--model``."""
    names = [name for name, workload in WORKLOADS.items() if "cpu" in workload.sizes]
    parser.add_argument(
        "--model", action="append", choices=names, metavar="NAME", help=f"only this: {', '.join(names)}"
    )
    parser.set_defaults(models=names)


def run(arguments: argparse.Namespace) -> list[Record]:
    """Measure, print the table, and return two records for each model and pass."""
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # of the processes: the one that waits leaves the cores alone
    names = arguments.model or arguments.models
    columns = (TextColumn("{task.description:24}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    found: list[Record] = []
    with Progress(*columns, console=tables.console()) as bar:
        task = bar.add_task("", total=len(names))
        for name in names:
            bar.update(task, description=name)
            found += measure(name, "quick" if arguments.quick else "cpu", QUICK_ROUNDS if arguments.quick else ROUNDS)
            arguments.keep(found)
            bar.advance(task)
    show(found)
    return found


def measure(name: str, scale: Scale, rounds: int) -> Iterator[Record]:
    """Both ways of one model."""
    context = multiprocessing.get_context("spawn")
    with ExitStack() as stack:
        processes: dict[str, Any] = {
            way: stack.enter_context(ProcessPoolExecutor(1, context)) for way in (KEPT, GIVEN_BACK)
        }
        for way, process in processes.items():
            if not process.submit(_start, name, scale, way).result():
                sys.exit("freed_memory: there is nothing to compare, for malloc is not that of glibc here")
        for which in ("inference", "training"):
            for process in processes.values():
                process.submit(_seconds, which, WARM_UP).result()
            clock = functools.partial(_asked, which)
            samples = timing.compare(processes, clock, rounds, repetitions=1)
            for way, process in processes.items():
                yield {
                    "benchmark": "freed_memory",
                    "model": name,
                    "shape": shape(WORKLOADS[name].sizes[scale]),
                    "pass": which,
                    "device": device_name(torch.device("cpu")),
                    "threads": torch.get_num_threads(),
                    "provider": way,
                    **samples.milliseconds(way, KEPT),
                    "page_faults": process.submit(_faults, which).result(),
                    "process_bytes": process.submit(_most_held).result(),
                }


def _asked(which: str, process: Any, repetitions: int) -> float:
    return process.submit(_seconds, which, repetitions).result()


_learner: Learner


def _start(name: str, scale: Scale, way: str) -> bool:
    """Whether this process does with what it frees what it is asked to."""
    global _learner
    done = way == GIVEN_BACK or keep_freed_memory()
    _learner = Learner(build(name, scale), BRAZE)
    return done


def _seconds(which: str, repetitions: int) -> float:
    _learner.train(which == "training")
    return timing.cpu_clock(_learner.step if which == "training" else _learner.infer, repetitions)


def _faults(which: str) -> int:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    _seconds(which, 1)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


def _most_held() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # kibibytes on Linux


def show(records: list[Record]) -> None:
    """Print a row for each model and pass."""
    table = Table(box=box.SIMPLE, title="Freed memory: given back ÷ kept; above 1, keeping it is faster")
    for name in ("model", "pass"):
        table.add_column(name)
    for name in ("ms given back", "ms kept", "ratio (95 % interval)", "page faults", "kept", "MiB held", "kept"):
        table.add_column(name, justify="right")
    for kept, given in zip(records[::2], records[1::2], strict=True):
        table.add_row(
            kept["model"], kept["pass"],
            *(f"{r['median_ms']:.4g}" for r in (given, kept)), tables.ratio(given),
            *(f"{r['page_faults']:,}" for r in (given, kept)),
            *(f"{r['process_bytes'] / 2**20:.0f}" for r in (given, kept)),
        )  # fmt: skip
    tables.console().print(table)
