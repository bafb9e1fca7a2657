"""Plain MLPs: recognised and verified, swapped only where asked; what is between the layers is then not kept."""

import copy
import importlib
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from braze.kernels import fuse, fused, plan, unfuse, use_backend
from braze.kernels.fuse import tune as tuning

from .test_fuse_savings import kept


@pytest.fixture(autouse=True)
def eager():
    with use_backend("eager"):
        yield


class Base(nn.Module):
    def __init__(self, p=0.0, q=0.0):
        super().__init__()
        self.inner, self.outer = nn.Linear(12, 40), nn.Linear(40, 12)
        self.act, self.drop, self.last = nn.GELU(), nn.Dropout(p), nn.Dropout(q)

    def forward(self, x):
        return self.last(self.outer(self.drop(self.act(self.inner(x)))))


class Statements(Base):
    def forward(self, hidden_states):
        h = self.inner(hidden_states)
        h = h * torch.sigmoid(1.702 * h)
        h = F.dropout(h, p=0.0, training=self.training)
        return self.outer(h)


class Squared(nn.Module):
    """The second child comes first."""

    def __init__(self, out=7):
        super().__init__()
        self.w2, self.w1 = nn.Linear(40, out, bias=False), nn.Linear(12, 40, bias=False)

    def forward(self, x):
        return self.w2(torch.relu(self.w1(x)) ** 2)


def sequential():
    return nn.Sequential(nn.Linear(12, 40), nn.SiLU(), nn.Linear(40, 12), nn.Dropout(0.0))


KINDS = {
    "modules": Base,
    "statements": Statements,
    "another width": Squared,
    "the second first": lambda: Squared(12),
    "sequential": sequential,
}


def step(model, x):
    x = x.clone().requires_grad_()
    y = model(x)
    parameters = list(model.parameters())
    return [y.detach(), *torch.autograd.grad(y.square().sum(), [x, *parameters])]


def assert_same(model, plain, x):
    for got, expected in zip(step(model, x), step(plain, x), strict=True):
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("kind", KINDS)
def test_it_is_offered_with_what_it_saves_and_swapped_by_name(kind, runs):
    torch.manual_seed(0)
    model, x = KINDS[kind](), torch.randn(2, 5, 12)
    plain, keys, cls = copy.deepcopy(model), list(model.state_dict()), type(model)
    for report in (plan(model), fuse(model)):
        (record,) = report
        assert (record.status, record.now) == ("offered", "mlp")
        assert record.check is not None
        assert record.saving.activations >= 2 * 40 * 4
        assert type(model) is cls
        assert report.savings == {}
        assert "only='mlp' would fuse 1 more" in str(report)
    (record,) = fuse(model, only="mlp")
    assert (record.status, record.reason) == ("fused", "")
    assert list(model.state_dict()) == keys
    for one in (model, pickle.loads(pickle.dumps(model)), copy.deepcopy(model)):
        runs.clear()
        assert_same(one, plain, x)
        assert "mlp" in runs
        assert_same(one.eval(), plain, x)
    assert {record.status for record in fuse(model)} == {"already fused"}
    unfuse(model)
    assert type(model) is cls


def test_what_is_saved_is_what_is_no_longer_kept():
    pytest.importorskip("triton")
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 12), Base(), nn.LayerNorm(12))
    swapped = copy.deepcopy(model)
    (record,) = fuse(swapped, only="mlp").fused
    x = torch.randn(2, 17, 12)
    with use_backend("triton"):
        saved = kept(model, lambda m: m(x)) - kept(swapped, lambda m: m(x))
    assert saved == 34 * record.saving.activations > 0


@pytest.mark.parametrize("choice", ["*", "outside", Base])
def test_a_path_or_a_class_does_not_ask_for_it(choice):
    model = nn.ModuleDict({"outside": Base()})
    assert [record.status for record in fuse(model, only=choice)] == ["offered"]
    assert [record.status for record in fuse(model, only=[choice, "mlp"])] == ["fused"]
    assert list(fuse(nn.ModuleDict({"outside": Base()}), skip="mlp")) == []


def test_a_block_swaps_it_for_a_while():
    model = Base()
    with fused(model, only="mlp") as report:
        assert len(report.fused) == 1
        assert type(model) is not Base
    assert type(model) is Base


def test_dropout_between_is_the_originals_and_behind_runs_as_a_module(runs):
    torch.manual_seed(0)
    model, calls, x = Base(0.5, 0.5), [], torch.randn(64, 12)
    plain = copy.deepcopy(model)
    assert len(fuse(model, only="mlp").fused) == 1
    runs.clear()
    model.last.register_forward_hook(lambda *_: calls.append("last"))
    for one in (model, plain):
        one.seed = torch.manual_seed(3)
        one.y = one(x)
    assert torch.equal(model.y, plain.y)
    assert "mlp" not in runs
    model.drop.p = 0.0
    y = model(x)
    assert "mlp" in runs
    assert calls == ["last"] * 2
    assert 0.4 < (y == 0.0).float().mean() < 0.6
    torch.testing.assert_close(y[y != 0.0], 2.0 * plain.eval()(x)[y != 0.0])


@pytest.mark.parametrize("part", ["inner", "outer", "act", "drop", "last"])
def test_hooks_fire_and_what_is_put_in_later_runs(part):
    calls = []
    model, x = Base(), torch.randn(3, 12)
    plain = copy.deepcopy(model)
    fuse(model, only="mlp")
    handle = getattr(model, part).register_forward_hook(lambda *_: calls.append(part))
    assert_same(model, plain, x)
    assert calls == [part]
    handle.remove()
    later = nn.Sequential(nn.Linear(12, 40) if part == "inner" else nn.Linear(40, 12), nn.Tanh())
    for one in (model, plain):
        setattr(one, part, later if part in ("inner", "outer") else nn.Tanh())
    assert_same(model, plain, x)


class Residual(Base):
    def forward(self, x):
        return x + self.outer(self.act(self.inner(x)))


class Softmax(Base):
    def forward(self, x):
        return self.outer(self.inner(x).softmax(-1))


class Mixed(Base):
    """Right for one token, or for one batch."""

    def forward(self, x):
        return self.outer(self.act(self.inner(x)).cumsum(1))


@pytest.mark.parametrize("kind", [Residual, Softmax, Mixed], ids=lambda kind: kind.__name__)
def test_lookalikes_are_left(kind):
    assert [record for record in fuse(kind(), only="mlp") if record.status != "left"] == []


def test_a_layer_that_is_more_than_its_weight_is_left():
    model = Base()
    model.outer = nn.utils.parametrizations.weight_norm(nn.Linear(40, 12))
    assert list(fuse(model, only="mlp")) == []
    model.outer = type("Adapted", (nn.Linear,), {"forward": lambda self, x: nn.Linear.forward(self, x) + x.mean()})(
        40, 12
    )
    assert list(fuse(model, only="mlp")) == []


def test_frozen_layers_stay_so():
    model, x = Base(), torch.randn(3, 12)
    model.inner.requires_grad_(requires_grad=False)
    plain = copy.deepcopy(model)
    assert len(fuse(model, only="mlp").fused) == 1
    for one in (model, plain):
        one.zero_grad()
        one(x).square().sum().backward()
    assert model.inner.weight.grad is None
    torch.testing.assert_close(model.outer.weight.grad, plain.outer.weight.grad)


def test_under_autocast_and_with_other_dtypes_it_is_the_original():
    model, x = Base(), torch.randn(3, 12)
    plain = copy.deepcopy(model)
    fuse(model, only="mlp")
    with torch.autocast("cpu", torch.bfloat16):
        assert model(x).dtype == plain(x).dtype == torch.bfloat16
    for one in (model, plain):
        with pytest.raises(RuntimeError, match="dtype"):
            one(x.double())


@pytest.mark.parametrize(("seconds", "status"), [(0.9, "fused"), (1.1, "left")])
def test_tune_swaps_it_where_it_is_faster(seconds, status, monkeypatch):
    timing = tuning.Timing(seconds, seconds, seconds)
    monkeypatch.setattr(importlib.import_module("braze.kernels.fuse.refine"), "timed", lambda *_: timing)
    model = nn.ModuleDict({"used": Base(), "not": Base()})
    model.forward = lambda x: model["used"](x)
    found = {record.path: record for record in fuse(model, example=torch.randn(3, 12), tune=True)}
    assert (found["used"].status, found["used"].timing) == (status, timing)
    assert found["not"].status == "offered"
    assert found["not"].reason.endswith("the example does not reach it")
    (record,) = (r for r in fuse(nn.Sequential(Base()), example=torch.randn(3, 12)) if r.now == "mlp")
    assert record.status == "offered"
    assert record.saving.unit == "batch"


def test_it_compiles_without_a_break():
    model, x = Base(), torch.randn(3, 12)
    expected = model(x)
    fuse(model, only="mlp")
    torch._dynamo.reset()
    torch.testing.assert_close(torch.compile(model, fullgraph=True, backend="aot_eager")(x), expected)


def clip(transformers):
    config = transformers.CLIPVisionConfig(hidden_size=12, intermediate_size=40)
    return transformers.models.clip.modeling_clip.CLIPMLP(config)


def t5(transformers):
    config = transformers.T5Config(d_model=12, d_ff=40, feed_forward_proj="relu")
    return transformers.models.t5.modeling_t5.T5DenseActDense(config)


def gpt2(transformers):
    config = transformers.GPT2Config(n_embd=12, n_inner=40, resid_pdrop=0.1)
    return transformers.models.gpt2.modeling_gpt2.GPT2MLP(40, config)


@pytest.mark.parametrize(
    ("library", "make"),
    [
        ("transformers", gpt2),
        ("transformers", clip),
        ("transformers", t5),
        ("timm", lambda timm: timm.layers.Mlp(12, 40, drop=0.1)),
        ("torchvision", lambda tv: tv.models.vision_transformer.MLPBlock(12, 40, 0.1)),
    ],
    ids=["GPT-2", "CLIP", "T5", "timm", "torchvision"],
)
def test_those_of_libraries_are_found(library, make):
    torch.manual_seed(0)
    model, x = make(pytest.importorskip(library)), torch.randn(2, 5, 12)
    plain = copy.deepcopy(model)
    assert [record.now for record in fuse(model, only="mlp").fused] == ["mlp"]
    assert_same(model.eval(), plain.eval(), x)
