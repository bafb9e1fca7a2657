"""Predicted times of kernels, against sums done by hand."""

from __future__ import annotations

import pytest
import torch

from braze.benchmarks import kernels, ops_measure, prediction, timing
from braze.benchmarks.ceilings import Ceilings
from braze.benchmarks.ops_case import Case
from braze.kernels import OPS

from .clocks import FakeClock

CEILINGS = Ceilings(copy_gbs=1000.0, matmul_tflops={"torch.float32": 1.0}, launch_us=2.0)
AUDIT = {"measure": "traffic", "op": "rms_norm", "variant": "default", "dtype": "float32"}


def case(name: str, **dims: int) -> Case:
    return Case(next(op for op in OPS if op.name == name), dims, torch.float32, torch.device("cpu"))


def test_counts_are_those_of_the_first_size_of_the_default_variant() -> None:
    records = [
        {"measure": "code", "op": "rms_norm", "kernel": "_forward"},
        {**AUDIT, "pass": "forward", "variant": "no weight", "ratio": 7.0, "bytes of _forward": 1},
        {**AUDIT, "pass": "backward", "ratio": 1.5, "bytes of _backward": 1, "bytes of _column_sum": 1},
        {**AUDIT, "pass": "backward", "ratio": 9.0, "bytes of _backward": 1},
    ]
    assert prediction.counts(records) == {("rms_norm", "backward", "float32"): (1.5, 2)}


def test_a_prediction_is_launches_and_bytes() -> None:
    norm = case("rms_norm", N=512, D=1000)
    counted = {
        ("rms_norm", "forward", "float32"): prediction.Counted(1.0, 1),
        ("rms_norm", "backward", "float32"): prediction.Counted(2.0, 2),
    }
    forward = 2.0 + norm.least_bytes("forward") / 1e6
    backward = 4.0 + 2.0 * norm.least_bytes("backward") / 1e6
    found = [prediction.predicted_us(norm, which, counted, CEILINGS) for which in norm.passes()]
    assert found == pytest.approx([forward, backward, forward + backward])
    assert prediction.predicted_us(case("layer_norm", N=1, D=1), "forward", counted, CEILINGS) is None
    assert prediction.predicted_us(norm, "forward", counted, CEILINGS._replace(launch_us=None)) is None


def test_matrix_products_bound_where_they_take_longer() -> None:
    mlp = case("mlp", N=100, D=100, H=100)
    counted = {("mlp", which, "float32"): prediction.Counted(1.0, 3) for which in ("forward", "backward")}
    flops = mlp.op.flops(**mlp.dims)
    assert prediction.predicted_us(mlp, "forward", counted, CEILINGS) == pytest.approx(6.0 + flops / 1e6)
    assert prediction.predicted_us(mlp, "backward", counted, CEILINGS) == pytest.approx(6.0 + 2 * flops / 1e6)


def test_every_counted_operator_has_a_prediction_for_every_assumed_gpu() -> None:
    counted = prediction.recorded()
    records = kernels.predict(counted)
    assert {r["op"] for r in records} == {op for op, *_ in counted}
    assert {r["device"] for r in records} == {f"{gpu}, assumed" for gpu in prediction.ASSUMED}
    assert kernels._predictions(records).row_count == len(records) / len(prediction.ASSUMED)


def test_a_gpu_s_own_ceilings_put_the_prediction_beside_the_time() -> None:
    clock = FakeClock()
    norm, effort = case("rms_norm", N=33, D=64), ops_measure.Effort(rounds=2, cold_rounds=1, host_rounds=1)
    for ceilings in (CEILINGS, CEILINGS._replace(launch_us=None)):  # a GPU's, a CPU's
        records = ops_measure.measure(norm, effort, ceilings, timing.Clocks(clock, clock), only=["aten"])
        found = {r["provider"] for r in records if "predicted_us" in r}
        assert found == ({"braze"} if ceilings.launch_us else set())
