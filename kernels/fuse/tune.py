"""Is a swap faster here? Original and fused take turns on the same inputs; the median of their ratios decides."""

from __future__ import annotations

import copy
import random
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from .sample import Draw
from .savings import leaf, tensors

#: Rounds of both, each of them first as often as the other. With 21 the 6th and the 16th ratio bound the median with
#: 97 % confidence, whatever their distribution (binomial).
ROUNDS, OUTER = 21, 5

#: Seconds of a sample: long against the clock's resolution, and a kernel's launch.
SAMPLE = 1e-3


@dataclass(frozen=True)
class Timing:
    """Time of the fused form over that of the original: the median, and an interval that it lies in (97 %)."""

    ratio: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.ratio:.2f} ({self.low:.2f} to {self.high:.2f})"


def verdict(timing: Timing, saves: bool) -> str:
    """Why a swap is not worth it here; nothing if it is: faster, or as fast and with less memory."""
    if timing.high < 1.0 or (timing.low <= 1.0 and saves):
        return ""
    how = "slower" if timing.low > 1.0 else "no faster, and saves no memory,"
    return f"{how} on the example: {timing} of the original's time"


def timed(original: nn.Module, fused: nn.Module, draw: Draw, dtype: torch.dtype, training: bool) -> Timing:
    """Compare modules in ``dtype`` on the draw, forward and backward, or forward only if not ``training``."""
    works = [_work(module, draw, dtype, training) for module in (original, fused)]
    device = draw.inputs[0].device
    for work in works:
        work()  # compiles, allocates
    repetitions = max(_repetitions(work, device) for work in works)
    order, ratios = random.Random(0), []
    for _ in range(ROUNDS):
        seconds = {}
        for i in order.sample((0, 1), 2):
            seconds[i] = clock(works[i], repetitions, device)
        ratios.append(seconds[1] / seconds[0])
    ratios.sort()
    return Timing(statistics.median(ratios), ratios[OUTER], ratios[-1 - OUTER])


def clock(work: Callable[[], None], repetitions: int, device: torch.device) -> float:
    """Seconds of so many calls."""
    _wait(device)
    start = time.perf_counter()
    for _ in range(repetitions):
        work()
    _wait(device)
    return time.perf_counter() - start


def _work(module: nn.Module, draw: Draw, dtype: torch.dtype, training: bool) -> Callable[[], None]:
    module = copy.deepcopy(module).to(dtype).train(training)
    plain = len(draw.inputs) - draw.tables
    inputs = [leaf(t, t.dtype, training and i < plain) for i, t in enumerate(draw.inputs)]
    leaves = [t for t in (*inputs, *module.parameters()) if t.requires_grad]

    def work() -> None:
        with torch.set_grad_enabled(training):
            outputs = module.forward(*inputs)
            results = [y for y in tensors(outputs) if y.requires_grad]
        if results:
            torch.autograd.grad(results, leaves, [torch.ones_like(y) for y in results], allow_unused=True)

    return work


def _repetitions(work: Callable[[], None], device: torch.device) -> int:
    repetitions = 1
    while clock(work, repetitions, device) < SAMPLE:
        repetitions *= 2
    return repetitions


def _wait(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
