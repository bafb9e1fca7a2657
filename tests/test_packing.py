"""Packed sequences: where they lie, what is refused, and shapes that stay."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask
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
