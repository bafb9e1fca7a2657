"""``python -m braze.benchmarks optim``: a step of the optimizers against torch.optim's three forms.

The parameters have the shapes of ResNet-50 and of GPT-2 with 124 million parameters. Times are taken in turns; a ratio
is a provider's time over braze's. Before that, what the Triton kernels move and become is audited, with no GPU, and
times are predicted from it (``prediction.py``), on a GPU beside the measured ones.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from rich import box
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from torch import nn

from braze.kernels import optim
from braze.kernels.audit.child import audit_others
from braze.kernels.audit.optimizers import CASES, least_bytes

from . import ceilings, prediction, tables, timing
from .records import Record

BASELINE = "braze"
ROUNDS, QUICK_ROUNDS = 11, 3

#: What is compared: the class, its arguments, and the norm to which gradients are clipped before.
STEPS: dict[str, tuple[str, dict[str, Any], float | None]] = {
    "SGD, momentum": ("SGD", {"lr": 1e-4, "momentum": 0.9, "weight_decay": 1e-4}, None),
    "Adam": ("Adam", {"lr": 1e-6}, None),
    "AdamW": ("AdamW", {"lr": 1e-6}, None),
    "AdamW, clipped": ("AdamW", {"lr": 1e-6}, 1.0),
}
FORMS = {"for-loop": {"foreach": False, "fused": False}, "foreach": {"foreach": True}, "fused": {"fused": True}}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the device."""
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", choices=("cpu", "cuda"), default=default, help=f"default: {default}")


def run(arguments: argparse.Namespace) -> list[Record]:
    """Audit, measure, print the tables, and return one record for each kernel, target, model, step and provider."""
    records: list[Record] = [
        {"benchmark": "optim", "measure": what, **record}
        for what in ("traffic", "code")
        for record in audit_others("optimizers", what)
    ]
    show_audit(records)
    models = {name: shapes for name, shapes in MODELS.items() if name == "ResNet-50" or not arguments.quick}
    traffic = [record for record in records if record["measure"] == "traffic"]
    predictions = predict(traffic, models, {f"{gpu}, assumed": limits for gpu, limits in prediction.ASSUMED.items()})
    show_predictions(predictions)
    timed: list[Record] = []
    with Progress(TextColumn("{task.description:24}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()) as bar:
        task = bar.add_task("", total=len(models) * len(STEPS))
        for model, shapes in models.items():
            params = [torch.randn(shape, device=arguments.device) for shape in shapes()]
            for step in STEPS:
                bar.update(task, description=f"{model}, {step}")
                timed += measure(model, params, step, QUICK_ROUNDS if arguments.quick else ROUNDS)
                bar.advance(task)
    if arguments.device == "cuda":
        own = predict(traffic, models, {"cuda": ceilings.measure(torch.device("cuda"), ())})
        predicted = {(record["model"], record["op"]): record["predicted_us"] for record in own}
        for record in timed:
            if record["provider"] == BASELINE:
                record["predicted_us"] = predicted.get((record["model"], record["op"]))
    show(timed)
    return records + predictions + timed


def predict(
    traffic: Iterable[Record],
    models: Mapping[str, Callable[[], Iterator[torch.Size]]],
    gpus: Mapping[str, ceilings.Ceilings],
) -> list[Record]:
    """What each audited step of a model's parameters, one launch, should take."""
    found = []
    for record in traffic:
        for model, shapes in models.items():
            sizes = [shape.numel() for shape in shapes()]
            moved = record["ratio"] * least_bytes(CASES[record["case"]], sizes)
            facts = {"model": model, "op": record["case"], "tensors": len(sizes), "elements": sum(sizes)}
            for gpu, limits in gpus.items():
                figures = {"device": gpu, "predicted_us": prediction.bytes_us(moved, 1, limits)}
                found.append({"benchmark": "optim", "measure": "prediction", "provider": BASELINE, **facts, **figures})
    return found


def _resnet() -> Iterator[torch.Size]:
    import torchvision

    with torch.device("meta"):
        yield from (p.shape for p in torchvision.models.resnet50().parameters())


def _gpt2() -> Iterator[torch.Size]:
    import transformers

    with torch.device("meta"):
        yield from (p.shape for p in transformers.GPT2LMHeadModel(transformers.GPT2Config()).parameters())


MODELS: dict[str, Callable[[], Iterator[torch.Size]]] = {"ResNet-50": _resnet, "GPT-2 124M": _gpt2}


def measure(model: str, values: list[torch.Tensor], step: str, rounds: int) -> list[Record]:
    """The time of a step by every provider, on parameters and gradients that they share."""
    name, arguments, max_norm = STEPS[step]
    params = [nn.Parameter(value) for value in values]
    for p in params:
        p.grad = torch.randn_like(p)
    providers: dict[str, timing.Work] = {
        f"torch, {form}": _step(getattr(torch.optim, name)(params, **arguments, **options), params, max_norm)
        for form, options in FORMS.items()
    }
    providers[BASELINE] = getattr(optim, name)(params, **arguments, max_norm=max_norm).step
    samples = timing.compare(providers, timing.clock_for(values[0].device), rounds)
    elements = sum(p.numel() for p in params)
    return [
        {
            "benchmark": "optim",
            "measure": "time",
            "model": model,
            "op": step,
            "provider": provider,
            "device": values[0].device.type,
            "dtype": "float32",
            "tensors": len(params),
            "elements": elements,
            **samples.figures(provider, BASELINE),
            "rounds": rounds,
        }
        for provider in providers
    ]


def _step(optimizer: torch.optim.Optimizer, params: list[nn.Parameter], max_norm: float | None) -> timing.Work:
    def clipped() -> None:
        assert max_norm is not None
        nn.utils.clip_grad_norm_(params, max_norm)
        optimizer.step()

    return optimizer.step if max_norm is None else clipped


def show(records: list[Record]) -> None:
    """Print a row for each provider."""
    table = Table(box=box.SIMPLE, title="A step of an optimizer, float32")
    for name in ("parameters of", "step", "provider"):
        table.add_column(name, no_wrap=True)
    for name in ("ms", "predicted ms", "÷ braze (95 % interval)"):
        table.add_column(name, justify="right", no_wrap=True)
    for record in records:
        predicted = record.get("predicted_us")
        table.add_row(
            f"{record['model']}: {record['elements'] / 1e6:.1f} M in {record['tensors']}",
            record["op"],
            record["provider"],
            f"{record['median_s'] * 1e3:.1f}",
            "-" if predicted is None else f"{predicted / 1e3:.2f}",
            tables.ratio(record),
        )
    _print(table)


def show_predictions(records: list[Record]) -> None:
    """Print, for each step, what it should take on GPUs that are not here."""
    gpus = list(dict.fromkeys(record["device"] for record in records))
    table = Table(box=box.SIMPLE, title="Predicted microseconds of a step, from its bytes and one launch; not measured")
    for name in ("parameters of", "step"):
        table.add_column(name, no_wrap=True)
    for gpu in gpus:
        table.add_column(gpu, justify="right", no_wrap=True)
    rows: dict[tuple[str, str], list[str]] = {}
    for record in records:
        rows.setdefault((record["model"], record["op"]), []).append(f"{record['predicted_us']:.0f}")
    for row, cells in rows.items():
        table.add_row(*row, *cells)
    _print(table)


def show_audit(records: list[Record]) -> None:
    """Print, for each step, what it moves and, over all targets, what its kernel became."""
    table = Table(box=box.SIMPLE, title="Triton kernels, with no GPU")
    table.add_column("step", no_wrap=True)
    for name in ("moved ÷ least bytes", "registers", "spills", "widest access"):
        table.add_column(name, justify="right", no_wrap=True)
    traffic, code = ([r for r in records if r["measure"] == what] for what in ("traffic", "code"))
    for record in traffic:
        own = [r for r in code if r["case"] == record["case"]]
        table.add_row(
            record["case"],
            f"{record['ratio']:.3f}",
            f"{min(r['registers'] for r in own)} … {max(r['registers'] for r in own)}",
            str(max(r["spills"] for r in own)),
            f"{min(r['widest_load'] for r in own)} bit",
        )
    _print(table)


def _print(table: Table) -> None:
    tables.console().print(table)
