"""The table of models: a process that dies is a result, and what is known is not measured again."""

from __future__ import annotations

import argparse
import functools
import os
from pathlib import Path
from typing import Any

import pytest

from braze.benchmarks import audit as command
from braze.benchmarks import channels_last, records
from braze.benchmarks.audit_child import in_child
from braze.benchmarks.audit_models import MODELS
from braze.benchmarks.child import ChildDied

pytest.importorskip("timm")
pytest.importorskip("torchvision")


def die() -> dict[str, Any]:
    os.abort()


def answers(value: int) -> dict[str, Any]:
    return {"value": value}


def raises() -> dict[str, Any]:
    raise KeyError("missing")


def test_a_child_answers_raises_or_dies() -> None:
    assert in_child(answers, 3, seconds=300) == {"value": 3}
    with pytest.raises(KeyError, match="missing"):
        in_child(raises, seconds=300)
    with pytest.raises(ChildDied, match="SIGABRT"):
        in_child(die, seconds=300)


def test_there_are_enough_models() -> None:
    assert len(set(MODELS)) == len(MODELS) >= 95


def figures(model: str, verdict: str) -> dict[str, Any]:
    record: dict[str, Any] = {"benchmark": "audit", "model": model, "versions": command._versions(), "verdict": verdict}
    for device in ("cpu", "cuda"):
        record |= {f"{device}_{name}": 1 for name in ("convolutions", "nchw", "nchw_backward", "bytes_lost")}
        record[f"{device}_verdict"] = verdict
    return {**record, "worst": "aten.cat at a/b.py:3"}


def test_a_stopped_run_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    measured: list[str] = []

    def measure(model: str) -> dict[str, Any]:
        measured.append(model)
        if model == "c" and measured.count("c") == 1:
            raise KeyboardInterrupt
        return {**figures(model, "clean"), **({"verdict": "failed", "error": "no"} if model == "b" else {})}

    monkeypatch.setattr(command, "measure", measure)
    file = tmp_path / "audit.json"
    keep = functools.partial(records.write, file, "audit")
    arguments = argparse.Namespace(model=["a", "b", "c"], quick=False, fresh=False, json=file, keep=keep)
    with pytest.raises(KeyboardInterrupt):
        command.run(arguments)
    found = command.run(arguments)
    assert measured == ["a", "b", "c", "b", "c"]  # what failed is tried again
    assert [record["model"] for record in found] == ["a", "b", "c"]
    assert "failed: no" in capsys.readouterr().out
    arguments.fresh = True
    command.run(arguments)
    assert measured[5:] == ["a", "b", "c"]


def test_a_step_is_timed_in_both_layouts(capsys: pytest.CaptureFixture[str]) -> None:
    import torch
    from torch import nn

    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    found = channels_last.measure("tiny", model, torch.randn(4, 3, 8, 8), rounds=2)
    assert [record["provider"] for record in found] == ["contiguous", "channels_last"]
    assert all(record["converted"] == 1 and record["median_s"] > 0 for record in found)
    channels_last._show(found)
    assert "1 of 1; " in capsys.readouterr().out
