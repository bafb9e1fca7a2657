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
from typing import Any

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from braze.kernels import OPS, dispatch
from braze.kernels.op import Call, Dims, Draw, Op

from . import ceilings, memory, scaling_report, tables, timing
from .accuracy import TRUTH_COPIES, Judge, leaves, tensors
from .ceilings import Ceilings
from .ops_case import device_name
from .records import Record

PASS = "forward+backward"
BRAZE = "braze"
PROVIDERS = ("aten", "compiled", BRAZE)
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
    #: Whether arithmetic is most of it: products of matrices.
    matmul: bool = False

    @property
    def operator(self) -> Op:
        """The operator itself."""
        return next(op for op in OPS if op.name == self.op)

    def call(self, size: int, dtype: torch.dtype, device: torch.device) -> Call:
        """The arguments at a size: always the same."""
        return self.operator.inputs(Draw(0, dtype, device), **self._options(size))

    def least_bytes(self, size: int, itemsize: int) -> int:
        """What must be moved at least, forward and backward."""
        return sum(self.operator.traffic(itemsize, **self._options(size)))

    def flops(self, size: int) -> int:
        """Of matrix products, forward and backward: the gradient of each operand is one more."""
        return 3 * self.operator.flops(**self.dims(size)) if self.matmul else 0

    def _options(self, size: int) -> dict[str, Any]:
        return {**self.operator.variants[self.variant], **self.dims(size)}


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
        matmul=True,
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
        matmul=True,
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
    functions, absent = _providers(sweep.operator, device)
    wrong: dict[str, str] = {}
    checked = set()
    for size in dict.fromkeys((sizes[0], sizes[-1])):
        verdicts = judge(sweep, size, functions, device)
        if verdicts is not None:
            checked.add(size)
            wrong = {**verdicts, **wrong}
    for size in sizes:
        timed = {name: fn for name, fn in functions.items() if name != BRAZE or name not in wrong}
        figures = _figures(sweep.call(size, _dtype(device), device), timed, device, rounds, clock)
        least, dtype = sweep.least_bytes(size, _dtype(device).itemsize), _dtype(device)
        roofline = limits.seconds(dtype, least, sweep.flops(size))
        yield [
            {
                "benchmark": "scaling",
                "op": sweep.op,
                "provider": name,
                "pass": PASS,
                "dtype": str(dtype).removeprefix("torch."),
                "axis": sweep.axis,
                "size": size,
                "shape": " ".join(f"{dim}={n}" for dim, n in sweep.dims(size).items()),
                "device": device_name(device),
                "threads": torch.get_num_threads(),
                "status": absent.get(name) or (f"wrong: {wrong[name]}" if name in wrong else "ok"),
                "judged": size in checked,
                "least_bytes": least,
                "copy_ceiling_gbs": limits.copy_gbs,
                "matmul_ceiling_tflops": limits.matmul(dtype),
                "roofline_ms": None if roofline is None else 1e3 * roofline,
                **figures.get(name, {}),
            }
            for name in PROVIDERS
        ]


def judge(
    sweep: Sweep, size: int, functions: Mapping[str, Callable[..., Any]], device: torch.device
) -> dict[str, str] | None:
    """What is wrong with whom at a size; None where the truth does not fit into memory."""
    if TRUTH_COPIES * sweep.least_bytes(size, 8) > memory.available(device):
        return None
    call = sweep.call(size, _dtype(device), device)
    truth = Judge(sweep.operator, call)
    errors = {name: truth.errors(fn, gradients=True) for name, fn in functions.items()}
    return {name: f"at {size}, {one.wrong}" for name, one in errors.items() if one.wrong}


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


def _providers(op: Op, device: torch.device) -> tuple[dict[str, Callable[..., Any]], dict[str, str]]:
    missing = dispatch.unavailable(op, "compile", device.type, _dtype(device))
    functions = {"aten": op.aten, BRAZE: op.fn}
    if missing:
        return functions, {"compiled": f"unavailable: {missing}"}
    return functions | {"compiled": torch.compile(op.aten, dynamic=False)}, {}


def _figures(
    call: Call, functions: Mapping[str, Callable[..., Any]], device: torch.device, rounds: int, clock: timing.Clock
) -> dict[str, Record]:
    wanted = leaves(call)
    with torch.no_grad():
        outputs = tensors(next(iter(functions.values()))(*call.args, **call.kwargs))
    generator = torch.Generator().manual_seed(1)
    cotangents = [torch.randn(y.shape, generator=generator).to(y.device, y.dtype) for y in outputs]
    del outputs

    def work(fn: Callable[..., Any]) -> timing.Work:
        return lambda: torch.autograd.grad(tensors(fn(*call.args, **call.kwargs)), wanted, cotangents)

    works = {name: work(fn) for name, fn in functions.items()}
    samples = timing.compare(works, clock, rounds)
    found = {}
    for name, one in works.items():
        low, median, high = samples.quartiles(name)
        figures: Record = {"median_ms": 1e3 * median, "quartile_low_ms": 1e3 * low, "quartile_high_ms": 1e3 * high}
        if BRAZE in works and name != BRAZE:
            ratio = samples.ratio(name, BRAZE)
            figures |= {"ratio": ratio.value, "ratio_low": ratio.low, "ratio_high": ratio.high}
        peak = memory.peak(one, device)
        floor = sum(x.numel() * x.element_size() for x in wanted)
        found[name] = {**figures, "rounds": rounds, "peak_bytes": peak, "gradient_bytes": floor}
    return found
