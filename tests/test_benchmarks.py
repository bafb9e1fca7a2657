"""The measuring instruments, measured: known costs in, known ratios out; a planted wrong provider is refused."""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from rich.console import Console

from braze.benchmarks import accuracy, losses, memory, ops, optim, rounding, timing
from braze.kernels import OPS, linear_cross_entropy
from braze.kernels.op import Op

RMS_NORM = next(op for op in OPS if op.name == "rms_norm")
TINY = {"N": 33, "D": 64}


class FakeClock:
    """Charges each work its price, times a slowness that drifts from one sample to the next."""

    def __init__(self, drift: float = 0.0) -> None:
        self.prices: dict[Callable[[], object], float] = {}
        self.order: list[Callable[[], object]] = []
        self.drift = drift

    def __call__(self, work: Callable[[], object], repetitions: int) -> float:
        self.order.append(work)
        return repetitions * self.prices.get(work, 1e-3) * math.exp(self.drift * len(self.order))


def providers(clock: FakeClock, **prices: float) -> dict[str, Callable[[], object]]:
    works: dict[str, Callable[[], object]] = {name: (lambda name=name: name) for name in prices}
    clock.prices = {works[name]: price for name, price in prices.items()}
    return works


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


def test_equal_providers_have_an_interval_around_one() -> None:
    noise = torch.Generator().manual_seed(0)
    samples = timing.compare(
        {"a": lambda: 0, "b": lambda: 0},
        lambda work, repetitions: repetitions * 1e-3 * float(1 + torch.rand(1, generator=noise)),
        rounds=40,
    )
    ratio = samples.ratio("a", "b")
    assert ratio.low < 1 < ratio.high


def test_providers_take_turns() -> None:
    clock = FakeClock()
    works = providers(clock, a=3e-3, b=3e-3, c=3e-3)
    timing.compare(works, clock, rounds=5)
    rounds = [clock.order[i : i + 3] for i in range(3, 18, 3)]  # the first three find the repetitions
    assert len(clock.order) == 18
    assert all(set(one) == set(works.values()) for one in rounds)


def test_a_sample_is_long_enough() -> None:
    clock = FakeClock()
    seen: list[float] = []

    def recording(work: Callable[[], object], repetitions: int) -> float:
        seen.append(clock(work, repetitions))
        return seen[-1]

    timing.compare(providers(clock, a=1e-6), recording, rounds=4)
    assert all(seconds >= timing.SAMPLE_SECONDS for seconds in seen[-4:])


@pytest.mark.gpu
def test_cuda_clock_counts_the_work_and_not_the_flush() -> None:
    clock = timing.CudaClock(torch.device("cuda"))
    assert 0 < clock(lambda: torch.ones(1, device="cuda"), 3) < clock(lambda: clock._flush.zero_(), 3)


def wrong_forward(x: torch.Tensor, weight: torch.Tensor, **options: float) -> torch.Tensor:
    return RMS_NORM.fn(x, weight, **options) * 1.001


class _HalfGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):  # type: ignore[no-untyped-def]
        return x.clone()

    @staticmethod
    def backward(ctx, dy):  # type: ignore[no-untyped-def]
        return dy / 2


def wrong_gradient(x: torch.Tensor, weight: torch.Tensor, **options: float) -> torch.Tensor:
    return RMS_NORM.fn(_HalfGradient.apply(x), weight, **options)


def not_a_number(x: torch.Tensor, weight: torch.Tensor, **options: float) -> torch.Tensor:
    return RMS_NORM.fn(x, weight, **options) * float("nan")


def case(op: Op, dtype: torch.dtype = torch.float32) -> ops.Case:
    return ops.Case(op, TINY, dtype, torch.device("cpu"))


@pytest.mark.parametrize("dtype", ops.DTYPES, ids=str)
def test_the_judge_passes_what_is_right(dtype: torch.dtype) -> None:
    one = case(RMS_NORM, dtype)
    errors = accuracy.Judge(RMS_NORM, one.call()).errors(RMS_NORM.fn, gradients=True)
    assert errors.wrong is None
    assert 0 < errors.outputs < 2 * torch.finfo(dtype).eps


@pytest.mark.parametrize(("planted", "blamed"), [(wrong_forward, "output"), (not_a_number, "output")])
def test_the_judge_names_a_wrong_output(planted: Callable[..., torch.Tensor], blamed: str) -> None:
    errors = accuracy.Judge(RMS_NORM, case(RMS_NORM).call()).errors(planted, gradients=False)
    assert errors.wrong is not None
    assert errors.wrong.startswith(blamed)


def without_compile(monkeypatch: pytest.MonkeyPatch) -> None:
    def unavailable(op: Op, backend: str, *_: object) -> str | None:
        return "not in this test" if backend == "compile" else None

    monkeypatch.setattr(ops.dispatch, "unavailable", unavailable)


def test_a_wrong_braze_is_refused_and_gets_no_speed(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = RMS_NORM.reference
    impls = {"compile": lambda x, weight, **options: plain(_HalfGradient.apply(x), weight, **options)}
    monkeypatch.setattr(ops.dispatch, "implementation", lambda _, backend: impls.get(backend, plain))
    monkeypatch.setattr(ops.dispatch, "SMALLEST_COMPILED", 0)
    records = ops.measure(case(RMS_NORM), 3, FakeClock())
    found = {(r["provider"], r["pass"]): r for r in records}
    assert found["braze", "forward"]["status"] == "ok"
    refused = found["braze", "forward+backward"]
    assert refused["status"].startswith("wrong: gradient 0")
    assert not {"median_ms", "ratio"} & refused.keys()
    assert found["aten", "forward+backward"]["median_ms"] == pytest.approx(1.0)


def test_a_wrong_baseline_keeps_its_time_and_is_marked(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    without_compile(monkeypatch)
    records = ops.measure(case(dataclasses.replace(RMS_NORM, aten=wrong_gradient)), 3, FakeClock())
    found = {(r["provider"], r["pass"]): r for r in records}
    marked = found["aten", "forward+backward"]
    assert marked["status"].startswith("wrong: gradient 0")
    assert marked["median_ms"] == pytest.approx(1.0)
    ops.ops_table.show(records)
    assert f"{marked['error_gradients']:.1e}!" in capsys.readouterr().out


def test_what_cannot_run_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    without_compile(monkeypatch)
    records = ops.measure(case(RMS_NORM), 3, FakeClock())
    statuses = {r["status"] for r in records if r["provider"] == "compiled"}
    assert statuses == {"unavailable: not in this test"}


def test_a_truth_that_does_not_fit_is_skipped_visibly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops, "_memory", lambda _: 1)
    records = ops.measure(case(RMS_NORM), 3, FakeClock())
    assert len(records) == 6
    assert all(r["status"].startswith("skipped: ") for r in records)
    ops.ops_table.show(records)


def test_quick_run_of_one_operator(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """End to end: real clock, real torch.compile, tiny sizes."""
    monkeypatch.setattr(ops, "OPS", (dataclasses.replace(RMS_NORM, bench=(TINY,)),))
    parser = argparse.ArgumentParser()
    ops.add_arguments(parser)
    arguments = parser.parse_args(["--op", "rms_norm", "--device", "cpu"], argparse.Namespace(quick=True))
    records = ops.run(arguments)
    assert all(isinstance(v, str | int | float | None) for r in json.loads(json.dumps(records)) for v in r.values())
    timed = {(r["provider"], r["pass"], r["dtype"]) for r in records if "median_ms" in r}
    assert len(timed) == 4 * 2 * 2
    means = [r for r in records if r["benchmark"] == "ops geometric mean"]
    assert {(r["provider"], r["pass"]) for r in means} == {(p, w) for p in ("aten", "compiled") for w in ops.PASSES}
    printed = capsys.readouterr().out
    assert "N=33 D=64" in printed
    assert "Geometric means" in printed


def test_geometric_mean_is_geometric() -> None:
    common = {"benchmark": "ops", "op": "x", "provider": "aten", "pass": "forward", "dtype": "float32", "shape": "N=1"}
    (mean,) = ops.geometric_means([{**common, "ratio": 0.5}, {**common, "ratio": 8.0}])
    assert mean["ratio"] == pytest.approx(2.0)


def test_the_peak_counts_what_is_alive_together() -> None:
    def work() -> None:
        first = torch.empty(3 << 20, dtype=torch.uint8)
        del first
        second = torch.empty(2 << 20, dtype=torch.uint8)
        third = torch.empty(2 << 20, dtype=torch.uint8)
        del second, third

    assert memory.peak(work) == 4 << 20


def test_losses_of_a_tiny_head(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def eager(hidden: torch.Tensor, weight: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.cross_entropy(hidden @ weight.mT, target)

    monkeypatch.setattr(losses, "providers", lambda: {"eager": eager, "braze": linear_cross_entropy})
    size = losses.Size(64, 8, 4000)
    plain, braze = losses.measure(size, 3, FakeClock())
    logits = 4 * size.N * size.C
    assert plain["peak_bytes"] > 2 * logits
    assert braze["peak_bytes"] < 2 * logits
    assert braze["gradients_apart"] < 1e-5
    assert braze["ratio"] == 1.0
    losses.show([plain, braze])
    assert "N=64 D=8 C=4000" in capsys.readouterr().out


def test_a_step_of_an_optimizer_is_timed_and_audited_figures_are_shown(capsys: pytest.CaptureFixture[str]) -> None:
    found = optim.measure("tiny", [torch.ones(3, 4), torch.ones(5)], "AdamW, clipped", rounds=2)
    assert [record["provider"] for record in found] == ["torch, for-loop", "torch, foreach", "torch, fused", "braze"]
    assert {record["elements"] for record in found} == {17}
    optim.show(found)
    optim.show_audit(
        [
            {"measure": "traffic", "case": "AdamW", "ratio": 1.0034},
            {"measure": "code", "case": "AdamW", "registers": 95, "spills": 0, "widest_load": 128},
            {"measure": "code", "case": "AdamW", "registers": 133, "spills": 8, "widest_load": 64},
            {"measure": "code", "case": "SGD", "registers": 7, "spills": 99, "widest_load": 32},
        ]
    )
    printed = capsys.readouterr().out
    assert "AdamW, clipped" in printed
    assert re.search(r"AdamW +1\.003 +95 … 133 +8 +64 bit", printed)


def test_roundings_are_compared_with_float32_of_the_same_seed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = [
        rounding.Run(title, seed, [4.0, 2.0 * (1 + seed) * (1 + 0.01 * place)] * rounding.LAST, 3.0 + seed)
        for seed in range(2)
        for place, title in enumerate(rounding.WAYS)
    ]
    records = rounding.report(runs, tmp_path / "plot.png", Console(width=200))
    assert len(records) == len(runs)
    for record, run in zip(records, runs, strict=True):
        place = list(rounding.WAYS).index(run.title)
        last, wanted = ((4.0 + 2.0 * (1 + run.seed) * (1 + 0.01 * k)) / 2 for k in (place, 0))
        assert record["train_of_float32"] == pytest.approx(last / wanted)
        assert record["validation_of_float32"] == 1.0
    assert (tmp_path / "plot.png").stat().st_size > 0
    printed = capsys.readouterr().out
    assert all(title in printed for title in rounding.WAYS)
