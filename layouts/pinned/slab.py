"""Slabs: memory that is lent to one batch at a time, and lent again when nobody holds that batch any more.

A tensor on a slab is built by :func:`torch.from_numpy` on an array whose base is the :class:`Lease`. Everything made
from it (views, ``detach()``, ``numpy()``, DLPack capsules, saved tensors of autograd) keeps the storage, the storage
keeps the array, and the array keeps the lease; so the lease dies when, and only when, the last of them does, in
whatever thread that is. A copy (``clone``, ``deepcopy``, pickling, ``share_memory_``) has memory of its own.
"""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

#: Bytes before the data of a slab: [0] is 1 while the slab is lent, [1] once another process has mapped it. They lie in
#: the slab itself, so that a process that maps a slab of another can give it back by writing one byte.
HEADER = 64
#: Data starts at multiples of this within a slab: a cache line, and the widest vector register.
ALIGNMENT = 64
#: Page-locking works by pages: no slab shares one with anything else.
PAGE = 4096
#: Room to spare in a new slab, so that batches of varying length do not ask for a new one each time.
HEADROOM = 1.25

_slabs_of_this_process: weakref.WeakSet[Slab] = weakref.WeakSet()


class Slab:
    """Memory of ``capacity`` bytes, lent or free.

    Args:
        memory: uint8, contiguous; the first HEADER bytes are not part of the capacity.
    """

    def __init__(self, memory: Tensor) -> None:
        self.memory = memory
        self.capacity = memory.numel() - HEADER
        self._pinned: bool | None = None
        self._bytes = memory.numpy()
        self._start = memory.data_ptr()
        _slabs_of_this_process.add(self)

    @property
    def lent(self) -> bool:
        """Whether a batch is on it."""
        return bool(self._bytes[0])

    @property
    def mapped(self) -> bool:
        """Whether the process that it is sent to has it."""
        return bool(self._bytes[1])

    def set_mapped(self) -> None:
        """Tell the process whose slab this is that its memory need not be sent again."""
        self._bytes[1] = 1

    def lend(self) -> Lease:
        """Mark the slab as lent; it is free again when the lease and everything built on it are gone."""
        self._bytes[0] = 1
        return Lease(self)

    def free(self) -> None:
        """Mark the slab as free. No lock: this runs wherever a lease dies, be it in the middle of :meth:`lend`."""
        self._bytes[0] = 0

    def pin(self, lock: Callable[[Tensor], Callable[[], object] | None]) -> bool:
        """Page-lock the memory for the life of the slab, the first time; whether it is locked."""
        if self._pinned is None:
            unlock = lock(self.memory)
            self._pinned = unlock is not None
            if unlock is not None:
                weakref.finalize(self, _unlock, unlock, self.memory)
        return self._pinned

    def holds(self, address: int) -> bool:
        """Whether the address lies in this slab."""
        return self._start <= address < self._start + self.memory.numel()


def _unlock(unlock: Callable[[], object], memory: Tensor) -> None:
    unlock()  # while the memory is still mapped, which is what the second argument is for


def slab_of(tensor: Tensor) -> Slab | None:
    """The slab of this process that a CPU tensor lies in."""
    address = tensor.data_ptr()
    return next((slab for slab in list(_slabs_of_this_process) if slab.holds(address)), None)


class Lease:
    """Who holds this, or an array made of it, holds the slab."""

    def __init__(self, slab: Slab) -> None:
        self.slab = slab
        # A forked child inherits leases that are still its parent's: their end there must not free a shared slab.
        self._process: int | None = os.getpid()
        self.__array_interface__ = {
            "version": 3,
            "typestr": "|u1",
            "shape": (slab.capacity,),
            "data": (slab.memory.data_ptr() + HEADER, False),
        }

    def array(self) -> np.ndarray:
        """The bytes of the slab."""
        return np.asarray(self)

    def hand_over(self) -> None:
        """Leave it to another process to free the slab."""
        self._process = None

    def __del__(self, getpid: Callable[[], int] = os.getpid) -> None:  # bound now: modules may be gone
        if self._process == getpid():
            self.slab.free()


class Arena:
    """Tensors one after the other on a lent slab.

    Args:
        lease: of the slab, or None: then there is room for nothing.
    """

    def __init__(self, lease: Lease | None) -> None:
        self.lease = lease
        #: Bytes that were asked for, whether there was room or not.
        self.wanted = 0
        self._used = 0
        self._memory = np.empty(0, np.uint8) if lease is None else lease.array()

    def room_for(self, nbytes: int) -> bool:
        """Whether :meth:`take` would succeed."""
        return self._used + nbytes <= len(self._memory)

    def take(self, size: Sequence[int], stride: Sequence[int], dtype: torch.dtype) -> Tensor | None:
        """A tensor with a storage of just its own bytes; None if there is no room, or nothing to hold."""
        nbytes = extent(size, stride) * dtype.itemsize
        self.wanted += aligned(nbytes)
        if not nbytes or not self.room_for(nbytes):
            return None
        tensor = tensor_at(self._memory, self._used, size, stride, dtype)
        self._used += aligned(nbytes)
        return tensor

    def offset_of(self, tensor: Tensor) -> int | None:
        """Where in the slab a tensor lies, in bytes; None if elsewhere."""
        offset = tensor.data_ptr() - self._memory.ctypes.data
        return offset if 0 <= offset < self._used else None


def extent(size: Sequence[int], stride: Sequence[int]) -> int:
    """Elements from the first of a strided tensor to its last."""
    if 0 in size:
        return 0
    return 1 + sum((s - 1) * t for s, t in zip(size, stride, strict=True))


def dense_strides(tensor: Tensor) -> tuple[int, ...]:
    """The strides of a copy: those of the tensor if its memory has no gaps."""
    return torch.empty_like(tensor, device="meta").stride()


def aligned(nbytes: int) -> int:
    """Rounded up to where the next tensor may start."""
    return -(-nbytes // ALIGNMENT) * ALIGNMENT


def tensor_at(
    memory: np.ndarray, offset: int, size: Sequence[int], stride: Sequence[int], dtype: torch.dtype
) -> Tensor:
    """The tensor at ``offset`` bytes; it holds what ``memory`` holds."""
    part = memory[offset : offset + extent(size, stride) * dtype.itemsize]
    return torch.from_numpy(part).view(dtype).as_strided(size, stride)


class SlabPool:
    """At most ``slabs`` slabs, of at least the size that was last asked for.

    Args:
        slabs: the most of them; while all are lent, :meth:`lend` gives None.
        shared: whether other processes can map them.
    """

    def __init__(self, slabs: int, *, shared: bool = False) -> None:
        self.slabs: list[Slab] = []
        #: The most bytes that a batch has been seen to need: what to lend for the next one.
        self.expected = 0
        self.made = self.lendings = self.refusals = 0
        self._most = slabs
        self._shared = shared
        self._lock = threading.Lock()

    def arena(self) -> Arena:
        """On a slab with room for a batch like those seen before; with no room before the first."""
        return Arena(self.lend(self.expected) if self.expected else None)

    def saw(self, nbytes: int) -> None:
        """Note what a batch needed."""
        self.expected = max(self.expected, nbytes)

    def lend(self, nbytes: int) -> Lease | None:
        """Lend a free slab of ``nbytes`` or more, making one if need be; None if as many as may be are lent."""
        with self._lock:
            free = [slab for slab in self.slabs if not slab.lent]
            chosen = next((slab for slab in free if slab.capacity >= nbytes), None)
            if chosen is None:
                self.slabs = [slab for slab in self.slabs if slab not in free]  # all of them are too small
                if len(self.slabs) >= self._most:
                    self.refusals += 1
                    return None
                chosen = self._make(nbytes)
            self.lendings += 1
            return chosen.lend()

    @property
    def nbytes(self) -> int:
        """Memory in slabs, lent or free."""
        return sum(slab.memory.numel() for slab in self.slabs)

    def _make(self, nbytes: int) -> Slab:
        total = -(-(HEADER + int(nbytes * HEADROOM)) // PAGE) * PAGE
        if self._shared:
            memory = torch.zeros(total, dtype=torch.uint8).share_memory_()  # a mapping: whole pages
        else:
            wide = torch.empty(total + PAGE, dtype=torch.uint8)
            start = -wide.data_ptr() % PAGE
            memory = wide[start : start + total]
            memory[:HEADER] = 0
        slab = Slab(memory)
        self.slabs.append(slab)
        self.made += 1
        return slab
