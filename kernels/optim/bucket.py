"""Parameters of one kind, which a step updates together, and the norm of all their gradients."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import sharding
from .rule import Rule


class Kind(NamedTuple):
    """What parameters have in common that share a launch.

    Attributes:
        rule: how they are updated.
        device: where they are.
        parameter: their dtype, and so are gradient and state.
        gradient: likewise.
        state: likewise.
        options: what the step does to them.
        dense: whether all of a parameter's tensors lie alike in memory and without gaps: a kernel sees one long row.
        shards: the device meshes, and their dims, over which the parameters are cut up.
    """

    rule: Rule
    device: torch.device
    parameter: torch.dtype
    gradient: torch.dtype
    state: torch.dtype
    options: tuple[str, ...]
    dense: bool
    shards: tuple[tuple[Any, int], ...]


class Bucket:
    """The parameters of one kind, and what belongs to each: lists of one length."""

    def __init__(self) -> None:
        #: As the user knows them; the others are what this process has of each.
        self.originals: list[Tensor] = []
        self.params: list[Tensor] = []
        self.grads: list[Tensor] = []
        self.steps: list[Tensor | None] = []
        self.states: list[tuple[Tensor, ...]] = []
        self.direction_states: list[tuple[Tensor, ...]] = []
        self.averages: list[Tensor | None] = []
        self.lost: list[Tensor | None] = []
        self.groups: list[int] = []
        self.numbers: list[int] = []
        self.first: list[bool] = []

    def append(self, **entry: Any) -> None:
        """Add a parameter: one value for each list."""
        for name, value in entry.items():
            getattr(self, name).append(value)


def local(t: Tensor, like: Tensor | None = None) -> Tensor:
    """The part of t that this process holds, cut up as ``like`` is."""
    if not sharding.is_sharded(t):
        return t
    if like is not None and t.placements != like.placements:  # type: ignore[attr-defined]
        t = t.redistribute(placements=like.placements)  # type: ignore[attr-defined]
    return t.to_local()  # type: ignore[attr-defined]


def whole(t: Tensor, like: Tensor) -> Tensor:
    """All of what t is this process's part of."""
    if not sharding.is_sharded(like):
        return t
    sharded = type(like).from_local(t, like.device_mesh, like.placements, shape=like.shape, stride=like.stride())  # type: ignore[attr-defined]
    return sharded.full_tensor()


def part(t: Tensor, like: Tensor) -> Tensor:
    """This process's part of t, which every process has."""
    if not sharding.is_sharded(like):
        return t
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(t.contiguous(), like.device_mesh, like.placements, src_data_rank=None).to_local()  # type: ignore[attr-defined]


def shards(t: Tensor) -> tuple[tuple[Any, int], ...]:
    """The device mesh of a DTensor with each dim of it that t is cut up over."""
    if not sharding.is_sharded(t):
        return ()
    return tuple((t.device_mesh, m) for m, placement in enumerate(t.placements) if placement.is_shard())  # type: ignore[attr-defined]


def is_dense(t: Tensor) -> bool:
    """Whether the elements of t fill a piece of memory, in any order of the dims."""
    if t.is_contiguous():
        return True
    expected = 1
    for stride, size in sorted(zip(t.stride(), t.shape, strict=True)):
        if size != 1 and stride != expected:
            return False
        expected *= size
    return True


def total_norm(buckets: Mapping[Kind, Bucket]) -> Tensor:
    """The 2-norm of all gradients, over all devices and shards, in float32 or wider."""
    squares = [_sum_of_squares(kind, bucket) for kind, bucket in buckets.items()]
    return (
        torch.stack([s.to(squares[0].device, torch.promote_types(s.dtype, squares[0].dtype)) for s in squares])
        .sum()
        .sqrt()
    )


def _sum_of_squares(kind: Kind, bucket: Bucket) -> Tensor:
    wide = torch.promote_types(kind.gradient, torch.float32)
    norms = torch._foreach_norm(bucket.grads, 2, dtype=wide)
    total = torch.stack(norms).square().sum()
    for mesh, dim in kind.shards:
        torch.distributed.all_reduce(total, group=mesh.get_group(dim))
    return total
