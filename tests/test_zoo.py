"""fuse on models of every kind: what it swaps, that it computes the same, and that nothing else changes."""

import inspect
import sys
import types
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from braze.benchmarks.zoo import count, measure, models
from braze.kernels import fuse, unfuse, use_backend

pytest.importorskip("transformers")
pytest.importorskip("timm")
pytest.importorskip("torchvision")

#: One of each family and of each way of writing a joint: model, and how many joints of each kind are counted.
SAMPLE = {
    "causal:llama": {"norm": 5, "gated mlp": 2, "rope": 2},
    "causal:deepseek_v2": {"norm": 9, "gated mlp": 4, "rope": 2},  # complex tables, experts, latent attention
    "causal:ernie4_5": {"norm": 5, "gated mlp": 2, "rope": 2},  # interleaved and widened tables
    "masked:modernbert": {"norm": 6, "gated mlp": 2, "rope": 2},
    "seq2seq:t5": {"norm": 12, "dropout and sum": 8},
    "timm:convnext_atto": {"norm": 17},
    "timm:mobilenetv4_conv_small": {},
    "torchvision:resnet18": {"batch norm and activation": 9},
    "own:dit": {"norm": 5, "modulated norm": 2, "gated sum": 2},
    "own:unet": {"group norm and activation": 7},
}


@pytest.mark.parametrize("name", SAMPLE)
def test_models_of_each_kind_are_fused_and_right(name):
    record = measure.measure(name)
    assert "exception" not in record, record
    assert record["right"], record
    assert record["kept"]
    assert record["unfuse_equal"]
    assert record["fused"] > 0
    for kind, least in SAMPLE[name].items():
        assert record["found"][kind] >= least
        assert record["swapped"][kind] == record["found"][kind], record["missed"]


def test_a_wrong_swap_is_seen(monkeypatch):
    """The zoo's own check: a fused norm that is off by a thousandth must not pass for right."""
    model, call = models.build("causal:llama")
    plain, _ = models.build("causal:llama")
    fuse(model)
    monkeypatch.setattr(model.model.norm, "variance_epsilon", 1e-3)
    assert not measure._errors(model, plain, call)["right"]


#: Packages whose every module and class is compared.
WATCHED = ("transformers.", "timm.", "torchvision.", "torch.nn.", "torch.optim.")


def public_attributes():
    """What each watched module, and each class in it, has: the objects themselves, so that an exchanged one shows."""
    found = {}
    for name, module in list(sys.modules.items()):
        if isinstance(module, types.ModuleType) and f"{name}.".startswith(WATCHED):
            classes = [value for value in vars(module).values() if getattr(value, "__module__", None) == name]
            for owner in (module, *filter(inspect.isclass, classes)):
                found[name, getattr(owner, "__qualname__", "")] = {
                    attribute: value for attribute, value in vars(owner).items() if attribute[0] != "_"
                }
    return found


def test_nothing_global_changes_whatever_is_fused():
    """One model of each family, and of each that a joint has a spelling of its own in."""
    families = {name.partition(":")[0]: name for name in models.names()}
    built = [models.build(name) for name in {*families.values(), *SAMPLE}]
    before = public_attributes()
    assert len(before) > 1000
    with use_backend("eager"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what a model remarks on when it is run
        for model, call in built:
            fuse(model)
            with torch.no_grad():
                model(**call)
            unfuse(model)
    after = public_attributes()
    changed = [
        (*owner, name)
        for owner, attributes in before.items()
        for name, value in attributes.items()
        if after[owner].get(name) is not value
    ]
    assert changed == []


def test_the_count_knows_no_names_of_models_and_finds_joints_of_other_spellings():
    class Norm(nn.Module):
        def forward(self, x):
            return x

    class Feed(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = (nn.Linear(4, 4) for _ in range(3))

        def forward(self, x):
            return self.c(F.silu(self.a(x)) * self.b(x))

    expected = count.expected_joints(nn.Sequential(Norm(), Feed(), nn.BatchNorm2d(4), nn.ReLU()))
    kinds = [(joint.kind, joint.path) for joint in expected]
    assert kinds == [("batch norm and activation", "2"), ("norm", "0"), ("gated mlp", "1")]
