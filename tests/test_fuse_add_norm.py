"""fuse where a norm follows a residual sum: both come from one operator, wherever the norm stands in the source."""

import copy
import pickle
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from braze.kernels import fuse, unfuse, use_backend


@pytest.fixture(autouse=True)
def eager():
    with use_backend("eager"):
        yield


def sums(report):
    return [(r.path, r.was, r.now) for r in report.fused if r.now.startswith("add_")]


class Scaled(nn.Module):
    """A root mean square norm with names of its own, scaled by 1 + gamma."""

    def __init__(self, width):
        super().__init__()
        self.gamma, self.tiny = nn.Parameter(torch.zeros(width)), 1e-3

    def forward(self, x):
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.tiny) * (1 + self.gamma)


class Base(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.LayerNorm(8), Scaled(8)
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)
        for parameter in self.parameters():
            nn.init.normal_(parameter)
        self.drop = nn.Dropout(0.0)

    def forward(self, x):
        return self.a(x)


class Aliased(Base):
    def forward(self, x):
        residual = x
        x = self.a(self.first(x))
        x = residual + x
        residual = x
        x = self.second(x)
        x = self.b(x)
        return residual + x


class Inside(Base):
    def forward(self, x):
        x = x + self.drop(self.a(self.first(x)))
        x = x + self.drop(self.b(self.second(x)))
        return x


class Around(Base):
    def forward(self, x):
        x = self.first(x + self.drop(self.a(x)))
        return self.second(self.b(x) + x)


class Chained(Base):
    def forward(self, x):
        h = self.a(x) + x
        h = h + self.b(self.first(h))
        return self.second(h) * h


class Returned(Base):
    def forward(self, x):
        if x.dim() > 1:
            total = self.a(x) + x
            return self.first(total), total
        return x


SITES = {
    Aliased: ["add_rms_norm"],
    Inside: ["add_rms_norm"],
    Around: ["add_layer_norm", "add_rms_norm"],
    Chained: ["add_layer_norm", "add_rms_norm"],
    Returned: ["add_layer_norm"],
}


def step(model, x):
    """Outputs and gradients."""
    model.zero_grad()
    x = x.clone().requires_grad_()
    outputs = model(x)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    sum(((i + 1) * y.sin()).sum() for i, y in enumerate(outputs)).backward()
    return [*outputs, x.grad, *(p.grad for p in model.parameters() if p.grad is not None)]


def assert_as_good(got, plain, truth, dtype):
    """At most twice the original's error, and a rounding step of the largest: the budget of every operator."""
    assert got.dtype == plain.dtype
    step = torch.finfo(dtype).eps * truth.abs().max()
    assert (got.double() - truth).abs().max() <= 2 * (plain.double() - truth).abs().max() + step


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("kind", SITES, ids=lambda kind: kind.__name__)
def test_sum_and_norm_are_one_operator_and_compute_the_same(kind, dtype):
    torch.manual_seed(0)
    model = kind().to(dtype)
    plain, x = copy.deepcopy(model), torch.randn(6, 8, dtype=dtype)
    assert sorted(sums(fuse(model))) == [("", kind.__name__, name) for name in SITES[kind]]
    expected, exact = step(plain, x), step(copy.deepcopy(plain).double(), x.double())
    for one in (model, pickle.loads(pickle.dumps(model)), copy.deepcopy(model)):
        for got, same, truth in zip(step(one, x), expected, exact, strict=True):
            assert_as_good(got, same, truth, dtype)
    unfuse(model)
    assert all(map(torch.equal, step(model, x), expected))


def test_the_operator_runs(monkeypatch):
    """And not the two that it stands for."""
    calls = []
    model = Around()
    fuse(model)
    forward = type(model).forward
    for name in ("add_rms_norm", "add_layer_norm"):
        module = __import__("braze.kernels.fuse.add_norm", fromlist=[name])
        operator = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *a, o=operator, n=name, **k: calls.append(n) or o(*a, **k))
    forward(model, torch.randn(2, 8))
    assert calls == ["add_layer_norm", "add_rms_norm"]


def test_the_norm_is_held_no_longer_than_before():
    class Seen(nn.Linear):
        def forward(self, x):
            seen.append(weakref.ref(x))
            return super().forward(x)

    class Last(nn.Module):
        def forward(self, x):
            alive.append(seen[0]() is not None)
            return x

    class Block(Base):
        def __init__(self):
            super().__init__()
            self.b, self.last = Seen(8, 8), Last()

        def forward(self, x):
            x = x + self.a(x)
            x = x + self.b(self.second(x))
            return self.last(x)

    seen, alive = [], []
    model = Block()
    assert sums(fuse(model))
    with torch.no_grad():
        model(torch.randn(2, 8))
    assert alive == [False]


class Without(Base):
    """Looks like such places, and has none."""

    def forward(self, x):
        y = x + self.a(x)
        y.mul_(2)
        z = self.first(y)
        y = x - self.b(x)
        z = z + self.second(y)
        w = z + x
        v = self.second(w) if w.dim() == 2 else w
        w = v + x
        v = self.drop(self.b(x) + self.first(w))
        w = v + x
        v += x
        return [self.first(w) for _ in range(2)][-1] + v


def test_lookalikes_are_left():
    model, x = Without(), torch.randn(4, 8)
    plain = copy.deepcopy(model)
    assert sums(fuse(model)) == []
    torch.testing.assert_close(model(x), plain(x))


@pytest.mark.parametrize("shape", [(1, 8), (8,)])
def test_sums_that_broadcast_are_the_originals(shape):
    class Broadcast(Base):
        def forward(self, x):
            return self.second(self.a(x) + self.table)

    model, x = Broadcast(), torch.randn(4, 8)
    model.table = torch.randn(shape)
    expected = model(x)
    assert sums(fuse(model))
    torch.testing.assert_close(model(x), expected)


def test_dtypes_that_differ_and_autocast_give_what_the_original_gives():
    model, x = Around(), torch.randn(4, 8)
    plain = copy.deepcopy(model)
    fuse(model)
    with torch.autocast("cpu", torch.bfloat16):
        got, expected = model(x), plain(x)
    assert_as_good(got, expected, copy.deepcopy(plain).double()(x.double()), torch.bfloat16)

    class Wide(Base):
        def forward(self, x):
            return self.second(self.a(x) + x.float())

    model, x = Wide().bfloat16(), torch.randn(4, 8).bfloat16()
    plain = copy.deepcopy(model)
    assert sums(fuse(model))
    truth = plain.second.double()((plain.a(x) + x.float()).double())
    plain.second.bfloat16()
    assert_as_good(model(x), plain(x), truth, torch.float32)


def test_a_hook_set_later_fires_and_a_module_put_in_later_runs():
    seen = []
    model, x = Inside(), torch.randn(4, 8)
    fuse(model)
    expected = model(x)
    model.second.register_forward_hook(lambda module, args, out: seen.append(args[0].shape))
    torch.testing.assert_close(model(x), expected)
    assert seen == [x.shape]
    model.second = nn.Tanh()
    assert not torch.allclose(model(x), expected)


def test_an_eps_changed_later_is_used():
    model, x = Around(), torch.randn(4, 8)
    plain = copy.deepcopy(model)
    fuse(model)
    for one in (model, plain):
        one.first.eps, one.second.tiny = 0.5, 0.7
    torch.testing.assert_close(model(x), plain(x))


def test_the_norm_alone_is_fused_too_and_either_can_be_skipped():
    model = Around()
    assert {(r.path, r.now) for r in fuse(model).fused} == {
        ("", "add_layer_norm"),
        ("", "add_rms_norm"),
        ("first", "layer_norm"),
        ("second", "rms_norm"),
    }
    assert sums(fuse(Around(), skip=["add_rms_norm"])) == [("", "Around", "add_layer_norm")]
    model, x = Around(), torch.randn(4, 8)
    plain = copy.deepcopy(model)
    assert len(fuse(model, skip=["rms_norm", "layer_norm"]).fused) == 2
    torch.testing.assert_close(model(x), plain(x))


@pytest.mark.parametrize("name", ["Llama", "Bert"])
def test_transformers_layers_have_them(name):
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "vocab_size": 31, "pad_token_id": 0}
    config = getattr(transformers, f"{name}Config")(**sizes, num_hidden_layers=2)
    model = transformers.AutoModel.from_config(config).eval()
    plain, x = copy.deepcopy(model), torch.arange(10).view(2, 5)
    found = [now for _, _, now in sums(fuse(model))]
    assert found == {"Llama": ["add_rms_norm"] * 2, "Bert": ["add_layer_norm"] * 5}[name]
    torch.testing.assert_close(model(x).last_hidden_state, plain(x).last_hidden_state)


@pytest.mark.parametrize("kind", [Inside, Around], ids=lambda kind: kind.__name__)
def test_rewritten_forwards_compile_without_a_break(kind):
    model, x = kind().eval(), torch.randn(4, 8)
    expected = model(x)
    fuse(model)
    torch._dynamo.reset()
    torch.testing.assert_close(torch.compile(model, fullgraph=True, backend="aot_eager")(x), expected)


def test_training_with_it_gives_the_losses_of_the_original():
    torch.manual_seed(0)
    model, x = nn.Sequential(Inside(), Around(), nn.Linear(8, 3)).double(), torch.randn(16, 8).double()
    losses = []
    for one in (copy.deepcopy(model), model):
        if one is model:
            assert len(sums(fuse(one))) == 3
        optimizer = torch.optim.SGD(one.parameters(), lr=0.05)
        found = []
        for _ in range(4):
            optimizer.zero_grad()
            loss = F.cross_entropy(one(x), torch.arange(16) % 3)
            loss.backward()
            optimizer.step()
            found.append(loss.item())
        losses.append(found)
    torch.testing.assert_close(*losses)  # of numbers in float64


def test_the_saving_is_told_apart_from_the_norms_own():
    """The norm does not read the sum again, and the backward pass does not add the sum's two gradients up."""
    (saving,) = (record.saving for record in fuse(Inside()).fused if record.now == "add_rms_norm")
    assert (saving.traffic, saving.activations, saving.unit) == (3 * 8 * 4, 0, "token")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_an_example_is_verified_against_the_original(dtype):
    """Not against a norm fused alone, which takes mixes of dtypes that the original does not."""

    class Layered(Base):
        def forward(self, x):
            x = x + self.a(x)
            return self.b(self.first(x))

    report = fuse(Layered().to(dtype), example=torch.randn(3, 8, dtype=dtype))
    assert sums(report) == [("", "Layered", "add_layer_norm")]
    assert [r.saving.unit for r in report.fused if r.now == "add_layer_norm"] == ["batch"]
