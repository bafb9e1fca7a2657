"""SlabCollate gives what default_collate gives, on memory that is used again, in the main process and from workers."""

from __future__ import annotations

import copy
import gc
import io
import multiprocessing
import pickle
from collections import OrderedDict, UserDict, namedtuple
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils import _pytree
from torch.utils.data import DataLoader, Dataset, default_collate

from braze.layouts import SlabCollate
from braze.layouts.pinned import collate as collate_module
from braze.layouts.pinned import parcel, slab

Pair = namedtuple("Pair", ["first", "second"])


@pytest.fixture
def by_slab(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(collate_module, "LEAST_FIELD", 0)


def image(i: int) -> Tensor:
    return (torch.arange(5 * 4 * 3).view(5, 4, 3) + i).to(torch.uint8)


def float16s(i: int) -> Tensor:
    return torch.full((2, 3), i, dtype=torch.bfloat16)


SAMPLES: dict[str, Any] = {
    "tensor": lambda i: torch.full((3, 2), float(i)),
    "bfloat16": float16s,
    "bool": lambda i: torch.tensor([i % 2 == 0, True]),
    "complex": lambda i: torch.tensor([complex(i, 1)]),
    "scalar": lambda i: torch.tensor(i),
    "no elements": lambda i: torch.empty(0, 3),
    "array": lambda i: np.full((2, 2), i, dtype=np.int16),
    "numbers": lambda i: (i, float(i), np.float32(i)),
    "strings": lambda i: {"name": str(i), "x": torch.tensor([i])},
    "named tuple": lambda i: Pair(torch.tensor([i]), [torch.tensor([i, i]), i]),
    "user's mapping": lambda i: UserDict(a=torch.tensor([i])),
    "ordered": lambda i: OrderedDict(b=torch.tensor([i]), a=(np.ones(2) * i, i)),
    "mixed dtypes": lambda i: torch.tensor([i], dtype=torch.float32 if i % 2 else torch.int16),
    "a gradient": lambda i: torch.tensor([float(i)], requires_grad=True),
    "conjugate": lambda i: torch.tensor([complex(i, 1)]).conj(),
    "strided": lambda i: torch.arange(24).view(4, 6).t()[::2] + i,
    "permuted image": lambda i: image(i).permute(2, 0, 1),
    "permuted float image": lambda i: image(i).permute(2, 0, 1).float(),
    "one channel": lambda i: image(i)[:, :, :1].permute(2, 0, 1),
    "one pixel": lambda i: image(i)[:1, :1].permute(2, 0, 1),
}


def assert_same(ours: Any, theirs: Any) -> None:
    """Structure, types, dtypes, shapes and values."""
    (a, structure), (b, other) = _pytree.tree_flatten(ours), _pytree.tree_flatten(theirs)
    assert structure == other
    for x, y in zip(a, b, strict=True):
        assert type(x) is type(y)
        if isinstance(x, UserDict):
            assert_same(dict(x), dict(y))
        elif isinstance(x, Tensor):
            torch.testing.assert_close(x, y, rtol=0, atol=0)
            assert x.requires_grad == y.requires_grad
        else:
            assert x == y


@pytest.mark.parametrize("kind", SAMPLES)
def test_gives_what_default_collate_gives(kind: str, by_slab: None) -> None:
    collate = SlabCollate()
    for start in (0, 3, 6):  # the first without a slab
        samples = [SAMPLES[kind](start + i) for i in range(3)]
        assert_same(collate(samples), default_collate(samples))
    short = samples[:1]
    assert_same(collate(short), default_collate(short))


class Samples(Dataset):
    def __init__(self, kinds: list[str]) -> None:
        self.kinds = kinds

    def __len__(self) -> int:
        return 11

    def __getitem__(self, i: int) -> dict[str, Any]:
        return {kind: SAMPLES[kind](i) for kind in self.kinds}


def test_gives_what_default_collate_gives_from_workers() -> None:
    # torch refuses these in a worker: it sends no gradients, and stacks into memory of the first sample's kind.
    crossing = [kind for kind in SAMPLES if kind not in ("a gradient", "mixed dtypes", "conjugate")]
    loaders = [
        DataLoader(Samples(crossing), batch_size=2, num_workers=2, collate_fn=collate)
        for collate in (SlabCollate(), None)
    ]
    kept = list(zip(*loaders, strict=True))  # all at once: kept batches stay what they are
    assert len(kept) == 6
    for ours, theirs in kept:
        assert_same(ours, theirs)
    in_slabs = [
        slab.slab_of(tensor) is not None for ours, _ in kept for tensor in ours.values() if torch.is_tensor(tensor)
    ]
    assert sum(in_slabs) > len(in_slabs) / 3  # but for the first of each worker


def test_one_slab_carries_all_tensors_of_a_batch_over_and_over() -> None:
    loader = DataLoader(Samples(["tensor", "array", "numbers"]), batch_size=1, num_workers=1, collate_fn=SlabCollate())
    seen = []
    for batch in loader:
        homes = {slab.slab_of(x) for x in (batch["tensor"], batch["array"], *batch["numbers"])}
        assert len(homes) == 1
        seen += homes
        del batch
    assert seen[0] is None  # the first tells what a batch needs
    assert None not in seen[1:]
    assert len(set(seen[1:])) <= 4
    assert not any(one.lent for one in seen[1:])
    del homes, loader
    parcel.forget_ended_workers()
    assert parcel._mapped == {}


def test_a_worker_without_a_free_slab_goes_on() -> None:
    loader = DataLoader(Samples(["tensor"]), batch_size=1, num_workers=1, collate_fn=SlabCollate(slabs=2))
    kept = [batch["tensor"] for batch in loader]
    assert [int(x.max()) for x in kept] == list(range(11))
    assert sum(slab.slab_of(x) is not None for x in kept) == 2


@pytest.mark.parametrize(
    ("sample", "expected"),
    [
        (image, True),
        (lambda i: image(i).numpy(), True),
        (lambda i: image(i)[:, :, :2], False),
        (lambda i: image(i).float(), False),
    ],
    ids=["tensor", "array", "two channels", "float"],
)
def test_hwc_samples_become_channels_last(sample: Any, expected: bool, by_slab: None) -> None:
    collate = SlabCollate(hwc=True)
    for _ in range(2):
        batch = collate([sample(i) for i in range(3)])
        plain = default_collate([sample(i) for i in range(3)])
        assert torch.equal(batch, plain.permute(0, 3, 1, 2) if expected else plain)
        assert batch.is_contiguous(memory_format=torch.channels_last) or not expected


@pytest.mark.parametrize("channels", [1, 3, 4])
@pytest.mark.parametrize("pixels", [1, 5])
def test_channels_last_strides_are_true_where_any_would_count(channels: int, pixels: int, by_slab: None) -> None:
    """``is_contiguous`` and ``contiguous`` say nothing of [N, 1, H, W] and [N, C, 1, 1]; the strides do."""
    collate = SlabCollate(hwc=True)
    for _ in range(2):
        batch = collate([torch.zeros(pixels, pixels, channels, dtype=torch.uint8)] * 2)
        assert batch.stride() == (pixels * pixels * channels, 1, pixels * channels, channels)


def test_samples_of_different_shapes_are_refused_as_by_default_collate(by_slab: None) -> None:
    collate = SlabCollate()
    collate([torch.zeros(3)])
    with pytest.raises(RuntimeError, match="equal size"):
        collate([torch.zeros(3), torch.zeros(4)])
    assert not any(one.lent for one in collate.pool.slabs)


def test_small_fields_get_fresh_memory() -> None:
    collate = SlabCollate()
    assert [slab.slab_of(collate([torch.zeros(3)])) for _ in range(3)] == [None] * 3
    assert collate.pool.slabs == []


def copies_of(batch: Tensor) -> Iterator[Tensor]:
    yield batch.clone()
    yield copy.deepcopy(batch)
    yield pickle.loads(pickle.dumps(batch))
    buffer = io.BytesIO()
    torch.save(batch, buffer)
    assert len(buffer.getvalue()) < 2 * batch.nbytes + 2000  # of the batch, not of the slab
    yield torch.load(io.BytesIO(buffer.getvalue()))


def test_copies_hold_no_slab(by_slab: None) -> None:
    collate = SlabCollate()
    collate([torch.zeros(100, 100)])
    batch = collate([torch.full((10, 10), 7.0)])
    copies = list(copies_of(batch))
    shared = batch.clone().share_memory_()
    batch.share_memory_()  # what sending it to another process does: it moves
    assert not any(one.lent for one in collate.pool.slabs)
    collate([torch.zeros(100, 100)])
    assert all(torch.equal(x, torch.full((1, 10, 10), 7.0)) for x in [*copies, shared, batch])


def test_the_slab_outlives_its_pool(by_slab: None) -> None:
    collate = SlabCollate()
    collate([torch.zeros(10)])
    batch = collate([torch.full((10,), 3.0)])
    del collate
    gc.collect()
    assert torch.equal(batch, torch.full((1, 10), 3.0))


def test_a_forked_child_frees_nothing_of_its_parents() -> None:
    shared = slab.SlabPool(1, shared=True)
    leases = [shared.lend(100)]
    context = multiprocessing.get_context("fork")
    child = context.Process(target=leases.clear)
    child.start()
    child.join()
    assert child.exitcode == 0
    assert shared.slabs[0].lent
    leases.clear()
    assert not shared.slabs[0].lent


def test_a_copy_of_a_collate_has_slabs_of_its_own(by_slab: None) -> None:
    collate = SlabCollate(hwc=True, slabs=2)
    collate([torch.zeros(10)])
    collate([torch.zeros(10)])
    assert collate.pool.slabs
    twin = pickle.loads(pickle.dumps(collate))
    assert (twin.hwc, twin.slabs) == (True, 2)
    assert twin.pool.slabs == []


class Numbers(Dataset):
    def __len__(self) -> int:
        return 6

    def __getitem__(self, i: int) -> Tensor:
        return torch.full((4,), i)


def test_workers_never_start_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    """Page-locking in a forked worker breaks it (pytorch #40403)."""

    def refuse(*_: Any) -> None:
        raise AssertionError("a worker used CUDA")

    monkeypatch.setattr(torch.cuda, "_lazy_init", refuse)
    monkeypatch.setattr(torch.cuda, "cudart", refuse)
    loader = DataLoader(Numbers(), batch_size=2, num_workers=1, collate_fn=SlabCollate())
    assert [int(batch.max()) for batch in loader] == [1, 3, 5]


def test_spawned_workers(by_slab: None) -> None:
    workers = {"num_workers": 1, "multiprocessing_context": "spawn"}
    loader = DataLoader(Samples(["tensor", "strings"]), batch_size=4, collate_fn=SlabCollate(), **workers)
    assert [batch["strings"]["name"] for batch in loader] == [list("0123"), list("4567"), ["8", "9", "10"]]


def test_sizes_may_vary(by_slab: None) -> None:
    """A slab that has become too small goes when it is free; no more than three are ever there."""
    collate = SlabCollate(slabs=3)
    for length in (1, 100, 50, 1000, 10, 5000, 5001, 1):
        x = torch.full((length,), float(length))
        assert torch.equal(collate([x]), x[None])
        assert len(collate.pool.slabs) <= 3
    assert collate.pool.made < 6  # a quarter more than was asked for


def test_no_slabs_are_refused() -> None:
    with pytest.raises(ValueError, match="slabs must be at least 1, got 0"):
        SlabCollate(slabs=0)


class Growing(Dataset):
    def __len__(self) -> int:
        return 8

    def __getitem__(self, i: int) -> Tensor:
        return torch.full((10 ** (i // 2 + 2),), i)


def test_slabs_that_a_worker_gave_up_are_given_up_here() -> None:
    loader = DataLoader(Growing(), num_workers=1, persistent_workers=True, collate_fn=SlabCollate(slabs=1))
    assert [int(batch.max()) for batch in loader] == list(range(8))
    assert [len(slabs) for slabs in parcel._mapped.values()] == [1]
    loader._iterator = None  # ends the worker
    parcel.forget_ended_workers()


def test_forked_workers_have_slabs_of_their_own(by_slab: None) -> None:
    collate = SlabCollate(slabs=1)
    kept = [collate([torch.zeros(4)]) for _ in range(2)]
    loader = DataLoader(Numbers(), batch_size=2, num_workers=1, collate_fn=collate, multiprocessing_context="fork")
    assert any(slab.slab_of(batch) is not None for batch in loader)
    assert slab.slab_of(kept[1]) is not None
