"""fuse on an example: what reaches the joints, what it refutes, and which swaps it is worth making."""

import collections
import copy
import importlib
import itertools
import json
import sys

import pytest
import torch
from torch import nn

from braze.kernels import dispatch, fuse, plan, unfuse, use_backend
from braze.kernels.fuse.sample import Draw

from .fusible import apply_rotary

tuning = importlib.import_module("braze.kernels.fuse.tune")


@pytest.fixture(autouse=True)
def eager():
    with use_backend("eager"):
        yield


class Model(nn.Module):
    """A joint of every way to be found."""

    def __init__(self):
        super().__init__()
        self.inner, self.gate, self.up = nn.LayerNorm(8), nn.Linear(8, 12), nn.Linear(8, 12)
        self.act, self.down, self.drop = nn.SiLU(), nn.Linear(12, 8), nn.Dropout(0.5)
        self.norm, self.relu = nn.BatchNorm1d(8), nn.ReLU()
        self.heads = Turned()
        self.tail = nn.Sequential(nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3), nn.Softmax(-1))
        self.unused = nn.RMSNorm(5)

    def forward(self, x, *, scale=1.0):
        y = self.drop(self.inner(x)) * scale
        y = self.down(self.act(self.gate(y)) * self.up(y))
        return self.tail(self.heads(self.relu(self.norm(y))))


class Turned(nn.Module):
    def forward(self, x):
        q, k = apply_rotary(x, 2 * x, x.detach().cos(), x.detach().sin())
        return q + k


X = torch.randn(6, 8, generator=torch.Generator().manual_seed(0))
KINDS = ["batch_norm_act", "batch_norm_act", "glu", "layer_norm", "rope", "softmax"]


@pytest.mark.parametrize("example", [X, (X,), [X], {"x": X}], ids=["tensor", "tuple", "list", "dict"])
def test_an_example_comes_in_every_form(example):
    (record,) = fuse(nn.RMSNorm(8), example=example)
    assert (record.saving.unit == "batch") == (type(example) is not dict)  # a keyword is the original's


def test_every_joint_is_seen_and_told_for_the_batch():
    torch.manual_seed(0)
    report = fuse(Model(), example={"x": X, "scale": 2.0})
    reached = [record for record in report if record.path != "unused"]
    assert sorted(record.now for record in reached) == KINDS
    assert {record.saving.unit for record in reached} == {"batch"}
    (unused,) = (record for record in report if record.path == "unused")
    assert (unused.status, unused.reason) == ("fused", "the example does not reach it")
    # SiLU's result, of 6 × 12 numbers, is no longer kept.
    (gate,) = (record for record in report if record.now == "glu")
    assert gate.saving.activations == 4 * 6 * 12


def test_the_run_on_the_example_changes_nothing():
    torch.manual_seed(0)
    model = Model()
    calls = []
    model.norm.register_forward_hook(lambda *_: calls.append(1))
    buffers = {name: (id(b), b.clone()) for name, b in model.named_buffers()}
    classes, state = [type(m) for m in model.modules()], torch.get_rng_state()
    plan(model, example=X)
    assert [type(m) for m in model.modules()] == classes
    assert all(id(b) == buffers[name][0] and torch.equal(b, buffers[name][1]) for name, b in model.named_buffers())
    assert torch.equal(torch.get_rng_state(), state)
    assert calls == [1]  # the user's hooks run with the model
    assert all(not m._forward_pre_hooks for m in model.modules())
    assert all(p.grad is None for p in model.parameters())


class Cubed(nn.LayerNorm):
    """A norm but for large inputs, which no draw reaches."""

    def forward(self, x):
        y = super().forward(x)
        return y**3 if x.abs().max() > 1e6 else y


def test_what_the_models_own_activations_refute_is_left():
    model = nn.Sequential(Cubed(8), nn.LayerNorm(8))
    assert len(plan(model).records) == len([r for r in plan(model) if r.status == "planned"]) == 2
    first, second = fuse(model, example=1e7 * X)
    assert first.status == "left"
    assert first.reason.startswith("on the example: ")
    assert (type(model[0]), second.status) == (Cubed, "fused")


@pytest.mark.parametrize("example", [X[:, :5], {"y": X}, (X, 3), "text"], ids=["shape", "name", "number", "type"])
def test_a_bad_example_is_an_error_and_changes_nothing(example):
    model = Model()
    before = [(type(m), m.__dict__.keys(), len(m._forward_pre_hooks)) for m in model.modules()]
    with pytest.raises(ValueError, match=r"example must be what the model takes.*raised \w+Error"):
        fuse(model, example=example)
    assert [(type(m), m.__dict__.keys(), len(m._forward_pre_hooks)) for m in model.modules()] == before
    with pytest.raises(ValueError, match=r"tune=True must come with an example"):
        fuse(model, tune=True)


# ------------------------------------------------------------------------------ tuning


@pytest.fixture
def speeds(monkeypatch):
    """Seconds of a call in which each operator runs, 1 for those where none does; a list of them takes turns."""
    found, ran, turns = {}, [], collections.Counter()
    run = dispatch.run
    monkeypatch.setattr(dispatch, "run", lambda op, *args, **options: ran.append(op.name) or run(op, *args, **options))

    def clock(work, repetitions, device):
        ran.clear()
        work()
        if not ran:
            return 1.0 * repetitions
        seconds = found.get(ran[0], [0.5])
        turns[ran[0]] += 1
        return repetitions * seconds[turns[ran[0]] % len(seconds)]

    monkeypatch.setattr(tuning, "clock", clock)
    return found


def test_only_what_is_faster_or_saves_memory_at_the_same_speed_is_kept(speeds):
    # The activation of a gate is kept no longer; a batch norm, whose result the next layer keeps, saves none.
    speeds |= {"layer_norm": [1.1], "rope": [0.9], "glu": [0.9, 1.0, 1.1], "batch_norm_act": [0.9, 1.0, 1.1]}
    model = Model()
    report = fuse(model, example=X, tune=True)
    found = {record.path: record for record in report}
    assert {path for path, record in found.items() if record.status == "left"} == {"inner", "norm", "tail.0"}
    assert found["inner"].reason == "slower on the example: 1.10 (1.10 to 1.10) of the original's time"
    assert found["norm"].reason.startswith("no faster, and saves no memory, on the example: 1.00 (0.90 to 1.10)")
    assert found["heads"].timing == tuning.Timing(0.9, 0.9, 0.9)
    assert type(model.inner) is nn.LayerNorm
    assert type(model.heads) is not Turned
    assert "×0.90 (0.90 to 0.90)" in str(report)  # noqa: RUF001 (the multiplication sign is meant)
    assert json.loads(json.dumps(report.as_dicts()))[0].keys() >= {"timing", "saving"}


@pytest.mark.parametrize(
    ("timing", "saves", "kept"),
    [
        ((0.9, 0.8, 0.99), False, True),
        ((0.9, 0.8, 1.01), False, False),
        ((1.1, 0.99, 1.2), True, True),
        ((1.1, 1.01, 1.2), True, False),
    ],
)
def test_the_whole_interval_decides(timing, saves, kept):
    assert (tuning.verdict(tuning.Timing(*timing), saves) == "") == kept


def test_in_evaluation_a_forward_pass_is_timed_and_memory_does_not_count(speeds):
    speeds["glu"] = [0.9, 1.0, 1.1]
    report = fuse(Model().eval(), example=X, tune=True)
    (gate,) = (record for record in report if "MLP" in record.was or record.path == "")
    assert gate.status == "left"
    assert "no faster" in gate.reason


def test_the_same_kind_and_shape_is_timed_once(speeds, monkeypatch):
    calls = []
    timed = tuning.timed
    monkeypatch.setattr(
        importlib.import_module("braze.kernels.fuse.refine"), "timed", lambda *args: calls.append(args) or timed(*args)
    )
    model = nn.Sequential(*(nn.LayerNorm(8) for _ in range(3)), nn.Linear(8, 4), nn.LayerNorm(4))
    assert len(fuse(model, example=X, tune=True).fused) == 4
    assert len(calls) == 2


class Costly(nn.Module):
    """Takes so many seconds of a clock that stands still otherwise."""

    def __init__(self, now, seconds):
        super().__init__()
        self.now, self.seconds = now, seconds

    def forward(self, x):
        self.now[0] += next(self.seconds)
        return 2 * x

    def __deepcopy__(self, memo):
        return self


def test_the_median_of_ratios_within_a_round_is_told(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(tuning.time, "perf_counter", lambda: now[0])
    # The machine slows down and down: that is no matter within a round.
    plain = Costly(now, (1.0 * 1.5**n for n in itertools.count()))
    fused = Costly(now, (0.5 * 1.5**n for n in itertools.count()))
    timing = tuning.timed(plain, fused, Draw("", (X,)), torch.float32, True)
    assert timing == tuning.Timing(*[pytest.approx(0.5)] * 3)
    assert tuning.verdict(timing, False) == ""


@pytest.mark.parametrize(("terminal", "installed"), [(True, True), (True, False), (False, True)])
def test_a_bar_needs_a_terminal_and_rich(speeds, terminal, installed, monkeypatch, capfd):
    if terminal:
        monkeypatch.setenv("TTY_COMPATIBLE", "1")
    if not installed:
        monkeypatch.setitem(sys.modules, "rich.progress", None)
    assert fuse(Model(), example=X, tune=True).fused
    printed, shown = capfd.readouterr()
    assert printed == ""
    assert ("timing joints" in shown) == (terminal and installed)


def test_a_tuned_model_computes_the_same_and_is_undone(speeds):
    torch.manual_seed(0)
    model = Model().eval()
    plain = copy.deepcopy(model)
    fuse(model, example=X, tune=True)
    torch.testing.assert_close(model(X), plain(X))
    unfuse(model)
    assert [type(m) for m in model.modules()] == [type(m) for m in plain.modules()]
    assert torch.equal(model(X), plain(X))
