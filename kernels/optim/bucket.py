"""Parameters of one kind, which a step updates together, and the norm of all their gradients."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
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
        state: likewise; of states in 8 bits int8.
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


class Entry(NamedTuple):
    """A parameter and what belongs to it.

    Attributes:
        original: as the user knows it; the tensors below are what this process has of each.
        param: the parameter.
        grad: its gradient.
        step: the number of steps, if the rule asks for it.
        states: of the rule's reference.
        scales: of the blocks of these states, where they are in 8 bits.
        direction_states: of its direction.
        average: the running average.
        lost: what rounding took.
        group: the index of its group.
        number: its own, over all groups.
        first: whether its states are new.
    """

    original: Tensor
    param: Tensor
    grad: Tensor
    step: Tensor | None
    states: tuple[Tensor, ...]
    scales: tuple[Tensor, ...]
    direction_states: tuple[Tensor, ...]
    average: Tensor | None
    lost: Tensor | None
    group: int
    number: int
    first: bool


class Bucket:
    """The entries of one kind, as a list for each of their attributes."""

    def __init__(self, entries: Iterable[Entry]) -> None:
        columns: list[list[Any]] = [list(column) for column in zip(*entries, strict=True)]
        self.originals: list[Tensor] = columns[0]
        self.params: list[Tensor] = columns[1]
        self.grads: list[Tensor] = columns[2]
        self.steps: list[Tensor | None] = columns[3]
        self.states: list[tuple[Tensor, ...]] = columns[4]
        self.scales: list[tuple[Tensor, ...]] = columns[5]
        self.direction_states: list[tuple[Tensor, ...]] = columns[6]
        self.averages: list[Tensor | None] = columns[7]
        self.lost: list[Tensor | None] = columns[8]
        self.groups: list[int] = columns[9]
        self.numbers: list[int] = columns[10]
        self.first: list[bool] = columns[11]


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
