"""``python -m braze.benchmarks models``: real models trained and asked, vanilla, with Liger-Kernel and with braze.

A training step is forward, backward and AdamW: ``torch.optim``'s with its defaults, and braze's own where the provider
is braze. Inference is a forward pass without gradients. Providers are eager, compiled (``torch.compile`` of the whole
model, static shapes), and, for training, under a Lightning Trainer: vanilla, and with ``FusedPrecision`` as its plugin,
each eager and compiled (the plugin by its ``compile="regional"``).

A provider whose answer or losses are further from vanilla's than roundings put them (``model_child.py``) is refused:
it gets the word "wrong" and no time. Losses are those of a few steps before the timed ones, as many for all. Memory is
the most that a step has allocated at one time, above parameters and the optimizer's state.

``--json FILE`` is written after every record. A model whose process dies leaves the others.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from rich import box
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from . import tables
from .child import ChildDied, messages
from .model_child import Stage, measure
from .model_providers import LIKE
from .records import Record
from .workloads import WORKLOADS, Scale, shape

#: Seconds without a word, after which a model's process has failed: one stage is one compilation or one timing.
SECONDS = 1800
#: In a process that was forked once these were imported, a model is there in a second.
PRELOAD = (
    "braze.benchmarks.model_child",
    "braze.benchmarks.model_lightning",
    "timm.models.vision_transformer",
    "torchvision.models.resnet",
    "transformers.models.gpt2.modeling_gpt2",
    "transformers.models.llama.modeling_llama",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add ``--device`` and ``--model``."""
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", choices=("cpu", "cuda"), default=default, help="where to run (%(default)s)")
    listing = ", ".join(WORKLOADS)
    parser.add_argument("--model", action="append", choices=WORKLOADS, metavar="NAME", help=f"only this: {listing}")


def run(arguments: argparse.Namespace) -> list[Record]:
    """Measure, print the tables, and return flat records."""
    # Before OpenMP is loaded in the children: threads that spin while they wait take the cores from whoever computes,
    # and here every Trainer has threads of its own.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    scale: Scale = "quick" if arguments.quick else arguments.device
    wanted = arguments.model or [name for name, workload in WORKLOADS.items() if scale in workload.sizes]
    if elsewhere := [name for name in wanted if scale not in WORKLOADS[name].sizes]:
        sys.exit(f"models: {', '.join(elsewhere)} must run at full size on a GPU; leave --quick out, use --device cuda")
    found: list[Record] = []
    columns = (TextColumn("{task.description:32}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=tables.console()) as bar:
        task = bar.add_task("", total=len(wanted))
        for name in wanted:
            for message in measured(name, scale, arguments.device):
                if isinstance(message, Stage):
                    bar.update(task, description=f"{name}: {message.text}")
                    continue
                found.append(message)
                arguments.keep(found)
            bar.advance(task)
    show(found)
    return found


def measured(
    name: str,
    scale: Scale,
    device: str,
    measure: Callable[..., Iterator[Any]] = measure,
    preload: Sequence[str] = PRELOAD,
) -> Iterator[Stage | Record]:
    """The stages and records of a model from a process of its own; if that dies, a record that says how."""
    stage = "start"
    try:
        for message in messages(measure, name, scale, device, preload=preload, seconds=SECONDS):
            stage = message.text if isinstance(message, Stage) else stage
            yield message
    except ChildDied as died:
        yield {
            "benchmark": "models",
            "model": name,
            "provider": stage,
            "pass": "training",
            "device": device,
            "shape": shape(WORKLOADS[name].sizes[scale]),
            "status": f"failed: {died}",
        }


def show(found: Sequence[Record]) -> None:
    """Print a row for each provider and pass, and then in words what has no time."""
    console = tables.console()
    for which in ("training", "inference"):
        chosen = [record for record in found if record["pass"] == which]
        if any("median_ms" in record for record in chosen):
            console.print(_table(which, chosen))
    for model, size in dict.fromkeys((record["model"], record["shape"]) for record in found):
        console.print(f"[bold]{model}[/]: {size}", highlight=False)
    where: dict[tuple[str, str], list[str]] = {}
    for record in found:
        if record["status"] != "ok":
            where.setdefault((record["provider"], record["status"]), []).append(f"{record['model']} {record['pass']}")
    for (provider, status), places in where.items():
        console.print(f"[bold]{provider}[/] {status}: {', '.join(places)}", highlight=False)


def _table(which: str, found: Sequence[Record]) -> Table:
    first = next(record for record in found if "dtype" in record)
    title = f"{which}, {first['device']}, {first['dtype']}; ratios of times (95 % interval): above 1, braze is faster"
    table = Table(box=box.SIMPLE, title=title)
    for name in ("model", "provider"):
        table.add_column(name, no_wrap=True)
    figures = ("ms", "a second", "÷ braze", "÷ braze, run alike", "peak MiB")
    training = ("first loss", "last loss", "from vanilla's (budget)", "start, s")
    for name in figures + (training if which == "training" else ("answer from vanilla's (budget)",)):
        table.add_column(name, justify="right", no_wrap=True)
    previous = None
    for record in found:
        if record["model"] != previous:
            table.add_section()
        model = f"[bold]{record['model']}" if record["model"] != previous else ""
        previous = record["model"]
        table.add_row(model, record["provider"], *_cells(record), *_found(record))
    return table


def _cells(record: Record) -> tuple[str, ...]:
    if "median_ms" not in record:
        return (f"[bold red]{record['status'].split(':')[0]}[/]", "", "", "", "")
    speed = f"{record['items_per_second']:,.0f} {record['unit']}"
    ratios = [_ratio(record, prefix) for prefix in ("", "like_")]
    return (f"{record['median_ms']:.4g}", speed, *ratios, f"{record['peak_bytes'] / 2**20:.1f}")


def _ratio(record: Record, prefix: str) -> str:
    if prefix == "like_" and record["provider"] not in LIKE:
        return ""
    if f"{prefix}ratio" not in record:
        return "-"
    return tables.ratio({name: record[f"{prefix}{name}"] for name in ("ratio", "ratio_low", "ratio_high")})


def _found(record: Record) -> tuple[str, ...]:
    if "error_outputs" in record:
        return (f"{record['error_outputs']:.1e} ({record['budget_outputs']:.1e})",)
    if "loss_last" not in record:
        return ()
    apart = f"{record['loss_last_difference']:+.1e} ({record['loss_last_budget']:.1e})"
    return (f"{record['loss_first']:.4f}", f"{record['loss_last']:.4f}", apart, f"{record['start_s']:.1f}")
