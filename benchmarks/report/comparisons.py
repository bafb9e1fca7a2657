"""Who is faster: every case in which somebody else was timed against braze, read the same way for all benchmarks.

A ratio is the other's time ÷ braze's: above 1, braze is faster. It is "faster" or "slower" where the 95 % interval lies
on one side of 1, and "same" where it holds 1.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from ..records import Record

FASTER, SAME, SLOWER, UNKNOWN = VERDICTS = ("faster", "same", "slower", "no interval")

#: What stands for braze in the benchmarks that compare layouts and not libraries.
OURS = {"channels_last": "channels_last", "freed_memory": "kept", "packing": "packed"}
#: Benchmarks whose ratios are against the other: ours ÷ theirs.
INVERTED = {"packing"}
#: Neither is a competitor: a copy is a floor, and means are counted anew from their cases.
NOT_COMPARED = ("ops geometric mean", "scaling slope", "kernels", "rounding", "zoo", "audit")

CASE_FIELDS = ("op", "model", "case", "shape", "axis", "size", "pass", "dtype")


@dataclass(frozen=True)
class Comparison:
    """One case, one provider: its time ÷ braze's, with the ends of the interval where there is one."""

    benchmark: str
    machine: str
    case: str
    provider: str
    ratio: float
    low: float | None
    high: float | None
    record: Record

    @property
    def verdict(self) -> str:
        """What the interval says of braze."""
        if self.low is None or self.high is None:
            return UNKNOWN
        return FASTER if self.low > 1 else SLOWER if self.high < 1 else SAME


def comparisons(records: Iterable[Record]) -> list[Comparison]:
    """All comparisons that the records hold."""
    found = []
    for record in records:
        benchmark, provider = record["benchmark"], record.get("provider")
        # A compiled model is compared with braze's compiled, where that was timed.
        prefix = "like_" if finite(record.get("like_ratio")) else ""
        ratio, low, high = (finite(record.get(prefix + name)) for name in ("ratio", "ratio_low", "ratio_high"))
        if benchmark in NOT_COMPARED or provider in (None, "copy") or ratio is None:
            continue
        mine = str(provider).startswith(OURS.get(benchmark, "braze"))
        if mine != (benchmark in INVERTED):
            continue
        name = str(provider)
        if benchmark in INVERTED:
            ratio, low, high, name = 1 / ratio, low and 1 / low, high and 1 / high, "padded"
            low, high = high, low
        found.append(Comparison(benchmark, record["machine"], case(record), name, ratio, low, high, record))
    return found


def refused(records: Iterable[Record]) -> list[Record]:
    """Where braze's own result was wrong, and so got no time."""
    return [r for r in records if str(r.get("provider")) == "braze" and str(r.get("status", "ok")).startswith("wrong")]


def case(record: Record) -> str:
    """What was measured, in words."""
    return ", ".join(str(record[name]) for name in CASE_FIELDS if record.get(name) not in (None, ""))


def finite(value: object) -> float | None:
    """A positive number, or None for whatever else stands there: figures of nothing are not drawn and not counted."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if math.isfinite(value) and value > 0 else None


def geometric_mean(ratios: Iterable[float]) -> float:
    """exp(mean(log ratio))."""
    logs = [math.log(ratio) for ratio in ratios]
    return math.exp(math.fsum(logs) / len(logs))


@dataclass(frozen=True)
class Standing:
    """How one provider stands against braze over all cases of a benchmark on a machine."""

    machine: str
    benchmark: str
    provider: str
    mean: float
    counts: dict[str, int]


def standings(found: Iterable[Comparison]) -> list[Standing]:
    """The headline."""
    groups: dict[tuple[str, str, str], list[Comparison]] = {}
    for one in found:
        groups.setdefault((one.machine, one.benchmark, one.provider), []).append(one)
    return [
        Standing(*key, geometric_mean(one.ratio for one in group),
                 {verdict: sum(one.verdict == verdict for one in group) for verdict in VERDICTS})
        for key, group in groups.items()
    ]  # fmt: skip


def slower(found: Iterable[Comparison]) -> list[Comparison]:
    """Where braze is slower, beyond the interval: the worst first."""
    return sorted((one for one in found if one.verdict == SLOWER), key=lambda one: one.ratio)


def same(found: Iterable[Comparison]) -> list[Comparison]:
    """Where the interval does not tell braze from the other: the lowest ratio first."""
    return sorted((one for one in found if one.verdict in (SAME, UNKNOWN)), key=lambda one: one.ratio)


def not_faster(found: Sequence[Comparison], wrong: Sequence[Record]) -> str:
    """In a sentence, in how many cases braze is not faster."""
    if not found and not wrong:
        return "Nothing has been timed against braze yet."
    refused = f" In {len(wrong)} its own result was over the error budget, which gets no time." if wrong else ""
    lost, even = len(slower(found)), len(same(found))
    return f"Of {len(found)} cases braze is slower in {lost}, and in {even} the interval shows no difference.{refused}"
