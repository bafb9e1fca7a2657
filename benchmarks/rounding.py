"""``python -m braze.benchmarks rounding``: a language model trained in nothing but bfloat16, by how it is rounded.

The demo's Llama over bytes, AdamW with a cosine schedule; same seed, same data. Parameters, gradients and activations
are bfloat16; nothing is float32 but, where braze rounds, AdamW's moments.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable, Iterable
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

import torch
from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from torch import Tensor
from torch.utils.data import DataLoader

from braze.kernels import optim

from .records import Record
from .tasks import TASKS

STEPS, QUICK_STEPS = 200, 10
#: Steps whose mean is "the last losses", and batches of the validation loss.
LAST, VALIDATION = 10, 40


class Run(NamedTuple):
    """A way to train, and the losses that it had."""

    title: str
    train: list[float]
    validation: float


WAYS: dict[str, tuple[torch.dtype, Callable[..., torch.optim.Optimizer], dict[str, Any]]] = {
    "float32, torch.optim.AdamW": (torch.float32, torch.optim.AdamW, {}),
    "bfloat16, torch.optim.AdamW": (torch.bfloat16, torch.optim.AdamW, {}),
    "bfloat16, stochastic": (torch.bfloat16, optim.AdamW, {"rounding": "stochastic"}),
    "bfloat16, stochastic, states too": (
        torch.bfloat16,
        optim.AdamW,
        {"rounding": "stochastic", "state_dtype": torch.bfloat16},
    ),
    "bfloat16, Kahan": (torch.bfloat16, optim.AdamW, {"rounding": "kahan"}),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add where the plot goes."""
    parser.add_argument("--plot", type=Path, default=Path("rounding.png"), metavar="FILE", help="where the curves go")


def run(arguments: argparse.Namespace) -> list[Record]:
    """Train, print the table, draw the curves, and return one record for each run."""
    steps = QUICK_STEPS if arguments.quick else STEPS
    console = Console()
    columns = (TextColumn("{task.description:34}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:
        runs = [_train(title, steps, progress) for title in WAYS]
    console.print(_table(runs))
    _plot(runs, arguments.plot)
    console.print(f"loss curves: {arguments.plot}")
    wanted = runs[0]
    return [
        {
            "benchmark": "rounding",
            "provider": r.title,
            "model": "llama",
            "steps": steps,
            "train_loss": fmean(r.train[-LAST:]),
            "train_of_float32": fmean(r.train[-LAST:]) / fmean(wanted.train[-LAST:]),
            "validation_loss": r.validation,
            "validation_of_float32": r.validation / wanted.validation,
        }
        for r in runs
    ]


def _train(title: str, steps: int, progress: Progress) -> Run:
    dtype, make, options = WAYS[title]
    task = TASKS["llama"]
    torch.manual_seed(0)
    model = task.build().to(dtype)
    train, validation = task.data()
    optimizer = make(model.parameters(), lr=model.learning_rate, **options)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    loader = DataLoader(train, task.batch, shuffle=True, drop_last=True, generator=torch.Generator().manual_seed(0))
    losses = []
    batches: Iterable[Tensor] = itertools.islice(itertools.chain.from_iterable(itertools.repeat(loader)), steps)
    for batch in progress.track(batches, steps, description=title):
        loss = model.compute_loss(batch)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        losses.append(loss.item())
    held_out = itertools.islice(DataLoader(validation, task.batch, drop_last=True), VALIDATION)
    with torch.no_grad():
        return Run(title, losses, fmean(model.compute_loss(batch).item() for batch in held_out))


def _table(runs: list[Run]) -> Table:
    table = Table(box=box.SIMPLE, title=f"Llama over bytes, {len(runs[0].train)} steps")
    table.add_column("parameters, optimizer", no_wrap=True)
    for name in (f"train loss, last {LAST}", "of float32's", "validation loss", "of float32's"):
        table.add_column(name, justify="right", no_wrap=True)
    wanted = runs[0]
    for r in runs:
        last = fmean(r.train[-LAST:])
        table.add_row(
            r.title,
            f"{last:.4f}",
            f"{last / fmean(wanted.train[-LAST:]):.4f}",
            f"{r.validation:.4f}",
            f"{r.validation / wanted.validation:.4f}",
        )
    return table


def _plot(runs: list[Run], path: Path) -> None:
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, (whole, end) = pyplot.subplots(1, 2, figsize=(12, 4.5), layout="constrained")
    for r in runs:
        smooth = [fmean(r.train[max(0, i - LAST + 1) : i + 1]) for i in range(len(r.train))]
        for axes in (whole, end):
            axes.plot(range(1, len(smooth) + 1), smooth, label=r.title, linewidth=1.5)
    half = len(runs[0].train) // 2
    tails = [fmean(r.train[i - LAST : i]) for r in runs for i in (half + LAST, len(r.train))]
    end.set(xlim=(half, len(runs[0].train)), ylim=(min(tails) * 0.97, max(tails) * 1.03), title="the second half")
    whole.set(yscale="log", title="all steps")
    for axes in (whole, end):
        axes.set(xlabel="step", ylabel=f"train loss, mean of {LAST} steps")
        axes.grid(alpha=0.3)
    whole.legend()
    figure.suptitle("Llama over bytes in bfloat16: same seed, same data, other rounding")
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
