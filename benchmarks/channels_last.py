"""``python -m braze.benchmarks channels_last``: a training step of ResNet-50 and others, converted against contiguous.

Forward, backward and an SGD step; the two copies of a model take turns. Gradients are compared first, and what differs
gets no time.
"""

from __future__ import annotations

import argparse
import copy

import torch
from rich import box
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from torch import nn

from braze.layouts import channels_last, specifier

from . import tables, timing
from .records import Record

MODELS = ("torchvision:resnet50", "torchvision:mobilenet_v3_large", "torchvision:resnext50_32x4d")
BATCH, SIDE, ROUNDS = 16, 224, 7
QUICK_BATCH, QUICK_SIDE, QUICK_ROUNDS = 8, 128, 3


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add ``--model`` and ``--device``."""
    parser.add_argument("--model", action="append", metavar="NAME", help=f"default: {', '.join(MODELS)}")
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", choices=("cpu", "cuda"), default=default, help=f"default: {default}")


def run(arguments: argparse.Namespace) -> list[Record]:
    """Measure, print the table, and return one record for each model and layout."""
    models = arguments.model or MODELS[: 1 if arguments.quick else None]
    batch, side, rounds = (QUICK_BATCH, QUICK_SIDE, QUICK_ROUNDS) if arguments.quick else (BATCH, SIDE, ROUNDS)
    found: list[Record] = []
    with Progress(TextColumn("{task.description:32}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()) as bar:
        for name in bar.track(models, description="models"):
            torch.manual_seed(0)
            model = specifier.build(name).train().to(arguments.device)
            images = specifier.example(model, batch, side).to(arguments.device)
            found += measure(name, model, images, rounds)
    _show(found)
    return found


def measure(name: str, model: nn.Module, images: torch.Tensor, rounds: int) -> list[Record]:
    """A record for the contiguous and one for the converted model."""
    converted = copy.deepcopy(model)
    report = channels_last(converted, images[:2])
    facts = {"benchmark": "channels_last", "model": name, "device": images.device.type, "shape": list(images.shape),
             "check": str(report.check), "converted": len(report.converted), "convolutions": len(report)}  # fmt: skip
    if not report.converted:
        return [{**facts, "provider": "channels_last", "status": str(report)}]
    providers = {"contiguous": _step(model, images), "channels_last": _step(converted, images)}
    samples = timing.compare(providers, timing.clock_for(images.device), rounds)
    return [
        {**facts, "provider": provider, "status": "ok", **samples.figures(provider, "channels_last"), "rounds": rounds}
        for provider in providers
    ]


def _step(model: nn.Module, images: torch.Tensor) -> timing.Work:
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
    target = torch.zeros(len(images), dtype=torch.long, device=images.device)

    def step() -> None:
        nn.functional.cross_entropy(model(images), target).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def _show(found: list[Record]) -> None:
    table = Table(box=box.SIMPLE, title="A training step: forward, backward, SGD")
    for name in ("model", "images", "layout"):
        table.add_column(name, no_wrap=True)
    for name in ("ms", "÷ channels_last (95 % interval)"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("convolutions converted, and check")
    for record in found:
        times = ("-", record["status"])
        if record["status"] == "ok":
            interval = tables.ratio(record)
            times = (f"{record['median_s'] * 1e3:.0f}", interval)
        converted = f"{record['converted']} of {record['convolutions']}; {record['check']}"
        table.add_row(record["model"], str(record["shape"]), record["provider"], *times, converted)
    tables.console().print(table)
