"""Dims padded to a multiple: the same numbers, the same checkpoints, and the same bits after it is undone."""

from __future__ import annotations

import copy
import io
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from braze.layouts import pad_to_multiple, unpad
from braze.layouts.padding import Padding

KINDS = {"vocabulary": 64, "hidden": 16, "head_dim": 8}


def assert_same(results: list[Tensor], expected: list[Tensor]) -> None:
    """In float64: sums in another order err by n·2⁻⁵³, a missing or an added entry by about 1/n; this is in between."""
    for mine, theirs in zip(results, expected, strict=True):
        assert mine.shape == theirs.shape
        assert (mine - theirs).abs().max() <= torch.finfo(torch.float32).eps * theirs.abs().max()


def assert_same_bits(mine: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert list(mine) == list(theirs)
    for name in mine:
        assert torch.equal(mine[name], theirs[name]), name


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: t.clone() for name, t in model.state_dict().items()}


class Model(nn.Module):
    def __init__(self, size: int, *, tied: bool, bias: bool) -> None:
        super().__init__()
        self.embedding = nn.Embedding(size, 12)
        self.between = nn.Linear(12, 12)
        self.head = nn.Linear(12, size, bias=bias)
        if tied:
            self.head.weight = self.embedding.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.between(self.embedding(ids)).tanh())


def differentiated(model: nn.Module, ids: Tensor, smoothing: float = 0.1) -> list[Tensor]:
    """Logits, loss and gradients; the loss looks at every class."""
    model.zero_grad()
    logits = model(ids)
    logits = logits if isinstance(logits, Tensor) else logits.logits
    loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), label_smoothing=smoothing)
    loss.backward()
    model_state = model.state_dict(keep_vars=True)
    # Of a padded parameter state_dict has a view, whose gradient is that of the parameter.
    shown = {name: p for name, p in model.named_parameters() if p.grad is not None and name in model_state}
    return [logits.detach(), loss.detach(), *(stripped(p.grad, model_state[name]) for name, p in shown.items())]


def stripped(gradient: Tensor, like: Tensor) -> Tensor:
    return gradient[tuple(slice(0, n) for n in like.shape)]


#: Any linear layer with as many outputs as there are tokens is taken for a head: not twelve, as many as features.
sizes_of_vocabularies = st.integers(2, 130).filter(lambda size: size != 12)


@given(sizes_of_vocabularies, st.booleans(), st.booleans(), st.sampled_from([1, 8, 64]))
def test_a_padded_vocabulary_changes_no_number(size: int, tied: bool, bias: bool, multiple: int) -> None:
    torch.manual_seed(size)
    model = Model(size, tied=tied, bias=bias).double()
    before, parameters = state(model), list(model.parameters())
    ids = torch.randint(size, (3, 7))
    expected = differentiated(model, ids)

    report = pad_to_multiple(model, vocabulary=multiple)
    assert all(map(lambda a, b: a is b, model.parameters(), parameters))
    assert (model.head.weight is model.embedding.weight) == tied
    assert model.head.weight.shape == (report[0].padded, 12)
    assert report[0].padded % multiple == 0
    assert report[0].paths == (("embedding", "head") if tied else ("head",))
    assert model(ids).stride(-2) == report[0].padded  # the product was computed at that width
    assert_same(differentiated(model, ids), expected)
    assert_same_bits(state(model), before)

    unpad(model)
    assert_same_bits(state(model), before)
    assert all(map(lambda a, b: a is b, model.parameters(), parameters))
    assert [p.shape for p in model.parameters()] == [p.grad.shape for p in model.parameters()]
    assert all(p.is_contiguous() and p.untyped_storage().nbytes() == p.nbytes for p in model.parameters())
    assert_same(differentiated(model, ids), expected)
    for module in model.modules():
        assert not module._forward_hooks
        assert not module._forward_pre_hooks
        assert not module._state_dict_hooks
        assert not module._load_state_dict_pre_hooks


@given(sizes_of_vocabularies, st.booleans(), st.booleans(), st.booleans(), st.booleans())
def test_checkpoints_load_into_either_form(size: int, tied: bool, bias: bool, padded: bool, assign: bool) -> None:
    """From the padded or the plain model into the other, and into itself."""
    source, target = (Model(size, tied=tied, bias=bias) for _ in range(2))
    if padded:
        pad_to_multiple(source)
    else:
        pad_to_multiple(target)
    file = io.BytesIO()
    torch.save(source.state_dict(), file)
    file.seek(0)
    saved = torch.load(file)
    assert all(size in t.shape or "between" in name for name, t in saved.items())
    for model in (source, target):
        model.load_state_dict(saved, assign=assign)
    assert_same_bits(state(target), state(source))
    assert (target.head.weight.shape[0] % 64 == 0) is (not padded or size % 64 == 0)
    unpad(target)
    assert_same_bits(state(target), state(source))


def test_entries_that_were_saved_padded_load_without_their_padding() -> None:
    mlp = nn.Sequential(nn.Linear(4, 10), nn.ReLU(), nn.Linear(10, 4))
    pad_to_multiple(mlp, vocabulary=None, hidden=16)
    raw = {name: torch.full_like(p, 3.0) for name, p in mlp.named_parameters()}
    mlp.load_state_dict(raw)
    assert all(t.eq(3).all() for t in mlp.state_dict().values())
    assert mlp[2].weight[:, 10:].eq(0).all()
    assert mlp[0].bias[10:].eq(0).all()
    with pytest.raises(RuntimeError, match=r"size mismatch for 0\.weight"):
        mlp.load_state_dict({**raw, "0.weight": torch.ones(11, 4)})


@pytest.mark.parametrize("blocks", [1, 3])
@pytest.mark.parametrize("dim", [0, 1])
def test_zeros_are_behind_each_block(dim: int, blocks: int) -> None:
    t = torch.arange(1.0, 1 + 6 * 12).view(6, 12)
    padding = Padding(dim, t.shape[dim], t.shape[dim] + 3 * blocks, blocks)
    padded = padding.pad(t)
    assert torch.equal(padding.strip(padded), t)
    ends = padded.unflatten(dim, (blocks, -1)).narrow(dim + 1, t.shape[dim] // blocks, 3)
    assert ends.eq(0).all()
    assert padded.ne(0).sum() == t.numel()


# ------------------------------------------------------------------------------ models of transformers


def network(name: str, **options: Any) -> nn.Module:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"vocab_size": 101, "num_hidden_layers": 2, "bos_token_id": None, "eos_token_id": None}
    if name == "GPT2":
        sizes |= {"n_embd": 24, "n_head": 2, "n_layer": 2, "attn_pdrop": 0, "resid_pdrop": 0, "embd_pdrop": 0}
        sizes.pop("num_hidden_layers")
    else:
        sizes |= {"hidden_size": 20, "intermediate_size": 44, "num_attention_heads": 4, "num_key_value_heads": 2}
        sizes |= {"head_dim": 10}
    config = getattr(transformers, f"{name}Config")(**sizes, **options)
    kind = "GPT2LMHeadModel" if name == "GPT2" else f"{name}ForCausalLM"
    made: nn.Module = getattr(transformers, kind)(config).double()
    return made


IDS = torch.arange(24).view(2, 12) * 37 % 101

NETWORKS: dict[str, tuple[str, dict[str, Any], dict[str, int]]] = {
    "Llama": ("Llama", {}, {"vocabulary": 1, "hidden": 2, "head_dim": 2}),
    "Llama, tied, biases, eager": (
        "Llama",
        {"tie_word_embeddings": True, "mlp_bias": True, "attention_bias": True, "attn_implementation": "eager"},
        {"vocabulary": 1, "hidden": 2, "head_dim": 2},
    ),
    "Qwen3, whose heads are normalized": ("Qwen3", {}, {"vocabulary": 1, "hidden": 2, "head_dim": 0}),
    "GPT-2, whose layers are no nn.Linear": ("GPT2", {}, {"vocabulary": 1, "hidden": 0, "head_dim": 0}),
}


@pytest.mark.parametrize("case", NETWORKS)
def test_transformers_models_compute_and_train_the_same(case: str, tmp_path: Path) -> None:
    name, options, found = NETWORKS[case]
    plain = network(name, **options)
    padded = copy.deepcopy(plain)
    before = state(plain)
    report = pad_to_multiple(padded, **KINDS)
    for kind, number in found.items():
        assert len([r for r in report if r.kind == kind and r.padded != r.size]) == number, str(report)
    assert_same_bits(state(padded), before)

    models = (plain, padded)
    # Adam divides a gradient by its own size, which magnifies the rounding of those that are 0 but for rounding.
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1) for m in models]
    for _ in range(3):
        losses = []
        for model, optimizer in zip(models, optimizers, strict=True):
            logits = model(input_ids=IDS, use_cache=False).logits
            loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), IDS[:, 1:].flatten(), label_smoothing=0.1)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.detach())
        assert_same(losses[1:], losses[:1])
    trained = state(padded)
    assert_same(list(trained.values()), list(state(plain).values()))
    padded.save_pretrained(tmp_path)
    again = type(plain).from_pretrained(tmp_path, dtype=torch.float64)
    assert_same_bits(state(again), trained)
    unpad(padded)
    assert_same_bits(state(padded), trained)
    assert [p.shape for p in padded.parameters()] == [p.shape for p in plain.parameters()]
    assert getattr(padded.config, "head_dim", 10) == 10


def test_zeros_stay_zeros_in_training() -> None:
    model = network("Llama")
    report = pad_to_multiple(model, **KINDS)
    assert len([r for r in report if r.padded != r.size]) == 5
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
    for _ in range(3):
        differentiated(model, IDS)
        optimizer.step()
    block = model.model.layers[0]
    assert block.mlp.down_proj.weight.shape == (20, 48)
    assert block.mlp.down_proj.weight[:, 44:].eq(0).all()
    assert block.mlp.up_proj.weight[44:].eq(0).all()
    heads = block.self_attn.q_proj.weight.unflatten(0, (4, 2, 8))
    assert heads[:, :, 5:].eq(0).all()
    assert heads[:, :, :5].ne(0).all()
    assert block.self_attn.o_proj.weight.shape == (20, 64)


# ------------------------------------------------------------------------------ what is left alone, and why


class Scaled(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


LEFT: dict[str, tuple[nn.Module, str]] = {
    "an activation that is not 0 at 0": (
        nn.Sequential(nn.Linear(4, 10), nn.Sigmoid(), nn.Linear(10, 4)),
        "its zeros would be trained",
    ),
    "a mean over the width": (
        nn.Sequential(nn.Linear(4, 10), nn.Softmax(-1), nn.Linear(10, 4)),
        "it computes something else",
    ),
    "a parameter of the width": (
        nn.Sequential(nn.Linear(4, 10), nn.LayerNorm(10), nn.Linear(10, 4)),
        "padded, it fails: RuntimeError",
    ),
    "a layer of its own": (nn.Sequential(nn.Linear(4, 10), nn.ReLU(), Scaled(10, 4)), "Scaled is no plain nn.Linear"),
    "a chain": (
        nn.Sequential(nn.Linear(4, 20), nn.ReLU(), nn.Linear(20, 10), nn.ReLU(), nn.Linear(10, 4)),
        "padded already, for another dim",
    ),
}


@pytest.mark.parametrize("case", LEFT)
def test_what_would_change_is_left(case: str) -> None:
    model, reason = LEFT[case]
    before = state(model)
    report = pad_to_multiple(model, vocabulary=None, hidden=16)
    assert report[-1].padded == report[-1].size == 10
    assert reason in report[-1].reason
    assert reason in str(report)
    assert_same_bits(state(model), before)


def test_a_shared_layer_is_left() -> None:
    mlps = [nn.Sequential(nn.Linear(4, 10), nn.ReLU(), nn.Linear(10, 4)) for _ in range(2)]
    mlps[1][0].weight = mlps[0][0].weight
    report = pad_to_multiple(nn.Sequential(*mlps), vocabulary=None, hidden=16)
    assert [r.padded for r in report] == [10, 10]
    assert "shared with another module" in report[0].reason


def test_a_vocabulary_that_somebody_else_uses_is_left() -> None:
    model = Model(10, tied=True, bias=False)
    model.other = Scaled(12, 10, bias=False)
    model.other.weight = model.head.weight
    (record,) = pad_to_multiple(model)
    assert record.reason == "Scaled has a forward of its own"
    assert model.head.weight.shape == (10, 12)


def test_frozen_parameters_are_padded_and_stay_frozen() -> None:
    mlp = nn.Sequential(nn.Linear(4, 10), nn.ReLU(), nn.Linear(10, 4)).requires_grad_(False)
    (record,) = pad_to_multiple(mlp, vocabulary=None, hidden=16)
    assert record.padded == 16
    assert not any(p.requires_grad for p in mlp.parameters())


def test_global_random_numbers_are_not_drawn() -> None:
    before = torch.get_rng_state()
    model = network("Llama")
    torch.set_rng_state(before)
    pad_to_multiple(model, **KINDS)
    assert torch.equal(torch.get_rng_state(), before)


# ------------------------------------------------------------------------------ a good citizen


def test_an_id_beyond_the_vocabulary_is_an_error_still() -> None:
    model = Model(10, tied=True, bias=True)
    pad_to_multiple(model)
    with pytest.raises(RuntimeError, match="token ids must be below the size of the vocabulary, 10"):
        model(torch.tensor([[3, 10]]))
    with pytest.raises(RuntimeError, match="token ids"):
        model.embedding(input=torch.tensor([63]))
    with pytest.raises(ValueError, match="vocabulary must be at least 1, got 0"):
        pad_to_multiple(model, vocabulary=0)


@pytest.mark.parametrize("again", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["copy", "pickle"])
def test_a_copy_is_padded_by_itself(again: Any) -> None:
    model = network("Llama", tie_word_embeddings=True)
    before = state(model)
    pad_to_multiple(model, **KINDS)
    other = again(model)
    expected = model(IDS).logits
    unpad(model)
    assert torch.equal(other(IDS).logits, expected)
    assert other.lm_head.weight.shape[0] == 128
    unpad(other)
    assert_same_bits(state(other), before)
    assert_same([other(IDS).logits], [expected])


def test_padding_again_starts_from_the_models_own_sizes() -> None:
    model = Model(10, tied=True, bias=True)
    before = state(model)
    pad_to_multiple(model, vocabulary=64)
    (record,) = pad_to_multiple(model, vocabulary=8)
    assert (record.size, record.padded, model.head.weight.shape[0]) == (10, 16, 16)
    assert_same_bits(state(model), before)


def test_compiles_with_no_graph_break() -> None:
    model = network("Llama", tie_word_embeddings=True)
    pad_to_multiple(model, **KINDS)
    expected = model(input_ids=IDS, use_cache=False).logits
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert_same([compiled(input_ids=IDS, use_cache=False).logits], [expected])


def test_a_graph_from_before_does_not_matter() -> None:
    model = Model(10, tied=True, bias=True)
    ids = torch.tensor([[1, 2, 3]])
    alive = model(ids).sum()
    alive.backward(retain_graph=True)
    pad_to_multiple(model)
    differentiated(model, ids)
    assert model.head.weight.grad.shape == (64, 12)
