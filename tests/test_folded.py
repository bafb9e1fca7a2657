"""A folded model afterwards: trained, loaded, written to, copied, compiled, differentiated; never a wrong number."""

import copy
import pickle

import pytest
import torch
from torch import nn

from braze.kernels import fold, unfold, use_backend

from .folding import IMAGE, Pair, check, trained


@pytest.fixture(autouse=True)
def eager():
    with use_backend("eager"):
        yield


def pair(dtype=torch.float32):
    torch.manual_seed(0)
    return trained(Pair(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6))).to(dtype)


@pytest.fixture
def folded():
    model = pair()
    fold(model)
    return model


def test_train_unfolds_and_a_training_flag_alone_is_an_error(folded):
    folded.first.training = True
    with pytest.raises(RuntimeError, match="must be in evaluation"):
        folded(IMAGE)
    plain = pair()
    assert folded.train() is folded
    assert [type(m) for m in folded.modules()] == [type(m) for m in plain.modules()]
    assert all(m.training for m in folded.modules())
    assert torch.equal(folded(IMAGE), plain.train()(IMAGE))
    with pytest.raises(ValueError, match=r"must be in evaluation.*model.eval\(\)"):
        fold(folded)


def load(model):
    other = trained(Pair(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6, eps=model.second.eps)))
    model.load_state_dict(other.state_dict())


def assign(model):
    model.load_state_dict({key: 2 * t for key, t in model.state_dict().items()}, assign=True)


def write(model):
    with torch.no_grad():
        model.first.weight.mul_(3.0)
        model.second.running_mean.add_(1.0)


def replace(model):
    model.second.weight = nn.Parameter(torch.full((6,), 0.25))


def widen(model):
    model.double()


def steady(model):
    model.second.eps = 0.5


def partly(model):
    model.load_state_dict({"second.running_var": torch.full((6,), 9.0)}, strict=False)


@pytest.mark.parametrize("change", [load, assign, write, replace, widen, partly, steady], ids=lambda f: f.__name__)
def test_folded_numbers_follow_the_parameters(folded, change):
    plain = pair()
    for model in (folded, plain):
        torch.manual_seed(3)
        change(model)
    check(folded, plain, IMAGE.to(next(plain.parameters()).dtype))


def test_copies_are_folded_and_independent(folded):
    with torch.no_grad():
        expected = folded(IMAGE)
        for copied in (copy.deepcopy(folded), pickle.loads(pickle.dumps(folded))):
            assert [type(m) for m in copied.modules()] == [type(m) for m in folded.modules()]
            assert torch.equal(copied(IMAGE), expected)
            copied.second.bias.add_(1.0)
            torch.testing.assert_close(copied(IMAGE), expected + 1.0)
            unfold(copied)
            assert type(copied.first) is nn.Conv2d
            assert torch.equal(folded(IMAGE), expected)


def test_gradients_reach_what_was_folded(folded):
    plain = pair()
    for model in (folded, plain):
        model(IMAGE).square().sum().backward()
    for got, expected in zip(folded.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(got.grad, expected.grad)


def test_numbers_made_in_inference_mode_serve_gradients_of_the_input(folded):
    folded.requires_grad_(False)
    with torch.inference_mode():
        write(folded)
        expected = folded(IMAGE)
    x = IMAGE.clone().requires_grad_()
    y = folded(x)
    assert torch.equal(y, expected)
    y.sum().backward()
    assert x.grad is not None


def test_a_folded_model_compiles_without_a_break(folded):
    torch._dynamo.reset()
    compiled = torch.compile(folded, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(IMAGE), folded(IMAGE))
        load(folded)
        torch.testing.assert_close(compiled(IMAGE), folded(IMAGE))
        folded.double()
        torch.testing.assert_close(compiled(IMAGE.double()), folded(IMAGE.double()))
