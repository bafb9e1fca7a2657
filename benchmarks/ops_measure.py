"""Everything that is known of one case: who is right, how fast with warm and with cold caches, and at what cost."""

from __future__ import annotations

import functools
import gc
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

from braze.kernels.op import Call

from . import memory, prediction, timing
from .accuracy import TRUTH_COPIES, Errors, Judge, tensors
from .ceilings import Ceilings, clocks_mhz
from .ops_case import FORWARD, Case, Function
from .providers import AUTOTUNED, BASELINE, COMPILED, Absent, Provider, providers
from .records import Record

COPY = "copy"
#: Calls in one sample of a GPU's host time: well under the thousand kernels or so after which queueing waits.
QUEUED_CALLS = 20
#: Seconds of a forward pass above which nothing is timed: a processor without instructions for a dtype (bfloat16 with
#: AVX2) takes minutes for a matrix product, of whichever provider.
LONGEST_FORWARD = 10.0


class Effort(NamedTuple):
    """How many rounds are timed: with warm caches, with cold ones, and of the host's part.

    50 show a difference of 5 % where two samples of a round differ by 6 % by chance, as on a busy machine;
    ``selfcheck`` looks whether they do on this one.
    """

    rounds: int = 50
    cold_rounds: int = 10
    host_rounds: int = 10
    #: Seconds of samples of a pass, warm or cold, after which no further round begins.
    longest: float = 30.0
    #: Whether, on a CPU, compiled functions are compiled again for the tiny inputs that show the host's part.
    compile_tiny: bool = True


QUICK = Effort(rounds=10, cold_rounds=2, host_rounds=3, longest=1.0, compile_tiny=False)


class Contestant(NamedTuple):
    """A provider that ran, and its errors (None: it draws random numbers of its own)."""

    provider: Provider
    errors: Errors | None

    def judged(self, which: str) -> Errors | None:
        """The errors of one pass."""
        return self.errors.of_outputs() if self.errors and which == FORWARD else self.errors

    def timed(self, which: str) -> bool:
        """Whether its time means anything."""
        errors = self.judged(which)
        return self.provider.keeps_time or errors is None or not errors.over


def measure(
    case: Case,
    effort: Effort,
    ceilings: Ceilings | None = None,
    clocks: timing.Clocks | None = None,
    only: Sequence[str] = (),
    also: Mapping[str, Provider] | None = None,
) -> list[Record]:
    """Time all providers of one case that are right, after a look at their results; ``also`` these further ones."""
    status = no_room(case) or _takes_too_long(case, ceilings)
    if status:
        return [case.record(which, BASELINE, status=status) for which in case.passes()]
    call = case.call()
    judge = Judge(case.op, call)
    there = {**providers(case, call, only), **(also or {})}
    found = {name: _judged(case, judge, name, one) for name, one in there.items()}
    records = [
        case.record(which, name, status=one.reason)
        for name, one in found.items()
        if isinstance(one, Absent)
        for which in case.passes()
    ]
    contestants = {name: one for name, one in found.items() if isinstance(one, Contestant)}
    with torch.set_grad_enabled(case.op.differentiable), _settled_heap():
        for which in case.passes():
            own_clocks = clocks or timing.clocks_for(case.device)
            records += _pass(case, which, call, judge.cotangents, contestants, effort, own_clocks, ceilings)
    return records


def no_room(case: Case) -> str | None:
    """Why the truth about a case cannot be known here."""
    # Of a loss that finds its gradients forward, that pass moves the logits several times.
    least = min(case.least_bytes(which, itemsize=8) for which in case.passes())
    needed, free = TRUTH_COPIES * least, memory.available(case.device)
    if needed > free:
        return f"skipped: the float64 truth needs about {needed / 1e9:.0f} GB, there are {free / 1e9:.0f}"
    return None


def _takes_too_long(case: Case, ceilings: Ceilings | None) -> str | None:
    flops = case.matmul_flops(FORWARD)
    seconds = ceilings.seconds(case.dtype, 0, flops) if ceilings and flops else None
    if flops and seconds and seconds > LONGEST_FORWARD:
        rate = flops / seconds / 1e9
        return f"skipped: at {rate:.3g} GFLOP/s of {case.dtype} a forward pass would take {seconds:.0f} s"
    return None


@contextmanager
def _settled_heap() -> Iterator[None]:
    """Leave what is there already out of further collections: torch.compile's objects would take 0.3 s each time."""
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


@functools.cache
def counted() -> prediction.Counts:
    """What the audit counted, read once."""
    return prediction.recorded()


def _judged(case: Case, judge: Judge, name: str, one: Provider | Absent) -> Contestant | Absent:
    if isinstance(one, Absent):
        return one
    if case.op.random and name != BASELINE:
        return Contestant(one, None)
    try:
        return Contestant(one, judge.errors(one.function, gradients=case.op.differentiable))
    except Exception as error:
        if one.keeps_time or name == BASELINE:
            raise
        said = str(error).strip().splitlines() or ["no message"]
        return Absent(f"failed: {type(error).__name__}: {said[0]}")


def _pass(
    case: Case,
    which: str,
    call: Call,
    cotangents: Sequence[Tensor],
    contestants: Mapping[str, Contestant],
    effort: Effort,
    clocks: timing.Clocks,
    ceilings: Ceilings | None,
) -> list[Record]:
    functions = {name: one.provider.function for name, one in contestants.items() if one.timed(which)}
    work: dict[str, timing.Work] = {name: case.work(which, fn, call, cotangents) for name, fn in functions.items()}
    peaks = memory.peaks(work, case.device)
    host = _host(case, which, functions, work, effort, clocks)
    work[COPY] = case.copy(which)
    warm = timing.compare(work, clocks.warm, effort.rounds, longest=effort.longest)
    once = None if case.device.type == "cuda" else 1
    cold = timing.compare(work, clocks.cold, effort.cold_rounds, once, effort.longest)
    common = {"least_bytes": case.least_bytes(which), "rounds": warm.rounds, **clocks_mhz(case.device)}
    records = []
    for name in (*contestants, COPY):
        figures: Record = {"status": "ok", "implementation": "Tensor.copy_"}
        if name != COPY:
            figures = _verdict(contestants[name], which)
        if name in work:
            figures |= warm.milliseconds(name, BASELINE) | _cold(name, cold) | common
            figures |= _of_ceilings(case, which, figures["median_ms"] / 1e3, ceilings)
            predicted = name == BASELINE and ceilings and prediction.predicted_us(case, which, counted(), ceilings)
            figures |= {"predicted_us": predicted} if predicted else {}
        figures |= {"host_us": 1e6 * host[name]} if name in host else {}
        figures |= {"peak_bytes": peaks[name]} if name in peaks else {}
        records.append(case.record(which, name, **figures))
    return records


def _verdict(one: Contestant, which: str) -> Record:
    figures: Record = {"status": "ok", "implementation": one.provider.implementation}
    errors = one.judged(which)
    if errors:
        figures |= {"error_outputs": errors.outputs, "error_gradients": errors.gradients}
        if errors.wrong:
            figures["status"] = f"wrong: {errors.wrong}"
    return figures


def _cold(name: str, cold: timing.Samples) -> Record:
    ratio = cold.ratio_fields(name, BASELINE, prefix="cold_")
    found = {"cold_ratio": ratio["cold_ratio"]} if ratio else {}
    return {"cold_median_ms": 1e3 * cold.quartiles(name).median, **found}


def _of_ceilings(case: Case, which: str, seconds: float, ceilings: Ceilings | None) -> Record:
    """Above 100 % of the copy where the operands have stayed in a cache, which those of the ceiling's copy do not."""
    if ceilings is None:
        return {}
    reached = case.least_bytes(which) / seconds / 1e9
    figures = {"copy_ceiling_gbs": ceilings.copy_gbs, "percent_of_copy": 100 * reached / ceilings.copy_gbs}
    flops, ceiling = case.matmul_flops(which), ceilings.matmul(case.dtype)
    if flops and ceiling:
        figures |= {"matmul_ceiling_tflops": ceiling, "percent_of_matmul": flops / seconds / 1e10 / ceiling}
    return figures


def _host(
    case: Case,
    which: str,
    functions: Mapping[str, Function],
    work: Mapping[str, timing.Work],
    effort: Effort,
    clocks: timing.Clocks,
) -> dict[str, float]:
    """Seconds of the host a call: on a GPU to queue it; on a CPU those of the whole call on :meth:`Case.tiny`."""
    if clocks.host:
        samples = timing.compare(work, clocks.host, effort.host_rounds, QUEUED_CALLS)
        return {name: samples.quartiles(name).median for name in work}
    tiny = case.tiny()
    call = tiny.call()
    cotangents = [torch.ones_like(y) for y in tensors(case.op.fn(*call.args, **call.kwargs))]
    small = {
        name: tiny.work(which, function, call, cotangents)
        for name, function in functions.items()
        if effort.compile_tiny or name not in (COMPILED, AUTOTUNED)
    }
    samples = timing.compare(small, clocks.warm, effort.host_rounds)
    return {name: samples.quartiles(name).median for name in small}
