"""Paired timing: providers take turns, so that a slow minute of the machine slows all of them.

One round times every provider once, in an order shuffled anew for each round; a sample is as many calls as take
``SAMPLE_SECONDS`` or more. What is reported is the median with its quartiles, and, against a baseline, the median over
rounds of the ratio *within* a round, with a bootstrap confidence interval: drifts that outlast a round cancel.
"""

from __future__ import annotations

import gc
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
import torch

Work = Callable[[], object]
#: ``clock(work, repetitions)``: the seconds that so many calls of ``work`` take.
Clock = Callable[[Work, int], float]

#: Long against the clock's resolution and a scheduler's tick (about 1 ms).
SAMPLE_SECONDS = 2e-3
#: Resamples of a bootstrap: the ends of a 95 % interval are then themselves known to about half a percentile.
RESAMPLES = 2000


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

    def quartiles(self, provider: str) -> Quartiles:
        """The spread of one provider's samples."""
        return Quartiles(*(float(q) for q in np.percentile(self._seconds[provider], (25, 50, 75))))

    def figures(self, provider: str, baseline: str) -> dict[str, float]:
        """Both, as the fields of a record."""
        low, median, high = self.quartiles(provider)
        ratio = self.ratio(provider, baseline)
        spread = {"median_s": median, "quartile_low_s": low, "quartile_high_s": high}
        return {**spread, "ratio": ratio.value, "ratio_low": ratio.low, "ratio_high": ratio.high}

    def ratio(self, provider: str, baseline: str) -> Ratio:
        """How many times as long as ``baseline`` the ``provider`` takes."""
        ratios = self._seconds[provider] / self._seconds[baseline]
        draws = np.random.default_rng(0).choice(ratios, (RESAMPLES, len(ratios)))
        low, high = np.percentile(np.median(draws, axis=1), (2.5, 97.5))
        return Ratio(float(np.median(ratios)), float(low), float(high))


def compare(providers: Mapping[str, Work], clock: Clock, rounds: int) -> Samples:
    """Time every provider once in each round, after a warm-up that also finds how many calls make a sample."""
    order = random.Random(0)
    seconds: dict[str, list[float]] = {name: [] for name in providers}
    with _no_garbage_collection():
        repetitions = {name: _repetitions(work, clock) for name, work in providers.items()}
        for _ in range(rounds):
            for name in order.sample(list(providers), len(providers)):
                seconds[name].append(clock(providers[name], repetitions[name]) / repetitions[name])
    return Samples(seconds)


def cpu_clock(work: Work, repetitions: int) -> float:
    """Wall time. Caches stay as the providers leave them: each follows each other one equally often."""
    start = time.perf_counter()
    for _ in range(repetitions):
        work()
    return time.perf_counter() - start


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
        for start, end in events:
            self._flush.zero_()
            start.record()
            work()
            end.record()
        torch.cuda.synchronize()
        return sum(start.elapsed_time(end) for start, end in events) / 1e3


def clock_for(device: torch.device) -> Clock:
    """The clock that tells the truth on ``device``."""
    return CudaClock(device) if device.type == "cuda" else cpu_clock


def _repetitions(work: Work, clock: Clock) -> int:
    work()  # compiles, allocates
    repetitions = 1
    while clock(work, repetitions) < SAMPLE_SECONDS:
        repetitions *= 2
    return repetitions


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
