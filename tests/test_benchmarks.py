"""The benchmarks of losses, optimizers and roundings: tiny runs of each."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from rich.console import Console

from braze.benchmarks import losses, optim, rounding
from braze.benchmarks.ceilings import Ceilings
from braze.kernels import linear_cross_entropy

from .clocks import FakeClock


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


def test_a_predicted_step_is_one_launch_and_its_bytes(capsys: pytest.CaptureFixture[str]) -> None:
    gpu = Ceilings(copy_gbs=1000.0, matmul_tflops={}, launch_us=2.0)
    shapes = {"tiny": lambda: iter([torch.Size([1000, 1000]), torch.Size([500])])}
    traffic = [{"case": "AdamW", "ratio": 1.5}, {"case": "SGD", "ratio": 1.0}]
    found = optim.predict(traffic, shapes, {"a GPU": gpu})
    # Of float32, AdamW reads parameter, gradient and two states, and writes all but the gradient.
    per_element = {"AdamW": 1.5 * 7 * 4, "SGD": 3 * 4}
    expected = {op: 2.0 + 1_000_500 * moved / 1e6 for op, moved in per_element.items()}
    assert {record["op"]: record["predicted_us"] for record in found} == pytest.approx(expected)
    optim.show_predictions(found)
    assert re.search(r"tiny +AdamW +44 ", capsys.readouterr().out)


def test_roundings_are_compared_with_float32_of_the_same_seed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = [
        rounding.Run(title, seed, [4.0, 2.0 * (1 + seed) * (1 + 0.01 * place)] * rounding.LAST, 3.0 + seed)
        for seed in range(2)
        for place, title in enumerate(rounding.WAYS)
    ]
    records = rounding.records_of(runs)
    rounding.report(runs, tmp_path / "plot.png", Console(width=200))
    assert len(records) == len(runs)
    for record, run in zip(records, runs, strict=True):
        place = list(rounding.WAYS).index(run.title)
        last, wanted = ((4.0 + 2.0 * (1 + run.seed) * (1 + 0.01 * k)) / 2 for k in (place, 0))
        assert record["train_of_float32"] == pytest.approx(last / wanted)
        assert record["validation_of_float32"] == 1.0
    assert (tmp_path / "plot.png").stat().st_size > 0
    printed = capsys.readouterr().out
    assert all(title in printed for title in rounding.WAYS)
