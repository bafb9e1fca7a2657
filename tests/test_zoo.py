"""fuse on models of every kind: what it swaps, that it computes the same, and that nothing else changes."""

import inspect

import pytest
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
    "seq2seq:t5": {"norm": 12},
    "timm:convnext_atto": {"norm": 17},
    "timm:mobilenetv4_conv_small": {},
    "torchvision:resnet18": {"batch norm and activation": 9},
    "own:dit": {"norm": 5},
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


def public(module):
    return {name: value for name, value in vars(module).items() if not name.startswith("_")}


def watched():
    import timm
    import torchvision
    import transformers

    found = [F, nn, nn.modules.normalization, nn.modules.batchnorm, nn.init, timm, timm.layers, torchvision.models]
    modules = [
        transformers.models.llama.modeling_llama,
        transformers.models.t5.modeling_t5,
        transformers.models.modernbert.modeling_modernbert,
        transformers.models.convnext.modeling_convnext,
        transformers.modeling_utils,
        transformers.activations,
        timm.layers.norm_act,
        torchvision.models.resnet,
    ]
    found += modules
    classes = [value for module in modules for value in vars(module).values() if inspect.isclass(value)]
    return [*found, *(c for c in classes if issubclass(c, nn.Module))]


def test_nothing_global_changes_whatever_is_fused():
    names = ["causal:llama", "seq2seq:t5", "masked:modernbert", "timm:convnext_atto", "timm:resnet18", "own:unet"]
    built = [models.build(name)[0] for name in names]
    before = [public(thing) for thing in watched()]
    transformers_before = set(dir(__import__("transformers")))
    with use_backend("eager"):
        for model in built:
            assert fuse(model).fused
            unfuse(model)
    for thing, attributes in zip(watched(), before, strict=True):
        now = public(thing)
        assert all(now[name] is value for name, value in attributes.items()), thing
    assert transformers_before <= set(dir(__import__("transformers")))


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
