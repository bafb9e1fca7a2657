"""``python -m braze.benchmarks packing``: a language model trained on packed and on padded batches of one text.

The demo's Llama over paragraphs of the standard library's source, as bytes. A step of both trains on the same
documents from the same parameters; they take turns, step by step, and a ratio of times is within a step. Padded is what
transformers users have: every document a row, as long as the longest of its batch, and an attention mask.
"""

from __future__ import annotations

import argparse
import random
import time
from pathlib import Path
from statistics import fmean, median
from typing import Any

import torch
from rich import box
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from braze.layouts import PackCollate, first_fit_decreasing

from . import data, tables
from .records import Record
from .tasks import TASKS
from .timing import Samples

STEPS, QUICK_STEPS = 40, 4
#: Steps that warm up and are not timed, and steps whose mean is "the last losses".
WARM_UP, LAST = 2, 10
#: Tokens of a row and of the longest document, and rows of a batch.
CAPACITY, ROWS = 512, 4
#: Documents that are shuffled into bins together.
WINDOW = 256


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add where the plot goes."""
    parser.add_argument("--plot", type=Path, default=Path("packing.png"), metavar="FILE", help="where the curves go")


def run(arguments: argparse.Namespace) -> list[Record]:
    """Train, print the table, draw the curves, and return one record for each way."""
    steps = QUICK_STEPS if arguments.quick else STEPS
    batches = _batches(steps)
    ways = {"padded": _Training(_padded), "packed": _Training(_packed)}
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    console = tables.console()
    with Progress(*columns, console=console) as progress:
        for step, documents in enumerate(progress.track(batches, description="steps")):
            for way in sorted(ways) if step % 2 else sorted(ways, reverse=True):
                ways[way].step(documents)
    records = _records(ways, batches)
    console.print(_table(records))
    _plot(ways, arguments.plot)
    console.print(f"loss curves: {arguments.plot}")
    return records


class _Training:
    """A model, its optimizer, and what its steps took and lost."""

    def __init__(self, collate: Any) -> None:
        torch.manual_seed(0)
        task = TASKS["llama"].build()
        self.model: Any = task.network
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=task.learning_rate)
        self.collate = collate
        self.seconds: list[float] = []
        self.losses: list[float] = []
        self.computed = 0

    def step(self, documents: list[Tensor]) -> None:
        start = time.perf_counter()
        inputs = self.collate(documents)
        loss = self.model(**inputs).loss
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.losses.append(loss.item())
        self.seconds.append(time.perf_counter() - start)
        self.computed += inputs["input_ids"].numel()


_collate = PackCollate(CAPACITY, ROWS)


def _packed(documents: list[Tensor]) -> dict[str, Any]:
    return _collate(documents).transformers_kwargs()


def _padded(documents: list[Tensor]) -> dict[str, Any]:
    ids = pad_sequence(documents, batch_first=True)
    mask = pad_sequence([torch.ones_like(d) for d in documents], batch_first=True)
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100), "use_cache": False}


def _batches(steps: int) -> list[list[Tensor]]:
    """The documents of each step: as many bins as a packed batch has rows."""
    documents = data.source_documents(CAPACITY)
    random.Random(0).shuffle(documents)
    batches: list[list[Tensor]] = []
    for start in range(0, len(documents), WINDOW):
        window = documents[start : start + WINDOW]
        bins = first_fit_decreasing([len(d) for d in window], CAPACITY)
        random.Random(start).shuffle(bins)
        for first in range(0, len(bins) - ROWS + 1, ROWS):
            batches.append([window[i] for own in bins[first : first + ROWS] for i in own])
    return batches[:steps]


def _records(ways: dict[str, _Training], batches: list[list[Tensor]]) -> list[Record]:
    tokens = sum(len(d) for batch in batches for d in batch)
    samples = Samples({name: way.seconds[WARM_UP:] for name, way in ways.items()})
    padded = ways["padded"].losses
    return [
        {
            "benchmark": "packing",
            "provider": name,
            "model": "llama",
            "steps": len(batches),
            "documents": sum(map(len, batches)),
            "tokens": tokens,
            "tokens_computed": way.computed,
            **samples.figures(name, "padded"),
            "train_loss": fmean(way.losses[-LAST:]),
            "first_loss": way.losses[0],
            "worst_difference_of_loss": max(abs(a / b - 1) for a, b in zip(way.losses, padded, strict=True)),
        }
        for name, way in ways.items()
    ]


def _table(records: list[Record]) -> Table:
    first = records[0]
    title = f"Llama over {first['documents']} documents, {first['tokens']} tokens, in {first['steps']} steps"
    table = Table(box=box.SIMPLE, title=title)
    table.add_column("batches", no_wrap=True)
    for name in (
        "tokens computed",
        "ms a step",
        "÷ padded (95 % interval)",
        f"loss, last {LAST}",
        "÷ padded, furthest from 1",
    ):
        table.add_column(name, justify="right", no_wrap=True)
    for r in records:
        table.add_row(
            r["provider"],
            f"{r['tokens_computed'] / r['tokens']:.2f} × real",  # noqa: RUF001 (the multiplication sign is meant)
            f"{r['median_s'] * 1e3:.0f}",
            tables.ratio(r),
            f"{r['train_loss']:.4f}",
            f"{r['worst_difference_of_loss']:.1e} off",
        )
    return table


def _plot(ways: dict[str, _Training], path: Path) -> None:
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, (by_step, by_time) = pyplot.subplots(1, 2, figsize=(12, 4.5), layout="constrained", sharey=True)
    for (name, way), style in zip(ways.items(), ("-", "--"), strict=True):
        smooth = [fmean(way.losses[max(0, i - LAST + 1) : i + 1]) for i in range(len(way.losses))]
        by_step.plot(range(1, len(smooth) + 1), smooth, style, label=name, linewidth=1.8)
        typical = median(way.seconds[WARM_UP:])  # a sum would count what else the machine did meanwhile
        by_time.plot([typical * (i + 1) for i in range(len(smooth))], smooth, style, label=name, linewidth=1.8)
    by_step.set(xlabel="step", ylabel=f"train loss, mean of {LAST} steps")
    by_time.set(xlabel="seconds of training, at the median step")
    for axes in (by_step, by_time):
        axes.grid(alpha=0.3)
    by_step.legend()
    figure.suptitle("Llama over bytes: the same documents in each step, padded and packed")
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
