"""The measuring instruments, measured: known costs in, known ratios out."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from itertools import pairwise

import pytest
import torch

from braze.benchmarks import ceilings, memory, selfcheck, timing

from .clocks import FakeClock, NoisyClock, providers

CPU = torch.device("cpu")


def test_ratios_are_those_of_the_prices() -> None:
    clock = FakeClock()
    samples = timing.compare(providers(clock, a=3e-4, b=1e-4), clock, rounds=11)
    assert samples.ratio("a", "b") == pytest.approx((3.0, 3.0, 3.0))
    assert samples.quartiles("a") == pytest.approx((3e-4, 3e-4, 3e-4))


def test_a_drift_of_the_machine_cancels() -> None:
    """The machine gets seven times slower on the way; the ratio does not notice, the quartiles do."""
    clock = FakeClock(drift=0.02)
    samples = timing.compare(providers(clock, a=6e-3, b=3e-3), clock, rounds=50)
    assert samples.ratio("a", "b").value == pytest.approx(2.0, rel=0.03)
    assert samples.quartiles("a").high > 2 * samples.quartiles("a").low


@pytest.mark.parametrize("rounds", [1, 5, 6, 10, 30])
def test_the_interval_is_that_of_the_signed_rank_test(rounds: int) -> None:
    """All 2ⁿ sign patterns of the rounds are equally likely between equal providers: 1 is outside in at most 5 %."""
    generator = torch.Generator().manual_seed(rounds)
    logs = torch.randn(rounds, generator=generator, dtype=torch.float64)
    exact = rounds <= 10
    signs = (
        torch.cartesian_prod(*[torch.tensor([-1.0, 1.0], dtype=torch.float64)] * rounds).view(-1, rounds)
        if exact
        else torch.randint(0, 2, (2000, rounds), generator=generator).double() * 2 - 1
    )
    ratios = [timing.Samples({"a": (s * logs).exp().tolist(), "b": [1.0] * rounds}).ratio("a", "b") for s in signs]
    missed = sum(not one.low <= 1.0 <= one.high for one in ratios) / len(ratios)
    if rounds < 6:  # the whole range: only equal signs throughout miss
        assert missed == 2 / 2**rounds
    else:
        assert 0.025 < missed <= (0.05 if exact else 0.065)  # 2000 draws of 5 %: three standard deviations are 1.5 %


def test_equal_providers_have_an_interval_around_one_and_a_slower_one_is_seen() -> None:
    """On a noisy machine, at the default settings, as ``selfcheck`` measures it on a real one."""
    found = []
    for seed in range(10):
        clock = NoisyClock(seed)
        works = {"braze": 1e-4, selfcheck.EQUAL: 1e-4, selfcheck.SLOWER: 1.05e-4}
        found += selfcheck.compare(providers(clock, **works), clock)
    assert sum(r["right"] for r in found if r["provider"] == selfcheck.EQUAL) >= 9
    assert sum(r["right"] for r in found if r["provider"] == selfcheck.SLOWER) >= 9
    selfcheck.show(found)


def test_providers_take_turns() -> None:
    clock = FakeClock()
    works = providers(clock, a=3e-3, b=3e-3, c=3e-3)
    timing.compare(works, clock, rounds=5)
    rounds = [clock.order[i : i + 3] for i in range(6, 21, 3)]  # the first six find the repetitions
    assert len(clock.order) == 21
    assert all(set(one) == set(works.values()) for one in rounds)
    assert any(one != other for one, other in pairwise(rounds))


def test_a_sample_is_long_enough() -> None:
    clock = FakeClock()
    seen: list[float] = []

    def recording(work: timing.Work, repetitions: int) -> float:
        seen.append(clock(work, repetitions))
        return seen[-1]

    timing.compare(providers(clock, a=1e-6), recording, rounds=4)
    assert all(seconds >= timing.SAMPLE_SECONDS for seconds in seen[-4:])


def test_samples_have_equally_many_calls_where_that_is_not_too_long() -> None:
    clock = FakeClock()
    works = providers(clock, a=9e-4, b=1.1e-3, c=4e-3, d=0.1)
    counts: dict[timing.Work, int] = {}

    def recording(work: timing.Work, repetitions: int) -> float:
        counts[work] = repetitions
        return clock(work, repetitions)

    timing.compare(works, recording, rounds=1)
    assert [counts[work] for work in works.values()] == [3, 3, 3, 1]


def test_an_interruption_does_not_shorten_samples() -> None:
    clock = FakeClock()
    works = providers(clock, a=1e-4, b=1e-4)
    lengths: dict[timing.Work, list[int]] = {work: [] for work in works.values()}

    def interrupted(work: timing.Work, repetitions: int) -> float:
        """The first sample of one of them, and all of it that take a millisecond."""
        hit = work is works["a"] and (not lengths[work] or repetitions >= 10)
        lengths[work].append(repetitions)
        return clock(work, repetitions) + (0.03 if hit else 0.0)

    timing.compare(works, interrupted, rounds=2)
    assert lengths[works["a"]][-1] == lengths[works["b"]][-1] == 20


def test_what_takes_long_is_tried_twice() -> None:
    clock = FakeClock()
    timing.compare(providers(clock, a=10.0), clock, rounds=2)
    assert len(clock.order) == 4


@pytest.mark.parametrize(("longest", "rounds"), [(100.0, 6), (1000.0, 12), (1e4, 50)])
def test_no_round_begins_when_the_time_is_over(longest: float, rounds: int) -> None:
    """Rounds of 90 s: the twelfth begins at 990."""
    clock = FakeClock()
    samples = timing.compare(providers(clock, a=30.0, b=60.0), clock, rounds=50, longest=longest)
    assert samples.rounds == rounds
    assert samples.ratio("b", "a") == pytest.approx((2.0, 2.0, 2.0))


@pytest.mark.parametrize("clock", [timing.cpu_clock, timing.clocks_for(CPU).cold], ids=["warm", "cold"])
def test_what_is_prepared_is_used_once(clock: timing.Clock) -> None:
    made: list[list[int]] = []

    def prepare() -> list[int]:
        made.append([])
        return made[-1]

    assert clock(timing.Prepared(prepare, lambda one: one.append(1)), 5) > 0
    assert made == [[1]] * 5


def test_preparation_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]

    def spend(seconds: float) -> None:
        now[0] += seconds

    monkeypatch.setattr(timing.time, "perf_counter", lambda: now[0])
    work = timing.Prepared(lambda: spend(100.0), lambda _: spend(1.0))
    assert timing.cpu_clock(work, 3) == 3.0
    assert timing.ColdCpuClock()(work, 3) == 3.0


def test_a_cold_call_comes_after_more_than_the_last_level_cache() -> None:
    assert timing.ColdCpuClock()._walked.nbytes > timing.last_level_cache_bytes() >= 2**20


@pytest.mark.gpu
def test_cuda_clock_counts_the_work_and_not_the_flush() -> None:
    clock = timing.CudaClock(torch.device("cuda"))
    assert 0 < clock(lambda: torch.ones(1, device="cuda"), 3) < clock(lambda: clock._flush.zero_(), 3)


@pytest.mark.gpu
def test_warm_cuda_clock_counts_captured_and_queued_calls_alike() -> None:
    x = torch.ones(2**24, device="cuda")
    clock = timing.clocks_for(x.device).warm
    queued = timing.Prepared(lambda: None, lambda _: x.add(1))
    assert 0.5 < clock(lambda: x.add(1), 50) / clock(queued, 50) < 2


def test_the_peak_counts_what_is_alive_together() -> None:
    def work() -> None:
        first = torch.empty(3 << 20, dtype=torch.uint8)
        del first
        second = torch.empty(2 << 20, dtype=torch.uint8)
        third = torch.empty(2 << 20, dtype=torch.uint8)
        del second, third

    assert memory.peak(work, torch.device("cpu")) == 4 << 20


def test_peaks_are_each_work_s_own_and_without_what_was_prepared() -> None:
    prepared = timing.Prepared(
        lambda: torch.empty(5 << 20, dtype=torch.uint8), lambda big: torch.empty(1 << 20, dtype=torch.uint8)
    )
    works = {"one": lambda: torch.empty(3 << 20, dtype=torch.uint8), "two": prepared}
    assert memory.peaks(works, CPU) == {"one": 3 << 20, "two": 1 << 20}


def test_the_self_check_of_one_run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """End to end: whether the intervals hold is this machine's affair, that the wrong provider is refused is not."""
    monkeypatch.setattr(selfcheck, "QUICK_RUNS", 1)
    records = selfcheck.run(argparse.Namespace(device="cpu", quick=True))
    assert [r["provider"] for r in records] == [selfcheck.EQUAL, selfcheck.SLOWER, selfcheck.WRONG]
    assert records[-1]["status"].startswith("wrong: output 0")
    assert "median_ms" not in records[-1]
    assert "wrong: output 0" in capsys.readouterr().out


@pytest.mark.parametrize(("slow_from", "expected"), [(8, 8), (2, 2), (100, 16)])
def test_the_ceiling_of_products_is_of_the_largest_that_are_not_slow(slow_from: int, expected: int) -> None:
    sizes: list[int] = []

    def clock(work: Callable[[], torch.Tensor], repetitions: int) -> float:
        sizes.append(len(work()))
        return repetitions * (ceilings.LONG_PRODUCT if sizes[-1] >= slow_from else 0.01)

    tflops = ceilings._matmul_tflops(torch.float32, 16, torch.device("cpu"), clock)  # type: ignore[arg-type]
    assert sizes[-1] == expected
    assert tflops == pytest.approx(2e-12 * expected**3 / (ceilings.LONG_PRODUCT if expected >= slow_from else 0.01))
