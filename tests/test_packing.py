"""Packed sequences: the same numbers as one by one, whoever attends, and shapes that stay."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from torch.utils import _pytree as pytree
from torch.utils.data import DataLoader

from braze.layouts import PackCollate, PackedBatch, first_fit_decreasing, pack, unpack
from braze.layouts.packed_batch import FILLER, IGNORED

LENGTHS = st.lists(st.integers(0, 40), min_size=1, max_size=12)


def drawn(lengths: list[int], seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(1, 64, (length,), generator=generator) for length in lengths]


def same_pairs(batch: PackedBatch, causal: bool) -> Tensor:
    """[rows, capacity, capacity]: who may attend to whom, token by token in plain Python."""
    owner = [segment for segment, length in enumerate(batch.lengths) for _ in range(length)]
    capacity = len(owner) // batch.rows
    rows = [owner[row * capacity : (row + 1) * capacity] for row in range(batch.rows)]
    pairs = [
        [[q == k and (j <= i or not causal) for j, k in enumerate(row)] for i, q in enumerate(row)] for row in rows
    ]
    return torch.tensor(pairs).view(batch.rows, capacity, capacity)


# ------------------------------------------------------------------------------ bins


def plain_first_fit(lengths: list[int], budget: int, most: int | None) -> list[list[int]]:
    bins: list[list[int]] = []
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        for own in bins:
            if sum(lengths[j] for j in own) + lengths[i] <= budget and len(own) != most:
                own.append(i)
                break
        else:
            bins.append([i])
    return bins


@given(LENGTHS, st.integers(40, 100), st.sampled_from([None, 1, 2, 3]))
def test_bins_are_those_of_first_fit_decreasing(lengths: list[int], budget: int, most: int | None) -> None:
    assert first_fit_decreasing(lengths, budget, max_sequences=most) == plain_first_fit(lengths, budget, most)


@given(LENGTHS, st.integers(40, 60), st.data())
def test_some_of_the_bins_packed_again_are_those_bins(lengths: list[int], budget: int, data: st.DataObject) -> None:
    """So a batch made of whole bins always fits into as many rows."""
    bins = first_fit_decreasing(lengths, budget)
    chosen = [own for own in bins if data.draw(st.booleans())]
    together = sorted(i for own in chosen for i in own)
    again = first_fit_decreasing([lengths[i] for i in together], budget)
    assert [[together[i] for i in own] for own in again] == chosen


def test_a_sequence_over_the_budget_is_named() -> None:
    with pytest.raises(ValueError, match="got 9 tokens in sequence 1, budget=8"):
        first_fit_decreasing([3, 9], 8)
    with pytest.raises(ValueError, match="at least 1"):
        first_fit_decreasing([3], 8, max_sequences=0)


# ------------------------------------------------------------------------------ pack and unpack


@given(
    LENGTHS, st.sampled_from(["exact", "one row", "rows", "short filler"]), st.sampled_from(["tensor", "array", "list"])
)
def test_unpack_is_the_inverse_of_pack(lengths: list[int], layout: str, kind: str) -> None:
    sequences = drawn(lengths)
    options: dict[str, Any] = {
        "exact": {},
        "one row": {"capacity": sum(lengths) + 3},
        "rows": {"capacity": 40, "rows": len(lengths), "max_sequences": 12},
        "short filler": {"capacity": 60, "rows": len(lengths), "max_seqlen": 41},
    }[layout]
    convert: Callable[[Tensor], Any] = {
        "tensor": lambda t: t.to(torch.int32),
        "array": lambda t: t.numpy().astype(np.uint16),
        "list": Tensor.tolist,
    }[kind]
    batch = pack([convert(t) for t in sequences], fill=63, **options)

    assert all(map(torch.equal, unpack(batch), sequences))
    assert len(unpack(batch)) == batch.num_sequences == len(sequences)
    assert batch.num_tokens == sum(lengths)
    if layout in ("exact", "one row"):
        assert torch.equal(batch.tokens[: sum(lengths)], torch.cat(sequences))
    assert len(batch.tokens) == options.get("rows", 1) * options.get("capacity", sum(lengths))

    ends = batch.cu_seqlens.tolist()
    assert batch.cu_seqlens.dtype == torch.int32
    assert ends[: len(batch.lengths) + 1] == np.cumsum([0, *batch.lengths]).tolist()
    assert set(ends[len(batch.lengths) :]) == {len(batch.tokens)}
    assert max(batch.lengths) <= batch.max_seqlen
    assert type(batch.max_seqlen) is int

    start = 0
    for length, number in zip(batch.lengths, batch.sequences, strict=True):
        own = slice(start, start + length)
        assert batch.position_ids[own].tolist() == list(range(length))
        expected = [IGNORED] * length if number == FILLER else [IGNORED, *sequences[number].tolist()[1:]][:length]
        assert batch.labels[own].tolist() == expected
        if number == FILLER:
            assert batch.tokens[own].eq(63).all()
        if "capacity" in options:
            assert not length or start // options["capacity"] == (start + length - 1) // options["capacity"]
        start += length


@given(
    st.lists(st.integers(0, 40), min_size=1, max_size=5),
    st.booleans(),
    st.sampled_from([1, 3]),
    st.sampled_from([4, 16]),
)
def test_masks_are_those_of_a_loop(lengths: list[int], causal: bool, rows: int, block: int) -> None:
    capacity = 37 * len(lengths) + 40  # a multiple of no block
    batch = pack(drawn(lengths), capacity=capacity, rows=rows, max_seqlen=41)
    pairs = same_pairs(batch, causal)
    assert torch.equal(batch.sdpa_mask(causal=causal)[:, 0], pairs)
    ids = batch.sequence_ids.view(rows, -1)

    def mask(b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
        return (ids[b, q] == ids[b, kv]) & ((q >= kv) | (not causal))

    expected = create_block_mask(mask, rows, 1, capacity, capacity, device="cpu", BLOCK_SIZE=block)
    made = batch.block_mask(causal=causal, block_size=block)
    for name in ("kv_num_blocks", "full_kv_num_blocks", "q_num_blocks", "full_q_num_blocks", "kv_indices", "q_indices"):
        assert torch.equal(getattr(made, name), getattr(expected, name)), name
    assert made.shape == expected.shape
    assert torch.equal(made.to_dense(), expected.to_dense())


def test_labels_given_stay_and_may_belong_to_their_own_tokens() -> None:
    sequences, labels = [[1, 2, 3], [4, 5]], [[IGNORED, 7, 8], [9, 10]]
    assert pack(sequences, labels, capacity=6).labels.tolist() == [IGNORED, 7, 8, IGNORED, 10, IGNORED]
    assert pack(sequences, labels, mask_boundaries=False).labels.tolist() == [IGNORED, 7, 8, 9, 10]
    assert pack(sequences).shifted_labels.tolist() == [2, 3, IGNORED, 5, IGNORED]


@pytest.mark.parametrize("as_array", [False, True])
def test_features_are_packed_too(as_array: bool) -> None:
    features = [torch.randn(n, 3, 2) for n in (4, 0, 2)]
    batch = pack([t.numpy() for t in features] if as_array else features, capacity=8, fill=5)
    assert batch.labels is None
    assert batch.tokens.dtype == torch.float32
    assert all(map(torch.equal, unpack(batch), features))
    assert batch.tokens[6:].eq(5).all()
    assert batch.transformers_kwargs().keys() >= {"inputs_embeds", "position_ids"}
    with pytest.raises(ValueError, match="no labels"):
        batch.shifted_labels  # noqa: B018 (the property raises)


def test_out_is_overwritten_where_it_is() -> None:
    collate = PackCollate(capacity=32, rows=2, max_sequences=6, max_seqlen=32)
    first = collate(drawn([5, 20, 30]))
    expected = collate(drawn([12, 3, 9, 31], seed=1))
    second = collate(drawn([12, 3, 9, 31], seed=1), out=first)
    for name in ("tokens", "labels", "position_ids", "cu_seqlens"):
        assert getattr(second, name) is getattr(first, name)
        assert torch.equal(getattr(second, name), getattr(expected, name))
    assert second.lengths == expected.lengths
    with pytest.raises(ValueError, match=r"out.tokens must be \[30\] of torch.int64, got \[64\]"):
        pack(drawn([30]), out=first)


@pytest.mark.parametrize(
    ("error", "message", "arguments", "options"),
    [
        (ValueError, "at least one sequence", ([],), {}),
        (ValueError, "several rows need a capacity", ([[1]],), {"rows": 2}),
        (ValueError, "must fit into rows=1 of capacity=4, got 6 tokens", ([[1, 2, 3], [4, 5, 6]],), {"capacity": 4}),
        (ValueError, "must fit into rows=2 of capacity=3", ([[1, 2], [3, 4], [5, 6]],), {"capacity": 3, "rows": 2}),
        (ValueError, "at most 1 of 3", ([[1, 2], [3]],), {"max_sequences": 1, "max_seqlen": 3}),
        (ValueError, "at most 2 of 1", ([[1, 2], [3]],), {"max_seqlen": 1}),
        (ValueError, "2 sequences and 1 of labels", ([[1, 2], [3]], [[1, 2]]), {}),
        (ValueError, "2 tokens and 1 labels in sequence 0", ([[1, 2]], [[1]]), {}),
        (TypeError, "all tensors, all NumPy arrays or all lists, got Tensor and list", ([torch.ones(2), [1]],), {}),
        (TypeError, "sequences must be integers, got torch.float32", ([torch.ones(2)],), {}),
        (TypeError, "sequences must be integers, got float64", ([np.ones(2)],), {}),
        (TypeError, "integer", ([[1.5]],), {}),
        (ValueError, "sequences must be on the CPU", ([torch.ones(2, device="meta")],), {}),
    ],
)
def test_what_does_not_fit_is_named(error: type, message: str, arguments: Any, options: dict[str, Any]) -> None:
    with pytest.raises(error, match=message):
        pack(*arguments, **options)


def test_values_of_another_number_are_refused() -> None:
    batch = pack([[1, 2, 3]], capacity=4)
    with pytest.raises(ValueError, match=r"values must be \[4, ...\] or \[1, 4, ...\].* got \[3, 2\]"):
        unpack(batch, torch.ones(3, 2))


# ------------------------------------------------------------------------------ a good citizen


def test_is_a_pytree_whose_leaves_are_tensors() -> None:
    batch = pack(drawn([3, 4]), capacity=8)
    leaves, spec = pytree.tree_flatten(batch)
    assert all(isinstance(leaf, Tensor) for leaf in leaves)
    again = pytree.tree_unflatten([leaf + 1 for leaf in leaves], spec)
    assert torch.equal(again.tokens, batch.tokens + 1)
    assert (again.lengths, again.max_seqlen) == (batch.lengths, batch.max_seqlen)
    paths = [pytree.keystr(path) for path, _ in pytree.tree_flatten_with_path(batch)[0]]
    assert paths == [".tokens", ".labels", ".position_ids", ".cu_seqlens"]


def test_pickles_copies_and_moves() -> None:
    batch = pack(drawn([3, 4]), capacity=8)
    for again in (pickle.loads(pickle.dumps(batch)), copy.deepcopy(batch), batch.to("cpu", non_blocking=True)):
        assert torch.equal(again.tokens, batch.tokens)
        assert vars(again).keys() == vars(batch).keys()
    assert batch.to("meta").cu_seqlens.is_meta
    features = pack([torch.ones(2, 3)])  # no labels
    assert features.to("meta").labels is None


def test_lightning_moves_and_converts_it() -> None:
    from lightning.fabric.utilities.apply_func import move_data_to_device
    from lightning_utilities.core.apply_func import apply_to_collection

    batch = pack([torch.ones(2, 3), torch.ones(1, 3)])
    assert move_data_to_device(batch, torch.device("meta")).tokens.is_meta
    half = apply_to_collection(batch, dtype=Tensor, function=lambda t: t.half() if t.is_floating_point() else t)
    assert half.tokens.dtype == torch.float16
    assert half.lengths == (2, 1)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_loader_packs_bins(workers: int) -> None:
    sequences = drawn([7, 3, 12, 9, 4, 8, 1])
    bins = first_fit_decreasing([len(s) for s in sequences], 16)
    loader = DataLoader(
        [{"input_ids": s, "labels": -s} for s in sequences],  # type: ignore[arg-type]
        batch_sampler=bins,
        collate_fn=PackCollate(capacity=16, max_sequences=4),
        num_workers=workers,
    )
    seen = dict(zip((i for own in bins for i in own), (s for batch in loader for s in unpack(batch)), strict=True))
    assert all(torch.equal(seen[i], s) for i, s in enumerate(sequences))
    batches = list(loader)
    assert len({(b.tokens.shape, b.cu_seqlens.shape, b.max_seqlen) for b in batches}) == 1
    assert all(torch.equal(b.labels[b.labels != IGNORED], -b.tokens[b.labels != IGNORED]) for b in batches)
    if workers:
        assert all(t.is_shared() for t in pytree.tree_leaves(batches[0]))


def test_a_fixed_capacity_compiles_once() -> None:
    compiled = []

    def backend(graph: Any, inputs: Any) -> Any:
        compiled.append(graph)
        return graph.forward

    @torch.compile(backend=backend, fullgraph=True, dynamic=False)
    def attended(batch: PackedBatch, x: Tensor) -> Tensor:
        kwargs = batch.transformers_kwargs()
        mask = batch.sdpa_mask()
        return F.scaled_dot_product_attention(x, x, x, mask).sum() * kwargs["max_length_q"] + kwargs["labels"].sum()

    collate, x = PackCollate(capacity=32, rows=2, max_sequences=6), torch.randn(2, 1, 32, 8)
    for lengths in ([5, 20, 30], [1], [16, 16, 16, 16, 0], [3, 4, 5, 6, 7, 8]):
        batch = collate(drawn(lengths))
        expected = F.scaled_dot_product_attention(x, x, x, batch.sdpa_mask()).sum() * 32 + batch.labels.sum()
        torch.testing.assert_close(attended(batch, x), expected)
    assert len(compiled) == 1


# ------------------------------------------------------------------------------ the same numbers


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


def excess(results: list[Tensor], plain: list[Tensor], exact: list[Tensor]) -> float:
    """The worst error as a multiple of its budget: twice the plain form's own, plus a rounding step of the largest."""
    ratios = []
    for mine, theirs, truth in zip(results, plain, exact, strict=True):
        step = torch.finfo(mine.dtype).eps * truth.abs().max()
        budget = 2 * ((theirs.double() - truth).abs().max() + step)
        ratios.append(((mine.double() - truth).abs().max() / budget).item())
    return max(ratios)


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
    # Weighted means of values of size 1: float32 sums rounded to bfloat16 once, and weights rounded before.
    torch.testing.assert_close(got, alone(q, k, v, batch.cu_seqlens), rtol=0, atol=4 * torch.finfo(torch.bfloat16).eps)


def test_the_benchmark_predicts_the_same_tokens_both_ways() -> None:
    from braze.benchmarks import packing

    for documents in packing._batches(2):
        ways = (packing._padded(documents), packing._packed(documents))
        predicted = [labels[labels != IGNORED].sort().values for labels in (way["labels"][:, 1:] for way in ways)]
        assert torch.equal(*predicted)
        assert len(predicted[0]) == sum(len(d) - 1 for d in documents)
