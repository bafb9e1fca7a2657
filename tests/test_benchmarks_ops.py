"""The ``ops`` benchmark: the judge's verdicts, who is timed and who is refused, and what every record says."""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Callable
from typing import Any

import pytest
import torch

from braze.benchmarks import accuracy, ceilings, memory, ops, ops_case, ops_measure, ops_table, peers, providers, timing
from braze.kernels import OPS
from braze.kernels.op import Op

from .clocks import FakeClock

RMS_NORM = next(op for op in OPS if op.name == "rms_norm")
TINY = {"N": 33, "D": 64}
EFFORT = ops_measure.Effort(rounds=3, cold_rounds=2, host_rounds=2)
CEILINGS = ceilings.Ceilings(copy_gbs=10.0, matmul_tflops={"torch.float32": 0.1})

Records = dict[tuple[str, str], dict[str, Any]]


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


def raising(x: torch.Tensor, weight: torch.Tensor, **options: float) -> torch.Tensor:
    raise TypeError("no such argument\nand more")


def case(op: Op, dtype: torch.dtype = torch.float32) -> ops_case.Case:
    return ops_case.Case(op, TINY, dtype, torch.device("cpu"))


def measured(op: Op, **options: Any) -> Records:
    clock = FakeClock()
    records = ops_measure.measure(case(op), EFFORT, CEILINGS, timing.Clocks(clock, clock), **options)
    return {(r["provider"], r["pass"]): r for r in records}


@pytest.mark.parametrize("dtype", ops.DTYPES, ids=str)
def test_the_judge_passes_what_is_right(dtype: torch.dtype) -> None:
    one = case(RMS_NORM, dtype)
    errors = accuracy.Judge(RMS_NORM, one.call()).errors(RMS_NORM.fn, gradients=True)
    assert errors.wrong is None
    assert 0 < errors.outputs < 2 * torch.finfo(dtype).eps


@pytest.mark.parametrize("planted", [wrong_forward, not_a_number])
def test_the_judge_names_a_wrong_output(planted: Callable[..., torch.Tensor]) -> None:
    errors = accuracy.Judge(RMS_NORM, case(RMS_NORM).call()).errors(planted, gradients=False)
    assert errors.wrong is not None
    assert errors.wrong.startswith("output")


def test_a_gradient_alone_does_not_condemn_the_forward_pass() -> None:
    errors = accuracy.Judge(RMS_NORM, case(RMS_NORM).call()).errors(wrong_gradient, gradients=True)
    assert errors.wrong is not None
    assert errors.of_outputs() == (errors.outputs, None, ())


def test_the_judge_rescales_cotangents() -> None:
    """The gradient of a bias is a sum of cotangents: on the same ones it would have the same error each time."""
    bias_act = next(op for op in OPS if op.name == "bias_act")
    seen: list[float] = []

    def recording(x: torch.Tensor, bias: torch.Tensor, **options: Any) -> torch.Tensor:
        y = bias_act.fn(x, bias, **options)
        if y.requires_grad:
            y.register_hook(lambda dy: seen.append(dy.abs().max().item()))
        return y

    one = ops_case.Case(bias_act, {"N": 4, "D": 8}, torch.float32, torch.device("cpu"))
    accuracy.Judge(dataclasses.replace(bias_act, fn=recording), one.call())
    assert sorted({round(s / min(seen) * 0.9, 3) for s in seen}) == sorted(accuracy.RESCALED)


def without_compile(monkeypatch: pytest.MonkeyPatch) -> None:
    def unavailable(op: Op, backend: str, *_: object) -> str | None:
        return "not in this test" if backend == "compile" else None

    monkeypatch.setattr(providers.dispatch, "unavailable", unavailable)


def test_a_wrong_braze_is_refused_and_gets_no_speed(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = RMS_NORM.reference
    impls = {"compile": lambda x, weight, **options: plain(_HalfGradient.apply(x), weight, **options)}
    monkeypatch.setattr(providers.dispatch, "implementation", lambda _, backend: impls.get(backend, plain))
    monkeypatch.setattr(providers.dispatch, "SMALLEST_COMPILED", 0)
    found = measured(RMS_NORM, only=["aten"])
    assert found["braze", "forward"]["status"] == "ok"
    for which in ("backward", "forward+backward"):
        refused = found["braze", which]
        assert refused["status"].startswith("wrong: gradient 0")
        assert not {"median_ms", "ratio", "cold_median_ms", "host_us", "peak_bytes"} & refused.keys()
        assert found["aten", which]["median_ms"] == pytest.approx(1.0)
        assert "ratio" not in found["aten", which]


def test_a_wrong_baseline_keeps_its_time_and_is_marked(capsys: pytest.CaptureFixture[str]) -> None:
    found = measured(dataclasses.replace(RMS_NORM, aten=wrong_gradient), only=["aten"])
    marked = found["aten", "forward+backward"]
    assert marked["status"].startswith("wrong: gradient 0")
    assert marked["median_ms"] == pytest.approx(1.0)
    ops_table.show(list(found.values()))
    assert f"{marked['error_gradients']:.1e}!" in capsys.readouterr().out


def planted(functions: dict[str, Callable[..., Any]], module: str = "torch", device: str = "cpu") -> peers.Peer:
    return peers.Peer("planted", module, "planted-kernels", functions, devices=(device,))


@pytest.mark.parametrize(
    ("peer", "status"),
    [
        (planted({"rms_norm": RMS_NORM.aten}), "ok"),
        (planted({"rms_norm": wrong_forward}), "wrong: output 0: error"),
        (planted({"rms_norm": raising}), "failed: TypeError: no such argument"),
        (planted({"rms_norm": RMS_NORM.aten}, "planted_kernels"), "skipped: planted-kernels is not installed"),
        (planted({"rms_norm": raising}, device="cuda"), "skipped: planted-kernels runs on cuda, this is cpu"),
    ],
    ids=["right", "wrong", "raising", "not installed", "another device"],
)
def test_a_peer_is_timed_only_where_it_is_there_and_right(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], peer: peers.Peer, status: str
) -> None:
    monkeypatch.setattr(peers, "PEERS", (peer,))
    monkeypatch.setattr(providers, "NAMES", ("planted", "braze"))
    found = measured(RMS_NORM)
    for which in ops_case.PASSES:
        assert found["planted", which]["status"].startswith(status)
        assert ("median_ms" in found["planted", which]) == (status == "ok")
        assert ("ratio" in found["planted", which]) == (status == "ok")
    ops_table.show(list(found.values()))
    assert status == "ok" or status in capsys.readouterr().out


def test_every_peer_names_operators_and_no_provider_twice() -> None:
    names = {op.name for op in OPS}
    assert all(peer.functions.keys() <= names for peer in peers.PEERS)
    assert len(set(providers.NAMES)) == len(providers.NAMES)


def test_what_cannot_run_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    without_compile(monkeypatch)
    found = measured(RMS_NORM, only=["compiled", "max-autotune"])
    for name in ("compiled", "max-autotune"):
        assert found[name, "backward"]["status"] == "unavailable: not in this test"


def test_a_truth_that_does_not_fit_is_skipped_visibly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "available", lambda _: 1)
    found = measured(RMS_NORM)
    assert len(found) == 3
    assert all(r["status"].startswith("skipped: ") for r in found.values())
    ops_table.show(list(found.values()))


@pytest.mark.parametrize("name", ["linear_cross_entropy", "linear_distillation"])
def test_a_loss_that_finds_its_gradients_forward_has_room_for_its_truth(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Logits, the weight, and the gradients of both: what a machine of 24 GB offers, half of it, is enough."""
    op = next(op for op in OPS if op.name == name)
    one = ops_case.Case(op, op.bench[0], torch.float32, torch.device("cpu"))
    monkeypatch.setattr(memory, "available", lambda _: 12 * 10**9)
    assert ops_measure.no_room(one) is None
    held = 8 * 2 * (one.dims["N"] + one.dims["D"]) * one.dims["C"]
    monkeypatch.setattr(memory, "available", lambda _: held)
    assert ops_measure.no_room(one) is not None


def test_products_that_take_minutes_are_skipped_visibly() -> None:
    mlp = next(op for op in OPS if op.name == "mlp")
    one = ops_case.Case(mlp, mlp.bench[0], torch.bfloat16, torch.device("cpu"))
    records = ops_measure.measure(one, EFFORT, ceilings.Ceilings(10.0, {"torch.bfloat16": 1e-3}))
    assert {r["pass"] for r in records} == set(one.passes())
    assert all("at 1 GFLOP/s of torch.bfloat16 a forward pass would take" in r["status"] for r in records)


def test_every_figure_of_a_record() -> None:
    mlp = next(op for op in OPS if op.name == "mlp")
    clock = FakeClock()
    dims = {"N": 64, "D": 32, "H": 128}
    one = ops_case.Case(mlp, dims, torch.float32, torch.device("cpu"))
    records = ops_measure.measure(one, EFFORT, CEILINGS, timing.Clocks(clock, clock), only=["aten"])
    found = {(r["provider"], r["pass"]): r for r in records}
    both = found["aten", "forward+backward"]
    traffic = mlp.traffic(4, **one.options)
    assert both["least_bytes"] == traffic.forward + traffic.backward
    assert both["percent_of_copy"] == pytest.approx(100 * both["least_bytes"] / 1e-3 / 10e9)
    assert both["percent_of_matmul"] == pytest.approx(100 * 3 * mlp.flops(**dims) / 1e-3 / 0.1e12)
    assert (both["host_us"], both["cold_median_ms"], both["cold_ratio"]) == pytest.approx((1000.0, 1.0, 1.0))
    hidden = 4 * dims["N"] * dims["H"]
    assert found["aten", "forward"]["peak_bytes"] >= 2 * hidden  # what gelu takes, and what it gives
    assert "percent_of_matmul" not in found["aten", "backward"]
    assert "host_us" not in found["copy", "forward"]


def test_only_what_matrix_products_bound_is_held_against_their_ceiling() -> None:
    bound = {op.name for op in OPS if case_of(op).matmul_flops("forward")}
    assert bound == {"mlp", "gated_mlp", "linear_cross_entropy", "linear_distillation"}


def case_of(op: Op) -> ops_case.Case:
    return ops_case.Case(op, ops_case.quick_dims(op), torch.float32, torch.device("cpu"))


def test_quick_sizes_are_small_and_tiny_ones_legal() -> None:
    for op in OPS:
        one = case_of(op)
        assert one.least_bytes("forward", itemsize=4) <= ops_case.QUICK_BYTES * 1.01  # indices have 8 bytes
        tiny = one.tiny().call()
        for function in (op.fn, op.aten):
            function(*tiny.args, **tiny.kwargs)


def test_image_norms_are_timed_in_both_memory_formats() -> None:
    norms = [op for op in OPS if op.name in ("batch_norm_act", "group_norm")]
    found = list(ops_case.cases(norms, (torch.float32,), torch.device("cpu"), quick=False))
    assert len(found) == 2 * sum(len(op.bench) for op in norms)
    for one in found:
        x = one.call().args[0]
        last = one.variant == "channels last"
        assert (x.stride(1) == 1) == last
        assert one.record("forward", "aten")["shape"].endswith(", channels last") == last


def test_quick_run_of_one_operator(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """End to end: real clocks, real torch.compile, tiny sizes; the ceilings alone are not measured."""
    monkeypatch.setattr(ops, "OPS", (dataclasses.replace(RMS_NORM, bench=(TINY,)),))
    monkeypatch.setattr(ops.ceilings, "measure", lambda *_: CEILINGS)
    parser = argparse.ArgumentParser()
    ops.add_arguments(parser)
    kept: list[int] = []
    given = argparse.Namespace(quick=True, keep=lambda found: kept.append(len(found)))
    records = ops.run(parser.parse_args(["--op", "rms_norm", "--device", "cpu"], given))
    assert len(kept) == 1, "after its one case"
    assert all(isinstance(v, str | int | float | None) for r in json.loads(json.dumps(records)) for v in r.values())
    timed = {(r["provider"], r["pass"], r["dtype"]) for r in records if "median_ms" in r}
    assert len(timed) == 4 * 3
    means = [r for r in records if r["benchmark"] == "ops geometric mean"]
    wanted = {(p, w) for p in ("aten", "compiled") for w in ops_case.PASSES}
    assert {(r["provider"], r["pass"]) for r in means} == wanted
    printed = capsys.readouterr().out
    assert "N=33 D=64" in printed
    assert "Geometric means" in printed
    assert "liger-kernel runs on cuda" in printed


def test_geometric_mean_is_geometric() -> None:
    common = {"benchmark": "ops", "op": "x", "provider": "aten", "pass": "forward", "dtype": "float32", "shape": "N=1"}
    (mean,) = ops.geometric_means([{**common, "ratio": 0.5}, {**common, "ratio": 8.0}])
    assert mean["ratio"] == pytest.approx(2.0)


def test_a_quick_run_shares_operators_among_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Their records come back in the order of the operators; what was there when each came is kept."""
    monkeypatch.setattr(ops.ceilings, "measure", lambda *_: CEILINGS)
    parser = argparse.ArgumentParser()
    ops.add_arguments(parser)
    kept: list[int] = []
    given = argparse.Namespace(quick=True, keep=lambda found: kept.append(len(found)))
    words = ["--op", "softmax", "--op", "rms_norm", "--provider", "aten", "--device", "cpu"]
    records = ops.run(parser.parse_args(words, given))
    assert len(kept) == 2
    names = [r["op"] for r in records if r["benchmark"] == "ops"]
    assert names == sorted(names, key=[op.name for op in ops.OPS].index)
    assert {r["threads"] for r in records if "threads" in r} == {1}
    assert {(r["op"], r["provider"]) for r in records if "median_ms" in r and r["provider"] != "copy"} == {
        (op, provider) for op in ("rms_norm", "softmax") for provider in ("aten", "braze")
    }
