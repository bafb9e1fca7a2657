"""The savings that a report predicts: the counted traffic is that of the operators, and what is kept is really kept."""

import copy
import json

import pytest
import torch
from torch import nn

from braze.kernels import OPS, fuse, plan, use_backend
from braze.kernels.fuse import savings
from braze.kernels.fuse.sample import Draw
from braze.kernels.op import Draw as Operands


class Call(nn.Module):
    """A drawn call of an operator as a function of the operands that gradients flow to."""

    def __init__(self, op, args, options):
        super().__init__()
        self.function, self.args, self.options = op.fn, args, options
        self.places = [i for i, t in enumerate(args) if isinstance(t, torch.Tensor) and t.requires_grad]

    def forward(self, *tensors):
        args = list(self.args)
        for place, tensor in zip(self.places, tensors, strict=True):
            args[place] = tensor
        return self.function(*args, **self.options)


#: Operators, and the sizes to count at.
COUNTED = {
    "rms_norm": {"N": 64, "D": 128},
    "layer_norm": {"N": 64, "D": 128},
    "glu": {"N": 64, "D": 128},
    "rope": {"B": 2, "H": 4, "S": 16, "D": 32},
    "batch_norm_act": {"N": 4, "C": 8, "S": 65},
    "group_norm": {"N": 2, "G": 4, "K": 8, "S": 1024},
    "softmax": {"B": 1, "Q": 64, "K": 128},
}


@pytest.mark.parametrize("name", COUNTED)
def test_a_fused_operator_counts_as_its_least_traffic(name):
    op = next(op for op in OPS if op.name == name)
    dims = dict.fromkeys(op.dims, 64) | COUNTED[name]
    options = next(iter(op.variants.values()))
    args, kwargs = op.inputs(Operands(0), **dims, **options)
    call = Call(op, args, dict(kwargs))
    found = savings.count(call, Draw("", tuple(args[i] for i in call.places)), torch.float32)
    least = op.traffic(4, **dims, **options)
    # What is above the least: running statistics, and a few numbers a row that other kernels keep in registers.
    assert sum(least) <= found.traffic <= 1.02 * sum(least)


def kept(model, step):
    """Bytes that autograd keeps of a step, without the parameters."""
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    storages = {}

    def pack(tensor):
        storages.setdefault(tensor.untyped_storage().data_ptr(), tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        step(model)
    return sum(t.untyped_storage().nbytes() for pointer, t in storages.items() if pointer not in own)


class Block(nn.Module):
    """Convolution, norm, activation, twice; one norm of groups."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 12, 1)
        self.norm, self.groups, self.silu, self.relu = nn.BatchNorm2d(8), nn.GroupNorm(3, 12), nn.SiLU(), nn.ReLU()
        self.last = nn.Conv2d(12, 4, 1)

    def forward(self, x):
        return self.last(self.silu(self.groups(self.second(self.relu(self.norm(self.first(x)))))))


def language_model():
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "vocab_size": 97, "pad_token_id": 0}
    config = transformers.LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2, head_dim=16)
    return transformers.LlamaForCausalLM(config).bfloat16()


TOKENS = torch.arange(34).view(2, 17) * 7 % 97


@pytest.mark.parametrize(
    ("make", "step", "units", "operators"),
    [
        (language_model, lambda m: m(input_ids=TOKENS, labels=TOKENS).loss, {"token": 34}, "rms_norm"),
        (language_model, lambda m: m(input_ids=TOKENS, labels=TOKENS).loss, {"token": 34}, "glu"),
        (language_model, lambda m: m(input_ids=TOKENS, labels=TOKENS).loss, {"token": 34}, "cross_entropy"),
        (language_model, lambda m: m(input_ids=TOKENS, labels=TOKENS).loss, {"element": 0}, "rope"),
        (Block, lambda m: m(torch.ones(2, 3, 10, 10)), {"pixel": 128}, ("batch_norm_act", "group_norm")),
    ],
    ids=["rms_norm", "glu", "cross_entropy", "rope", "image norms"],
)
def test_the_activations_that_a_report_saves_are_those_that_a_model_no_longer_keeps(make, step, units, operators):
    """The Triton kernels run, whatever the report counted: they keep what the compiled forms keep."""
    pytest.importorskip("triton")
    torch.manual_seed(0)
    model = make()
    fused = copy.deepcopy(model)
    report = fuse(fused, only=operators)
    assert report.fused
    with use_backend("triton"):
        saved = kept(model, step) - kept(fused, step)
    predicted = sum(record.saving.activations * units[record.saving.unit] for record in report.fused)
    assert saved == round(predicted)
    assert saved != 0 or operators == "rope"


def test_a_head_saves_its_logits():
    report = plan(nn.Sequential(nn.Linear(8, 200, bias=False)))
    (record,) = report
    assert record.saving.unit == "token"
    # In the place of hidden the loss keeps its gradient; beside the logits there are a few numbers a row.
    assert record.saving.activations == pytest.approx(4 * 200, rel=0.01)


def test_the_report_adds_up_what_is_saved_and_prints_it():
    image = nn.Sequential(nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8), nn.ReLU())
    report = plan(nn.Sequential(image, nn.LayerNorm(8), nn.Linear(8, 8), nn.LayerNorm(5)))
    (norm, row, head) = records = json.loads(json.dumps(report.as_dicts()))
    # ReLU reads and writes, and in the backward pass reads twice and writes; the norm reads and writes what it did.
    assert norm["saving"] == {"traffic": 5 * 4 * 8, "activations": 0, "unit": "pixel"}
    assert row["saving"]["traffic"] == 0
    assert (row["saving"]["unit"], head["saving"]["unit"]) == ("token", "row")  # of heads of five
    assert report.savings.keys() == {"pixel", "token", "row"}
    assert report.savings["pixel"].traffic == sum(r["saving"]["traffic"] for r in records)
    assert "saves 160 B/pixel of traffic, 0 B/pixel of activations" in str(report)
