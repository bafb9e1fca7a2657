"""fuse beside what else is done to a model: compiled, exported, adapted, checkpointed, copied, sent, loaded late."""

import copy
import functools
import io

import pytest
import torch
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch import nn
from torch.optim.swa_utils import AveragedModel

from braze.kernels import fuse, unfuse, use_backend
from braze.kernels.fuse.joint import fusion

from .fusible import tiny_llama

transformers = pytest.importorskip("transformers")
timm = pytest.importorskip("timm")

# transformers renames what adapters and this file call.
pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*is deprecated:FutureWarning")

TOKENS = torch.arange(24).view(2, 12) * 7 % 97
IMAGES = torch.linspace(-2, 2, 2 * 3 * 32 * 32).sin().view(2, 3, 32, 32).double()


@functools.cache
def language_model():
    return tiny_llama(num_attention_heads=4, num_key_value_heads=2)


@functools.cache
def image_model():
    torch.manual_seed(0)
    # In float64: normalised over a few pixels, rounding grows a thousandfold.
    return timm.create_model("resnet10t", num_classes=7).double()


def language_loss(model):
    return F.cross_entropy(model(input_ids=TOKENS).logits.view(-1, 97), TOKENS.view(-1))


def image_loss(model):
    return model(IMAGES).square().mean()


MODELS = {"language": (language_model, language_loss), "images": (image_model, image_loss)}
each_model = pytest.mark.parametrize(("make", "loss"), MODELS.values(), ids=MODELS)


@pytest.fixture(autouse=True)
def _eager():
    with use_backend("eager"):  # what is compiled for the CPU is the same in any composition, and takes minutes
        yield


def fresh(make):
    return copy.deepcopy(make())


def how_many(model):
    return sum(fusion(module) is not None for module in model.modules())


def gradients(model, loss):
    """The loss, and the gradients by the names that the parameters have without wrappers."""
    model.zero_grad()
    value = loss(model)
    value.backward()
    names = ("_orig_mod.", "module.")
    found = {}
    for name, parameter in model.named_parameters():
        for wrapper in names:
            name = name.replace(wrapper, "")
        found[name] = parameter.grad
    return value.detach(), found


def assert_same(model, loss, plain):
    torch.testing.assert_close(gradients(model, loss), gradients(plain, loss))


# ----------------------------------------------------------------------------------------- compile and export


@each_model
@pytest.mark.parametrize("wrapped", [False, True], ids=["in place", "wrapped"])
@pytest.mark.parametrize("first", ["fuse", "compile"])
def test_compiled_before_or_after(make, loss, first, wrapped):
    model, plain = fresh(make), fresh(make)

    def compiled(module):
        if wrapped:
            return torch.compile(module, backend="aot_eager")
        module.compile(backend="aot_eager")
        return module

    if first == "compile":
        model = compiled(model)
        gradients(model, loss)  # what is compiled already must not be kept
    assert fuse(model).fused
    if first == "fuse":
        model = compiled(model)
    assert_same(model, loss, plain)
    unfuse(model)
    assert_same(model, loss, plain)


@pytest.mark.filterwarnings("ignore:While compiling, we found certain side effects:UserWarning")  # transformers' own
@pytest.mark.parametrize("strict", [False, True])
@each_model
def test_exported(make, loss, strict):
    model, plain = fresh(make).eval(), fresh(make).eval()
    fuse(model)
    call = {"input_ids": TOKENS} if make is language_model else {"x": IMAGES}
    exported = torch.export.export(model, (), call, strict=strict)
    expected = plain(**call)
    got = exported.module()(**call)
    logits = (got.logits, expected.logits) if make is language_model else (got, expected)
    torch.testing.assert_close(*logits)
    assert set(exported.state_dict) <= set(plain.state_dict()) | {n for n, _ in plain.named_buffers()}


# ----------------------------------------------------------------------------------------------------- adapters


def adapted(model, targets):
    peft = pytest.importorskip("peft")
    torch.manual_seed(1)
    config = peft.LoraConfig(r=4, lora_dropout=0.0, init_lora_weights=False, target_modules=targets)
    return peft.get_peft_model(model, config)


TARGETS = {
    "attention": ["q_proj", "v_proj"],
    "MLP": ["gate_proj", "up_proj", "down_proj"],
    "head": ["lm_head"],
    "all": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "lm_head"],
}


@pytest.mark.parametrize("first", ["fuse", "adapters"])
@pytest.mark.parametrize("targets", TARGETS.values(), ids=TARGETS)
def test_adapters_before_or_after(targets, first):
    model = fresh(language_model)
    if first == "fuse":
        fuse(model)
    model = adapted(model, targets)
    if first == "adapters":
        assert fuse(model).fused
    plain = adapted(fresh(language_model), targets)
    adapters = {name for name, p in plain.named_parameters() if p.requires_grad}
    assert adapters == {name for name, p in model.named_parameters() if p.requires_grad}
    for one in (model, plain):
        optimizer = torch.optim.SGD([p for p in one.parameters() if p.requires_grad], lr=0.1)
        for _ in range(2):
            gradients(one, language_loss)
            optimizer.step()
    assert_same(model, language_loss, plain)
    assert all(p.grad.any() for name, p in model.named_parameters() if name in adapters)
    merged, expected = model.merge_and_unload(), plain.merge_and_unload()
    torch.testing.assert_close(merged(TOKENS).logits, expected(TOKENS).logits)
    assert how_many(merged)


# ------------------------------------------------------------------------------------------- memory and modes


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_layers(reentrant):
    model, plain = fresh(language_model).train(), fresh(language_model).train()
    fuse(model)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    assert_same(model, language_loss, plain)


@each_model
def test_inference_mode(make, loss):
    model, plain = fresh(make).eval(), fresh(make).eval()
    with torch.inference_mode():
        assert fuse(model).fused
        torch.testing.assert_close(loss(model), loss(plain))
    assert_same(model, loss, plain)  # and what was prepared there can be trained


@each_model
def test_a_functional_call(make, loss):
    model, plain = fresh(make), fresh(make)
    fuse(model)
    halved = {name: p.detach() / 2 for name, p in plain.named_parameters()}

    class Called(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, *args, **kwargs):
            return torch.func.functional_call(self.inner, halved, args, kwargs)

    torch.testing.assert_close(loss(Called(model)), loss(Called(plain)))


@pytest.mark.filterwarnings(
    "ignore:torch.quantize_per_tensor:UserWarning", "ignore:torch.ao.quantization:DeprecationWarning"
)
def test_quantised_layers_are_left_alone():
    quantised = torch.ao.quantization.quantize_dynamic(fresh(language_model).eval(), {nn.Linear}, dtype=torch.qint8)
    model = copy.deepcopy(quantised)
    fuse(model)
    with torch.no_grad():
        torch.testing.assert_close(model(TOKENS).logits, quantised(TOKENS).logits)


# ------------------------------------------------------------------------------------- copies, processes, loading


@each_model
@pytest.mark.parametrize("first", ["fuse", "average"])
def test_an_averaged_copy(make, loss, first):
    decay = {"multi_avg_fn": torch.optim.swa_utils.get_ema_multi_avg_fn(0.5), "use_buffers": False}
    model, plain = fresh(make), fresh(make)
    averages = AveragedModel(plain, **decay)
    if first == "fuse":
        fuse(model)
    average = AveragedModel(model, **decay)
    if first == "average":
        fuse(model)
    for one, its in ((model, average), (plain, averages)):
        optimizer = torch.optim.SGD(one.parameters(), lr=0.1)
        for _ in range(2):
            gradients(one, loss)
            optimizer.step()
            its.update_parameters(one)
    assert bool(how_many(average)) == (first == "fuse")
    torch.testing.assert_close(average.module.state_dict(), averages.module.state_dict())


def _child(index, model, gradient, results):
    with use_backend("eager"):
        loss = language_loss(model)
        loss.backward()
    results["loss"], results["fused"] = loss.item(), how_many(model)
    gradient.copy_(model.model.norm.weight.grad)


def test_sent_to_a_spawned_process():
    model, plain = fresh(language_model), fresh(language_model)
    fuse(model)
    gradient = torch.zeros(32, dtype=torch.float32).share_memory_()
    with mp.Manager() as manager:
        results = manager.dict()
        mp.spawn(_child, (model, gradient, results), nprocs=1)
        found = dict(results)
    loss, expected = gradients(plain, language_loss)
    assert found["fused"] == how_many(model)
    assert found["loss"] == pytest.approx(loss.item(), rel=1e-5)
    torch.testing.assert_close(gradient, expected["model.norm.weight"])


@each_model
@pytest.mark.parametrize("assign", [False, True])
def test_fused_on_meta_and_loaded_later(make, loss, assign):
    plain = fresh(make)
    with torch.device("meta"):
        model = copy.deepcopy(plain).to("meta")
    assert fuse(model).fused
    stored = io.BytesIO()
    torch.save(plain.state_dict(), stored)
    stored.seek(0)
    if not assign:
        model.to_empty(device="cpu")
    weights = torch.load(stored)
    left = model.load_state_dict(weights, assign=assign)
    assert not left.missing_keys
    assert not left.unexpected_keys
    for name, buffer in plain.named_buffers():  # those that no state dict has
        if name not in weights:
            path, _, own = name.rpartition(".")
            model.get_submodule(path).register_buffer(own, buffer.clone(), persistent=False)
    assert_same(model, loss, plain)


def test_from_pretrained_gives_a_fused_model_its_weights(tmp_path):
    plain = fresh(language_model)
    fused = fresh(language_model)
    fuse(fused)
    fused.save_pretrained(tmp_path)
    loaded = transformers.LlamaForCausalLM.from_pretrained(tmp_path)
    assert type(loaded) is type(plain)
    assert how_many(loaded) == 0
    fuse(loaded)
    assert_same(loaded.train(), language_loss, plain.train())
