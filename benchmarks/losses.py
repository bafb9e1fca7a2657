"""``python -m braze.benchmarks losses``: memory and time of a linear layer and the cross-entropy of its logits.

Forward and backward, the loss that ends every language model. Memory is what tensors take at the peak above the
operands and their gradients. Times are taken in turns; a ratio is a provider's time over braze's.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from rich import box
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from torch import Tensor

from braze.kernels import linear_cross_entropy

from . import memory, tables, timing
from .records import Record

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]
BASELINE = "braze"
#: A step takes seconds; five of them in turns tell a few percent apart.
ROUNDS, QUICK_ROUNDS = 5, 3


class Size(NamedTuple):
    """Tokens, hidden size, vocabulary."""

    N: int
    D: int
    C: int


SIZES = (Size(4096, 1024, 32_000), Size(4096, 1024, 128_000))
QUICK_SIZES = (Size(512, 128, 8_000),)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the device."""
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", choices=("cpu", "cuda"), default=default, help=f"default: {default}")


def run(arguments: argparse.Namespace) -> list[Record]:
    """Measure, print the table, and return one record for each size and provider."""
    sizes, rounds = (QUICK_SIZES, QUICK_ROUNDS) if arguments.quick else (SIZES, ROUNDS)
    records: list[Record] = []
    with Progress(TextColumn("{task.description:24}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()) as bar:
        task = bar.add_task("", total=len(sizes))
        for size in sizes:
            bar.update(task, description=str(tuple(size)))
            records += measure(size, rounds, device=arguments.device)
            bar.advance(task)
    show(records)
    return records


def providers() -> dict[str, Loss]:
    """Everything that computes this loss here; torch's own chunked form is newer than the oldest torch supported."""

    def eager(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(F.linear(hidden, weight), target)

    found: dict[str, Loss] = {"eager": eager, "torch.compile": torch.compile(eager, dynamic=False)}
    if hasattr(F, "linear_cross_entropy"):
        options = torch.nn.LinearCrossEntropyOptions()
        found["torch, chunked"] = lambda h, w, t: F.linear_cross_entropy(h, w, t, options=options)
    return {**found, BASELINE: linear_cross_entropy}


def measure(size: Size, rounds: int, clock: timing.Clock | None = None, device: str = "cpu") -> list[Record]:
    """Memory and time of all providers, and how far their gradients are from eager's."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(size.N, size.D, generator=generator).to(device).requires_grad_()
    weight = (torch.randn(size.C, size.D, generator=generator) / size.D**0.5).to(device).requires_grad_()
    target = torch.randint(size.C, (size.N,), generator=generator).to(device)
    gradients = 4 * (hidden.numel() + weight.numel())

    def work(loss: Loss) -> tuple[Tensor, ...]:
        return torch.autograd.grad(loss(hidden, weight, target), (hidden, weight))

    losses = providers()
    wanted = work(losses["eager"])
    apart = {name: max(map(_difference, work(loss), wanted)) for name, loss in losses.items()}  # compiles, too
    del wanted
    works = {name: functools.partial(work, loss) for name, loss in losses.items()}
    peaks = {name: memory.peak(own, torch.device(device)) - gradients for name, own in works.items()}
    samples = timing.compare(works, clock or timing.clock_for(torch.device(device)), rounds)
    records = []
    for name in losses:
        records.append(
            {
                "benchmark": "losses",
                "op": "linear_cross_entropy",
                "provider": name,
                "pass": "forward+backward",
                "dtype": "float32",
                "device": device,
                "shape": " ".join(f"{label}={n}" for label, n in size._asdict().items()),
                "peak_bytes": peaks[name],
                "peak_of_eager": peaks[name] / peaks["eager"],
                **samples.figures(name, BASELINE),
                "rounds": rounds,
                "gradients_apart": apart[name],
            }
        )
    return records


def _difference(ours: Tensor, wanted: Tensor) -> float:
    return ((ours - wanted).abs().max() / wanted.abs().max()).item()


def show(records: list[Record]) -> None:
    """Print a row for each record."""
    table = Table(box=box.SIMPLE, title="Linear layer and cross-entropy, forward and backward, float32")
    table.add_column("tokens, hidden, vocabulary", no_wrap=True)
    table.add_column("provider", no_wrap=True)
    for name in ("peak MiB", "of eager's", "seconds", "÷ braze (95 % interval)", "gradients from eager's"):
        table.add_column(name, justify="right", no_wrap=True)
    for record in records:
        table.add_row(
            record["shape"],
            record["provider"],
            f"{record['peak_bytes'] / 2**20:.0f}",
            f"{record['peak_of_eager']:.3f}",
            f"{record['median_s']:.2f}",
            tables.ratio(record),
            f"{record['gradients_apart']:.1e}",
        )
    tables.console().print(table)
