"""Paired timing: providers take turns, so that a slow minute of the machine slows all of them.

One round times every provider once, in an order shuffled anew for each round; a sample is as many calls as take
``SAMPLE_SECONDS`` or more, of every provider equally many where that is not too long. What is reported is the median
with its quartiles, and, against a baseline, the typical ratio *within* a round with its confidence interval: drifts
that outlast a round cancel.

A clock decides what a call finds in the caches. Warm: what the calls before it left there. Cold: nothing of its own.
"""

from __future__ import annotations

import functools
import gc
import math
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch


class Prepared(NamedTuple):
    """Work that is timed from its middle on: each call of ``finish`` takes what a call of ``prepare`` has made.

    All that a sample needs is made before its clock starts, so that a backward pass runs once on a graph of its own,
    as it does in training, and not again and again on one that is retained.
    """

    prepare: Callable[[], Any]
    finish: Callable[[Any], object]


Work = Callable[[], object] | Prepared
#: ``clock(work, repetitions)``: the seconds that so many calls of ``work`` take.
Clock = Callable[[Work, int], float]

#: Long against the clock's resolution and a scheduler's tick (about 1 ms).
SAMPLE_SECONDS = 2e-3
#: Up to this, samples are as many calls as the quickest provider's. The first call of a sample finds the caches as the
#: provider before left them, and of some graphs the first to be used up is the longest unused: where equal works had
#: one call and two for a sample, they seemed to differ by a fifth.
EQUAL_SECONDS = 2e-2
#: Rounds that are timed however long they take: with fewer a ratio has no interval but its whole range.
FEWEST_ROUNDS = 6


class Quartiles(NamedTuple):
    """Seconds a call: the lower quartile, the median, the upper quartile."""

    low: float
    median: float
    high: float


class Ratio(NamedTuple):
    """A ratio of times and its 95 % confidence interval."""

    value: float
    low: float
    high: float


class Samples:
    """Seconds a call by provider: one sample for each round, in the order of the rounds."""

    def __init__(self, seconds: Mapping[str, Sequence[float]]) -> None:
        self._seconds = {name: np.asarray(samples) for name, samples in seconds.items()}

    @property
    def rounds(self) -> int:
        """How many there were."""
        return min(map(len, self._seconds.values()), default=0)

    def quartiles(self, provider: str) -> Quartiles:
        """The spread of one provider's samples."""
        return Quartiles(*(float(q) for q in np.percentile(self._seconds[provider], (25, 50, 75))))

    def figures(self, provider: str, baseline: str) -> dict[str, float]:
        """Both, as the fields of a record."""
        low, median, high = self.quartiles(provider)
        ratio = self.ratio(provider, baseline)
        spread = {"median_s": median, "quartile_low_s": low, "quartile_high_s": high}
        return {**spread, "ratio": ratio.value, "ratio_low": ratio.low, "ratio_high": ratio.high}

    def milliseconds(self, provider: str, baseline: str) -> dict[str, float]:
        """The spread in milliseconds, as the fields of a record; the ratio, if the baseline was timed, too."""
        low, median, high = self.quartiles(provider)
        spread = {"median_ms": 1e3 * median, "quartile_low_ms": 1e3 * low, "quartile_high_ms": 1e3 * high}
        return spread | self.ratio_fields(provider, baseline)

    def ratio_fields(self, provider: str, baseline: str, prefix: str = "") -> dict[str, float]:
        """The ratio to another provider, as the fields of a record; none where that was not timed."""
        if baseline not in self._seconds or baseline == provider:
            return {}
        ratio = self.ratio(provider, baseline)
        return {f"{prefix}ratio": ratio.value, f"{prefix}ratio_low": ratio.low, f"{prefix}ratio_high": ratio.high}

    def ratio(self, provider: str, baseline: str) -> Ratio:
        """How many times as long as ``baseline`` the ``provider`` takes.

        The estimate is the median of all pairs of rounds, each pair its mean, of the logarithm of the ratio (Hodges and
        Lehmann, 1963); the interval inverts Wilcoxon's signed-rank test. In a round the order is a draw of lots, so
        that the logarithm's distribution is symmetric for equal providers, and the interval holds whatever the noise
        is. It needs a third fewer rounds than the interval of a median. Under six rounds it is the whole range.
        """
        logs = np.log(self._seconds[provider] / self._seconds[baseline])
        n = len(logs)
        first, second = np.triu_indices(n)
        means = np.sort((logs[first] + logs[second]) / 2)
        outside = _outside(n)
        return Ratio(*(float(np.exp(x)) for x in (np.median(means), means[outside], means[-1 - outside])))


@functools.cache
def _outside(rounds: int) -> int:
    """How many means of pairs lie outside each end of the interval: the signed-rank statistic's 2.5 % quantile."""
    chances = np.ones(1)
    for rank in range(1, rounds + 1):
        chances = np.convolve(chances, [0.5, *[0.0] * (rank - 1), 0.5])
    return max(0, int(np.searchsorted(np.cumsum(chances), 0.025, side="right")) - 1)


def compare(
    providers: Mapping[str, Work],
    clock: Clock,
    rounds: int,
    repetitions: int | None = None,
    longest: float = math.inf,
) -> Samples:
    """Time every provider once in each round, after a warm-up that also finds how many calls make a sample.

    ``repetitions`` says it instead, for a clock whose single call is long enough. After ``longest`` seconds on the
    clock no further round begins, once there are ``FEWEST_ROUNDS``.
    """
    order = random.Random(0)
    seconds: dict[str, list[float]] = {name: [] for name in providers}
    spent = 0.0
    with _no_garbage_collection():
        calls = dict.fromkeys(providers, repetitions) if repetitions else _repetitions(providers, clock)
        for done in range(rounds):
            if done >= FEWEST_ROUNDS and spent > longest:
                break
            for name in order.sample(list(providers), len(providers)):
                sample = clock(providers[name], calls[name])
                seconds[name].append(sample / calls[name])
                spent += sample
    return Samples(seconds)


def ready(work: Work, repetitions: int) -> list[Callable[[], object]]:
    """That many calls of ``work``, prepared. Whoever holds the list keeps what they need alive."""
    if isinstance(work, Prepared):
        return [functools.partial(work.finish, work.prepare()) for _ in range(repetitions)]
    return [work] * repetitions


def cpu_clock(work: Work, repetitions: int) -> float:
    """Wall time. Caches stay as the providers leave them: each follows each other one equally often."""
    calls = ready(work, repetitions)
    start = time.perf_counter()
    for call in calls:
        call()
    return time.perf_counter() - start


class ColdCpuClock:
    """Wall time, each call after a walk through more memory than the last-level cache holds."""

    def __init__(self) -> None:
        self._walked = torch.ones(5 * last_level_cache_bytes() // 4 // 4)

    def __call__(self, work: Work, repetitions: int) -> float:
        """Seconds; the walks are not counted."""
        total = 0.0
        for call in ready(work, repetitions):
            self._walked.sum()
            total += cpu_clock(call, 1)
        return total


def last_level_cache_bytes() -> int:
    """The largest cache of the first core; 64 MiB where the system does not say."""
    sizes = [path.read_text().strip() for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")]
    return max((int(size.removesuffix("K")) * 2**10 for size in sizes if size.endswith("K")), default=64 * 2**20)


def host_clock(work: Work, repetitions: int) -> float:
    """Wall time until the calls are queued, on a device that was idle: what they keep the host busy for."""
    calls = ready(work, repetitions)
    torch.cuda.synchronize()
    start = time.perf_counter()
    for call in calls:
        call()
    seconds = time.perf_counter() - start
    torch.cuda.synchronize()
    return seconds


class CudaClock:
    """Time on the device, between events, each call after a flush of the L2 cache.

    Writing the flush buffer takes the device longer than the host needs to queue the call behind it, so that launch
    overhead does not show, which is wanted here: host overhead is a measurement of its own.
    """

    def __init__(self, device: torch.device) -> None:
        l2_bytes = torch.cuda.get_device_properties(device).L2_cache_size
        self._flush = torch.empty(max(4 * l2_bytes, 256 * 2**20), dtype=torch.int8, device=device)

    def __call__(self, work: Work, repetitions: int) -> float:
        """Seconds on the device; the flushes are not counted."""
        events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repetitions)]
        calls = ready(work, repetitions)
        for call, (start, end) in zip(calls, events, strict=True):
            self._flush.zero_()
            start.record()
            call()
            end.record()
        torch.cuda.synchronize()
        return sum(start.elapsed_time(end) for start, end in events) / 1e3


class WarmCudaClock:
    """Time on the device of calls back to back, which find in the L2 cache what the one before left there.

    The calls of a sample are captured in one CUDA graph, which needs no host: the device alone bounds small sizes.
    What refuses to be captured, and a backward pass, whose graphs are prepared anew for each sample, is queued behind
    writes of a large buffer instead, as in :class:`CudaClock`; of what takes the host longer than those, the host's
    time shows.
    """

    #: Writes of the buffer, 256 MiB or more, that are queued ahead: 0.1 ms each on an H100.
    AHEAD = 20

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._cold = CudaClock(device)
        self._graphs: dict[Work, tuple[int, torch.cuda.CUDAGraph | None]] = {}

    def __call__(self, work: Work, repetitions: int) -> float:
        """Seconds on the device."""
        if self._graphs.get(work, (0,))[0] != repetitions:
            graph = None if isinstance(work, Prepared) else self._captured(work, repetitions)
            self._graphs[work] = repetitions, graph
        graph = self._graphs[work][1]
        calls = ready(work, repetitions) if graph is None else [graph.replay]
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        for _ in range(self.AHEAD if graph is None else 1):
            self._cold._flush.zero_()
        if graph is not None:
            graph.replay()
        start.record()
        for call in calls:
            call()
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end) / 1e3

    def _captured(self, work: Callable[[], object], repetitions: int) -> torch.cuda.CUDAGraph | None:
        aside = torch.cuda.Stream(self._device)
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):  # outside of the capture: libraries make their handles on the first call
            work()
        torch.cuda.current_stream().wait_stream(aside)
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph):
                for _ in range(repetitions):
                    work()
        except RuntimeError:  # a synchronization, or an allocation outside of torch
            torch.cuda.synchronize()
            return None
        return graph


class Clocks(NamedTuple):
    """What a call takes with warm and with cold caches, and what it takes of the host (None: the same as warm)."""

    warm: Clock
    cold: Clock
    host: Clock | None = None


def clocks_for(device: torch.device) -> Clocks:
    """All clocks of a device. Those of a GPU keep what they captured: take new ones for the next works."""
    if device.type == "cuda":
        return Clocks(WarmCudaClock(device), CudaClock(device), host_clock)
    return Clocks(cpu_clock, _cold_cpu_clock())


@functools.cache  # its memory is slow to fill
def _cold_cpu_clock() -> ColdCpuClock:
    return ColdCpuClock()


def clock_for(device: torch.device) -> Clock:
    """The clock that tells the truth on ``device``."""
    return CudaClock(device) if device.type == "cuda" else cpu_clock


def _repetitions(providers: Mapping[str, Work], clock: Clock) -> dict[str, int]:
    """How many calls of each make a sample."""
    seconds = {name: _seconds(work, clock) for name, work in providers.items()}
    most = math.ceil(SAMPLE_SECONDS / min(seconds.values()))
    return {
        name: max(math.ceil(SAMPLE_SECONDS / call), min(most, int(EQUAL_SECONDS / call)))
        for name, call in seconds.items()
    }


def _seconds(work: Work, clock: Clock) -> float:
    """Those of a call where nothing interrupts it, by the quickest of tries of up to ``SAMPLE_SECONDS``.

    Equal works must get samples of equal length. Interruptions often miss a short one and never a long one: on a
    machine with five processes for each core, equal works whose lengths came from one try each seemed to differ six
    times.
    """
    for call in ready(work, 1):
        call()  # compiles, allocates
    repetitions, quickest = 1, _quickest(work, clock, 1)
    while repetitions * quickest < SAMPLE_SECONDS:
        repetitions *= 2
        quickest = min(quickest, _quickest(work, clock, repetitions))
    return quickest


def _quickest(work: Work, clock: Clock, repetitions: int) -> float:
    """Seconds a call: two tries, of which one may be interrupted."""
    return min(clock(work, repetitions), clock(work, repetitions)) / repetitions


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    gc.collect()
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
