"""``default_collate`` into slabs: no fresh memory for each batch, images in channels-last memory by copies of rows."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import get_worker_info
from torch.utils.data._utils.collate import collate, default_collate_fn_map

from . import parcel
from .slab import Arena, SlabPool

#: In the main process, a field below this many bytes gets fresh memory: malloc has it at hand, and what surrounds a
#: slab (35 µs for 64 samples) would cost more than it saves.
LEAST_FIELD = 2**20
#: The channels that an [H, W, C] image may have.
CHANNELS = (1, 3, 4)


class SlabCollate:
    """A ``collate_fn`` for a DataLoader: what :func:`torch.utils.data.default_collate` gives, on reused memory.

    Structure, shapes, dtypes and values are those of ``default_collate``. Tensors lie on slabs that are lent to the
    batch and come back when nothing of it is referenced any more; batches may be kept for as long as one likes. When
    all slabs are lent, a batch gets fresh memory. The first batch does, too: it tells how much a batch needs.

    In a worker the slabs are shared with the main process, and all tensors of a batch, small ones too, cross in one.
    Workers have slabs of their own. Nothing here touches a GPU; :class:`PinnedLoader` page-locks the slabs.

    Samples [C, H, W] that are permuted views of [H, W, C] memory become a batch in ``channels_last`` memory, row by row
    and without a transposition.

    Args:
        hwc: whether uint8 samples [H, W, C] with 1, 3 or 4 channels, as image decoders give them, become [N, C, H, W]
            in ``channels_last`` memory. Otherwise they become [N, H, W, C], as in ``default_collate``.
        slabs: how many slabs a process may have, each 1.25 times as large as the largest batch seen. A worker needs as
            many as there are batches of its own on their way (``prefetch_factor``) and in use.

    Raises:
        ValueError: if slabs is less than 1.
    """

    def __init__(self, *, hwc: bool = False, slabs: int = 4) -> None:
        if slabs < 1:
            raise ValueError(f"SlabCollate: slabs must be at least 1, got {slabs}; to do without, use default_collate")
        self.hwc, self.slabs = hwc, slabs
        self._pool: SlabPool | None = None
        self._process = 0

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_pool": None}  # a pool belongs to the process that made it

    def __call__(self, samples: Sequence[Any]) -> Any:
        """The batch; in a worker, a parcel that becomes the batch in the main process."""
        in_worker = get_worker_info() is not None
        pool = self.pool
        arena = pool.arena()
        stack = self._stacker(arena, least=0 if in_worker else LEAST_FIELD)
        batch = collate(samples, collate_fn_map={**default_collate_fn_map, Tensor: stack})
        if in_worker:
            batch = parcel.pack(batch, arena, pool)
        pool.saw(arena.wanted)
        return batch

    @property
    def pool(self) -> SlabPool:
        """The slabs of this process."""
        if self._pool is None or self._process != os.getpid():  # after a fork, the parent's slabs are not ours
            self._pool, self._process = SlabPool(self.slabs, shared=get_worker_info() is not None), os.getpid()
        return self._pool

    def _stacker(self, arena: Arena, least: int) -> Callable[..., Tensor]:
        def stack(samples: Sequence[Tensor], *, collate_fn_map: Any = None) -> Tensor:
            first = samples[0]
            if not parcel.plain(first) or not _alike(samples):
                return _default(samples, collate_fn_map=collate_fn_map)
            if self.hwc and _is_hwc(first):
                return _stack(samples, arena, least).permute(0, 3, 1, 2)
            if _is_permuted(first):
                return _stack([sample.permute(1, 2, 0) for sample in samples], arena, least).permute(0, 3, 1, 2)
            return _stack(samples, arena, least)

        return stack


_default = default_collate_fn_map[Tensor]


def _stack(samples: Sequence[Tensor], arena: Arena, least: int) -> Tensor:
    first = samples[0]
    out = None
    if len(samples) * first.nbytes >= least:
        size = (len(samples), *first.shape)
        out = arena.take(size, torch.empty(size, device="meta").stride(), first.dtype)
    # Without a slab, a worker stacks into a new shared segment, as default_collate does.
    return _default(samples) if out is None else torch.stack(tuple(samples), out=out)


def _alike(samples: Sequence[Tensor]) -> bool:
    """Whether samples are plain tensors of one dtype: where they are not, default_collate promotes or refuses."""
    kinds = {(type(sample), sample.dtype, sample.requires_grad) for sample in samples}
    return kinds == {(Tensor, samples[0].dtype, False)}


def _is_hwc(sample: Tensor) -> bool:
    return sample.dtype == torch.uint8 and sample.dim() == 3 and sample.shape[2] in CHANNELS


def _is_permuted(sample: Tensor) -> bool:
    """Whether a [C, H, W] sample is a view of contiguous [H, W, C] memory."""
    return sample.dim() == 3 and sample.permute(1, 2, 0).is_contiguous() and not sample.is_contiguous()
