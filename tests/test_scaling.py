"""The scaling benchmark: what grows in a sweep, who is refused, and what the curves are held against."""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch

pytest.importorskip("matplotlib", reason="needs the extra braze[bench]")
pytest.importorskip("rich", reason="needs the extra braze[bench]")

from braze.benchmarks import memory, scaling, scaling_report
from braze.benchmarks.ceilings import Ceilings
from braze.benchmarks.ops_case import BOTH
from braze.benchmarks.providers import Absent, Provider
from braze.kernels import OPS, dispatch
from braze.kernels.op import Op

CPU = torch.device("cpu")
LIMITS = Ceilings(copy_gbs=10.0, matmul_tflops={"torch.float32": 0.1})
SIZES = (16, 32, 64)
TINY = scaling.Sweep("rms_norm", "rows", lambda n: {"N": n, "D": 64}, cpu=SIZES, cuda=SIZES)
RMS_NORM = TINY.case(16, CPU).op


@pytest.mark.parametrize("sweep", scaling.SWEEPS, ids=lambda sweep: f"{sweep.op} {sweep.axis}")
def test_shapes_grow_only_along_their_axis(sweep: scaling.Sweep) -> None:
    for sizes in (sweep.cpu, sweep.cuda):
        assert len(sizes) >= 5
        for small, large in itertools.pairwise(sizes):
            assert small < large
            before, after = sweep.dims(small), sweep.dims(large)
            grown = {name for name in before if before[name] != after[name]}
            assert grown
            assert all(after[name] * small == before[name] * large for name in grown)
            one, other = sweep.case(small, CPU), sweep.case(large, CPU)
            assert one.least_bytes(BOTH) < other.least_bytes(BOTH)
            assert (one.matmul_flops(BOTH) or 0) <= (other.matmul_flops(BOTH) or 0)
    assert (one.matmul_flops(BOTH) is not None) == (sweep.op in ("linear_cross_entropy", "gated_mlp"))


def test_the_roofline_is_the_longer_of_the_two() -> None:
    assert LIMITS.seconds(torch.float32, 10**10, 0) == pytest.approx(1.0)
    assert LIMITS.seconds(torch.float32, 10**10, 4 * 10**11) == pytest.approx(4.0)


def test_the_slope_is_the_power() -> None:
    assert scaling.slope([(n, 7 * n**1.5) for n in (3, 10, 50)]) == pytest.approx(1.5)


def without_compile(monkeypatch: pytest.MonkeyPatch) -> None:
    def unavailable(op: Op, backend: str, *_: object) -> str | None:
        return "not in this test" if backend == "compile" else None

    monkeypatch.setattr(dispatch, "unavailable", unavailable)


def one_millisecond(work: Callable[[], object], repetitions: int) -> float:
    return 1e-3 * repetitions


def records(sizes: Sequence[int] = SIZES) -> list[scaling.Record]:
    found = [r for of_size in scaling.measure(TINY, sizes, CPU, LIMITS, 2, one_millisecond) for r in of_size]
    return found + scaling.slopes(found)


def test_a_sweep_gives_flat_records_tables_and_a_figure(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    without_compile(monkeypatch)
    found = records()
    assert all(isinstance(v, str | int | float) for r in json.loads(json.dumps(found)) for v in r.values())
    curves = [r for r in found if r["benchmark"] == "scaling"]
    assert [(r["size"], r["provider"]) for r in curves] == list(itertools.product(SIZES, scaling.PROVIDERS))
    assert {(r["size"], r["judged"]) for r in curves} == {(16, True), (32, False), (64, True)}
    braze = [r for r in curves if r["provider"] == "braze"]
    assert [r["peak_bytes"] >= r["gradient_bytes"] > 0 for r in braze] == [True] * 3
    assert braze[0]["roofline_ms"] == pytest.approx(braze[0]["least_bytes"] / 1e10 * 1e3)
    assert {r["slope"] for r in found if r["benchmark"] == "scaling slope"} == {0.0}  # every size took a millisecond
    scaling_report.show(found)
    scaling_report.plot(found, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 0
    printed = capsys.readouterr().out
    assert "N=32 D=64" in printed
    assert "rms_norm by rows compiled unavailable: not in this test" in printed


def test_a_braze_that_is_wrong_at_one_end_is_refused_at_all_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong_from_64_rows(x: torch.Tensor, weight: torch.Tensor, **options: float) -> torch.Tensor:
        return RMS_NORM.fn(x, weight, **options) * (1.001 if len(x) >= 64 else 1.0)

    without_compile(monkeypatch)
    found = {
        "aten": Provider(RMS_NORM.aten, "eager", keeps_time=True),
        "compiled": Absent("absent"),
        "braze": Provider(wrong_from_64_rows, "eager", keeps_time=False),
    }
    monkeypatch.setattr(scaling, "_contestants", lambda case: found)
    for record in records(SIZES[::2]):
        if record["provider"] == "braze":
            assert record["status"].startswith("wrong: at 64, output 0")
            assert not {"median_ms", "ratio", "peak_bytes"} & record.keys()
        elif record["benchmark"] == "scaling" and record["provider"] == "aten":
            assert record["median_ms"] == pytest.approx(1.0)


def test_a_baseline_that_is_wrong_keeps_its_times_and_is_marked(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    without_compile(monkeypatch)
    wrong = dataclasses.replace(RMS_NORM, aten=lambda x, weight, **options: RMS_NORM.aten(x, weight, **options) * 1.001)
    monkeypatch.setattr(scaling, "OPS", (wrong, *(op for op in OPS if op is not RMS_NORM)))
    found = records(SIZES[:1])
    marked = [r for r in found if r["benchmark"] == "scaling" and r["provider"] == "aten"]
    assert all(r["status"].startswith("wrong: at 16") and r["median_ms"] == pytest.approx(1.0) for r in marked)
    scaling_report.show(found)
    assert "1!" in capsys.readouterr().out


def test_a_truth_that_does_not_fit_is_not_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    without_compile(monkeypatch)
    monkeypatch.setattr(memory, "available", lambda _: 1)
    assert {r["judged"] for r in records(SIZES[:1])} == {False}
