"""An epoch that is left in the middle goes on from there: exactly the batches that were not had."""

from __future__ import annotations

import io
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler, IterableDataset
from torchdata.stateful_dataloader import StatefulDataLoader

from braze.layouts import PinnedLoader, SlabCollate

from .slow_copies import SlowStream

# torchdata 0.11's loader, when it is made under torch 2.15.
pytestmark = pytest.mark.filterwarnings("ignore:.*set_vital.*:UserWarning")


class Squares(Dataset):
    def __len__(self) -> int:
        return 11

    def __getitem__(self, i: int) -> Tensor:
        return torch.tensor([i, i * i])


class Countdown(IterableDataset):
    """A stream that does not say how long it is."""

    def __iter__(self) -> Iterator[Tensor]:
        yield from (torch.tensor([i]) for i in range(7, 0, -1))


def through_a_file(state: Any) -> Any:
    file = io.BytesIO()
    torch.save(state, file)
    return torch.load(io.BytesIO(file.getvalue()), weights_only=False)


def make(kind: type, depth: int, workers: int = 0, seed: int = 0, **options: Any) -> PinnedLoader:
    torch.manual_seed(seed)
    options.setdefault("dataset", Squares())
    options.setdefault("shuffle", not isinstance(options["dataset"], IterableDataset))
    source = kind(batch_size=2, num_workers=workers, collate_fn=SlabCollate(), **options)
    return PinnedLoader(source, device=EagerStream(), depth=depth)


class EagerStream(SlowStream):
    """Its copies end when the consumer is made to wait for them, so that batches can be looked at at once."""

    def wait(self, event: Any) -> None:
        super().wait(event)
        event.synchronize()


def states_along_the_way(loader: PinnedLoader) -> tuple[list[Any], list[Any]]:
    """An epoch, with the state before each batch and after the last."""
    batches, states = [], []
    iterator = iter(loader)
    while True:
        states.append(through_a_file(loader.state_dict()))
        try:
            batches.append(next(iterator).tolist())
        except StopIteration:
            return batches, states


@pytest.mark.parametrize("kind", [DataLoader, StatefulDataLoader])
@pytest.mark.parametrize("depth", range(5))
def test_resumes_at_every_batch(kind: type, depth: int) -> None:
    batches, states = states_along_the_way(make(kind, depth))
    assert len(batches) == 6
    assert sorted(row[0] for batch in batches for row in batch) == list(range(11))
    for had, state in enumerate(states):
        resumed = make(kind, depth, seed=had + 1)  # other random numbers: the order comes from the state
        resumed.load_state_dict(state)
        assert [batch.tolist() for batch in resumed] == batches[had:]


@pytest.mark.parametrize("kind", [DataLoader, StatefulDataLoader])
@pytest.mark.parametrize("depth", range(5))
def test_resumes_at_every_batch_with_workers(kind: type, depth: int) -> None:
    batches, states = states_along_the_way(make(kind, depth, workers=2))
    for had, state in enumerate(states):
        resumed = make(kind, depth, workers=2, seed=had + 1)
        resumed.load_state_dict(state)
        assert [batch.tolist() for batch in resumed] == batches[had:]


@pytest.mark.parametrize("kind", [DataLoader, StatefulDataLoader])
def test_a_stream_without_length_resumes(kind: type) -> None:
    batches, states = states_along_the_way(make(kind, 2, dataset=Countdown()))
    assert batches == [[[7], [6]], [[5], [4]], [[3], [2]], [[1]]]
    for had, state in enumerate(states):
        resumed = make(kind, 2, dataset=Countdown())
        resumed.load_state_dict(state)
        assert [batch.tolist() for batch in resumed] == batches[had:]


@pytest.mark.parametrize("kind", [DataLoader, StatefulDataLoader])
def test_the_epoch_after_a_resumed_one_is_whole(kind: type) -> None:
    loader = make(kind, 3)
    iterator = iter(loader)
    had = [next(iterator).tolist() for _ in range(2)]
    state = loader.state_dict()
    resumed = make(kind, 3, seed=1)
    resumed.load_state_dict(state)
    rest = [batch.tolist() for batch in resumed]
    assert sorted(row[0] for batch in had + rest for row in batch) == list(range(11))
    assert sorted(row[0] for batch in resumed for row in batch.tolist()) == list(range(11))


@pytest.mark.parametrize("depth", [0, 2])
def test_leaving_the_loop_keeps_the_place(depth: int) -> None:
    loader = make(DataLoader, depth)
    for _, batch in zip(range(2), loader, strict=False):
        last = batch.tolist()
    state = loader.state_dict()
    whole = make(DataLoader, depth)
    whole.load_state_dict({**state, "batches": 0})
    batches = [batch.tolist() for batch in whole]
    at = batches.index(last)
    resumed = make(DataLoader, depth, seed=5)
    resumed.load_state_dict(state)
    assert [batch.tolist() for batch in resumed] == batches[at + 1 :]


def test_a_state_of_a_stateful_loader_is_its_own() -> None:
    """It can be loaded without the wrapper, and the other way round."""
    loader = make(StatefulDataLoader, 3)
    iterator = iter(loader)
    next(iterator)
    bare = StatefulDataLoader(Squares(), batch_size=2, shuffle=True)
    bare.load_state_dict(loader.state_dict())
    assert [batch.tolist() for batch in bare] == [batch.tolist() for batch in iterator]


def test_a_generator_of_the_loader_is_part_of_the_state() -> None:
    loader = make(DataLoader, 2, generator=torch.Generator().manual_seed(3))
    batches, states = states_along_the_way(loader)
    resumed = make(DataLoader, 2, generator=torch.Generator().manual_seed(4))
    resumed.load_state_dict(states[2])
    assert [batch.tolist() for batch in resumed] == batches[2:]


def test_resuming_leaves_the_callers_random_numbers_alone() -> None:
    _, states = states_along_the_way(make(DataLoader, 2))
    resumed = make(DataLoader, 2, seed=8)
    resumed.load_state_dict(states[2])
    expected = torch.Generator().manual_seed(8)
    list(resumed)
    assert torch.equal(torch.rand(3), torch.rand(3, generator=expected))


def test_a_state_of_something_else_is_refused() -> None:
    loader = make(DataLoader, 2)
    with pytest.raises(ValueError, match=r"must have the keys batches and generators, got \['epoch'\]"):
        loader.load_state_dict({"epoch": 1})
    other = make(DataLoader, 2, generator=torch.Generator())
    next(iter(other))
    with pytest.raises(ValueError, match="2 random generators, this one has 1"):
        loader.load_state_dict(other.state_dict())


@pytest.mark.parametrize("kind", [DataLoader, StatefulDataLoader])
def test_set_epoch_reaches_a_distributed_sampler(kind: type) -> None:
    def epoch(number: int, rank: int) -> list[int]:
        sampler = DistributedSampler(Squares(), num_replicas=2, rank=rank, shuffle=True)
        loader = make(kind, 2, sampler=sampler, shuffle=None)
        loader.set_epoch(number)
        assert sampler.epoch == number
        return [row[0] for batch in loader for row in batch.tolist()]

    assert set(epoch(3, 0)) | set(epoch(3, 1)) == set(range(11))
    assert epoch(3, 0) == epoch(3, 0) != epoch(4, 0)


def test_set_epoch_reaches_datasets_and_batch_samplers_and_each_once() -> None:
    class Epochs(list):  # type: ignore[type-arg]
        def set_epoch(self, epoch: int) -> None:
            self.seen = [*getattr(self, "seen", []), epoch]

    batches, dataset = Epochs([[0], [1]]), Epochs([torch.zeros(1), torch.ones(1)])
    PinnedLoader(DataLoader(dataset, batch_sampler=batches), device="cpu").set_epoch(4)
    assert batches.seen == dataset.seen == [4]


def test_a_state_does_not_move_on_with_its_loader() -> None:
    class Tape:
        """Its state is the very dictionary that it changes."""

        def __init__(self) -> None:
            self.place = {"at": 0}

        def __iter__(self) -> Iterator[Tensor]:
            while self.place["at"] < 6:
                self.place["at"] += 1
                yield torch.tensor([self.place["at"]])

        def state_dict(self) -> dict[str, int]:
            return self.place

        def load_state_dict(self, state: dict[str, int]) -> None:
            self.place = dict(state)

    loader = PinnedLoader(Tape(), device=EagerStream(), depth=2)
    iterator = iter(loader)
    next(iterator)
    assert loader.state_dict() == {"at": 1}
