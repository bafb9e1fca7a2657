"""``python -m braze.benchmarks loaders``: from samples to batches, against torch, timm, torchvision and transformers.

Providers take turns; a ratio is a provider's time over braze's. Before they are timed, their results are compared.
Samples are the same objects each time, so that only what happens to them counts. ``copy``, of the finished
batch, into memory that is there, is the floor: nothing that makes the same bytes is faster.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from rich import box
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from timm.data.loader import fast_collate
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate
from torchvision.transforms import v2
from transformers import DataCollatorWithFlattening

from braze.kernels import image_normalize
from braze.layouts import PackCollate, PackedBatch, SlabCollate

from . import tables, timing
from .records import Record

BASELINE, FLOOR = "braze", "copy"
ROUNDS, QUICK_ROUNDS = 25, 3
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
#: The largest normalized value.
LARGEST = (1 - MEAN[2]) / STD[2]
#: Of two results in float32: scaling and subtracting round values up to 1 (divided by std afterwards), then twice more.
TOLERANCE = 2 * (3 / min(STD) + 2 * LARGEST) * 2.0**-24


class Case(NamedTuple):
    """Providers of one result, and how far a result may be from braze's."""

    name: str
    providers: dict[str, Callable[[], Any]]
    tolerance: float = 0.0


#: Opens a case: what it needs (worker processes) ends with it.
Opener = Callable[[ExitStack, bool], Case]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add nothing: ``--quick`` and ``--json`` say it all."""


def run(arguments: argparse.Namespace) -> list[Record]:
    """Measure, print the table, and return one record for each case and provider."""
    rounds = QUICK_ROUNDS if arguments.quick else ROUNDS
    records: list[Record] = []
    with Progress(TextColumn("{task.description:40}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()) as bar:
        task = bar.add_task("", total=len(CASES))
        for opener in CASES:
            with ExitStack() as resources:
                case = opener(resources, arguments.quick)
                bar.update(task, description=case.name)
                records += measure(case, rounds)
            bar.advance(task)
    show(records)
    return records


def measure(case: Case, rounds: int, clock: timing.Clock = timing.cpu_clock) -> list[Record]:
    """Compare the results of all providers, then time them."""
    results = {name: list(_tensors(work())) for name, work in case.providers.items()}
    for name in results:
        _check(case, name, results[name], results[BASELINE])
    nbytes = sum(tensor.nbytes for tensor in results[BASELINE])
    del results
    samples = timing.compare(case.providers, clock, rounds)
    return [
        {
            "benchmark": "loaders",
            "case": case.name,
            "provider": name,
            "bytes": nbytes,
            **samples.figures(name, BASELINE),
            "rounds": rounds,
        }
        for name in case.providers
    ]


def _check(case: Case, name: str, found: list[Tensor], expected: list[Tensor]) -> None:
    if len(found) != len(expected):
        raise AssertionError(f"{case.name}: {name} gives {len(found)} tensors, braze {len(expected)}")
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=case.tolerance, msg=lambda m: f"{case.name}, {name}: {m}")


def _tensors(result: Any) -> Iterator[Tensor]:
    if isinstance(result, Tensor):
        yield result
    elif isinstance(result, dict):
        for key in sorted(result):
            yield from _tensors(result[key])
    elif isinstance(result, list | tuple):
        for item in result:
            yield from _tensors(item)


def collating(count: int, side: int) -> Opener:
    """Planar uint8 images with a label."""

    def open_case(resources: ExitStack, quick: bool) -> Case:
        samples = [(torch.from_numpy(_image(i, side)).permute(2, 0, 1).contiguous(), i) for i in range(count)]
        slab = SlabCollate()
        providers = {
            "default_collate": lambda: default_collate(samples),
            "timm fast_collate": lambda: fast_collate(samples),
            FLOOR: _copying(default_collate(samples)),
            BASELINE: lambda: slab(samples),
        }
        return Case(f"collate {count} images of {side}²", providers)

    return open_case


def channels_last(count: int, side: int) -> Opener:
    """Decoded images [H, W, C] → a batch [N, C, H, W] in channels-last memory; views of them for the others."""

    def open_case(resources: ExitStack, quick: bool) -> Case:
        decoded = [(_image(i, side), i) for i in range(count)]
        planar = [(image.transpose(2, 0, 1), i) for image, i in decoded]
        slab = SlabCollate(hwc=True)

        def restrided(collate: Callable[[Any], Any]) -> Any:
            x, y = collate(planar)
            return [x.to(memory_format=torch.channels_last), y]

        providers = {
            "default_collate + .to": lambda: restrided(default_collate),
            "timm fast_collate + .to": lambda: restrided(fast_collate),
            FLOOR: _copying(restrided(default_collate)),
            BASELINE: lambda: slab(decoded),
        }
        return Case(f"HWC → channels_last, {count} images of {side}²", providers)

    return open_case


def small_fields(resources: ExitStack, quick: bool) -> Case:
    """Sixteen fields of seven numbers: nothing for a slab to gain."""
    samples = [{f"field {k}": torch.full((7,), i + k) for k in range(16)} for i in range(64)]
    slab = SlabCollate()
    providers = {"default_collate": lambda: default_collate(samples), BASELINE: lambda: slab(samples)}
    return Case("collate 64 samples of 16 small fields", providers)


class Detections(Dataset):
    """An image and a few small fields, as detectors have them."""

    def __init__(self, batches: int, fields: int) -> None:
        self.count = 64 * batches
        self.sample = {"image": torch.from_numpy(_image(0, 224)).permute(2, 0, 1).contiguous()}
        self.sample |= {f"field {k}": torch.full((7,), k) for k in range(fields)}

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return self.sample


def from_a_worker(fields: int) -> Opener:
    """An epoch of batches of 64 images and small fields from one worker process."""

    def open_case(resources: ExitStack, quick: bool) -> Case:
        batches = 4 if quick else 16

        def epochs(collate: Callable[[Any], Any] | None) -> Callable[[], Any]:
            loader = resources.enter_context(_workers(Detections(batches, fields), collate))

            def epoch() -> Any:
                for batch in loader:
                    last = batch
                return last

            return epoch

        providers = {"default_collate": epochs(None), BASELINE: epochs(SlabCollate())}
        return Case(f"from a worker, {batches} batches of 64 images, {fields} fields", providers)

    return open_case


@contextmanager
def _workers(dataset: Dataset, collate: Callable[[Any], Any] | None) -> Iterator[DataLoader]:
    loader = DataLoader(dataset, batch_size=64, num_workers=1, persistent_workers=True, collate_fn=collate)
    yield loader
    loader._iterator = None  # ends the worker


def normalizing(count: int, dtype: torch.dtype) -> Opener:
    """uint8 → normalized floating point, contiguous, into memory that is there."""

    def open_case(resources: ExitStack, quick: bool) -> Case:
        x = torch.stack([torch.from_numpy(_image(i, 224)).permute(2, 0, 1) for i in range(count)])
        transform = v2.Compose([v2.ToDtype(torch.float32, scale=True), v2.Normalize(MEAN, STD), v2.ToDtype(dtype)])
        out = torch.empty(x.shape, dtype=dtype)
        providers = {
            "torchvision v2": lambda: transform(x),
            "braze, into fresh memory": lambda: image_normalize(x, MEAN, STD, dtype=dtype),
            FLOOR: _copying([transform(x)]),
            BASELINE: lambda: image_normalize(x, MEAN, STD, out=out),
        }
        # In bfloat16 a difference of one rounding in float32 may become one of a bfloat16 step.
        tolerance = TOLERANCE if dtype == torch.float32 else LARGEST * 2.0**-7
        return Case(f"normalize {count} images of 224² to {str(dtype).removeprefix('torch.')}", providers, tolerance)

    return open_case


def packing(count: int, as_lists: bool = False) -> Opener:
    """Sequences of 16 to 512 token ids, one behind the other, with labels and position ids."""

    def open_case(resources: ExitStack, quick: bool) -> Case:
        generator = torch.Generator().manual_seed(0)
        lengths = torch.randint(16, 513, (count,), generator=generator).tolist()
        tokens: list[Any] = [torch.randint(50_000, (length,), generator=generator) for length in lengths]
        samples = [{"input_ids": ids.tolist() if as_lists else ids} for ids in tokens]
        theirs, ours = DataCollatorWithFlattening(), PackCollate()
        out = ours(samples)

        def flattened(batch: dict[str, Tensor]) -> list[Tensor]:
            return [batch[name][0] for name in ("input_ids", "labels", "position_ids")]

        def fields(batch: PackedBatch) -> list[Any]:
            return [batch.tokens, batch.labels, batch.position_ids]

        providers = {
            "transformers, flattening": lambda: flattened(theirs(samples)),
            "braze, into fresh memory": lambda: fields(ours(samples)),
            FLOOR: _copying(fields(out)),
            BASELINE: lambda: fields(ours(samples, out=out)),
        }
        return Case(f"pack {count} {'lists' if as_lists else 'tensors'} of 16 to 512 tokens", providers)

    return open_case


def _copying(batch: list[Any]) -> Callable[[], list[Any]]:
    """The floor: copies of these tensors, as dense as they are, into memory that is there."""
    pairs = [(torch.empty_like(t), t.clone()) for t in batch]
    return lambda: [target.copy_(source) for target, source in pairs]


def _image(i: int, side: int) -> np.ndarray:
    return np.random.default_rng(i).integers(0, 256, (side, side, 3), dtype=np.uint8)


#: In the order of the table.
CASES: tuple[Opener, ...] = (
    collating(256, 224),
    collating(64, 224),
    collating(16, 224),
    collating(16, 32),
    small_fields,
    channels_last(256, 224),
    channels_last(64, 224),
    channels_last(4, 224),
    from_a_worker(0),
    from_a_worker(16),
    normalizing(64, torch.float32),
    normalizing(64, torch.bfloat16),
    normalizing(16, torch.float32),
    packing(512),
    packing(64),
    packing(512, as_lists=True),
)


def show(records: list[Record]) -> None:
    """Print a row for each provider; where braze gains nothing, the row says so."""
    table = Table(box=box.SIMPLE, title="From samples to batches")
    for name in ("case", "provider"):
        table.add_column(name, no_wrap=True)
    for name in ("MiB", "ms", "÷ braze (95 % interval)", ""):
        table.add_column(name, justify="right", no_wrap=True)
    for record in records:
        ours = record["provider"] == BASELINE
        table.add_row(
            record["case"],
            record["provider"],
            f"{record['bytes'] / 2**20:.3g}",
            f"{record['median_s'] * 1e3:.3g}",
            "" if ours else tables.ratio(record),
            "no gain" if record["provider"] not in (BASELINE, FLOOR) and record["ratio_low"] <= 1.0 else "",
            end_section=ours,
        )
    tables.console().print(table)
