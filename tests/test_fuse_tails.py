"""The ends of residual blocks: norm, shortcut and activation in one operator, though statements lie between them."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from braze.kernels import dispatch, fuse, unfuse, use_backend


@pytest.fixture(autouse=True)
def eager():
    with use_backend("eager"):
        yield


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.act = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.ReLU(inplace=True)
        self.down, self.gate, self.alone = nn.Conv2d(3, 3, 1), None, nn.Identity()

    def forward(self, x):
        shortcut = x
        y = self.conv(x)
        y = self.norm(y)
        if self.gate is not None:
            y = self.gate(y)
        if self.down is not None:
            shortcut = self.down(x)
        y += shortcut
        y = self.act(y)
        return y


class Used(Block):
    def forward(self, x):
        y = self.conv(x)
        y = self.norm(y)
        z = y.mean()
        y += x
        y = self.act(y)
        return y * z


class Left(Block):
    def forward(self, x):
        y = self.conv(x)
        y = self.norm(y)
        if x.sum() > 1e9:
            return x
        y += x
        y = self.act(y)
        return y


class Held(Block):
    """What the norm is given can be changed before it would run."""

    def forward(self, x):
        y = x
        y = self.alone(y)
        y = self.norm(y)
        z = x.mul_(2.0)
        y += z
        y = self.act(y)
        return y


class Minus(Block):
    def forward(self, x):
        y = self.conv(x)
        y = self.norm(y)
        y -= x
        y = self.act(y)
        return y


class Own(Block):
    def forward(self, x):
        y = self.conv(x)
        y = self.norm(y)
        y += y
        y = self.act(y)
        return y


class Kept(Block):
    def forward(self, x):
        y = self.conv(x)
        y = self.norm(y)
        y += x
        z = self.act(y)
        return y + z


class Returned(Block):
    def forward(self, x):
        y = self.conv(x)
        y = self.norm(y)
        y += x
        return F.leaky_relu(y, 0.2)


X = torch.randn(4, 3, 5, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def step(model, x):
    x = x.clone().requires_grad_()
    y = model(x)
    gradients = torch.autograd.grad(y.square().sum(), [x, *model.parameters()], allow_unused=True)
    return [y.detach(), *(g for g in gradients if g is not None), *(b.clone() for b in model.buffers())]


def both():
    torch.manual_seed(0)
    model = Block().double()
    plain = copy.deepcopy(model)
    (record,) = fuse(model)
    assert (record.path, record.now, record.status) == ("norm", "batch_norm_act", "fused")
    return model, plain


def assert_same(model, plain, x=X):
    for got, expected in zip(step(model, x), step(plain, x), strict=True):
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("training", [True, False])
def test_a_tail_is_one_operator_and_computes_the_same(training, monkeypatch):
    model, plain = both()
    shortcuts, run = [], dispatch.run

    def spied(op, *args, **options):
        shortcuts.append((op.name, args[3] is not None))
        return run(op, *args, **options)

    monkeypatch.setattr(dispatch, "run", spied)
    for one in (model.train(training), pickle.loads(pickle.dumps(model))):
        assert_same(one, copy.deepcopy(plain).train(training))
    assert shortcuts == [("batch_norm_act", True)] * 2
    unfuse(model)
    assert type(model) is Block


@pytest.mark.parametrize("kind", [Used, Left, Held, Minus, Own, Kept], ids=lambda kind: kind.__name__)
def test_lookalikes_are_left(kind):
    assert [record.status for record in fuse(kind())] == []


@pytest.mark.parametrize("names", [["norm", "down", "act"], ["down", "act"]], ids=str)
def test_hooks_fire_in_order(names):
    model, plain = both()
    for one in (model, plain):
        one.order = []
        for name in names:
            getattr(one, name).register_forward_hook(lambda *_, one=one, name=name: one.order.append(name))
    assert_same(model, plain)
    assert model.order == plain.order == names


def test_what_is_put_in_later_runs():
    for change in (
        lambda m: setattr(m, "gate", nn.Softplus()),
        lambda m: setattr(m, "down", None),
        lambda m: setattr(m, "act", nn.Sigmoid()),
        lambda m: setattr(m, "norm", nn.Identity()),
    ):
        model, plain = both()
        for one in (model, plain):
            change(one)
        assert_same(model, plain)


def test_the_activation_may_have_constants_and_be_returned():
    model = Returned().double()
    plain = copy.deepcopy(model)
    (record,) = fuse(model)
    assert (record.path, record.now, record.status) == ("norm", "batch_norm_act", "fused")
    assert_same(model, plain)


def test_a_shortcut_that_broadcasts_is_added_as_ever():
    model, plain = both()
    for one in (model, plain):
        one.down = nn.AdaptiveAvgPool2d(1)
    assert_same(model, plain)


def test_a_tail_compiles_without_a_break():
    model, plain = both()
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(X), plain(X))


@pytest.mark.parametrize("library", ["torchvision", "timm"])
def test_every_block_of_a_resnet_ends_in_one(library):
    package = pytest.importorskip(library)
    torch.manual_seed(0)
    model = package.models.resnet18() if library == "torchvision" else package.create_model("resnet18")
    plain, x = copy.deepcopy(model), torch.randn(2, 3, 32, 32)
    found = {record.path for record in fuse(model).fused}
    assert {f"layer{n}.{m}.bn2" for n in (1, 2, 3, 4) for m in (0, 1)} <= found
    exact = copy.deepcopy(plain).double()(x.double())
    errors = [((y.double() - exact).abs().max() / exact.abs().max()).item() for y in (model(x), plain(x))]
    assert errors[0] <= 4 * (errors[1] + torch.finfo(torch.float32).eps)  # ATen sums a channel in float64 on the CPU
