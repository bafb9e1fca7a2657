"""Every operator against what PyTorch offers already: ``python -m braze.benchmarks ops``.

Three providers, timed in turns on the same inputs:

- ``aten``: the plain call in eager mode, as a user writes it (``Op.aten``);
- ``compiled``: ``torch.compile`` of that same plain call, with static shapes, which is its best case;
- ``braze``: the public function, with the implementation that it chooses here.

``copy`` is the floor under all three: a copy that moves the operator's least bytes. Where a result is outside the error
budget of the contract, ``braze`` is refused: it gets the word "wrong" and no time. The others are what people use, and
keep their times with a mark at the error.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from torch import Tensor

from braze.kernels import OPS, dispatch
from braze.kernels.op import Call, Dims, Draw, Op

from . import ops_table, timing
from .accuracy import Judge, leaves, tensors

DTYPES = (torch.float32, torch.bfloat16)
FORWARD, BOTH = PASSES = ("forward", "forward+backward")
BASELINE = "braze"
ROUNDS, QUICK_ROUNDS = 30, 10
#: Operands in float64 that the truth holds at once, forward and backward, in units of the forward pass's own.
TRUTH_COPIES = 6

Record = dict[str, Any]
Function = Callable[..., Any]


@dataclass(frozen=True)
class Case:
    """One operator on one shape and dtype."""

    op: Op
    dims: Dims
    dtype: torch.dtype
    device: torch.device

    def call(self) -> Call:
        """The arguments: always the same, differentiable where they can be."""
        options = {**self.op.variants["default"], **self.dims}
        return self.op.inputs(Draw(0, self.dtype, self.device), **options)

    def passes(self) -> tuple[str, ...]:
        """What there is to time."""
        return PASSES if self.op.differentiable else (FORWARD,)

    def least_bytes(self, which: str, itemsize: int | None = None) -> int:
        """What the operator must move at least."""
        options = {**self.op.variants["default"], **self.dims}
        traffic = self.op.traffic(itemsize or self.dtype.itemsize, **options)
        return traffic.forward + (traffic.backward if which == BOTH else 0)

    def record(self, which: str, provider: str, **figures: Any) -> Record:
        """A flat record of one measurement."""
        return {
            "benchmark": "ops",
            "op": self.op.name,
            "provider": provider,
            "pass": which,
            "dtype": str(self.dtype).removeprefix("torch."),
            "shape": " ".join(f"{name}={size}" for name, size in self.dims.items()),
            "device": device_name(self.device),
            "threads": torch.get_num_threads(),
            **figures,
        }


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of ``python -m braze.benchmarks ops``, beside those that all benchmarks share."""
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", choices=("cpu", "cuda"), default=default, help="where to run (%(default)s)")
    names = [op.name for op in OPS]
    parser.add_argument("--op", action="append", choices=names, metavar="NAME", help=f"only this: {', '.join(names)}")


def run(arguments: argparse.Namespace) -> list[Record]:
    """Measure, print the table, and return flat records."""
    ops = [op for op in OPS if not arguments.op or op.name in arguments.op]
    cases = list(_cases(ops, torch.device(arguments.device), arguments.quick))
    rounds = QUICK_ROUNDS if arguments.quick else ROUNDS
    records: list[Record] = []
    columns = (TextColumn("{task.description:40}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    # A case has its own compilations of the same plain function; past the limit torch.compile would go eager, silently.
    with Progress(*columns) as progress, torch._dynamo.config.patch(recompile_limit=10_000):
        task = progress.add_task("", total=len(cases))
        for case in cases:
            progress.update(task, description=f"{case.op.name} {dict(case.dims)}")
            records += measure(case, rounds)
            progress.advance(task)
    records += geometric_means(records)
    ops_table.show(records)
    return records


def measure(case: Case, rounds: int, clock: timing.Clock | None = None) -> list[Record]:
    """Time all providers of one case, after a look at their results."""
    needed, memory = TRUTH_COPIES * case.least_bytes(FORWARD, itemsize=8), _memory(case.device)
    if needed > memory:
        status = f"skipped: the float64 truth needs about {needed / 1e9:.0f} GB, there are {memory / 1e9:.0f}"
        return [
            case.record(which, name, status=status) for which in case.passes() for name in ("aten", "compiled", "braze")
        ]
    call = case.call()
    judge = Judge(case.op, call)
    found = []
    for which in case.passes():
        functions, absent = _providers(case, call)
        found += [case.record(which, name, status=f"unavailable: {why}") for name, why in absent.items()]
        found += _measure_pass(case, call, judge, which, functions, rounds, clock or timing.clock_for(case.device))
    return found


def _measure_pass(
    case: Case,
    call: Call,
    judge: Judge,
    which: str,
    functions: dict[str, Function],
    rounds: int,
    clock: timing.Clock,
) -> list[Record]:
    backward = which == BOTH
    judged = {name: fn for name, fn in functions.items() if name == BASELINE or not case.op.random}
    errors = {name: judge.errors(fn, gradients=backward) for name, fn in judged.items()}
    work = {
        name: _work(fn, call, judge.cotangents if backward else None)
        for name, fn in functions.items()
        if name != BASELINE or not errors[name].wrong
    }
    work["copy"] = _copy(case.least_bytes(which), case.device)
    with torch.set_grad_enabled(backward):
        samples = timing.compare(work, clock, rounds)
    records = []
    for name in (*functions, "copy"):
        figures: Record = {"status": "ok", "implementation": _implementation(case, call, name)}
        if name in errors:
            figures["error_outputs"], figures["error_gradients"], wrong = errors[name]
            if wrong:
                figures["status"] = f"wrong: {wrong}"
        if name in work:
            low, median, high = samples.quartiles(name)
            figures |= {"median_ms": 1e3 * median, "quartile_low_ms": 1e3 * low, "quartile_high_ms": 1e3 * high}
            figures |= {"least_bytes": case.least_bytes(which), "rounds": rounds}
            if BASELINE in work and name != BASELINE:
                ratio = samples.ratio(name, BASELINE)
                figures |= {"ratio": ratio.value, "ratio_low": ratio.low, "ratio_high": ratio.high}
        records.append(case.record(which, name, **figures))
    return records


def geometric_means(records: Sequence[Record]) -> list[Record]:
    """The geometric mean of the ratios to braze over shapes and dtypes, for each operator, pass and provider."""
    groups: dict[tuple[str, str, str], list[Record]] = {}
    for record in records:
        if "ratio" in record and record["provider"] != "copy":
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


def device_name(device: torch.device) -> str:
    """The device as a reader should know it."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def _cases(ops: Sequence[Op], device: torch.device, quick: bool) -> Iterator[Case]:
    for op in ops:
        shapes = sorted(op.bench, key=lambda dims: Case(op, dims, torch.float32, device).least_bytes(FORWARD))
        for dims in shapes[:1] if quick else shapes:
            for dtype in DTYPES:
                yield Case(op, dims, dtype, device)


def _providers(case: Case, call: Call) -> tuple[dict[str, Function], dict[str, str]]:
    """The functions to time, and why others are absent."""
    missing = dispatch.unavailable(case.op, "compile", case.device.type, case.dtype)
    functions = {"aten": case.op.aten}
    if not missing:
        functions["compiled"] = torch.compile(case.op.aten, dynamic=False)
    return functions | {BASELINE: case.op.fn}, {"compiled": missing} if missing else {}


def _implementation(case: Case, call: Call, provider: str) -> str:
    if provider != BASELINE:
        return {"aten": "eager", "compiled": "torch.compile of the eager form", "copy": "Tensor.copy_"}[provider]
    chosen = []

    def choose(*arguments: Any) -> dispatch.Choice:
        chosen.append(before(*arguments))
        return chosen[-1]

    before, dispatch.choose = dispatch.choose, choose
    try:
        case.op.fn(*call.args, **call.kwargs)
    finally:
        dispatch.choose = before
    return chosen[0].backend


def _work(fn: Function, call: Call, cotangents: Sequence[Tensor] | None) -> timing.Work:
    args, kwargs = call
    if cotangents is None:
        return lambda: fn(*args, **kwargs)
    wanted = leaves(call)

    def forward_and_backward() -> object:
        return torch.autograd.grad(tensors(fn(*args, **kwargs)), wanted, cotangents)

    return forward_and_backward


def _copy(least_bytes: int, device: torch.device) -> timing.Work:
    source = torch.ones(least_bytes // 2, dtype=torch.int8, device=device)
    target = torch.empty_like(source)
    return lambda: target.copy_(source)


def _memory(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
