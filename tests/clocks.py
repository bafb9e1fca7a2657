"""Clocks that run on no machine: known costs in, so that the figures that come out can be told right from wrong."""

from __future__ import annotations

import math
import random

from braze.benchmarks import timing


class FakeClock:
    """Charges each work its price, times a slowness that drifts from one sample to the next."""

    def __init__(self, drift: float = 0.0) -> None:
        self.prices: dict[timing.Work, float] = {}
        self.order: list[timing.Work] = []
        self.drift = drift

    def __call__(self, work: timing.Work, repetitions: int) -> float:
        self.order.append(work)
        return repetitions * self.prices.get(work, 1e-3) * math.exp(self.drift * len(self.order))


class NoisyClock(FakeClock):
    """A shared machine: its slowness wanders by a tenth, calls jitter by 3 %, one sample of twenty is interrupted.

    The wandering has the memory of ten samples, and what is read is whole microseconds.
    """

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.random = random.Random(seed)
        self.slowness = 0.0

    def __call__(self, work: timing.Work, repetitions: int) -> float:
        self.slowness = 0.9 * self.slowness + self.random.gauss(0.0, 0.1 * math.sqrt(1 - 0.9**2))
        jitter = self.random.gauss(0.0, 0.03)
        interruption = self.random.expovariate(2.0) if self.random.random() < 0.05 else 0.0
        seconds = super().__call__(work, repetitions) * math.exp(self.slowness + jitter) * (1 + interruption)
        return round(1e6 * seconds) / 1e6


def providers(clock: FakeClock, **prices: float) -> dict[str, timing.Work]:
    """Works that do nothing, and cost the clock so many seconds."""
    works: dict[str, timing.Work] = {name: (lambda name=name: name) for name in prices}
    clock.prices = {works[name]: price for name, price in prices.items()}
    return works
