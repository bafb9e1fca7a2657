"""The benchmark of loaders: a wrong provider is refused, and where there is no gain the table says so."""

from __future__ import annotations

import argparse

import pytest
import torch

from braze.benchmarks import loaders


def case(**providers: float) -> loaders.Case:
    return loaders.Case(
        "a case", {name: lambda value=value: torch.tensor([value]) for name, value in providers.items()}
    )


def clock(work: object, repetitions: int) -> float:
    return repetitions * 1e-3


def test_a_wrong_provider_is_refused_before_it_is_timed() -> None:
    with pytest.raises(AssertionError, match="a case, torch"):
        loaders.measure(case(torch=1.5, braze=1.0), 3, clock)


def test_equal_times_are_no_gain(capsys: pytest.CaptureFixture[str]) -> None:
    records = loaders.measure(case(torch=1.0, braze=1.0), 3, clock)
    assert [record["ratio"] for record in records] == [1.0, 1.0]
    loaders.show(records)
    loaders.show([{**record, "ratio_low": 2.0} for record in records])
    assert capsys.readouterr().out.count("no gain") == 1


def test_a_case_runs_and_gives_a_record_for_each_provider(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(loaders, "CASES", (loaders.collating(3, 8), loaders.channels_last(3, 8), loaders.small_fields))
    records = loaders.run(argparse.Namespace(quick=True))
    assert [record["provider"] for record in records].count("braze") == 3
    assert {record["case"] for record in records} == {
        "collate 3 images of 8²",
        "HWC → channels_last, 3 images of 8²",
        "collate 64 samples of 16 small fields",
    }
    assert "timm fast_collate" in capsys.readouterr().out
