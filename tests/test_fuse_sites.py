"""fuse in the source of a forward: gates, rotary sums, norms with an activation; and what must still be noticed."""

import copy
import functools
import importlib
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from braze.kernels import fuse, plan, unfuse, use_backend


@pytest.fixture(autouse=True)
def eager():
    with use_backend("eager"):
        yield


def operators(report):
    return sorted(record.now for record in report if record.status == "fused")


def rotate_half(x):
    first, second = x.chunk(2, -1)
    return torch.cat([-second, first], -1)


def rotate_pairs(x):
    return torch.stack([-x[..., 1::2], x[..., ::2]], -1).flatten(-2)


def apply_rotary(x, table):
    sin, cos = table.chunk(2, -1)
    return x * cos + sin * rotate_half(x)


def decorated(function):
    @functools.wraps(function)
    def wrapper(*args):
        return function(*args)

    return wrapper


class Base(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)
        self.act, self.drop = nn.SiLU(), nn.Dropout(0.1)
        self.norm, self.relu = nn.BatchNorm1d(8), nn.ReLU(inplace=True)

    def forward(self, x):
        return self.a(x)


class Dropped(Base):
    def forward(self, x):
        return self.drop(self.act(self.a(x)) * self.b(x))


class OtherSide(Base):
    @decorated
    def forward(self, x):
        y = super().forward(x)
        return x + self.b(y) * torch.sigmoid(y)


class InAMethod(Base):
    def forward(self, x):
        return self.gated(*self.a(x).chunk(2, -1))

    def gated(self, gate, up):
        return F.gelu(gate) * up if self.training else self.act(gate) * up


class Halves(Base):
    def forward(self, x):
        return (x * self.a.bias.cos()) + (rotate_half(x) * self.a.bias.sin())


class Pairs(Base):
    def forward(self, x):
        return (rotate_pairs(x).float() * x.detach().sin()) + (x.float() * x.detach().cos())


class Helper(Base):
    def forward(self, x):
        return apply_rotary(x, torch.cat([x.detach().sin(), x.detach().cos()], -1))


class Complex(Base):
    def forward(self, x):
        pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)))
        turns = torch.polar(torch.ones(4), torch.arange(4.0))
        return torch.view_as_real(pairs * turns).flatten(-2).type_as(x)


class Nested(Base):
    def forward(self, x):
        return self.relu(self.norm(self.a(x)))


class InSteps(Base):
    def forward(self, x):
        y = self.norm(self.a(x))
        y = self.relu(y)
        return self.b(y)


class Returned(Base):
    def forward(self, x):
        y = self.norm(x)
        return self.act(y)


class WithConstants(Base):
    def forward(self, x):
        y = F.leaky_relu(self.norm(self.a(x)), 0.3, inplace=True)
        y = self.norm(y)
        y = F.relu6(y, inplace=True)
        return self.b(y)


SITES = {
    Dropped: ["glu"],
    OtherSide: ["glu"],
    Halves: ["rope"],
    Pairs: ["rope"],
    Helper: ["rope"],
    Complex: ["rope"],
    Nested: ["batch_norm_act"],
    InSteps: ["batch_norm_act"],
    Returned: ["batch_norm_act"],
    WithConstants: ["batch_norm_act", "batch_norm_act"],
}


def step(model, x):
    torch.manual_seed(0)
    x = x.clone().requires_grad_()
    y = model(x)
    parameters = [p for p in model.parameters() if p.requires_grad]
    gradients = torch.autograd.grad(y.square().sum(), [x, *parameters], allow_unused=True)
    return [
        y.detach(),
        *(torch.zeros(()) if g is None else g for g in gradients),
        *(b.clone() for b in model.buffers()),
    ]


@pytest.mark.parametrize("kind", SITES, ids=lambda kind: kind.__name__)
def test_sites_are_fused_and_compute_the_same(kind):
    torch.manual_seed(0)
    model = kind()
    plain, x = copy.deepcopy(model), torch.randn(6, 8)
    assert operators(plan(model)) == []
    assert [record.now for record in plan(model) if record.status == "planned"] == SITES[kind]
    assert type(model) is kind
    assert operators(fuse(model)) == SITES[kind]
    for one in (model, pickle.loads(pickle.dumps(model)), copy.deepcopy(model)):
        for got, expected in zip(step(one, x), step(copy.deepcopy(plain), x), strict=True):
            torch.testing.assert_close(got, expected)
    assert {record.status for record in fuse(model)} == {"already fused"}
    fresh = copy.deepcopy(plain)
    unfuse(model)
    assert type(model) is kind
    model.load_state_dict(fresh.state_dict())
    for got, expected in zip(step(model, x), step(fresh, x), strict=True):
        assert torch.equal(got, expected)


def test_two_sites_of_a_method_that_the_forward_calls():
    assert operators(fuse(InAMethod())) == ["glu", "glu"]


@pytest.mark.parametrize("momentum", [0.1, None])
def test_norms_in_a_sequential_count_and_average_as_before(momentum):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8, momentum=momentum), nn.ReLU(), nn.GroupNorm(2, 8), nn.SiLU()
    )
    plain, x = copy.deepcopy(model), torch.randn(4, 3, 5, 5)
    report = fuse(model)
    assert [(record.path, record.now) for record in report] == [("1", "batch_norm_act"), ("3", "group_norm")]
    for _ in range(3):
        torch.testing.assert_close(model(x), plain(x))
    for got, expected in zip(model.buffers(), plain.buffers(), strict=True):
        torch.testing.assert_close(got, expected)
    torch.testing.assert_close(model.eval()(x), plain.eval()(x))


def test_norms_of_many_widths_that_hold_their_activation_are_verified_once(monkeypatch):
    timm = pytest.importorskip("timm")
    search = importlib.import_module("braze.kernels.fuse.search")
    calls = []
    verify = search.verify
    monkeypatch.setattr(search, "verify", lambda *args: calls.append(args) or verify(*args))
    norms = [timm.layers.BatchNormAct2d(n, apply_act=act) for n, act in ((4, True), (6, True), (9, True), (6, False))]
    model, x = nn.ModuleList(norms), torch.randn(3, 9, 2, 2)
    plain = copy.deepcopy(model)
    assert operators(fuse(model)) == ["batch_norm_act"] * 3
    assert len(calls) == 1
    torch.testing.assert_close(model[2](x), plain[2](x))


def test_hooks_inside_a_site_fire_and_a_module_put_in_later_runs():
    calls = []
    model = Nested()
    fuse(model)
    model.norm.register_forward_hook(lambda *_: calls.append("norm"))
    model.relu.register_forward_hook(lambda *_: calls.append("relu"))
    model(torch.randn(4, 8))
    assert calls == ["norm", "relu"]
    model.relu = nn.Tanh()
    assert model(torch.randn(4, 8)).min() < 0


def test_shapes_that_broadcast_are_the_originals():
    class Broadcast(Base):
        def forward(self, x):
            return self.act(x[..., :1]) * self.b(x)

    model, x = Broadcast(), torch.randn(3, 8)
    expected = model(x)
    assert operators(fuse(model)) == ["glu"]
    assert torch.equal(model(x), expected)


class Without(Base):
    """Looks like sites, and is none."""

    def forward(self, x):
        y = self.norm(x)
        z = self.relu(y)
        gate = torch.tanh(self.a(x)) * self.b(x)
        return z + y + gate + (x * x.cos() + torch.flip(x, (-1,)) * x.sin())


def test_lookalikes_are_left():
    assert operators(fuse(Without())) == []


ACTIVATIONS = [
    nn.ReLU(),
    nn.SiLU(),
    nn.GELU(),
    nn.Hardswish(),
    nn.Hardswish(inplace=True),
    nn.ReLU6(inplace=True),
    nn.Hardtanh(0.0, 6.0),
    nn.LeakyReLU(),
    nn.LeakyReLU(0.2, inplace=True),
]


@pytest.mark.parametrize("act", ACTIVATIONS, ids=str)
@pytest.mark.parametrize("norm", [nn.BatchNorm2d(4), nn.GroupNorm(2, 4)], ids=["batch", "group"])
def test_every_activation_behind_a_norm_is_told_by_its_values(norm, act):
    torch.manual_seed(0)
    model, x = nn.Sequential(copy.deepcopy(norm), act).double(), 5.0 * torch.randn(6, 4, 3, 3, dtype=torch.float64)
    for p in model.parameters():
        nn.init.normal_(p, std=3.0)
    plain = copy.deepcopy(model)
    assert [record.path for record in fuse(model).fused] == ["0"]
    assert type(model) is not nn.Sequential
    for training in (True, False):
        for got, expected in zip(step(model.train(training), x), step(plain.train(training), x), strict=True):
            torch.testing.assert_close(got, expected)


def test_the_slope_is_that_of_the_module_and_another_one_is_noticed():
    model, x = nn.Sequential(nn.BatchNorm2d(4), nn.LeakyReLU(0.1)), torch.randn(3, 4, 5, 5)
    plain = copy.deepcopy(model)
    fuse(model)
    for slope in (0.1, 0.5):
        model[1].negative_slope = plain[1].negative_slope = slope
        torch.testing.assert_close(model(x), plain(x))


@pytest.mark.parametrize("act", [nn.ELU(), nn.Mish(), nn.RReLU(), nn.PReLU()], ids=str)
def test_an_activation_that_no_operator_has_is_a_reason(act):
    (record,) = (r for r in fuse(nn.Sequential(nn.BatchNorm2d(4), act)) if r.path == "0")
    assert record.status == "left"
    assert "no such activation" in record.reason
    assert ("learned" in record.reason) == isinstance(act, nn.PReLU)


def test_an_activation_that_a_norm_holds_may_change_later():
    timm = pytest.importorskip("timm")
    model = timm.layers.BatchNormAct2d(4, act_layer="leaky_relu", act_kwargs={"negative_slope": 0.2})
    plain, x = copy.deepcopy(model), torch.randn(3, 4, 2, 2)
    assert operators(fuse(model)) == ["batch_norm_act"]
    for act in (plain.act, nn.LeakyReLU(0.5), nn.Tanh()):
        model.act = plain.act = act
        torch.testing.assert_close(model(x), plain(x))


def test_a_sequential_with_a_forward_of_its_own_is_a_reason():
    class Resized(nn.Sequential):
        def forward(self, x):
            size = x.shape[-2:]
            for module in self:
                x = module(x)
            return F.interpolate(x, size=size)

    (record,) = (r for r in fuse(Resized(nn.BatchNorm2d(4), nn.ReLU())) if r.path == "0")
    assert record.status == "left"
    assert record.reason == "its nn.Sequential has a forward of its own"


def test_source_that_is_not_what_runs_is_left():
    space = {"nn": nn, "Base": Base, "torch": torch}
    exec("class Unseen(Base):\n    def forward(self, x):\n        return self.act(self.a(x)) * self.b(x)\n", space)
    assert operators(fuse(space["Unseen"]())) == []


def test_skip_and_only_reach_sites():
    assert operators(fuse(Dropped(), skip="glu")) == []
    model = nn.Sequential(Nested(), Nested())
    report = fuse(model, only="1.norm")
    assert [record.path for record in report.fused] == ["1.norm"]
    assert type(model[0]) is Nested


@pytest.mark.parametrize("kind", [Dropped, Helper, Nested], ids=lambda kind: kind.__name__)
def test_rewritten_forwards_compile_without_a_break(kind):
    model, x = kind().eval(), torch.randn(4, 8)
    expected = model(x)
    fuse(model)
    torch._dynamo.reset()
    torch.testing.assert_close(torch.compile(model, fullgraph=True, backend="aot_eager")(x), expected)
