"""Every operator against what PyTorch and others offer already: ``python -m braze.benchmarks ops``.

Providers, timed in turns on the same inputs:

- ``aten``: the plain call in eager mode, as a user writes it (``Op.aten``);
- ``torch``: PyTorch's own fused form, where ``aten`` is not that already;
- ``compiled``: ``torch.compile`` of the plain call, with static shapes, which is its best case; ``max-autotune``: in
  that mode, on a GPU, and on a CPU where it is asked for;
- ``braze``: the public function, with the implementation that it chooses here;
- other libraries of kernels (``peers``), where they are installed and run on the device.

``copy`` is the floor under all of them: a copy that moves the operator's least bytes.

Results come before times. Where one is outside the error budget of the contract, ``braze`` and the other libraries are
refused: they get the word "wrong" and no time. PyTorch's forms are what people use, and keep their times with a mark at
the error.

Passes are those of a training step. ``forward`` records its graph, as training needs it. ``backward`` runs alone, on
graphs that were made before its clock started, each used once: no graph is retained, and no time is a difference of
two. ``forward+backward`` is the whole. All compiled forms are compiled once for all three.

``--quick`` on a CPU is for a first look: small sizes, float32, few rounds, and as many processes with one thread each
as there are cores, which share the operators. Most of its time goes into compiling.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from braze.kernels import OPS
from braze.kernels.op import Dims

from . import ceilings, ops_table
from .ops_case import Case, cases
from .ops_measure import COPY, QUICK, Effort, measure
from .providers import NAMES
from .records import Record

DTYPES = (torch.float32, torch.bfloat16)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of ``python -m braze.benchmarks ops``, beside those that all benchmarks share."""
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", choices=("cpu", "cuda"), default=default, help="where to run (%(default)s)")
    names = [op.name for op in OPS]
    parser.add_argument("--op", action="append", choices=names, metavar="NAME", help=f"only this: {', '.join(names)}")
    parser.add_argument(
        "--provider", action="append", choices=NAMES, metavar="NAME", help=f"only this and braze: {', '.join(NAMES)}"
    )


def run(arguments: argparse.Namespace) -> list[Record]:
    """Measure, print the tables, and return flat records."""
    device = torch.device(arguments.device)
    ops = [op for op in OPS if not arguments.op or op.name in arguments.op]
    todo = list(cases(ops, DTYPES, device, quick=arguments.quick))
    dtypes = list(dict.fromkeys(case.dtype for case in todo))
    apart = arguments.quick and device.type == "cpu" and len(ops) > 1
    records: list[Record] = []
    columns = (TextColumn("{task.description:40}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns) as progress:
        task = progress.add_task("ceilings of this machine", total=len(todo))
        only = tuple(arguments.provider or ())
        limits = ceilings.measure(device, dtypes)
        effort = QUICK if arguments.quick else Effort()
        found_by_case = _in_processes(todo, limits, only) if apart else _one_by_one(todo, effort, limits, only)
        for case, found in found_by_case:
            records += found
            arguments.keep(records)
            progress.update(task, description=f"{case.op.name} {dict(case.dims)}", advance=1)
    order = [op.name for op in ops]
    records.sort(key=lambda record: order.index(record["op"]))
    records += geometric_means(records)
    ops_table.show(records)
    return records


def _one_by_one(
    todo: Sequence[Case], effort: Effort, limits: ceilings.Ceilings, only: Sequence[str]
) -> Iterator[tuple[Case, list[Record]]]:
    # A case has its own compilations of the same plain function; past the limit torch.compile would go eager, silently.
    with torch._dynamo.config.patch(recompile_limit=10_000):
        for case in todo:
            yield case, measure(case, effort, limits, only=only)


def _in_processes(
    todo: Sequence[Case], limits: ceilings.Ceilings, only: Sequence[str]
) -> Iterator[tuple[Case, list[Record]]]:
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(os.cpu_count(), context, torch.set_num_threads, (1,)) as pool:
        running = {pool.submit(_quickly, case.op.name, case.dims, limits, only): case for case in todo}
        try:
            for done in as_completed(running):
                yield running[done], done.result()
        finally:
            pool.shutdown(cancel_futures=True)


def _quickly(name: str, dims: Dims, limits: ceilings.Ceilings, only: Sequence[str]) -> list[Record]:
    op = next(op for op in OPS if op.name == name)
    case = Case(op, dims, DTYPES[0], torch.device("cpu"))
    return [record for _, found in _one_by_one([case], QUICK, limits, only) for record in found]


def geometric_means(records: Sequence[Record]) -> list[Record]:
    """The geometric mean of the ratios to braze over shapes and dtypes, for each operator, pass and provider."""
    groups: dict[tuple[str, str, str], list[Record]] = {}
    for record in records:
        if "ratio" in record and record["provider"] != COPY:
            groups.setdefault((record["op"], record["pass"], record["provider"]), []).append(record)
    return [
        {
            "benchmark": "ops geometric mean",
            "op": op,
            "provider": provider,
            "pass": which,
            "dtype": ", ".join(dict.fromkeys(r["dtype"] for r in group)),
            "shape": ", ".join(dict.fromkeys(r["shape"] for r in group)),
            "ratio": float(torch.tensor([r["ratio"] for r in group], dtype=torch.float64).log().mean().exp()),
        }
        for (op, which, provider), group in groups.items()
    ]
