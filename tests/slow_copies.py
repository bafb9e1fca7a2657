"""A device that copies when it is told to, and host memory that shows when it was freed too early."""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from unittest import mock

import torch
from torch import Tensor

from braze.layouts.pinned import collate, slab, transfer

#: What freed slabs, and targets that no copy has reached, are full of. No dataset of the tests yields it.
POISON = 0xA5


class SlowEvent:
    def __init__(self, stream: SlowStream) -> None:
        self.stream = stream
        self.ended = self.waited_for = False

    def query(self) -> bool:
        return self.ended

    def synchronize(self) -> None:
        while not self.ended:
            self.stream.advance()


class SlowStream:
    """A copy stream on CPU memory: copies are queued, and read their sources when :meth:`advance` gets to them.

    As a device does, it keeps neither sources nor targets alive: it reads whatever is then at the place of a source,
    and notes an error if a target is freed that it may still write to.
    """

    device = torch.device("cpu")

    def __init__(self) -> None:
        self.errors: list[str] = []
        self.locked = 0
        self._queue: deque[tuple[list[tuple[Callable[[], Tensor | None], Tensor]], SlowEvent]] = deque()
        self._events: dict[int, SlowEvent] = {}

    def pin(self, memory: Tensor) -> Callable[[], object]:
        self.locked += 1
        return self._unlock

    def _unlock(self) -> None:
        self.locked -= 1

    def copy(self, sources: Sequence[Tensor]) -> tuple[list[Tensor], SlowEvent]:
        event = SlowEvent(self)
        targets, copies = [], []
        for source in sources:
            target = torch.empty_like(source)
            target.untyped_storage().fill_(POISON)
            weakref.finalize(target, self._freed, event, target.data_ptr()).atexit = False
            self._events[target.data_ptr()] = event
            targets.append(target)
            copies.append((weakref.ref(target), _as_the_device_sees(source)))
        self._queue.append((copies, event))
        return targets, event

    def synchronize(self) -> None:
        while self._queue:
            self.advance()

    def wait(self, event: SlowEvent) -> None:
        event.waited_for = True

    def advance(self) -> None:
        """Carry out the copies of one batch."""
        if self._queue:
            copies, event = self._queue.popleft()
            for target, source in copies:
                alive = target()
                if alive is not None:
                    alive.copy_(source)
            event.ended = True

    def arrived(self, address: int) -> bool:
        """Whether the copy to a target that is still held has been carried out."""
        return self._events[address].ended

    @property
    def on_device(self) -> int:
        """Batches that are on the device or on their way to it."""
        return len(set(self._events.values()))

    @property
    def under_way(self) -> int:
        """Batches that are still to be copied."""
        return len(self._queue)

    def events_of(self, target: Tensor) -> list[SlowEvent]:
        """The events of the copy to a target."""
        return [self._events[target.data_ptr()]]

    def _freed(self, event: SlowEvent, address: int) -> None:
        # Memory of the consumer's stream: what that stream does with it next comes after what it was made to wait for.
        if not (event.ended or event.waited_for):
            self.errors.append("memory was freed while a copy was writing to it")
        if self._events.get(address) is event:
            del self._events[address]


def _as_the_device_sees(source: Tensor) -> Tensor:
    """The same bytes by their address, with no lease; of pageable memory what the driver has taken at once."""
    home = slab.slab_of(source)
    if home is None:
        return source.clone()
    start = source.data_ptr() - home.memory.data_ptr()
    nbytes = slab.extent(source.shape, source.stride()) * source.dtype.itemsize
    return home.memory[start : start + nbytes].view(source.dtype).as_strided(source.shape, source.stride())


def poisoning_free(freed: slab.Slab) -> None:
    freed.memory[slab.HEADER :] = POISON
    freed.memory[0] = 0


@contextmanager
def poisoned() -> Iterator[None]:
    """Freed slabs are overwritten, and tensors of any size go by slabs."""
    with (
        mock.patch.object(slab.Slab, "free", poisoning_free),
        mock.patch.object(collate, "LEAST_FIELD", 0),
        mock.patch.object(transfer, "LEAST_STAGED", 0),
    ):
        yield
