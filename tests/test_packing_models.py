"""Packed sequences in models: loss and gradients of each alone, whoever attends."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn
from torch.nn.attention.flex_attention import flex_attention

from braze.layouts import pack, unpack
from braze.layouts.packed_batch import IGNORED

from .budget import excess


def drawn(lengths: list[int], seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(1, 64, (length,), generator=generator) for length in lengths]


def model(name: str, attention: str, dtype: torch.dtype) -> nn.Module:
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        bos_token_id=None,
        eos_token_id=None,
        attn_implementation=attention,
    )
    made: nn.Module = getattr(transformers, f"{name}ForCausalLM")(config).to(dtype)
    return made


def one_by_one(network: nn.Module, sequences: list[Tensor]) -> list[Tensor]:
    """The mean loss over all predicted tokens, and its gradients, with each sequence alone in a batch.

    The models' own loss is no reference: it is in float32 whatever the model is in.
    """
    logits = [network(input_ids=s[None], use_cache=False).logits[0, :-1] for s in sequences]
    loss = F.cross_entropy(torch.cat(logits), torch.cat([s[1:] for s in sequences]))
    return [loss, *torch.autograd.grad(loss, list(network.parameters()))]


def packed(network: nn.Module, kwargs: dict[str, Any]) -> list[Tensor]:
    loss = network(**kwargs).loss
    return [loss, *torch.autograd.grad(loss, list(network.parameters()))]


SEQUENCES = drawn([9, 23, 2, 14, 30], seed=1)
LAYOUTS: dict[str, dict[str, Any]] = {"exact": {}, "rows": {"capacity": 34, "rows": 3, "max_seqlen": 30}}


def broken_positions(kwargs: dict[str, Any]) -> dict[str, Any]:
    ids = kwargs["position_ids"]
    return {**kwargs, "position_ids": torch.arange(ids.shape[1]).expand_as(ids)}


#: Each lets tokens see across boundaries, or predict across them.
MUTANTS: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
    "positions do not restart": broken_positions,
    "a cache": lambda kwargs: {**kwargs, "use_cache": True},
    "a mask of ones": lambda kwargs: {**kwargs, "attention_mask": torch.ones_like(kwargs["input_ids"])},
    "labels at boundaries": lambda kwargs: {**kwargs, "labels": kwargs["input_ids"]},
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("name", ["Llama", "Qwen3"])
def test_a_packed_batch_has_the_loss_and_gradients_of_its_sequences(name: str, attention: str, layout: str) -> None:
    networks = [model(name, attention, dtype) for dtype in (torch.float32, torch.float64)]
    plain, exact = (one_by_one(network, SEQUENCES) for network in networks)
    kwargs = pack(SEQUENCES, **LAYOUTS[layout]).transformers_kwargs()
    assert excess(packed(networks[0], kwargs), plain, exact) <= 1
    for what, mutant in MUTANTS.items():
        assert excess(packed(networks[0], mutant(kwargs)), plain, exact) > 100, what


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_mask_serves_models_that_do_not_look_at_positions(layout: str) -> None:
    networks = [model("Llama", "sdpa", dtype) for dtype in (torch.float32, torch.float64)]
    plain, exact = (one_by_one(network, SEQUENCES) for network in networks)
    batch = pack(SEQUENCES, **LAYOUTS[layout])
    kwargs = {**batch.transformers_kwargs(), "attention_mask": batch.sdpa_mask(), "use_cache": True}
    assert excess(packed(networks[0], kwargs), plain, exact) <= 1


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_no_bit_of_a_sequence_depends_on_its_neighbours(attention: str) -> None:
    """The weight of a masked token is exactly 0."""
    network = model("Llama", attention, torch.float32)
    others = [SEQUENCES[0], *drawn([23, 2], seed=5), *SEQUENCES[3:]]

    def logits(
        sequences: list[Tensor], change: Callable[[dict[str, Any]], dict[str, Any]] = lambda k: k
    ) -> list[Tensor]:
        batch = pack(sequences, capacity=90)
        return unpack(batch, network(**change(batch.transformers_kwargs())).logits)

    def same(*change: Callable[[dict[str, Any]], dict[str, Any]]) -> list[bool]:
        return list(map(torch.equal, logits(SEQUENCES, *change), logits(others, *change)))

    assert same() == [True, False, False, True, True]
    assert same(broken_positions) == [True, False, False, False, False]


def test_the_mean_over_sequences_is_that_of_a_loop() -> None:
    network = model("Llama", "sdpa", torch.float64)
    loop = torch.stack([F.cross_entropy(network(s[None]).logits[0, :-1], s[1:]) for s in SEQUENCES]).mean()
    for options in LAYOUTS.values():
        batch = pack([*SEQUENCES, torch.tensor([7])], **options)  # one token predicts nothing, and does not count
        logits = network(**batch.transformers_kwargs()).logits
        losses = F.cross_entropy(logits.flatten(0, 1), batch.shifted_labels, reduction="none")
        # Far more than float64 errs, and far less than any weight of 1/78 that is wrong.
        torch.testing.assert_close(batch.mean_over_sequences(losses), loop, rtol=torch.finfo(torch.float32).eps, atol=0)


def alone(q: Tensor, k: Tensor, v: Tensor, ends: Tensor) -> Tensor:
    """[T, heads, head_dim]: causal attention of each segment by itself."""
    pieces = zip(*(t.transpose(0, 1).split(ends.diff().tolist(), 1) for t in (q, k, v)), strict=True)
    return torch.cat([F.scaled_dot_product_attention(*own, is_causal=True) for own in pieces], 1).transpose(0, 1)


# Its plain form, which needs no compiler, evaluates the same mask; the blocks are compared above.
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile:UserWarning")
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_form_of_attention_sees_the_same_boundaries(layout: str) -> None:
    batch = pack(SEQUENCES, **LAYOUTS[layout])
    q, k, v = torch.randn(3, len(batch.tokens), 2, 16, dtype=torch.float64).unbind()
    expected = alone(q, k, v, batch.cu_seqlens)
    in_rows = [t.unflatten(0, (batch.rows, -1)).transpose(1, 2) for t in (q, k, v)]
    forms = {
        "SDPA": F.scaled_dot_product_attention(*in_rows, batch.sdpa_mask()),
        "FlexAttention": flex_attention(*in_rows, block_mask=batch.block_mask(block_size=16)),
    }
    for name, form in forms.items():
        torch.testing.assert_close(batch.flat(form.transpose(1, 2)), expected, msg=name)
    # torch 2.15's attention over jagged tensors asks for a CUDA driver, also on the CPU.
    jagged = zip(*(batch.nested(t).unbind() for t in (q, k, v)), strict=True)
    own = [alone(*component, torch.tensor([0, len(component[0])])) for component in jagged]
    torch.testing.assert_close(torch.cat(own), expected)
    assert batch.nested(q).values().data_ptr() == q.data_ptr()


def test_keyword_arguments_are_those_of_the_functions() -> None:
    import inspect

    from torch.nn.attention.varlen import varlen_attn

    batch = pack(SEQUENCES)
    bound = inspect.signature(varlen_attn).bind(None, None, None, **batch.varlen_kwargs())
    assert bound.arguments["max_q"] == 30
    assert batch.flash_kwargs() == {
        "cu_seqlens_q": batch.cu_seqlens,
        "cu_seqlens_k": batch.cu_seqlens,
        "max_seqlen_q": 30,
        "max_seqlen_k": 30,
    }
    theirs = transformers.DataCollatorWithFlattening(return_flash_attn_kwargs=True)(
        [{"input_ids": s} for s in SEQUENCES]
    )
    ours = batch.transformers_kwargs()
    for name, value in theirs.items():
        torch.testing.assert_close(ours[name], value, rtol=0, atol=0)


@pytest.mark.gpu
def test_varlen_attention_on_a_gpu() -> None:
    from torch.nn.attention.varlen import varlen_attn

    batch = pack(SEQUENCES, capacity=90).to("cuda")
    q, k, v = torch.randn(3, 90, 2, 64, dtype=torch.bfloat16, device="cuda").unbind()
    got = varlen_attn(q, k, v, **batch.varlen_kwargs(), window_size=(-1, 0))
    plain, exact = (alone(*(t.to(dtype) for t in (q, k, v)), batch.cu_seqlens) for dtype in (q.dtype, torch.float64))
    assert excess([got], [plain], [exact]) <= 1


def test_the_benchmark_predicts_the_same_tokens_both_ways() -> None:
    from braze.benchmarks import packing

    for documents in packing._batches(2):
        ways = (packing._padded(documents), packing._packed(documents))
        predicted = [labels[labels != IGNORED].sort().values for labels in (way["labels"][:, 1:] for way in ways)]
        assert torch.equal(*predicted)
        assert len(predicted[0]) == sum(len(d) - 1 for d in documents)
