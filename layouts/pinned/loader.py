"""``PinnedLoader``: batches of any loader on the device ahead of time, from memory that is used again."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import torch

from .collate import SlabCollate
from .copy_stream import CopyStream, Event, copy_stream
from .parcel import forget_ended_workers
from .report import LoaderReport
from .resume import State, course
from .transfer import Transfer


class PinnedLoader:
    """Iterates over ``loader`` and yields its batches on ``device``, the next ``depth`` of them being copied meanwhile.

    Batches keep their type: mappings, tuples, named tuples, lists, dataclasses, and objects that have ``.to``. They
    may be kept for as long as one likes. On the CPU they are passed on as they come. There are no threads: batches
    are fetched and their copies started while the loop asks for the one before, so that leaving the loop, by
    whatever way, leaves nothing behind.

    Tensors are copied from where they lie if that is page-locked: slabs of :class:`SlabCollate` become so, and
    ``pin_memory=True`` gives the like. Others are first copied into a page-locked slab of the loader's, or, below 64
    KiB, left to the driver. ``report()`` counts which. Memory of the host is written to again only when the host
    has seen the copy's event; memory of the device belongs to the consumer's stream from the start. On the device there
    are ``depth`` batches besides those that the loop holds.

    An iterable must not write to a batch that it has yielded. Batches are to be used on the stream that was current
    when they were asked for.

    ``len``, ``dataset``, ``sampler``, ``batch_sampler`` and whatever else ``loader`` has are at hand here too.

    Args:
        loader: a DataLoader, a StatefulDataLoader, or any iterable; one batch a time.
        device: where to; None is the current CUDA device, or the CPU where there is none. An object with the methods
            of ``CopyStream`` will do as well.
        depth: how many batches are copied ahead, 0 or more.
        transform: what is done to each batch on the device, on the consumer's stream, when it is handed out: the
            place to normalize images that crossed as bytes.

    Raises:
        TypeError: if loader is not iterable.
        ValueError: if depth is negative.
    """

    def __init__(
        self,
        loader: Iterable[Any],
        *,
        device: torch.device | str | int | CopyStream | None = None,
        depth: int = 2,
        transform: Callable[[Any], Any] | None = None,
    ) -> None:
        if not hasattr(loader, "__iter__") and not hasattr(loader, "__getitem__"):
            raise TypeError(
                f"PinnedLoader: loader must be iterable, got {type(loader).__name__}; wrap it in a DataLoader"
            )
        if depth < 0:
            raise ValueError(
                f"PinnedLoader: depth must be 0 or more, got {depth}; 0 copies a batch when it is asked for"
            )
        self.loader, self.depth, self.transform = loader, depth, transform
        self._device = device
        self._course = course(loader)
        self._report = LoaderReport()
        self._transfer: Transfer | None = None
        #: The state after the batch that was handed out last, where the loader has gone on since.
        self._state: State | None = None

    def __iter__(self) -> Iterator[Any]:
        if self._transfer is None:  # only now: a process may choose its device after it made its loaders
            stream = _stream(self._device)
            self._transfer = None if stream is None else Transfer(stream, self.depth, self._report)
        self._state = None
        source = self._course.begin()
        return self._passed_on(source) if self._transfer is None else self._copied(source, self._transfer)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_transfer": None}

    def __len__(self) -> int:
        return len(self.loader)  # type: ignore[arg-type]

    def __getattr__(self, name: str) -> Any:
        if name == "loader":  # not there yet: copy and pickle ask before __init__ ran
            raise AttributeError(name)
        return getattr(self.loader, name)

    def set_epoch(self, epoch: int) -> None:
        """Pass the epoch on to whatever shuffles by it: the loader, or its samplers and its dataset."""
        batch_sampler = getattr(self.loader, "batch_sampler", None)
        parts = [getattr(self.loader, name, None) for name in ("sampler", "dataset")]
        parts += [batch_sampler, getattr(batch_sampler, "sampler", None)]
        if hasattr(self.loader, "set_epoch"):
            parts = [self.loader]
        for part in {id(part): part for part in parts if hasattr(part, "set_epoch")}.values():
            part.set_epoch(epoch)  # type: ignore[union-attr]

    def state_dict(self) -> State:
        """The state after the batch that was handed out last, whatever has been fetched since.

        It is the loader's own if that has one. Otherwise a loader that goes on from it produces the batches before it
        again, and throws them away; a StatefulDataLoader skips them.
        """
        return self._course.state() if self._state is None else self._state

    def load_state_dict(self, state_dict: State) -> None:
        """Make the next iteration go on from a state; a batch of a plain loader is the same if its dataset is."""
        self._course.load(state_dict)
        self._state = None

    def report(self) -> LoaderReport:
        """How long the loop waited, and which way the bytes went."""
        collate = getattr(self.loader, "collate_fn", None)
        pools = [collate.pool] if isinstance(collate, SlabCollate) else []
        pools += [] if self._transfer is None else [self._transfer.staging]
        report = self._report
        report.slabs = sum(len(pool.slabs) for pool in pools)
        report.slab_bytes = sum(pool.nbytes for pool in pools)
        report.made = sum(pool.made for pool in pools)
        report.lendings = sum(pool.lendings for pool in pools)
        report.refusals = sum(pool.refusals for pool in pools)
        return report

    def _passed_on(self, source: Iterator[Any]) -> Iterator[Any]:
        try:
            while True:
                start = time.perf_counter()
                try:
                    batch = [next(source)]
                except StopIteration:
                    return
                # Popped, here and below: a generator would hold what its variables name while the loop runs.
                yield self._finished(batch.pop(), start)
        finally:
            _close(source)

    def _copied(self, source: Iterator[Any], transfer: Transfer) -> Iterator[Any]:
        ahead: deque[_Sent] = deque()
        ending: Exception | None = None
        self._state = self._course.state() if self.depth else None
        try:
            while True:
                start = time.perf_counter()
                try:
                    while ending is None and len(ahead) <= self.depth:
                        ahead.append(self._fetch(source, transfer))
                except Exception as error:  # in its turn: the batches before it are good
                    ending = error
                if ahead:
                    yield self._handed_out(ahead.popleft(), transfer, start)
                elif isinstance(ending, StopIteration):
                    self._state = None
                    return
                elif ending is not None:
                    raise ending
        finally:
            transfer.finish()  # targets not handed out are freed now: nothing may still write to them
            ahead.clear()
            ending = None  # it holds this frame
            _close(source)

    def _fetch(self, source: Iterator[Any], transfer: Transfer) -> _Sent:
        batch, event = transfer.send(next(source))
        return _Sent(batch, event, self._course.state() if self.depth else None)

    def _handed_out(self, sent: _Sent, transfer: Transfer, start: float) -> Any:
        self._report.late += not sent.event.query()
        transfer.stream.wait(sent.event)
        self._state = sent.state
        return self._finished(sent.batch, start)

    def _finished(self, batch: Any, start: float) -> Any:
        if self.transform is not None:
            batch = self.transform(batch)
        self._report.waited(time.perf_counter() - start)
        return batch


class _Sent(NamedTuple):
    batch: Any
    event: Event
    state: State | None


def _close(source: Iterator[Any]) -> None:
    if hasattr(source, "close"):
        source.close()  # lets go of the loader's iterator, whose workers end with it
    forget_ended_workers()


def _stream(device: torch.device | str | int | CopyStream | None) -> CopyStream | None:
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if not isinstance(device, torch.device | str | int):
        return device
    device = torch.device(device)
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    return copy_stream(device)
