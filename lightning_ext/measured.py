"""What the meters of a run read: windows of steps, their summary on one page, and its picture."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from statistics import median

from .table import Table


@dataclasses.dataclass(frozen=True)
class Window:
    """Means over some steps, up to ``step``."""

    step: int
    seconds: float  #: a step took
    wait: float  #: seconds of these in which the loop's thread waited for its batch, and for it to be on the device
    rate: float | None  #: samples or tokens per second, of all processes
    flops: float | None  #: FLOP/s of this device
    mfu: float | None  #: of the device's peak
    memory: int  #: bytes: of tensors on the device at the peak, or of the process where that is the CPU

    def metrics(self, unit: str) -> dict[str, float]:
        """As they are logged: milliseconds, units per second, 10¹² FLOP/s, GiB."""
        found = {
            "step_ms": 1e3 * self.seconds,
            "wait_ms": 1e3 * self.wait,
            f"{unit}_per_s": self.rate,
            "tflops": None if self.flops is None else self.flops / 1e12,
            "mfu": self.mfu,
            "peak_gib": self.memory / 2**30,
        }
        return {name: value for name, value in found.items() if value is not None}


def summary(windows: Sequence[Window], unit: str, title: str, notes: Sequence[str] = ()) -> Table:
    """A line for each metric: median over the windows, and their extremes.

    Where there are several, the first is left out: it holds compilation and the first allocations.
    """
    steady = windows[1:] or windows
    readings = [window.metrics(unit) for window in steady]
    rows = []
    for name in dict.fromkeys(name for reading in readings for name in reading):
        values = [reading[name] for reading in readings if name in reading]
        rows.append((name, *(f"{value:.4g}" for value in (median(values), min(values), max(values)))))
    share = sum(window.wait for window in steady) / sum(window.seconds for window in steady)
    counted = f"readings: {len(steady)}, up to batch {windows[-1].step}; waiting for data took {share:.1%} of the time"
    return Table(("metric", "median", "least", "most"), rows, title=title, notes=(counted, *notes))


def draw(windows: Sequence[Window], unit: str, title: str, path: Path) -> None:
    """Write the picture: time of a step, throughput, and what there is of utilization and memory, over the steps."""
    from matplotlib.figure import Figure  # not pyplot, whose backend is the user's

    steps = [window.step for window in windows]
    figure = Figure(figsize=(9, 6), layout="constrained")
    axes = figure.subplots(2, 2, sharex=True)
    time, rate, use, memory = axes.flat
    time.plot(steps, [1e3 * window.seconds for window in windows], marker=".", label="step")
    time.plot(steps, [1e3 * window.wait for window in windows], marker=".", label="of it waiting for data")
    time.set(ylabel="ms", yscale="log")
    time.legend(frameon=False)
    _line(rate, steps, [window.rate for window in windows], f"{unit} per second")
    if windows[-1].mfu is not None:
        _line(use, steps, [window.mfu for window in windows], "MFU")
    else:
        _line(use, steps, [window.flops and window.flops / 1e12 for window in windows], "10¹² FLOP/s")
    _line(memory, steps, [window.memory / 2**30 for window in windows], "peak memory, GiB")
    for axis in axes.flat:
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(axis="y", linewidth=0.4)
    for axis in axes[-1]:
        axis.set_xlabel("batches")
    figure.suptitle(title, fontsize=10)
    figure.savefig(path, dpi=120)


def _line(axis: object, steps: Sequence[int], values: Sequence[float | None], label: str) -> None:
    known = [(step, value) for step, value in zip(steps, values, strict=True) if value is not None]
    if known:
        axis.plot(*zip(*known, strict=True), marker=".")  # type: ignore[attr-defined]
        axis.set_ylim(bottom=0)  # type: ignore[attr-defined]
    else:
        axis.text(0.5, 0.5, "not counted", ha="center", transform=axis.transAxes)  # type: ignore[attr-defined]
    axis.set_ylabel(label)  # type: ignore[attr-defined]
