"""What the tests of deferred logits share: models, operands, and the budget of their errors."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from braze.kernels.fuse import deferred
from braze.kernels.fuse.deferred import DeferredLogits

transformers = pytest.importorskip("transformers")

B, S, D, C = 2, 6, 8, 40


def is_deferred(tensor):
    return isinstance(tensor, DeferredLogits) and tensor._logits.value is None


def drawn(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def operands(dtype=torch.float32, bias=True):
    tensors = (drawn(B, S, D, dtype=dtype), drawn(C, D, seed=1, dtype=dtype), drawn(C, seed=2, dtype=dtype))
    return [t.requires_grad_() for t in tensors[: 2 + bias]] + [None] * (not bias)


def targets(*shape):
    target = torch.arange(int(torch.Size(shape).numel())).view(shape) * 7 % C
    return target.masked_fill(target % 5 == 0, -100)


def gradients(loss, tensors):
    return torch.autograd.grad(loss, [t for t in tensors if t is not None], retain_graph=True)


def relative(a, b):
    return ((a.double() - b.double()).abs().max() / b.double().abs().max()).item()


def assert_as_good(got, plain, exact, more=0.0):
    """The budget of every fused operator, for the largest of all errors: that of one small gradient is partly luck."""
    assert [(t.shape, t.dtype) for t in got] == [(t.shape, t.dtype) for t in plain]
    steps = torch.finfo(plain[-1].dtype).eps
    error, budget = (max(map(relative, found, exact)) for found in (got, plain))
    assert error <= 2 * (budget + steps) + more, (error, budget)


class GPT(nn.Module):
    """Hand-written, its head tied to its embedding, its loss outside."""

    def __init__(self, vocabulary=C, features=D):
        super().__init__()
        self.wte = nn.Embedding(vocabulary, features)
        self.mlp = nn.Sequential(nn.Linear(features, 16), nn.GELU(), nn.Linear(16, features))
        self.head = nn.Linear(features, vocabulary, bias=False)
        self.head.weight = self.wte.weight

    def forward(self, tokens):
        h = self.wte(tokens)
        return self.head(h + self.mlp(h))

    def training_step(self, tokens, labels):
        return F.cross_entropy(self(tokens).view(-1, self.head.out_features), labels.view(-1))


def gpt(**sizes):
    torch.manual_seed(0)
    return GPT(**sizes)


def tokens(vocabulary=C, length=S):
    return torch.arange(2 * length).view(2, length) * 7 % vocabulary


def llama(name="Llama", vocabulary=C, **options):
    torch.manual_seed(0)
    config = getattr(transformers, name + "Config")(
        hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1,
        head_dim=16, vocab_size=vocabulary, pad_token_id=0, **options,
    )  # fmt: skip
    return getattr(transformers, f"{name}ForCausalLM")(config)


def huggingface_step(model, x):
    return model(input_ids=x, labels=x).loss


def handwritten_step(model, x):
    return model.training_step(x, x.roll(-1, 1))


MODELS = {
    "GPT, tied": (gpt, handwritten_step),
    "Llama": (llama, huggingface_step),
    "Llama, tied": (lambda **o: llama(tie_word_embeddings=True, **o), huggingface_step),
    "Gemma 2, capped": (lambda **o: llama("Gemma2", final_logit_softcapping=0.5, **o), huggingface_step),
    "Granite, scaled": (lambda **o: llama("Granite", logits_scaling=3.0, **o), huggingface_step),
}
models = pytest.mark.parametrize(("make", "step"), MODELS.values(), ids=MODELS)


def counted_losses(monkeypatch):
    """A list that grows with each loss that is computed without logits."""
    calls, function = [], deferred.linear_cross_entropy
    monkeypatch.setattr(
        deferred, "linear_cross_entropy", lambda *args, **options: calls.append(1) or function(*args, **options)
    )
    return calls
