"""``python -m braze.benchmarks scaling``: how time and memory grow with the size of what an operator is given.

Forward and backward, along one axis at a time: rows, their length, vocabulary, sequence length, width of a model. The
providers are those of ``ops``: the plain call in eager mode, the same under ``torch.compile`` with static shapes, and
braze; float32 on the CPU, bfloat16 on a GPU. The roofline is the time of the operator's least bytes at the speed of a
large copy, or of its products at the speed of a large matrix product if that is longer, both measured in the same run.
What fits into a cache may be under it.

Results are judged at the smallest and the largest size, against the reference in float64. Where braze is outside its
budget it is refused, at all sizes; the others keep their times, with a mark. Memory is the most that a call has
allocated at one time; its floor are the gradients, which are there at the end.
"""

from __future__ import annotations

import argparse
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from braze.kernels import OPS
from braze.kernels.op import Dims

from . import ceilings, memory, scaling_report, tables, timing
from .accuracy import Judge, cotangents_for, leaves, tensors
from .ceilings import Ceilings
from .ops_case import BOTH, Case
from .ops_measure import no_room
from .providers import ATEN, BASELINE, COMPILED, Absent, Provider, providers
from .records import Record

PROVIDERS = (ATEN, COMPILED, BASELINE)
ROUNDS, QUICK_ROUNDS = 15, 5
QUICK_SIZES = 3
#: The sizes at the end whose times the slope is fitted to.
UPPER = 3


@dataclass(frozen=True)
class Sweep:
    """An operator on growing sizes."""

    op: str
    axis: str
    dims: Callable[[int], Dims]
    cpu: Sequence[int]
    cuda: Sequence[int]
    variant: str = "default"

    def case(self, size: int, device: torch.device) -> Case:
        """The operator on one size."""
        op = next(op for op in OPS if op.name == self.op)
        return Case(op, self.dims(size), _dtype(device), device, self.variant)


SWEEPS = (
    Sweep(
        "rms_norm",
        "rows",
        lambda n: {"N": n, "D": 1024},
        cpu=(128, 512, 2048, 8192, 16_384),
        cuda=(512, 2048, 8192, 32_768, 131_072),
    ),
    Sweep(
        "rms_norm",
        "row length",
        lambda n: {"N": 1024, "D": n},
        cpu=(128, 512, 2048, 8192, 16_384),
        cuda=(256, 1024, 4096, 16_384, 65_536),
    ),
    Sweep(
        "cross_entropy",
        "vocabulary",
        lambda n: {"N": 512, "C": n},
        cpu=(1024, 4096, 8192, 16_384, 32_768),
        cuda=(8192, 16_384, 32_768, 65_536, 131_072),
    ),
    Sweep(
        "linear_cross_entropy",
        "vocabulary",
        lambda n: {"N": 512, "D": 256, "C": n},
        cpu=(1024, 2048, 4096, 8192, 16_384),
        cuda=(8192, 16_384, 32_768, 65_536, 131_072),
    ),
    Sweep(
        "rope",
        "sequence length",
        lambda n: {"B": 1, "H": 8, "S": n, "D": 64},
        cpu=(128, 512, 2048, 8192, 32_768),
        cuda=(1024, 4096, 16_384, 65_536, 131_072),
    ),
    Sweep(
        "softmax",
        "sequence length",
        lambda n: {"B": 4, "Q": n, "K": n},
        cpu=(128, 256, 512, 1024, 2048),
        cuda=(512, 1024, 2048, 4096, 8192),
        variant="causal",
    ),
    Sweep(
        "glu",
        "width",
        lambda n: {"N": 1024, "D": n},
        cpu=(128, 512, 2048, 8192, 16_384),
        cuda=(1024, 4096, 8192, 16_384, 65_536),
    ),
    Sweep(
        "gated_mlp",
        "width",
        lambda n: {"N": 512, "D": n, "H": 3 * n},
        cpu=(64, 128, 256, 512, 1024),
        cuda=(512, 1024, 2048, 4096, 8192),
    ),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add ``--device``, ``--op`` and ``--plot``."""
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", choices=("cpu", "cuda"), default=default, help="where to run (%(default)s)")
    names = list(dict.fromkeys(sweep.op for sweep in SWEEPS))
    parser.add_argument("--op", action="append", choices=names, metavar="NAME", help=f"only this: {', '.join(names)}")
    parser.add_argument("--plot", type=Path, default=Path("scaling.png"), metavar="FILE", help="where the curves go")


def run(arguments: argparse.Namespace) -> list[Record]:
    """Measure, print the tables, draw the curves, and return flat records."""
    # The profiler's notes would tear up the progress bar.
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    device = torch.device(arguments.device)
    sweeps = [sweep for sweep in SWEEPS if not arguments.op or sweep.op in arguments.op]
    rounds = QUICK_ROUNDS if arguments.quick else ROUNDS
    sizes = {sweep: getattr(sweep, device.type)[: QUICK_SIZES if arguments.quick else None] for sweep in sweeps}
    limits = ceilings.measure(device, [_dtype(device)])
    found: list[Record] = []
    columns = (TextColumn("{task.description:40}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    # A size has its own compilation of the same plain function; past the limit torch.compile would go eager, silently.
    with Progress(*columns, console=tables.console()) as bar, torch._dynamo.config.patch(recompile_limit=10_000):
        task = bar.add_task("", total=sum(map(len, sizes.values())))
        for sweep in sweeps:
            bar.update(task, description=f"{sweep.op}, {sweep.axis}")
            for of_size in measure(sweep, sizes[sweep], device, limits, rounds, timing.clock_for(device)):
                found += of_size
                bar.advance(task)
                arguments.keep(found)
    found += slopes(found)
    scaling_report.show(found)
    scaling_report.plot(found, arguments.plot)
    print(f"curves: {arguments.plot}")
    return found


def measure(
    sweep: Sweep,
    sizes: Sequence[int],
    device: torch.device,
    limits: Ceilings,
    rounds: int,
    clock: timing.Clock,
) -> Iterator[list[Record]]:
    """The records of each size of a sweep; what is wrong at an end of it is known before the first is timed."""
    contestants = _contestants(sweep.case(sizes[0], device))
    wrong: dict[str, str] = {}
    checked = set()
    for size in dict.fromkeys((sizes[0], sizes[-1])):
        verdicts = judge(sweep.case(size, device), contestants)
        if verdicts is not None:
            checked.add(size)
            wrong = {**{name: f"wrong: at {size}, {what}" for name, what in verdicts.items()}, **wrong}
    for size in sizes:
        case = sweep.case(size, device)
        there = {name: one for name, one in contestants.items() if isinstance(one, Provider)}
        timed = {name: one for name, one in there.items() if one.keeps_time or name not in wrong}
        figures = _figures(case, timed, rounds, clock)
        least = case.least_bytes(BOTH)
        roofline = limits.seconds(case.dtype, least, case.matmul_flops(BOTH) or 0)
        common = {
            "benchmark": "scaling",
            "axis": sweep.axis,
            "size": size,
            "judged": size in checked,
            "least_bytes": least,
            "copy_ceiling_gbs": limits.copy_gbs,
            "matmul_ceiling_tflops": limits.matmul(case.dtype),
            "roofline_ms": None if roofline is None else 1e3 * roofline,
        }
        for name, one in contestants.items():
            status = one.reason if isinstance(one, Absent) else wrong.get(name, "ok")
            figures[name] = {**common, "status": status, **figures.get(name, {})}
        yield [case.record(BOTH, name, **figures[name]) for name in PROVIDERS]


def judge(case: Case, contestants: Mapping[str, Provider | Absent]) -> dict[str, str] | None:
    """What is wrong with whom; None where the truth does not fit into memory."""
    if no_room(case):
        return None
    truth = Judge(case.op, case.call())
    there = {name: one.function for name, one in contestants.items() if isinstance(one, Provider)}
    errors = {name: truth.errors(fn, gradients=True) for name, fn in there.items()}
    return {name: one.wrong for name, one in errors.items() if one.wrong}


def _contestants(case: Case) -> dict[str, Provider | Absent]:
    found = providers(case, case.call(), only=PROVIDERS)
    return {name: found[name] for name in PROVIDERS}


def slopes(found: Sequence[Record]) -> list[Record]:
    """For each curve, the power of the size with which time grows: the slope of log time over log size, upper sizes."""
    curves: dict[tuple[str, str, str], list[Record]] = {}
    for record in found:
        if "median_ms" in record:
            curves.setdefault((record["op"], record["axis"], record["provider"]), []).append(record)
    keep = ("op", "axis", "provider", "pass", "dtype", "device")
    return [
        {
            "benchmark": "scaling slope",
            **{name: curve[0][name] for name in keep},
            "shape": f"{curve[-UPPER:][0]['shape']} … {curve[-1]['shape']}",
            "slope": slope([(r["size"], r["median_ms"]) for r in curve[-UPPER:]]),
        }
        for curve in curves.values()
        if len(curve) > 1
    ]


def slope(points: Sequence[tuple[float, float]]) -> float:
    """Least squares in logarithms."""
    x, y = ([math.log(point[i]) for point in points] for i in range(2))
    middle_x, middle_y = sum(x) / len(x), sum(y) / len(y)
    covariance = sum((a - middle_x) * (b - middle_y) for a, b in zip(x, y, strict=True))
    return covariance / sum((a - middle_x) ** 2 for a in x)


def _dtype(device: torch.device) -> torch.dtype:
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def _figures(case: Case, timed: Mapping[str, Provider], rounds: int, clock: timing.Clock) -> dict[str, Record]:
    call = case.call()
    with torch.no_grad():
        outputs = tensors(case.op.fn(*call.args, **call.kwargs))
    cotangents = cotangents_for(outputs)
    del outputs
    works = {name: case.work(BOTH, one.function, call, cotangents) for name, one in timed.items()}
    samples = timing.compare(works, clock, rounds)
    peaks = memory.peaks(works, case.device)
    floor = sum(x.nbytes for x in leaves(call))
    return {
        name: {
            **samples.milliseconds(name, BASELINE),
            "rounds": rounds,
            "peak_bytes": peaks[name],
            "gradient_bytes": floor,
        }
        for name in works
    }
