"""How batches get to a device: what :class:`PinnedLoader` asks of one, and the devices that answer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Protocol, cast

import torch
from torch import Tensor


class Event(Protocol):
    """The end of some copies, as :class:`torch.cuda.Event` tells it to the host."""

    def query(self) -> bool:
        """Whether the copies have ended."""

    def synchronize(self) -> None:
        """Wait for them, on the host."""


class CopyStream(Protocol):
    """Copies beside the work of the consumer, whose stream is the one that is current in the calling thread."""

    device: torch.device

    def pin(self, memory: Tensor) -> Callable[[], object] | None:
        """Page-lock host memory and return what unlocks it; None if it cannot be locked."""

    def copy(self, sources: Sequence[Tensor]) -> tuple[list[Tensor], Event]:
        """Start copying; the caller keeps the sources unchanged and the targets alive until the event."""

    def synchronize(self) -> None:
        """Wait, on the host, for every copy that was started."""

    def wait(self, event: Event) -> None:
        """Make what the consumer queues from now on wait for the event; the host does not wait."""


class CudaCopyStream:
    """A side stream of a CUDA or ROCm device.

    The targets are memory of the consumer's stream: there they are used and freed, so that the allocator needs no
    ``record_stream``. They may be blocks that work already queued on that stream still reads; the copies wait for it.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._stream = torch.cuda.Stream(device)

    def pin(self, memory: Tensor) -> Callable[[], object] | None:
        """Register the memory with the driver: unlike ``pin_memory()`` no copy, and no rounding to a power of two."""
        portable = 1  # cudaHostRegisterPortable: for every device of this process
        driver, address = torch.cuda.cudart(), memory.data_ptr()
        with torch.cuda.device(self.device):
            refused = int(driver.cudaHostRegister(address, memory.nbytes, portable))
        return None if refused else partial(driver.cudaHostUnregister, address)

    def copy(self, sources: Sequence[Tensor]) -> tuple[list[Tensor], Event]:
        """Copies on the side stream."""
        targets = [torch.empty_like(source, device=self.device) for source in sources]
        self._stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self._stream):
            for target, source in zip(targets, sources, strict=True):
                target.copy_(source, non_blocking=True)
        return targets, self._stream.record_event()

    def synchronize(self) -> None:
        """Wait for the side stream."""
        self._stream.synchronize()

    def wait(self, event: Event) -> None:
        """The consumer's stream waits."""
        torch.cuda.current_stream(self.device).wait_event(cast(torch.cuda.Event, event))


class BlockingCopy:
    """Devices without a side stream here; on MPS, asynchronous copies from reused memory race (pytorch #83015)."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def pin(self, memory: Tensor) -> Callable[[], object] | None:
        """Never: a blocking copy gains nothing from it."""
        return None

    def copy(self, sources: Sequence[Tensor]) -> tuple[list[Tensor], Event]:
        """Copies that have ended on return."""
        return [source.to(self.device) for source in sources], _Ended()

    def synchronize(self) -> None:
        """Nothing to wait for."""

    def wait(self, event: Event) -> None:
        """Nothing to wait for."""


class _Ended:
    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        pass


def copy_stream(device: torch.device) -> CopyStream | None:
    """The copy stream of a device; None for the CPU, where nothing is copied."""
    if device.type == "cpu":
        return None
    return CudaCopyStream(device) if device.type == "cuda" else BlockingCopy(device)
