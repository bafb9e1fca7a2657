"""A batch on its way from a worker: everything in one slab that stays, instead of a new segment for each tensor.

Pickled, a parcel is a few hundred bytes that say where in the slab each tensor lies; unpickled, it is the batch
itself, with its tensors on the slab. The slab is free for another batch of the worker's when the receiver holds none
of them any more.
"""

from __future__ import annotations

import io
import multiprocessing
import os
import pickle
from multiprocessing.reduction import ForkingPickler
from typing import Any

import torch
from torch import Tensor

from .slab import Arena, Lease, Slab, SlabPool, dense_strides, tensor_at

#: Where a tensor lies: byte offset, size, stride, dtype.
Place = tuple[int, tuple[int, ...], tuple[int, ...], torch.dtype]

#: Slabs of workers that this process has mapped: process of the worker → number of the slab → slab. Mapping one anew
#: for each batch would cost a page fault for every 4 KiB.
_mapped: dict[int, dict[int, Slab]] = {}


class Parcel:
    """A batch with its tensors on a shared slab, for one trip to another process.

    Args:
        payload: the batch, pickled, with a place for each tensor on the slab.
        lease: of the slab.
        kept: the storages of the slabs that the worker still has, so that the receiver can let go of others.
    """

    def __init__(self, payload: bytes, lease: Lease, kept: tuple[int, ...]) -> None:
        self._payload, self._lease, self._kept = payload, lease, kept

    def __reduce__(self) -> tuple[Any, ...]:
        self._lease.hand_over()
        slab = self._lease.slab
        # Once, as sending memory takes a connection to a thread of the worker, which must then still be alive.
        memory = None if slab.mapped else slab.memory
        return unpack, (self._payload, memory, slab.memory.data_ptr(), os.getpid(), self._kept)


def pack(batch: Any, arena: Arena, pool: SlabPool) -> Any:
    """``batch`` as a parcel, its tensors brought onto the arena; or as it is, where there is no slab."""
    buffer = io.BytesIO()
    _Packer(buffer, arena).dump(batch)
    if arena.lease is None:
        return batch
    kept = tuple(slab.memory.data_ptr() for slab in pool.slabs)
    return Parcel(buffer.getvalue(), arena.lease, kept)


def unpack(payload: bytes, memory: Tensor | None, number: int, worker: int, kept: tuple[int, ...]) -> Any:
    """The batch of a parcel."""
    if memory is not None:
        forget_ended_workers()
        slab = _mapped.setdefault(worker, {})[number] = Slab(memory)
        slab.set_mapped()
    slabs = _mapped[worker]
    for gone in set(slabs).difference(kept):
        del slabs[gone]
    return _Unpacker(io.BytesIO(payload), Lease(slabs[number])).load()


def forget_ended_workers() -> None:
    """Let go of the slabs of workers that have ended; batches on them stay valid.

    Of a worker that is alive none may be let go: it will not send the memory again.
    """
    alive = {process.pid for process in multiprocessing.active_children()}
    for worker in set(_mapped).difference(alive):
        del _mapped[worker]


class _Packer(ForkingPickler):
    """Puts a place where a plain tensor would be pickled; what is not plain goes the ordinary way of torch."""

    def __init__(self, buffer: io.BytesIO, arena: Arena) -> None:
        super().__init__(buffer)
        self._arena = arena
        self._places: dict[int, Place] = {}
        self._held: list[Tensor] = []  # so that no id is used twice

    def persistent_id(self, obj: Any) -> Place | None:
        if type(obj) is not Tensor or not plain(obj):
            return None
        place = self._places.get(id(obj))
        if place is None:
            place = self._place(obj)
            if place is not None:
                self._places[id(obj)] = place
                self._held.append(obj)
        return place

    def _place(self, tensor: Tensor) -> Place | None:
        offset = self._arena.offset_of(tensor)
        if offset is None:
            taken = self._arena.take(tensor.shape, dense_strides(tensor), tensor.dtype)
            if taken is None:
                return None
            tensor = taken.copy_(tensor)
            offset = self._arena.offset_of(tensor)
            assert offset is not None
        return offset, tuple(tensor.shape), tensor.stride(), tensor.dtype


class _Unpacker(pickle.Unpickler):
    def __init__(self, buffer: io.BytesIO, lease: Lease) -> None:
        super().__init__(buffer)
        self._memory = lease.array()
        self._tensors: dict[Place, Tensor] = {}

    def persistent_load(self, place: Place) -> Tensor:
        if place not in self._tensors:
            self._tensors[place] = tensor_at(self._memory, *place)
        return self._tensors[place]


def plain(tensor: Tensor) -> bool:
    """Whether a tensor is its bytes and nothing else: strided CPU memory, no history, nothing lazy."""
    return (
        tensor.device.type == "cpu"
        and tensor.layout == torch.strided
        and not tensor.requires_grad
        and not tensor.is_quantized
        and not tensor.is_conj()
        and not tensor.is_neg()
    )
