"""fuse: what is recognised, what is refused, and that a swap changes nothing but a class."""

import copy
import gc
import io
import json
import pickle
import random
import subprocess
import sys
import types

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from braze.kernels import RMSNorm, fuse, unfuse

from .fusible import unswappable

transformers = pytest.importorskip("transformers")

SIZES = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 97,
    "pad_token_id": 0,
}


def language_model(name="Llama", **options):
    torch.manual_seed(0)
    config = getattr(transformers, name + ("TextConfig" if name == "Gemma3" else "Config"))(**SIZES | options)
    model = getattr(transformers, f"{name}ForCausalLM")(config)
    for name, parameter in model.named_parameters():
        if "norm" in name:
            parameter.data.add_(0.1 * torch.randn_like(parameter))  # ones would hide an exchanged weight
    return model


@pytest.fixture(scope="module")
def llama():
    return language_model()


@pytest.fixture
def fused(llama):
    model = copy.deepcopy(llama)
    fuse(model)
    return model


def tokens():
    return torch.arange(34).view(2, 17) * 7 % 97


def step(model, **options):
    """Loss, logits and gradients."""
    model.zero_grad()
    outputs = model(input_ids=tokens(), labels=tokens(), **options)
    outputs.loss.backward()
    return [outputs.loss.detach(), outputs.logits.detach(), *(p.grad.clone() for p in model.parameters())]


def operators(report):
    return sorted(record.now for record in report if record.status == "fused")


def relative(a, b):
    return ((a.double() - b.double()).abs().max() / b.double().abs().max()).item()


def classes(model):
    return [type(m) for m in model.modules()]


# ------------------------------------------------------------------------------ what is found where

ONCE = ["cross_entropy", "linear_cross_entropy"]
FOR_EACH_LAYER, NORMS = ["glu", "rope", "add_rms_norm"], ["rms_norm"]


@pytest.mark.parametrize(
    ("name", "norms"),
    [("Llama", 5), ("Mistral", 5), ("Qwen2", 5), ("Qwen3", 9), ("Gemma", 5), ("Gemma2", 9), ("Gemma3", 13)],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_language_models_are_fused_whole(name, norms, dtype):
    model = language_model(name).to(dtype)
    plain, exact = copy.deepcopy(model), copy.deepcopy(model).double()
    assert operators(fuse(model)) == sorted(ONCE + FOR_EACH_LAYER * 2 + NORMS * norms)
    got, own, true = step(model), step(plain), step(exact)
    assert [t.dtype for t in got] == [t.dtype for t in own]
    # The largest of all errors: that of one small gradient is partly luck.
    error, budget = (max(map(relative, found, true)) for found in (got, own))
    assert error <= 2 * (budget + torch.finfo(dtype).eps)


def vision_models():
    timm = pytest.importorskip("timm")
    vision = pytest.importorskip("torchvision.models.vision_transformer")
    yield timm.create_model("vit_tiny_patch16_224", img_size=32, depth=2, num_classes=10), []
    eva = timm.create_model("eva02_tiny_patch14_224", img_size=28, depth=2, num_classes=10)
    yield eva, ["glu"] * 4 + ["rope"] * 6  # each in two forms, of which a model runs one
    model = vision.VisionTransformer(32, 8, 2, 4, 64, 128, num_classes=10)
    nn.init.normal_(model.heads.head.weight)  # it starts at zero, and would hide everything before it
    yield model, []


@pytest.mark.parametrize("index", range(3))
def test_vision_transformers_are_fused(index):
    torch.manual_seed(0)
    model, others = list(vision_models())[index]
    plain, x = copy.deepcopy(model), torch.randn(2, 3, *[28 if index == 1 else 32] * 2)
    assert operators(fuse(model)) == sorted(["layer_norm"] * 5 + ["add_layer_norm"] * 2 + others)
    assert relative(model(x), plain(x)) < 1e-5


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_a_transformer_encoder_keeps_its_fast_path_and_nested_tensors():
    layer = nn.TransformerEncoderLayer(32, 4, 64, dropout=0.0, batch_first=True)
    model = nn.TransformerEncoder(layer, 2, norm=nn.LayerNorm(32)).eval()
    plain, x = copy.deepcopy(model), torch.randn(2, 5, 32)
    padding = torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    assert operators(fuse(model)) == ["layer_norm"] * 5
    model.layers[1].norm1.register_forward_hook(lambda *_: None)  # turns the second layer's fast path off
    with torch.no_grad():
        expected = plain(x, src_key_padding_mask=padding)
        torch.testing.assert_close(model(x, src_key_padding_mask=padding), expected)


# ------------------------------------------------------------------------------ a swap changes only a class


def test_parameters_buffers_keys_and_attributes_are_the_same_objects(llama):
    model = copy.deepcopy(llama)
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    keys, attributes = list(model.state_dict()), [dict(vars(m)) for m in model.modules()]
    names = [(c.__name__, c.__qualname__, c.__module__) for c in classes(model)]
    before = classes(model)
    fuse(model)
    now = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    assert now.keys() == tensors.keys()
    assert all(now[name] is tensors[name] for name in now)
    assert list(model.state_dict()) == keys
    assert [dict(vars(m)) for m in model.modules()] == attributes
    assert [(c.__name__, c.__qualname__, c.__module__) for c in classes(model)] == names
    assert all(issubclass(now, was) for now, was in zip(classes(model), before, strict=True))


def test_nothing_global_changes():
    modeling = transformers.models.llama.modeling_llama
    watched = [modeling, transformers.loss.loss_utils, transformers.modeling_utils, F, nn, nn.modules.normalization]
    watched += [modeling.LlamaRMSNorm, modeling.LlamaAttention, modeling.LlamaMLP, modeling.LlamaForCausalLM]
    model = language_model()  # transformers caches on the class what it finds there
    before = [dict(vars(thing)) for thing in watched]
    fuse(model)
    assert [dict(vars(thing)) for thing in watched] == before
    later = language_model()
    assert all(c.__dict__.get("_braze_fusion") is None for c in classes(later))
    assert type(later.model.norm) is modeling.LlamaRMSNorm


def test_unfuse_restores_the_classes_and_every_bit(llama):
    model = copy.deepcopy(llama)
    fuse(model)
    assert classes(model) != classes(llama)
    unfuse(model)
    assert classes(model) == classes(llama)
    for got, expected in zip(step(model), step(llama), strict=True):
        assert torch.equal(got, expected)


def test_a_second_fuse_changes_nothing_and_says_so(fused):
    before = classes(fused)
    report = fuse(fused)
    assert classes(fused) == before
    assert {record.status for record in report} == {"already fused"}
    assert len(report) == 13


def test_equal_classes_share_a_fused_class(fused, llama):
    other = copy.deepcopy(llama)
    fuse(other)
    assert classes(other) == classes(fused)
    assert type(fused.model.norm) is type(fused.model.layers[0].input_layernorm)


def test_a_shared_module_is_swapped_once():
    norm = nn.LayerNorm(8)
    model = nn.ModuleList([norm, nn.Sequential(norm), nn.LayerNorm(8)])
    assert [record.path for record in fuse(model)] == ["0", "2"]
    assert model[1][0] is norm


def test_hooks_stay_and_verification_does_not_fire_them():
    calls = []
    model = nn.Sequential(nn.LayerNorm(8))
    model[0].register_forward_hook(lambda *_: calls.append("forward"))
    model[0].register_full_backward_hook(lambda *_: calls.append("backward"))
    assert len(fuse(model).fused) == 1
    assert calls == []
    model(torch.randn(2, 8, requires_grad=True)).sum().backward()
    assert calls == ["forward", "backward"]


def test_a_hook_on_the_activation_still_fires(llama):
    calls = []
    mlp = copy.deepcopy(llama.model.layers[0].mlp)
    fuse(mlp)
    mlp.act_fn.register_forward_hook(lambda *_: calls.append(1))
    mlp(torch.randn(2, 3, 64))
    assert calls == [1]


class Counting(nn.LayerNorm):
    def __init__(self, *args):
        super().__init__(*args)
        self.calls, self.log = 0, []

    def forward(self, x):
        self.calls += 1
        self.log.append(x.shape)
        return super().forward(x)


def test_verification_moves_no_state_of_the_model_or_the_process():
    model = nn.Sequential(Counting(8), nn.BatchNorm1d(8), nn.Dropout(0.5))
    before, states = (
        copy.deepcopy(model.state_dict()),
        (torch.get_rng_state(), random.getstate(), torch.is_grad_enabled()),
    )
    with torch.no_grad():
        fuse(model)
    assert (model[0].calls, model[0].log) == (0, [])
    assert all(torch.equal(a, b) for a, b in zip(before.values(), model.state_dict().values(), strict=True))
    assert torch.equal(torch.get_rng_state(), states[0])
    assert (random.getstate(), torch.is_grad_enabled()) == states[1:]
    assert all(p.grad is None for p in model.parameters())


def test_hidden_states_and_attentions_are_still_recorded(fused, llama):
    options = {"input_ids": tokens(), "output_hidden_states": True}
    assert len(copy.deepcopy(fused)(**options).hidden_states) == len(copy.deepcopy(llama)(**options).hidden_states) == 3


# ------------------------------------------------------------------------------ copying, saving, loading, compiling


def test_deepcopy_and_pickle_keep_the_model_fused(fused):
    buffer = io.BytesIO()
    torch.save(fused, buffer)
    buffer.seek(0)
    expected = fused(tokens()).logits
    for model in (copy.deepcopy(fused), pickle.loads(pickle.dumps(fused)), torch.load(buffer, weights_only=False)):
        assert classes(model) == classes(fused)
        assert torch.equal(model(tokens()).logits, expected)


def test_a_process_that_never_called_fuse_loads_the_model(fused, tmp_path):
    torch.save((fused, fused(tokens()).logits), tmp_path / "model.pt")
    code = (
        "import sys, torch; model, logits = torch.load(sys.argv[1], weights_only=False);"
        "found = model(torch.arange(34).view(2, 17) * 7 % 97).logits;"
        "assert '_braze_fusion' in type(model.model.norm).__dict__; torch.testing.assert_close(found, logits)"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "model.pt")], check=True)


def test_save_pretrained_writes_what_the_original_writes(fused, llama, tmp_path):
    for model, folder in ((copy.deepcopy(fused), "fused"), (copy.deepcopy(llama), "plain")):
        model.save_pretrained(tmp_path / folder)
    assert (tmp_path / "fused/config.json").read_text() == (tmp_path / "plain/config.json").read_text()
    loaded = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "fused")
    assert type(loaded.model.norm) is type(llama.model.norm)
    assert torch.equal(loaded.model.norm.weight, llama.model.norm.weight)


def test_a_fused_decoder_layer_compiles_without_a_break(fused):
    layer, x = fused.model.layers[0], torch.randn(2, 17, 64)
    positions = fused.model.rotary_emb(x, torch.arange(17)[None])
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    got, plain = (f(x, position_embeddings=positions) for f in (compiled, layer))
    exact = copy.deepcopy(layer).double()(x.double(), position_embeddings=tuple(t.double() for t in positions))
    assert relative(got, exact) <= 2 * (relative(plain, exact) + torch.finfo(torch.float32).eps)


def test_autocast_gives_the_dtypes_of_the_original(llama, fused):
    with torch.autocast("cpu", torch.bfloat16):
        plain, got = llama(tokens()).logits, fused(tokens()).logits
    exact = copy.deepcopy(llama).double()(tokens()).logits
    assert plain.dtype == got.dtype == torch.bfloat16
    assert relative(got, exact) <= 2 * (relative(plain, exact) + torch.finfo(torch.bfloat16).eps)


def test_a_loss_set_later_is_used(fused):
    model = copy.deepcopy(fused)
    model.loss_function = lambda logits, labels, **_: logits.sum() * 0 + 7
    assert model(input_ids=tokens(), labels=tokens()).loss == 7


# ------------------------------------------------------------------------------ what is left alone


def own_forward():
    module = nn.LayerNorm(8)
    module.forward = types.MethodType(nn.LayerNorm.forward, module)
    return module


class SelfPickling(nn.LayerNorm):
    def __reduce__(self):
        return SelfPickling, (8,)


def quantised():
    module = Projections()
    module.gate.weight = nn.Parameter(torch.zeros(16, 8, dtype=torch.int8), requires_grad=False)
    return module


class Projections(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(8, 16), nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x):
        return self.down(nn.functional.silu(self.gate(x)) * self.up(x))


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (own_forward, "forward of its own"),
        (
            lambda: nn.utils.parametrize.register_parametrization(nn.LayerNorm(8), "weight", nn.Identity()),
            "parametrized",
        ),
        (lambda: SelfPickling(8), "pickles itself"),
        (quantised, "torch.int8"),
    ],
    ids=["own forward", "parametrized", "own pickling", "quantised"],
)
def test_what_cannot_be_swapped_is_left_with_the_reason(make, reason):
    module = make()
    before = type(module)
    (record,) = (record for record in fuse(module) if record.path == "")
    assert record.status == "left"
    assert reason in record.reason
    assert type(module) is before


def test_our_own_modules_are_fused_already():
    (record,) = fuse(nn.Sequential(RMSNorm(8)))
    assert record.status == "already fused"


def test_skip_and_only_take_paths_classes_and_operators(llama):
    def found(**options):
        return {record.path for record in fuse(copy.deepcopy(llama), **options).fused}

    everything = found()
    assert found(skip=["model.layers.0"]) == {p for p in everything if not p.startswith("model.layers.0")}
    assert found(skip=["*.input_layernorm", "rope"]) == {
        p for p in everything if not p.endswith(("input_layernorm", "self_attn"))
    }
    assert found(only=[type(llama.model.norm)]) == {p for p in everything if p.endswith("norm")}
    assert found(only="glu") == {"model.layers.0.mlp", "model.layers.1.mlp"}
    with pytest.raises(TypeError, match=r"skip must hold paths.*got 3"):
        found(skip=[3])
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module, got list"):
        fuse([llama])


def test_a_failure_midway_rolls_everything_back():
    model = nn.Sequential(nn.LayerNorm(8), nn.RMSNorm(8), unswappable(nn.LayerNorm, 8))
    before = classes(model)
    with pytest.raises(RuntimeError, match="no other class"):
        fuse(model)
    assert classes(model) == before


def test_a_meta_model_is_verified_on_a_drawn_sample(llama):
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(llama.config)
    assert len(fuse(model).fused) == 13
    model = model.to_empty(device="cpu")
    model.load_state_dict(llama.state_dict())
    model.model.rotary_emb = llama.model.rotary_emb
    assert relative(model(tokens()).logits, llama(tokens()).logits) < 1e-5


# ------------------------------------------------------------------------------ the report


def test_the_report_prints_groups_and_is_json(llama):
    report = fuse(copy.deepcopy(llama))
    text = str(report)
    assert "model.layers.*.input_layernorm" in text
    assert text.count("×2") == 5  # noqa: RUF001 (the multiplication sign is meant)
    assert "13 of 13 joints fused" in text
    (first, *_) = records = json.loads(json.dumps(report.as_dicts()))
    assert len(records) == 13
    assert first.keys() == {"path", "was", "now", "status", "reason", "check", "saving", "timing"}
    assert all(0 <= record["check"]["error"] <= record["check"]["budget"] for record in records)


def test_a_large_model_is_not_copied():
    """Verification keeps to a small sample: a gated MLP of 12 GB in float64 is fused on a machine that has less."""
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(
            transformers.LlamaConfig(**SIZES | {"hidden_size": 8192, "intermediate_size": 65536, "head_dim": 2048})
        )
    gc.collect()
    assert len(fuse(model).fused) == 13
