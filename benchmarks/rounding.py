"""``python -m braze.benchmarks rounding``: a language model trained in nothing but bfloat16, by how it is rounded.

The demo's Llama over bytes, AdamW with a cosine schedule; for each seed the same weights and data. Parameters,
gradients and activations are bfloat16; nothing is float32 but, where braze rounds, AdamW's moments. Trainings that
differ in a rounding soon part ways, so that one seed shows little: there are several. Beside them stand weights that a
float32 copy rounds to at every step: compensation does the same in less memory, and can do no better.
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
SEEDS, QUICK_SEEDS = range(3), range(1)
#: Of 2e-3, 1e-3 and 3e-4 the one at which float32 ends lowest. Most updates are smaller than a step of bfloat16 here;
#: at 2e-3, where they are not, the ways of rounding differ by less than the seeds.
LEARNING_RATE = 3e-4
#: Steps whose mean is "the last losses", and batches of the validation loss.
LAST, VALIDATION = 10, 40
WANTED = "float32, torch.optim.AdamW"


class Run(NamedTuple):
    """A way to train, the seed, and the losses that it had."""

    title: str
    seed: int
    train: list[float]
    validation: float

    @property
    def last(self) -> float:
        """The mean of the last training losses."""
        return fmean(self.train[-LAST:])


class WithCopy(torch.optim.AdamW):
    """AdamW of a float32 copy of the parameters, which are what the copy rounds to."""

    def __init__(self, params: Iterable[Tensor], lr: float) -> None:
        self.rounded = list(params)
        super().__init__([p.detach().float() for p in self.rounded], lr)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]  # there is no loss to return
        """One step of the copy."""
        copies = self.param_groups[0]["params"]
        for copy, p in zip(copies, self.rounded, strict=True):
            copy.grad, p.grad = None if p.grad is None else p.grad.float(), None
        super().step()
        torch._foreach_copy_(self.rounded, copies)


WAYS: dict[str, tuple[torch.dtype, Callable[..., torch.optim.Optimizer], dict[str, Any]]] = {
    WANTED: (torch.float32, torch.optim.AdamW, {}),
    "float32, 8-bit states": (torch.float32, optim.AdamW, {"state_dtype": "8bit"}),
    "bfloat16, torch.optim.AdamW": (torch.bfloat16, torch.optim.AdamW, {}),
    "bfloat16, stochastic": (torch.bfloat16, optim.AdamW, {"rounding": "stochastic"}),
    "bfloat16, stochastic, bfloat16 states": (
        torch.bfloat16,
        optim.AdamW,
        {"rounding": "stochastic", "state_dtype": torch.bfloat16},
    ),
    "bfloat16, stochastic, 8-bit states": (
        torch.bfloat16,
        optim.AdamW,
        {"rounding": "stochastic", "state_dtype": "8bit"},
    ),
    "bfloat16, Kahan": (torch.bfloat16, optim.AdamW, {"rounding": "kahan"}),
    "bfloat16 of a float32 copy": (torch.bfloat16, WithCopy, {}),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add where the plot goes."""
    parser.add_argument("--plot", type=Path, default=Path("rounding.png"), metavar="FILE", help="where the curves go")


def run(arguments: argparse.Namespace) -> list[Record]:
    """Train, print the table, draw the curves, and return one record for each run."""
    steps, seeds = (QUICK_STEPS, QUICK_SEEDS) if arguments.quick else (STEPS, SEEDS)
    console = Console()
    columns = (TextColumn("{task.description:46}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:
        runs: list[Run] = []
        for seed, title in itertools.product(seeds, WAYS):
            runs.append(train(title, seed, steps, progress))
            arguments.keep(records_of(runs))
    report(runs, arguments.plot, console)
    return records_of(runs)


def report(runs: list[Run], plot: Path, console: Console) -> None:
    """Print the table and draw the curves."""
    console.print(_table(runs))
    _plot(runs, plot)
    console.print(f"loss curves: {plot}")


def records_of(runs: list[Run]) -> list[Record]:
    """A record for each run, beside the float32 run of its seed."""
    return [
        {
            "benchmark": "rounding",
            "provider": r.title,
            "model": "llama",
            "seed": r.seed,
            "steps": len(r.train),
            "train_loss": r.last,
            "train_of_float32": r.last / wanted.last,
            "validation_loss": r.validation,
            "validation_of_float32": r.validation / wanted.validation,
        }
        for r in runs
        for wanted in _beside(r, runs)
    ]


def train(title: str, seed: int, steps: int, progress: Progress) -> Run:
    """Train in the way of this title."""
    dtype, make, options = WAYS[title]
    task = TASKS["llama"]
    torch.manual_seed(seed)
    model = task.build().to(dtype)
    data, validation = task.data()
    optimizer = make(model.parameters(), lr=LEARNING_RATE, **options)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    loader = DataLoader(data, task.batch, shuffle=True, drop_last=True, generator=torch.Generator().manual_seed(seed))
    losses = []
    batches: Iterable[Tensor] = itertools.islice(itertools.chain.from_iterable(itertools.repeat(loader)), steps)
    for batch in progress.track(batches, steps, description=f"{title}, seed {seed}"):
        loss = model.compute_loss(batch)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        losses.append(loss.item())
    held_out = itertools.islice(DataLoader(validation, task.batch, drop_last=True), VALIDATION)
    with torch.no_grad():
        return Run(title, seed, losses, fmean(model.compute_loss(batch).item() for batch in held_out))


def _beside(run: Run, runs: list[Run]) -> list[Run]:
    """The float32 run of the same seed."""
    return [r for r in runs if (r.title, r.seed) == (WANTED, run.seed)]


def _ratios(title: str, runs: list[Run]) -> tuple[list[float], list[float]]:
    """Of each seed the training and the validation loss, over those of float32."""
    pairs = [(r, wanted) for r in runs if r.title == title for wanted in _beside(r, runs)]
    return [r.last / wanted.last for r, wanted in pairs], [r.validation / wanted.validation for r, wanted in pairs]


def _table(runs: list[Run]) -> Table:
    seeds = len({r.seed for r in runs})
    table = Table(
        box=box.SIMPLE, title=f"Llama over bytes, {len(runs[0].train)} steps, mean of {seeds} seeds (least … most)"
    )
    table.add_column("parameters, optimizer", no_wrap=True)
    for name in (f"train loss, last {LAST}", "of float32's", "validation loss", "of float32's"):
        table.add_column(name, justify="right", no_wrap=True)
    for title in WAYS:
        own = [r for r in runs if r.title == title]
        train_ratios, validation_ratios = _ratios(title, runs)
        table.add_row(
            title,
            f"{fmean(r.last for r in own):.4f}",
            _spread(train_ratios),
            f"{fmean(r.validation for r in own):.4f}",
            _spread(validation_ratios),
        )
    return table


def _spread(values: list[float]) -> str:
    return f"{fmean(values):.4f} ({min(values):.4f} … {max(values):.4f})"


def _plot(runs: list[Run], path: Path) -> None:
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, (curves, ends) = pyplot.subplots(1, 2, figsize=(13, 4.8), layout="constrained")
    for place, title in enumerate(WAYS):
        mean = [fmean(losses) for losses in zip(*(r.train for r in runs if r.title == title), strict=True)]
        smooth = [fmean(mean[max(0, i - LAST + 1) : i + 1]) for i in range(len(mean))]
        (line,) = curves.plot(range(1, len(smooth) + 1), smooth, label=title, linewidth=1.3)
        for shift, marker, values in zip((-0.15, 0.15), "ox", _ratios(title, runs), strict=True):
            ends.plot(values, [place + shift] * len(values), marker, color=line.get_color(), markersize=5)
            ends.plot([fmean(values)], [place + shift], "|", color="black", markersize=14)
    curves.set(
        yscale="log", xlabel="step", ylabel=f"train loss, mean of the seeds and of {LAST} steps", title="all steps"
    )
    curves.grid(alpha=0.3, which="both")
    curves.legend(fontsize=8)
    ends.axvspan(0.99, 1.01, color="0.9")
    ends.set_yticks(range(len(WAYS)), WAYS)
    ends.invert_yaxis()
    ends.set(
        xlabel="loss ÷ float32's of the same seed; bar: mean, grey: within 1 %",
        title="circles: train, last steps; crosses: validation",
    )
    ends.grid(alpha=0.3, axis="x")
    figure.suptitle("Llama over bytes in bfloat16: same seeds, same data, other rounding")
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
