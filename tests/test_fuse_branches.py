"""fuse at the end of residual blocks: factors, stochastic depth and dropout of a branch go into its sum.

One file, because every test goes over the same spellings of a branch; real models are in test_fuse_branch_models.py.
"""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from braze.kernels import dispatch, fuse, plan, unfuse, use_backend

WIDTH = 8


@pytest.fixture(autouse=True)
def eager():
    with use_backend("eager"):
        yield


class Scale(nn.Module):
    def __init__(self, width, inplace=False):
        super().__init__()
        self.lambda1, self.inplace = nn.Parameter(torch.randn(width)), inplace

    def forward(self, x):
        return x.mul_(self.lambda1) if self.inplace else self.lambda1 * x


class Depth(nn.Module):
    """Stochastic depth; ``batch`` drops all samples or none."""

    def __init__(self, rate, by_keep=True, batch=False):
        super().__init__()
        self.rate, self.by_keep, self.batch = rate, by_keep, batch

    def forward(self, x):
        if self.rate == 0.0 or not self.training:
            return x
        kept = torch.rand(1 if self.batch else len(x), *[1] * (x.dim() - 1), device=x.device) >= self.rate
        return x * kept / (1 - self.rate if self.by_keep else 1.0)


class Base(nn.Module):
    def __init__(self):
        super().__init__()
        self.mlp, self.down = nn.Linear(WIDTH, WIDTH), nn.Identity()
        self.scale, self.path, self.drop = Scale(WIDTH), Depth(0.5), nn.Dropout(0.5)
        self.gamma = nn.Parameter(torch.randn(WIDTH))
        self.norm, self.p = nn.LayerNorm(WIDTH), 0.5


class Nested(Base):
    def forward(self, x):
        return x + self.path(self.scale(self.mlp(x)))


class Statements(Base):
    def forward(self, x):
        shortcut = x
        x = self.mlp(x)
        x = self.scale(x)
        if self.gamma is not None:
            x = x.mul(self.gamma.reshape(1, 1, -1))
        x = self.path(x) + self.down(shortcut)
        return x


class Images(Base):
    """Channels are the second dim; the factor is guarded."""

    def forward(self, x):
        shortcut = x.permute(0, 3, 1, 2)
        x = self.mlp(x).permute(0, 3, 1, 2)
        if self.gamma is not None:
            x = x.mul(self.gamma.reshape(1, -1, 1, 1))
        x = self.path(x) + shortcut
        return x


class Augmented(Base):
    def forward(self, x):
        result = self.gamma * self.mlp(x)
        result = self.path(result)
        result += x
        return result


class OnlyPath(Base):
    def forward(self, x):
        y = self.path(self.mlp(x))
        return self.norm(x + y) + x


class Function(Base):
    def forward(self, x):
        y = self.mlp(x)
        y = F.dropout(y, p=self.p, training=self.training)
        y = x + y
        return y


class Dropped(Base):
    def forward(self, x):
        return self.drop(self.mlp(x)) + x


class Normed(Base):
    """Dropout, sum and norm are one operator, as in BERT."""

    def forward(self, h, x=None):
        x = h if x is None else x
        h = self.mlp(h)
        h = self.drop(h)
        h = self.norm(h + x)
        return h


class NormedNext(Base):
    def forward(self, x):
        x = x + F.dropout(self.mlp(x), p=self.p, training=self.training)
        h = self.norm(x)
        return x + h


class Gated(Base):
    def forward(self, x):
        scale, gate = self.mlp(x.mean(1)).chunk(2, dim=1)
        scale, gate = torch.cat([scale, scale], 1), torch.cat([gate, gate], 1)
        x = x + gate.unsqueeze(1) * self.mlp(x)
        y = scale[:, None] * self.mlp(x)
        z = y + x
        return z


OPERATORS = {
    Nested: ["scale_add"],
    Statements: ["scale_add"],
    Images: ["scale_add"],
    Augmented: ["scale_add"],
    OnlyPath: ["scale_add"],
    Function: ["dropout_add"],
    Dropped: ["dropout_add"],
    Normed: ["add_layer_norm"],
    NormedNext: ["add_layer_norm"],
    Gated: ["gated_add", "gated_add"],
}
X = torch.randn(4, 3, WIDTH, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def made(kind):
    torch.manual_seed(0)
    return kind().double()


def given(model):
    return X.unflatten(1, (1, 3)) if isinstance(model, Images) else X


def still(model):
    """Nothing dropped, though in training."""
    for module in model.modules():
        for name in ("p", "rate"):
            if hasattr(module, name):
                setattr(module, name, 0.0)
    return model


def step(model, x):
    x = x.clone().requires_grad_()
    y = model(x)
    gradients = torch.autograd.grad(y.sin().sum(), [x, *model.parameters()], allow_unused=True)
    return [y.detach(), *(g for g in gradients if g is not None)]


def assert_same(model, plain):
    for got, expected in zip(step(model, given(model)), step(plain, given(plain)), strict=True):
        torch.testing.assert_close(got, expected)


def joints(report):
    return sorted(r.now for r in report if r.now and r.now not in ("layer_norm", "linear_cross_entropy"))


@pytest.mark.parametrize("kind", OPERATORS, ids=lambda kind: kind.__name__)
def test_steps_and_sum_are_one_operator_and_compute_the_same(kind):
    model = made(kind)
    plain = copy.deepcopy(model)
    assert joints(plan(model)) == joints(fuse(model)) == OPERATORS[kind]
    for one in (model, pickle.loads(pickle.dumps(model)), copy.deepcopy(model)):
        assert_same(still(copy.deepcopy(one)), still(copy.deepcopy(plain)))
        assert_same(copy.deepcopy(one).eval(), copy.deepcopy(plain).eval())
    unfuse(model)
    assert type(model) is kind
    assert torch.equal(model.eval()(given(model)), plain.eval()(given(plain)))


@pytest.mark.parametrize("kind", [Nested, Images, Augmented, Function, Normed], ids=lambda kind: kind.__name__)
def test_the_operator_runs(kind, monkeypatch):
    """And nothing else, where something is dropped: not the modules that it stands for."""
    model = made(kind)
    assert joints(fuse(model)) == OPERATORS[kind]

    def never(*_):
        raise AssertionError("it ran")

    for owner in (Scale, Depth, nn.Dropout):
        monkeypatch.setattr(owner, "forward", never)
    monkeypatch.setattr(F, "dropout", never)
    model(given(model))


@pytest.mark.parametrize("kind", [Nested, OnlyPath, Dropped, Function, Normed], ids=lambda kind: kind.__name__)
def test_half_of_it_is_dropped_and_the_gradient_knows_of_what(kind):
    model = made(kind)
    assert joints(fuse(model)) == OPERATORS[kind]
    still_model = still(copy.deepcopy(model))
    x = torch.randn(400, 3, WIDTH, dtype=torch.float64)
    branch = model.mlp(x).detach() * (model.scale.lambda1.detach() if kind is Nested else 1.0)
    seen = []
    model.norm.forward = lambda h: seen.append(h) or h  # as it is: the sum itself
    if kind is Normed:
        del model.norm.forward
        h = model(x)
        kept = (h - F.layer_norm(x, (WIDTH,), model.norm.weight, model.norm.bias)).abs() > 1e-9
        assert abs(kept.double().mean() - 1.0) < 0.1  # each row has something that was kept
        assert (h - still_model(x)).abs().max() > 0.1
        return
    result = model(x) - x
    dropped = seen[0] - x if kind is OnlyPath else result
    shares = (dropped / branch).flatten(1)
    rows = shares[:, :1].expand_as(shares) if kind in (Nested, OnlyPath) else shares
    torch.testing.assert_close(shares, rows)
    assert set(shares.detach().round(decimals=6).unique().tolist()) == {0.0, 2.0}
    count = shares[:, 0] if kind in (Nested, OnlyPath) else shares.flatten()
    # Six standard deviations of a binomial.
    assert abs((count > 1).double().mean() - 0.5) < 6 * 0.5 / len(count) ** 0.5
    (gradient,) = torch.autograd.grad(result.sum(), [model.mlp.bias])
    factor = model.scale.lambda1 if kind is Nested else torch.ones(WIDTH).double()
    if kind is not OnlyPath:
        torch.testing.assert_close(gradient, (shares.unflatten(1, (3, WIDTH)) * factor).sum((0, 1)).detach())


class Later(Base):
    """What the step gives is used again."""

    def forward(self, x):
        y = self.scale(self.mlp(x))
        z = x + y
        return z * y


class Between(Base):
    def forward(self, x):
        y = self.scale(self.mlp(x))
        x = x.sin()
        y = x + y
        return y


class Twice(Base):
    def forward(self, x):
        y = self.scale(self.mlp(x))
        y = y + y
        return y


class Chosen(Base):
    def forward(self, x):
        y = self.scale(self.mlp(x))
        y = x + y if x.sum() > 1e9 else y
        return y


class Looped(Base):
    def forward(self, x):
        y = self.mlp(x)
        for _ in range(2):
            y = self.scale(y)
            z = x + y
        return z


class Into(Base):
    """The residual is changed in place, and whoever holds it sees that."""

    def forward(self, x):
        y = x.clone()
        z = y
        y += self.scale(self.mlp(x))
        return y + z


class Minus(Base):
    def forward(self, x):
        return x - self.scale(self.mlp(x))


LOOKALIKES = [Later, Between, Twice, Chosen, Looped, Into, Minus]


@pytest.mark.parametrize("kind", LOOKALIKES, ids=lambda kind: kind.__name__)
def test_lookalikes_are_left(kind):
    model = made(kind)
    plain = copy.deepcopy(model)
    assert joints(fuse(model)) == []
    assert_same(model, plain)


@pytest.mark.parametrize(
    "change",
    [
        lambda m: (setattr(m, "scale", Scale(WIDTH, inplace=True)), setattr(m.path, "rate", 0.0)),
        lambda m: setattr(m, "path", Depth(0.5, batch=True)),
        lambda m: setattr(m, "path", nn.Dropout1d(0.5)),
        lambda m: setattr(m, "path", nn.Sequential(Depth(0.5))),
        lambda m: setattr(m, "path", nn.AlphaDropout(0.5)),
    ],
    ids=["in place", "batch", "rows", "inside", "another distribution"],
)
def test_modules_that_do_something_else_are_left_or_called(change):
    model = made(Nested)
    change(model)
    model.double()
    plain = copy.deepcopy(model)
    fuse(model)
    results = []
    for one in (model, plain):
        torch.manual_seed(1)
        results.append(one(X))
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("kind", [OnlyPath, Dropped, Function], ids=lambda kind: kind.__name__)
def test_nothing_to_drop_is_no_joint_of_its_own(kind):
    """The sum is then the norm's, if one is behind it."""
    assert joints(fuse(still(made(kind)))) == (["add_layer_norm"] if kind is OnlyPath else [])


def test_without_the_division_by_what_is_kept():
    model = made(Nested)
    model.path = Depth(0.5, by_keep=False)
    assert joints(fuse(model)) == ["scale_add"]
    shares = (model(X) - X) / (model.mlp(X) * model.scale.lambda1)
    assert set(shares.detach().round(decimals=6).unique().tolist()) <= {0.0, 1.0}


@pytest.mark.parametrize("kind", [Nested, Statements, Normed, Dropped], ids=lambda kind: kind.__name__)
def test_hooks_fire_in_order(kind):
    model = still(made(kind))
    model.path.rate = model.drop.p = 0.5
    plain = copy.deepcopy(model)
    assert joints(fuse(model)) == OPERATORS[kind]
    for one in map(still, (model, plain)):
        one.order = []
        for name in ("mlp", "scale", "path", "drop", "norm"):
            getattr(one, name).register_forward_hook(lambda *_, one=one, name=name: one.order.append(name))
    assert_same(model, plain)
    assert model.order == plain.order


def test_what_is_put_in_later_runs():
    for change in (
        lambda m: setattr(m, "gamma", None),
        lambda m: setattr(m, "path", nn.ReLU()),
        lambda m: setattr(m, "scale", nn.Tanh()),
        lambda m: setattr(m, "down", nn.Softplus()),
        lambda m: setattr(m, "gamma", nn.Parameter(torch.ones(1, dtype=torch.float64))),
    ):
        model = made(Statements)
        plain = copy.deepcopy(model)
        fuse(model)
        for one in map(still, (model, plain)):
            change(one)
        assert_same(model, plain)


@pytest.mark.parametrize("kind", [Nested, Augmented, Gated, Function], ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("wide", ["residual", "parameters"])
def test_other_dtypes_are_what_they_were(kind, wide):
    model = made(kind).bfloat16()
    if wide == "parameters":
        model.scale.float()
        model.gamma.data = model.gamma.data.float()
    plain, x = copy.deepcopy(model), X.bfloat16()
    assert joints(fuse(model)) == OPERATORS[kind]
    if wide == "residual":
        for one in (model, plain):
            one.mlp = nn.Sequential(Cast(), one.mlp)
        x = x.float()
    got, expected = still(model)(x), still(plain)(x)
    assert got.dtype == expected.dtype
    # Where dtypes differ the branch is rounded less often.
    torch.testing.assert_close(got, expected, rtol=2 * torch.finfo(torch.bfloat16).eps, atol=0.05)


class Cast(nn.Module):
    def forward(self, x):
        return x.bfloat16()


@pytest.mark.parametrize("kind", OPERATORS, ids=lambda kind: kind.__name__)
def test_it_compiles_without_a_break(kind):
    model = made(kind)
    plain = copy.deepcopy(model)
    fuse(model)
    torch._dynamo.reset()
    compiled = torch.compile(still(model), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(given(model)), still(plain)(given(plain)))


@pytest.mark.parametrize("kind", [Nested, Function, Normed], ids=lambda kind: kind.__name__)
def test_a_checkpoint_drops_the_same_again(kind):
    model = made(kind)
    assert joints(fuse(model)) == OPERATORS[kind]
    found = []
    for checkpointed in (False, True):
        torch.manual_seed(2)
        x = X.clone().requires_grad_()
        y = checkpoint(model, x, use_reentrant=False) if checkpointed else model(x)
        found.append([y, *torch.autograd.grad(y.sin().sum(), [x, model.mlp.weight])])
    torch.testing.assert_close(*found)


def test_under_autocast_a_sum_that_cannot_take_the_norm_still_drops(monkeypatch):
    model = made(Normed).float()
    assert joints(fuse(model)) == ["add_layer_norm"]
    ran, run = [], dispatch.run
    monkeypatch.setattr(dispatch, "run", lambda op, *args, **options: ran.append(op.name) or run(op, *args, **options))
    with torch.autocast("cpu", torch.bfloat16):
        model(X.float())
    assert "dropout_add" in ran


def test_the_report_says_that_the_random_numbers_differ():
    (record,) = (r for r in fuse(made(Nested)).fused if r.now == "scale_add")
    assert "random numbers of its own" in record.reason
    assert record.saving.unit == "token"
    assert record.saving.traffic > 0
    (record,) = (r for r in fuse(made(Dropped)).fused if r.now == "dropout_add")
    assert record.saving.activations > 0  # there is no mask


def test_an_example_is_verified_and_timed_though_it_drops():
    model = made(Nested).float()
    found = {record.path: record for record in fuse(model, example=X.float(), tune=True)}
    assert found[""].check is not None
    assert found[""].timing is not None
