"""The benchmark of whole models: its models, its judgement, its records, and the death of its processes."""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import math
import warnings
from pathlib import Path

import pytest
import torch

pytest.importorskip("lightning", reason="needs the extra braze[bench]")
pytest.importorskip("rich", reason="needs the extra braze[bench]")
pytest.importorskip("timm", reason="needs the extra braze[bench]")
pytest.importorskip("torchvision", reason="needs the extra braze[bench]")
pytest.importorskip("transformers", reason="needs the extra braze[bench]")

from braze.benchmarks import child, memory, model_child, model_providers, models
from braze.benchmarks.workloads import WORKLOADS

from . import dying

QUICK = [name for name, workload in WORKLOADS.items() if "quick" in workload.sizes]
STEPS = 2


@pytest.mark.parametrize("name", QUICK)
def test_every_model_trains_and_answers(name: str) -> None:
    task = model_child.build(name, "quick")
    answer, losses = model_child._results(task, STEPS)
    assert answer.isfinite().all()
    assert answer.requires_grad is False
    assert all(math.isfinite(loss) for loss in losses)
    assert losses[0] != losses[1]


def test_every_model_has_its_published_size_on_a_gpu() -> None:
    """Millions of parameters, as the models' papers and cards give them; none for the zoo's own two."""
    published = {"gpt2": 124, "vit-b": 86.6, "convnext-t": 28.6, "resnet-50": 25.6, "llama-0.2B": 200, "llama-1B": 1236}
    for name, millions in published.items():
        with torch.device("meta"):
            model = WORKLOADS[name].build(WORKLOADS[name].sizes["cuda"])
        assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(millions, rel=0.04), name


@functools.cache
def judged(name: str) -> tuple[model_providers.Task, model_child.Budget]:
    task = model_child.build(name, "quick")
    return task, model_child.vanilla(task, STEPS)


@pytest.mark.parametrize("name", ["llama-tiny", "unet"])
def test_fused_answer_and_losses_are_within_the_budget(name: str) -> None:
    task, budget = judged(name)
    figures = model_child.judge(task, "braze", budget).figures
    assert [figures[which]["status"] for which in ("inference", "training")] == ["ok", "ok"]
    assert figures["training"]["loss_last"] != figures["training"]["loss_first"]


def test_a_lightning_trainer_takes_the_same_steps() -> None:
    task, budget = judged("unet")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Lightning's advice about workers, which the benchmark's processes ignore too
        run = model_child.judge(task, "lightning", budget)
    assert run.figures["training"].get("loss_last") == budget.losses[-1], run.figures
    model_bytes = 4 * sum(p.numel() for p in task.model.parameters())
    assert run.learner.peak(run.learner.step) > model_bytes  # its gradients at least
    run.learner.close()
    assert not run.learner._thread.is_alive()


def scaled_by_a_thousandth(model: torch.nn.Module, device: torch.device) -> model_providers.Around:
    with torch.no_grad():
        for p in model.parameters():
            p *= 1.001
    return model_providers._eager(model, device)


def test_a_wrong_provider_is_refused_and_gets_no_time(monkeypatch: pytest.MonkeyPatch) -> None:
    task, budget = judged("unet")
    monkeypatch.setitem(model_providers.PREPARE, "braze", scaled_by_a_thousandth)
    runs = {name: model_child.judge(task, name, budget) for name in ("eager", "braze")}
    for which in ("inference", "training"):
        model_child._time(runs, which, 1, 2, lambda work, repetitions: 1.0)
        assert runs["braze"].figures[which]["status"].startswith("wrong: ")
        assert not {"median_ms", "ratio", "peak_bytes"} & runs["braze"].figures[which].keys()
        assert runs["eager"].figures[which]["median_ms"] == 1000.0
        assert "ratio" not in runs["eager"].figures[which]  # there is nobody to compare with


def test_a_wrong_step_of_the_optimizer_shows_in_the_last_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    task, budget = judged("unet")
    monkeypatch.setattr(model_providers, "LEARNING_RATE", 1.01 * model_providers.LEARNING_RATE)
    status = model_child.judge(task, "eager", budget).figures["training"]["status"]
    assert status.startswith("wrong: last loss")


def test_what_is_no_number_is_wrong() -> None:
    assert model_child.difference(torch.tensor([1.0, float("nan")]), torch.ones(2)) == math.inf


def test_a_provider_that_raises_leaves_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    def raising(model: torch.nn.Module, device: torch.device) -> model_providers.Around:
        raise RuntimeError("no such kernel")

    task, budget = judged("unet")
    monkeypatch.setitem(model_providers.PREPARE, "braze", raising)
    run = model_child.judge(task, "braze", budget)
    assert run.figures == {"training": {"status": "failed: RuntimeError: no such kernel"}}


def test_records_of_a_model_are_flat_and_say_who_is_absent(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(model_child, "QUICK_ROUNDS", 2)
    messages = list(model_child.measure("unet", "quick", "cpu"))
    found = [m for m in messages if not isinstance(m, model_child.Stage)]
    assert all(isinstance(v, str | int | float) for r in json.loads(json.dumps(found)) for v in r.values())
    training = {r["provider"]: r for r in found if r["pass"] == "training"}
    assert set(training) == set(model_providers.NAMES)
    timed = {"eager", "braze", "lightning", "braze lightning"}
    assert {name for name, r in training.items() if "median_ms" in r} == timed
    assert all(r["status"].startswith("skipped: ") for name, r in training.items() if name not in timed)
    assert {r["provider"] for r in found if r["pass"] == "inference"} == {"eager", "braze"}
    for record in (training["eager"], training["lightning"]):
        assert record["ratio_low"] <= record["ratio"] <= record["ratio_high"]
        assert record["like_ratio_low"] <= record["like_ratio"] <= record["like_ratio_high"]
        assert record["items_per_second"] == pytest.approx(2 * 1e3 / record["median_ms"])
    models.show(found)
    printed = capsys.readouterr().out
    assert "unet: batch=2 side=8 width=16" in printed
    assert "liger skipped: Liger-Kernel runs on GPUs only: unet training" in printed


def test_braze_and_pairs_stay_together_where_memory_is_short(monkeypatch: pytest.MonkeyPatch) -> None:
    task, _ = judged("unet")
    copy = model_child.PARAMETER_BYTES * sum(p.numel() for p in task.model.parameters())
    monkeypatch.setattr(memory, "available", lambda _: 3.5 * copy / model_child.SHARE)
    groups = model_child._groups(task)
    assert all(len(group) <= 3 and group[0] == "braze" for group in groups)
    assert sorted(itertools.chain(["braze"], *(group[1:] for group in groups))) == sorted(model_providers.NAMES)
    for name, like in model_providers.LIKE.items():
        assert any({name, like} <= set(group) for group in groups)


def test_a_process_that_dies_leaves_the_other_models(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    tasks = {"gpt2": dying.record_then_abort, "dit": dying.refuse, "unet": dying.one_record}
    measured = models.measured
    monkeypatch.setattr(models, "measured", lambda name, *how: measured(name, *how, tasks[name], preload=()))
    parser = argparse.ArgumentParser()
    models.add_arguments(parser)
    words = ["--device", "cpu", *(word for name in tasks for word in ("--model", name))]
    kept: list[list[dict[str, object]]] = []
    found = models.run(
        parser.parse_args(words, argparse.Namespace(quick=True, keep=lambda so_far: kept.append(list(so_far))))
    )
    assert kept[-1] == found
    statuses = [(r["model"], r["status"]) for r in found]
    assert statuses[:2] == [("gpt2", "ok"), ("gpt2", "failed: SIGABRT")]
    assert statuses[2][1].startswith("failed: ValueError: dit cannot be built")
    assert statuses[3:] == [("unet", "ok")]


def test_a_process_that_says_nothing_is_ended() -> None:
    messages = child.messages(dying.say_nothing, "unet", "quick", "cpu", preload=(), seconds=20.0)
    assert next(messages)["model"] == "unet"
    messages.close()
    with pytest.raises(child.ChildDied, match="no answer in 0 s"):
        next(child.messages(dying.say_nothing, "unet", "quick", "cpu", preload=(), seconds=0.0))
