"""Producing, copying, keeping, dropping in any order: no batch changes, no slab leaks, memory is bounded."""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any
from unittest import mock

import hypothesis
import numpy as np
import pytest
import torch
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchdata.stateful_dataloader import StatefulDataLoader

from braze.layouts import PinnedLoader, SlabCollate
from braze.layouts.pinned import slab, transfer

from .slow_copies import POISON, SlowStream, poisoned

# torchdata 0.11's loader, when it is made under torch 2.15.
pytestmark = pytest.mark.filterwarnings("ignore:.*set_vital.*:UserWarning")
SETTINGS = hypothesis.settings(max_examples=4 * hypothesis.settings().max_examples, stateful_step_count=50)
#: The ways of holding on to a tensor without a copy of it.
HOLDS: dict[str, Callable[[Tensor], Any]] = {
    "itself": lambda x: x,
    "a view": lambda x: x.view(-1),
    "a slice": lambda x: x[-1:],
    "detached": lambda x: x.detach(),
    "numpy": lambda x: x.numpy(),
    "a row of numpy": lambda x: memoryview(x.numpy()[1]),
    "dlpack": lambda x: torch.from_dlpack(x),
    "a storage": lambda x: x.untyped_storage(),
    "saved for backward": lambda x: x * torch.ones((), requires_grad=True),
}


def values(held: Any) -> set[int]:
    """The distinct numbers in what somebody holds."""
    if isinstance(held, torch.UntypedStorage):
        held = torch.empty(0).set_(held)
    if isinstance(held, Tensor) and held.grad_fn is not None:
        held = held.grad_fn._saved_self
    return set(np.unique(np.asarray(held)).astype(int).tolist())


class OnTheHost(RuleBasedStateMachine):
    """Batches of a SlabCollate, held in every way, let go of in any thread."""

    SLABS = 3

    def __init__(self) -> None:
        super().__init__()
        self.context = ExitStack()
        self.context.enter_context(poisoned())
        gc.freeze()  # a collection takes 0.2 s with what torch has imported, and no time without
        self.context.callback(gc.unfreeze)
        self.collate = SlabCollate(slabs=self.SLABS)
        self.held: list[tuple[Any, set[int]]] = []
        self.made = self.forgotten = 0

    @rule(length=st.integers(1, 9), way=st.sampled_from(sorted(HOLDS)))
    def produce(self, length: int, way: str) -> None:
        first = self.made = self.made + 2
        batch = self.collate([torch.full((length,), float(first + i)) for i in range(2)])
        held = HOLDS[way](batch)
        kept = {first + 1} if way in ("a slice", "a row of numpy") else {first, first + 1}
        self.held.append((held, kept))

    @precondition(lambda self: self.held)
    @rule(data=st.data(), thread=st.booleans())
    def drop(self, data: st.DataObject, thread: bool) -> None:
        gone = [self.held.pop(data.draw(st.integers(0, len(self.held) - 1)))]
        if thread:
            dropping = threading.Thread(target=gone.clear)
            dropping.start()
            dropping.join()

    @precondition(lambda self: self.held)
    @rule()
    def forget_in_a_cycle(self) -> None:
        cycle: list[Any] = [self.held.pop()]
        cycle.append(cycle)
        self.forgotten += 1

    @rule()
    def collect(self) -> None:
        gc.collect()
        self.forgotten = 0

    @invariant()
    def nothing_changes(self) -> None:
        for held, expected in self.held:
            assert values(held) == expected

    @invariant()
    def slabs_are_bounded(self) -> None:
        slabs = self.collate.pool.slabs
        assert len(slabs) <= self.SLABS
        assert sum(one.lent for one in slabs) <= len(self.held) + self.forgotten

    def teardown(self) -> None:
        self.held.clear()
        gc.collect()
        self.context.close()
        assert not any(one.lent for one in self.collate.pool.slabs)


class Numbered(Dataset):
    """Sample i is full of i + 1; the samples of a batch of two have the same length."""

    def __init__(self, lengths: list[int]) -> None:
        self.lengths = lengths

    def __len__(self) -> int:
        return 2 * len(self.lengths)

    def __getitem__(self, i: int) -> Tensor:
        return torch.full((self.lengths[i // 2],), float(i + 1))


class OnADevice(RuleBasedStateMachine):
    """A PinnedLoader over a device that copies when it likes to."""

    def __init__(self) -> None:
        super().__init__()
        self.context = ExitStack()
        self.context.enter_context(poisoned())
        self.stream = SlowStream()
        #: A target, or a view of it; the address of the target; its numbers.
        self.held: list[tuple[Tensor, int, set[int]]] = []

    @initialize(
        depth=st.integers(0, 4),
        slabs=st.one_of(st.none(), st.integers(1, 4)),
        lengths=st.lists(st.integers(1, 9), min_size=1, max_size=8),
        stateful=st.booleans(),
    )
    def make(self, depth: int, slabs: int | None, lengths: list[int], stateful: bool) -> None:
        self.depth, self.batches = depth, len(lengths)
        self.slabs = slabs
        self.collate = None if slabs is None else SlabCollate(slabs=slabs)
        self.source = (StatefulDataLoader if stateful else DataLoader)(
            Numbered(lengths), batch_size=2, collate_fn=self.collate
        )
        self.begin()

    def begin(self, state: Any = None, at: int = 0) -> None:
        self.loader = PinnedLoader(self.source, device=self.stream, depth=self.depth)
        if state is not None:
            self.loader.load_state_dict(state)
        self.iterator, self.at = iter(self.loader), at

    @rule(view=st.sampled_from(["itself", "a view", "a slice"]))
    def step(self, view: str) -> None:
        try:
            batch = next(self.iterator)
        except StopIteration:
            assert self.at == self.batches
            self.iterator, self.at = iter(self.loader), 0
            return
        numbers = {2 * self.at + 1, 2 * self.at + 2}
        self.at += 1
        self.held.append((HOLDS[view](batch), batch.data_ptr(), {max(numbers)} if view == "a slice" else numbers))

    @rule()
    def advance(self) -> None:
        self.stream.advance()

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def drop(self, data: st.DataObject) -> None:
        self.held.pop(data.draw(st.integers(0, len(self.held) - 1)))

    @rule()
    def leave(self) -> None:
        self.iterator.close()
        self.iterator, self.at = iter(self.loader), 0

    @rule()
    def resume(self) -> None:
        state, at = self.loader.state_dict(), self.at
        self.iterator.close()
        self.begin(state, at)

    @invariant()
    def what_has_arrived_is_right_and_stays(self) -> None:
        for held, target, numbers in self.held:
            if self.stream.arrived(target):
                assert values(held) == numbers
        assert self.stream.errors == []

    @invariant()
    def memory_is_bounded(self) -> None:
        if hasattr(self, "loader"):
            assert self.stream.on_device <= self.depth + len(self.held)
            assert len(self.staged()) <= self.depth + 2
            assert self.collate is None or len(self.collate.pool.slabs) <= self.slabs

    def staged(self) -> list[slab.Slab]:
        return [] if self.loader._transfer is None else self.loader._transfer.staging.slabs

    def teardown(self) -> None:
        with self.context:
            if hasattr(self, "loader"):
                self.leave_nothing()

    def leave_nothing(self) -> None:
        self.iterator.close()
        slabs = self.staged() + ([] if self.collate is None else self.collate.pool.slabs)
        self.held.clear()
        assert not any(one.lent for one in slabs)
        assert self.stream.errors == []
        assert self.stream.locked == sum(one._pinned is True for one in slabs)


TestOnTheHost = OnTheHost.TestCase
TestOnADevice = OnADevice.TestCase
TestOnTheHost.settings = TestOnADevice.settings = SETTINGS


def no_waiting_for_events(self: transfer.Transfer) -> None:
    self._under_way.clear()


def lent_twice(self: slab.Slab) -> slab.Lease:
    return slab.Lease(self)


def never_given_back(freed: slab.Slab) -> None:
    freed.memory[slab.HEADER :] = POISON


def array_that_holds_no_lease(self: slab.Lease) -> np.ndarray:
    return self.slab.memory.numpy()[slab.HEADER :]


BUGS: dict[str, tuple[type[RuleBasedStateMachine], Any, str, Any]] = {
    "a slab is used again before its event": (OnADevice, transfer.Transfer, "_let_go", no_waiting_for_events),
    "leaving does not wait for copies": (OnADevice, transfer.Transfer, "finish", lambda self: None),
    "a slab is lent twice": (OnTheHost, slab.Slab, "lend", lent_twice),
    "a slab is free while a tensor is on it": (OnTheHost, slab.Lease, "array", array_that_holds_no_lease),
    "a slab is not given back": (OnTheHost, slab.Slab, "free", never_given_back),
}


@pytest.mark.parametrize("bug", BUGS)
def test_a_planted_bug_is_found(bug: str) -> None:
    machine, owner, name, wrong = BUGS[bug]

    class Broken(machine):  # type: ignore[misc,valid-type]
        def __init__(self) -> None:
            super().__init__()
            self.context.enter_context(mock.patch.object(owner, name, wrong))

    quick = hypothesis.settings(SETTINGS, phases=[hypothesis.Phase.generate], report_multiple_bugs=False)
    with pytest.raises(AssertionError):
        run_state_machine_as_test(Broken, settings=quick)
