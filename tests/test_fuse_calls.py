"""Calls of fuse on one model: in blocks, nested, repeated, in parts, and failing."""

import copy
import pickle

import pytest
import torch
from torch import nn

from braze.kernels import fuse, fused, unfuse, use_backend

from .fusible import apply_rotary, unswappable


@pytest.fixture(autouse=True)
def eager():
    with use_backend("eager"):
        yield


class Many(nn.Module):
    """A forward with a site of three operators, and a helper that is replaced."""

    def __init__(self):
        super().__init__()
        self.norm, self.relu = nn.BatchNorm1d(8), nn.ReLU()
        self.act, self.up, self.inner = nn.SiLU(), nn.Linear(8, 8), nn.LayerNorm(8)

    def forward(self, x):
        y = self.relu(self.norm(x))
        q, k = apply_rotary(y, y, x.detach().cos(), x.detach().sin())
        return self.inner(self.act(q) * self.up(k))


X = torch.randn(6, 8, generator=torch.Generator().manual_seed(0))
OPERATORS = ["batch_norm_act", "glu", "layer_norm", "rope"]


@pytest.fixture
def model():
    torch.manual_seed(0)
    return Many()


def classes(model):
    return [type(m) for m in model.modules()]


def operators(report, status="fused"):
    return sorted(record.now for record in report if record.status == status)


def test_a_block_swaps_and_undoes(model):
    before = classes(model)
    with fused(model) as report:
        assert operators(report) == OPERATORS
        assert classes(model) != before
    assert classes(model) == before
    with pytest.raises(KeyError), fused(model, only="glu"):
        raise KeyError(model.no_such_thing if classes(model) == before else "")
    assert classes(model) == before


def test_blocks_are_nested_and_keep_what_was_fused_before(model):
    before, plain = classes(model), copy.deepcopy(model)
    fuse(model, only="layer_norm")
    first = classes(model)
    with fused(model, only=["rope", "layer_norm"]) as outer:
        assert (operators(outer), operators(outer, "already fused")) == (["rope"], ["layer_norm"])
        second = classes(model)
        with fused(model) as inner:
            assert operators(inner) == ["batch_norm_act", "glu"]
            assert operators(inner, "already fused") == ["layer_norm", "rope"]
            torch.testing.assert_close(model(X), plain(X))
        assert classes(model) == second
    assert classes(model) == first
    unfuse(model)
    assert classes(model) == before


def test_a_block_ends_with_an_error_if_a_class_was_changed_in_it(model):
    with fused(model):
        unfuse(model)
    with pytest.raises(RuntimeError, match="fused: the class of a LayerNorm must be"):  # noqa: SIM117, PT012
        with fused(model):
            held = classes(model)
            model.inner.__class__ = type("Changed", (type(model.inner),), {})
    assert classes(model)[0] is held[0]


@pytest.mark.parametrize("order", [OPERATORS, OPERATORS[::-1]], ids=["forth", "back"])
def test_calls_for_one_operator_each_make_what_one_call_makes(model, order):
    whole, plain = copy.deepcopy(model), copy.deepcopy(model)
    fuse(whole)
    for operator in order:
        assert operators(fuse(model, only=operator)) == [operator]
    assert classes(model) == classes(whole)
    for one in (model, pickle.loads(pickle.dumps(model))):
        torch.testing.assert_close(one(X), copy.deepcopy(plain)(X))
    again = fuse(model, example=X)
    assert {record.status for record in again} == {"already fused"}
    unfuse(model)
    assert classes(model) == classes(plain)


def test_a_later_call_sees_the_example_in_a_forward_that_is_rewritten(model):
    fuse(model, only="rope")
    report = fuse(model, example=X)
    assert operators(report) == ["batch_norm_act", "glu", "layer_norm"]
    assert {record.saving.unit for record in report.fused} == {"batch"}


def test_skip_and_only_know_the_class_and_the_path_of_a_part(model):
    model = nn.Sequential(model, nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.ReLU()))

    def found(**options):
        return [record.path for record in fuse(copy.deepcopy(model), **options).fused]

    everything = found()
    assert sorted(everything) == ["0", "0", "0.inner", "0.norm", "1.1"]
    assert found(skip=[nn.modules.batchnorm._BatchNorm]) == [p for p in everything if p not in ("0.norm", "1.1")]
    assert found(only=[nn.BatchNorm2d]) == ["1.1"]
    assert found(only=[nn.BatchNorm1d], skip="0.*") == []
    assert found(skip="*.norm") == [p for p in everything if p != "0.norm"]
    assert found(only=["batch_norm_act", nn.LayerNorm], skip=["1"]) == [
        p for p in everything if p in ("0.norm", "0.inner")
    ]


def test_a_call_that_fails_leaves_what_an_earlier_one_did(model):
    model = nn.Sequential(model, unswappable(nn.LayerNorm, 8))
    fuse(model, only="glu")
    before = classes(model)
    for call in (fuse, lambda m: fused(m).__enter__()):
        with pytest.raises(RuntimeError, match="no other class"):
            call(model)
        assert classes(model) == before
