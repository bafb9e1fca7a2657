"""``python -m braze.benchmarks selfcheck``: the harness measures what is known.

Equal providers, of which the interval of the ratio should contain 1: at 95 % confidence, nine times of ten or more. A
provider that does 5 % more work (21 calls in the place of 20), of which the interval should lie above 1. A provider
whose results are 0.1 % off, which should be refused. All at the settings of ``ops`` without ``--quick``.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
from rich import box
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from torch import Tensor

from braze.kernels import OPS

from . import tables, timing
from .ops_case import FORWARD, Case
from .ops_measure import Effort, measure
from .providers import BASELINE, Provider
from .records import Record

RUNS, QUICK_RUNS = 10, 3
#: A unit of work takes some tens of microseconds of a core.
ELEMENTS, UNITS = 2**18, 20
EQUAL, SLOWER, WRONG = "equal", "5 % more work", "0.1 % off"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add ``--device``."""
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", choices=("cpu", "cuda"), default=default, help="where to run (%(default)s)")


def run(arguments: argparse.Namespace) -> list[Record]:
    """Measure, print the tables, and return one record for each comparison and one for the wrong provider."""
    device = torch.device(arguments.device)
    runs = QUICK_RUNS if arguments.quick else RUNS
    records = []
    with Progress(TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()) as bar:
        for _ in bar.track(range(runs), description="comparisons"):
            records += compare(work(device), timing.clocks_for(device).warm)
    show(records)
    refusal = refused(device)
    tables.console().print(f"A provider whose results are {WRONG}: {refusal['status']}")
    return [*records, refusal]


def work(device: torch.device) -> dict[str, timing.Work]:
    """The baseline, the same again, and the same with one unit more."""
    x = torch.ones(ELEMENTS, device=device)

    def repeated(units: int) -> Callable[[], None]:
        def units_of_work() -> None:
            for _ in range(units):
                x.mul(2.0)

        return units_of_work

    return {BASELINE: repeated(UNITS), EQUAL: repeated(UNITS), SLOWER: repeated(UNITS + UNITS // 20)}


def compare(providers: dict[str, timing.Work], clock: timing.Clock, rounds: int = Effort().rounds) -> list[Record]:
    """One run of the harness: a record for the equal provider, and one for the slower."""
    samples = timing.compare(providers, clock, rounds)
    records: list[Record] = []
    for name in (EQUAL, SLOWER):
        figures = samples.figures(name, BASELINE)
        right = figures["ratio_low"] <= 1 <= figures["ratio_high"] if name == EQUAL else figures["ratio_low"] > 1
        records.append({"benchmark": "selfcheck", "provider": name, **figures, "rounds": rounds, "right": right})
    return records


def refused(device: torch.device) -> Record:
    """What the harness says of a wrong provider that is none of PyTorch's forms."""
    op = next(op for op in OPS if op.name == "rms_norm")

    def wrong(x: Tensor, weight: Tensor, **options: float) -> Tensor:
        return op.fn(x, weight, **options) * 1.001

    case = Case(op, {"N": 32, "D": 256}, torch.float32, device)
    planted = {WRONG: Provider(wrong, "planted", keeps_time=False)}
    records = measure(case, Effort(rounds=3, cold_rounds=1, host_rounds=1), only=[BASELINE], also=planted)
    return next({**r, "benchmark": "selfcheck"} for r in records if (r["provider"], r["pass"]) == (WRONG, FORWARD))


def show(records: list[Record]) -> None:
    """A row for each run, and the counts."""
    equal, slower = ([r for r in records if r["provider"] == name] for name in (EQUAL, SLOWER))
    title = "The ratio to the baseline and its 95 % interval (!: does not contain 1; contains 1)"
    table = Table(box=box.SIMPLE, title=title)
    for name in ("run", EQUAL, SLOWER):
        table.add_column(name, justify="right")
    for i, pair in enumerate(zip(equal, slower, strict=True)):
        table.add_row(str(i + 1), *(tables.ratio(r, 3) + ("" if r["right"] else "[bold red]![/]") for r in pair))
    counts = [f"{sum(r['right'] for r in ones)} of {len(ones)} right" for ones in (equal, slower)]
    table.add_section()
    table.add_row("", *counts)
    tables.console().print(table)
