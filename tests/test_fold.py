"""fold: the same outputs without the normalizations, bit-equal models after it, and no wrong number in between."""

import copy
import itertools
import re
import types

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from braze.kernels import fold, fuse, unfold, unfuse, use_backend

from .folding import IMAGE, Pair, check, trained
from .fusible import unswappable


@pytest.fixture(autouse=True)
def eager():
    with use_backend("eager"):
        yield


def state(model):
    """What must not change: tensors, their identities and values, classes and attributes."""
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return (
        {name: (id(t), t.clone()) for name, t in tensors.items()},
        [type(m) for m in model.modules()],
        [set(vars(m)) for m in model.modules()],
    )


def assert_same_state(before, now):
    assert before[0].keys() == now[0].keys()
    for name, (identity, value) in before[0].items():
        assert now[0][name][0] == identity
        assert torch.equal(now[0][name][1], value)
    assert before[1:] == now[1:]


# ------------------------------------------------------------------------------ models


def models():
    torchvision = pytest.importorskip("torchvision")
    timm = pytest.importorskip("timm")
    vision = torchvision.models
    return {
        "resnet18": (vision.resnet18, 20, 20),
        "mobilenet_v3_small": (vision.mobilenet_v3_small, 34, 34),
        "densenet": (lambda: vision.DenseNet(8, (2, 2), 16), 5, 11),  # the others have their activation behind them
        "efficientnet": (lambda: timm.create_model("efficientnet_lite0"), 49, 49),
        "convolutions that pad themselves": (lambda: timm.create_model("tf_efficientnet_lite0"), 49, 49),
    }


@pytest.mark.parametrize(
    "name", ["resnet18", "mobilenet_v3_small", "densenet", "efficientnet", "convolutions that pad themselves"]
)
def test_models_are_folded_and_come_back_to_the_bit(name):
    make, folded, norms = models()[name]
    torch.manual_seed(0)
    model = trained(make())
    plain, before, x = copy.deepcopy(model), state(model), torch.randn(2, 3, 64, 64)
    report = fold(model)
    assert (len(report.folded), len(report)) == (folded, norms)
    assert f"{folded} of {norms} joints folded" in str(report)
    check(model, plain, x)
    assert model.state_dict().keys() == plain.state_dict().keys()
    assert all(torch.equal(t, plain.state_dict()[key]) for key, t in model.state_dict().items())
    assert {record.status for record in fold(model)} == {"already folded"} | ({"left"} if norms > folded else set())
    unfold(model)
    assert_same_state(before, state(model))
    with torch.no_grad():
        assert torch.equal(model(x), plain(x))


# ------------------------------------------------------------------------------ layers


def forward_pairs():
    for dims, transposed, groups, bias in itertools.product((1, 2, 3), (False, True), (1, 2), (False, True)):
        conv = getattr(nn, f"Conv{'Transpose' * transposed}{dims}d")
        name = f"{conv.__name__}, {groups} groups{', bias' * bias}"
        make = lambda conv=conv, groups=groups, bias=bias, dims=dims: Pair(  # noqa: E731
            conv(4, 6, 3, stride=2, padding=1, groups=groups, bias=bias), getattr(nn, f"BatchNorm{dims}d")(6)
        )
        yield name, make, (3, 4, *(7, 6, 5)[:dims])
    yield "no affine", lambda: Pair(nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6, affine=False)), (2, 4, 7, 6)
    yield "Linear", lambda: Pair(nn.Linear(4, 6), nn.BatchNorm1d(6)), (5, 4)
    yield "norm, Linear", lambda: Pair(nn.BatchNorm1d(4), nn.Linear(4, 6, bias=False)), (5, 4)
    for groups in (1, 2):
        make = lambda groups=groups: Pair(nn.BatchNorm2d(4), nn.Conv2d(4, 6, 3, groups=groups))  # noqa: E731
        yield f"norm, Conv2d, {groups} groups", make, (2, 4, 7, 6)
    reflecting = {"padding": 1, "padding_mode": "reflect", "bias": False}
    yield "norm, reflecting Conv2d", lambda: Pair(nn.BatchNorm2d(4), nn.Conv2d(4, 6, 3, **reflecting)), (2, 4, 7, 6)


PAIRS = list(forward_pairs())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("make", "shape"), [pair[1:] for pair in PAIRS], ids=[pair[0] for pair in PAIRS])
def test_layers_of_every_kind(make, shape, dtype):
    torch.manual_seed(0)
    model = trained(make()).to(dtype)
    plain = copy.deepcopy(model)
    assert len(fold(model).folded) == 1
    inputs = [torch.randn(shape).to(dtype) for _ in range(8)]
    check(model, plain, *inputs)
    calls = []
    norm = next(m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm))
    norm.register_forward_hook(lambda _, given, y: calls.append(y is given[0]))
    with torch.no_grad():
        model(inputs[0])
    assert calls == [True]


def test_a_norm_before_zero_padding_is_folded_only_without_a_shift():
    model = trained(Pair(nn.BatchNorm2d(4), nn.Conv2d(4, 6, 3, padding=1)))
    (record,) = fold(model)
    assert record.status == "left"
    assert "pads with zeros" in record.reason
    for tensor in (model.first.running_mean, model.first.bias.data):
        tensor.zero_()
    plain = copy.deepcopy(model)
    assert len(fold(model).folded) == 1
    check(model, plain, torch.randn(2, 4, 5, 5))
    model.load_state_dict(
        model.state_dict() | {"first.bias": torch.ones(4), "first.running_mean": torch.full((4,), 0.0)}
    )
    with pytest.raises(RuntimeError, match=r"pads with zeros.*unfold"):
        model(torch.randn(2, 4, 5, 5))
    model.load_state_dict(plain.state_dict())
    check(model, plain, torch.randn(2, 4, 5, 5))


def test_a_linear_layer_and_a_norm_that_mean_different_dims_stay_apart():
    """BatchNorm1d normalizes dim 1 of three; with as many rows as features both fit."""
    model = trained(Pair(nn.Linear(4, 6), nn.BatchNorm1d(6)))
    plain, x = copy.deepcopy(model), torch.randn(2, 6, 4)
    fold(model)
    with torch.no_grad():
        assert torch.equal(model(x), plain(x))


def test_a_norm_of_another_class_is_folded():
    torchvision = pytest.importorskip("torchvision")
    model = trained(Pair(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6)))
    frozen = torchvision.ops.FrozenBatchNorm2d(6)
    frozen.load_state_dict({k: t for k, t in model.second.state_dict().items() if k != "num_batches_tracked"})
    model.second = frozen.eval()
    plain = copy.deepcopy(model)
    assert len(fold(model).folded) == 1
    check(model, plain, IMAGE)


# ------------------------------------------------------------------------------ what is left alone


def shared():
    conv = nn.Conv2d(3, 3, 1)
    return nn.Sequential(conv, nn.BatchNorm2d(3), conv)


def tied():
    model = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.Conv2d(3, 3, 1))
    model[2].weight = model[0].weight
    return model


def hooked():
    model = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3))
    model[0].register_forward_hook(lambda *_: None)
    return model


def parametrized():
    model = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3))
    nn.utils.parametrizations.weight_norm(model[0])
    return model


def own_forward():
    model = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3))
    model[1].forward = types.MethodType(nn.BatchNorm2d.forward, model[1])
    return model


class Twice(Pair):
    def forward(self, x):
        return self.second(self.first(self.second(self.first(x))))


class Residual(Pair):
    def forward(self, x):
        y = self.first(x)
        return y + self.second(y)


class Branching(Pair):
    def forward(self, x):
        return self.second(self.first(x)) if x.mean() > 0 else x


class Between(Pair):
    def forward(self, x):
        return self.second(F.relu(self.first(x)))


def of(kind):
    return lambda: kind(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3))


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (shared, "shared|more than once"),
        (tied, "parameters are"),
        (hooked, "has hooks"),
        (parametrized, "parametrized"),
        (own_forward, "forward of its own"),
        (of(Twice), "called more than once"),
        (of(Residual), "right before it"),
        (of(Branching), "cannot be traced"),
        (of(Between), "right before it"),
        (lambda: Pair(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)).to("meta"), "meta device"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_what_cannot_be_folded_is_left_with_the_reason(make, reason):
    model = make().eval()
    classes = [type(m) for m in model.modules()]
    (record,) = fold(model)
    assert record.status == "left"
    assert re.search(reason, record.reason), record.reason
    assert [type(m) for m in model.modules()] == classes


def test_a_layer_holds_one_norm():
    model = trained(nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)))
    plain = copy.deepcopy(model)
    first, second = fold(model)
    assert (first.now, first.status, second.reason) == ("in 1", "folded", "its neighbour, a Conv2d, holds another norm")
    assert [record.status for record in fold(model)] == ["already folded", "left"]
    check(model, plain, IMAGE)


def test_skip_and_only():
    model = trained(nn.Sequential(*(nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)) for _ in range(3))))
    assert [r.path for r in fold(copy.deepcopy(model), skip="0.*")] == ["1.1", "2.1"]
    assert [r.path for r in fold(copy.deepcopy(model), only=["1"])] == ["1.1"]
    with pytest.raises(TypeError, match=r"only must hold paths.*got 3"):
        fold(model, only=[3])
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module, got list"):
        fold([model])


def test_a_failure_midway_rolls_everything_back():
    model = nn.Sequential(
        nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.Conv2d(3, 3, 1), unswappable(nn.BatchNorm2d, 3)
    ).eval()
    before = state(model)
    with pytest.raises(RuntimeError, match="no other class"):
        fold(model)
    assert_same_state(before, state(model))


@pytest.mark.parametrize("first", ["fuse", "fold"])
def test_fused_models_are_folded_and_folded_ones_fused(first):
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    norm_act = timm.layers.BatchNormAct2d(5)
    model = trained(
        nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 5, 1), norm_act, nn.LayerNorm(6))
    )
    plain, before = copy.deepcopy(model), state(model)
    if first == "fuse":
        assert len(fuse(model).fused) == 3
    assert len(fold(model).folded) == 2
    if first == "fold":
        assert [record.now for record in fuse(model)] == ["layer_norm"]
    check(model, plain, IMAGE)
    if first == "fuse":
        with pytest.raises(RuntimeError, match=r"unfuse.*undo that change first"):
            unfuse(model)
    unfold(model)
    unfuse(model)
    assert_same_state(before, state(model))
