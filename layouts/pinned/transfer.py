"""Batches under way to a device: from which memory each tensor is copied, and until when that memory is held."""

from __future__ import annotations

from collections import deque
from typing import Any

import torch
from torch import Tensor

from .copy_stream import CopyStream, Event
from .parcel import plain
from .report import LoaderReport
from .slab import Arena, SlabPool, aligned, dense_strides, slab_of
from .tree import map_leaves, tensors

#: Less than this is copied from pageable memory: the driver takes up to 64 KiB into its own buffer and returns.
LEAST_STAGED = 64 * 2**10


class Transfer:
    """Copies batches with a stream; at most ``depth + 1`` of them have sources that are still held.

    Args:
        stream: does the copying.
        depth: batches that are copied ahead of the one in use.
        report: where to count.
    """

    def __init__(self, stream: CopyStream, depth: int, report: LoaderReport) -> None:
        self.staging = SlabPool(depth + 2)
        self.stream, self._most, self._report = stream, depth + 1, report
        #: What the device may be reading from, until its event.
        self._under_way: deque[tuple[Event, list[Tensor]]] = deque()

    def send(self, batch: Any) -> tuple[Any, Event]:
        """The batch on the device, and the event after which it is there."""
        self._let_go()
        sources = self._sources(batch)
        targets, event = self.stream.copy([source for _, source in sources])
        self._under_way.append((event, [source for _, source in sources]))
        moved = {id(leaf): target for (leaf, _), target in zip(sources, targets, strict=True)}
        return map_leaves(batch, lambda leaf: moved[id(leaf)] if id(leaf) in moved else self._itself(leaf)), event

    def finish(self) -> None:
        """Wait, on the host, until nothing is under way, be it a copy that an interrupt kept from being noted."""
        self.stream.synchronize()
        self._under_way.clear()

    def _let_go(self) -> None:
        """Let go of sources that the device has read: only the host's knowledge makes them safe to write to."""
        while self._under_way and self._under_way[0][0].query():
            self._under_way.popleft()
        while len(self._under_way) >= self._most:
            event, _ = self._under_way.popleft()
            event.synchronize()

    def _sources(self, batch: Any) -> list[tuple[Tensor, Tensor]]:
        """For each plain tensor, once, the memory that it is copied from."""
        leaves = list({id(leaf): leaf for leaf in tensors(batch) if type(leaf) is Tensor and plain(leaf)}.values())
        ways = {id(leaf): self._way(leaf) for leaf in leaves}
        staged = sum(aligned(leaf.nbytes) for leaf in leaves if ways[id(leaf)] == "staged")
        arena = self._arena(staged)
        found = []
        for leaf in leaves:
            way, source = ways[id(leaf)], leaf
            if way == "staged":
                taken = arena.take(leaf.shape, dense_strides(leaf), leaf.dtype)
                way, source = ("direct", leaf) if taken is None else ("staged", taken.copy_(leaf))
            self._count(way, leaf.nbytes)
            found.append((leaf, source))
        return found

    def _itself(self, leaf: Any) -> Any:
        """A subclass, a sparse tensor, an object of the user's: it knows how to move; the host waits for it."""
        moved = leaf.to(self.stream.device)
        known = isinstance(leaf, Tensor) and leaf.layout == torch.strided
        self._count("present" if moved is leaf else "blocking", leaf.nbytes if known else 0)
        return moved

    def _count(self, way: str, nbytes: int) -> None:
        self._report.tensors[way] += 1
        self._report.nbytes[way] += nbytes

    def _way(self, leaf: Tensor) -> str:
        if leaf.stride() == dense_strides(leaf):
            slab = slab_of(leaf)
            if slab is not None and slab.pin(self.stream.pin):
                return "slab"
            if leaf.is_pinned():
                return "pinned"
        return "staged" if leaf.nbytes >= LEAST_STAGED else "direct"

    def _arena(self, nbytes: int) -> Arena:
        if not nbytes:
            return Arena(None)
        lease = self.staging.lend(nbytes)
        if lease is not None and not lease.slab.pin(self.stream.pin):
            lease = None
        return Arena(lease)
