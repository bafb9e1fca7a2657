"""Operators on DTensors: every rank runs the kernel on what it holds; what has to be communicated, an operator says.

An operator says what its dims are to each other in a signature, such as ``"... D, D -> ... D"`` for RMSNorm: the dims
of each tensor that goes in and of each that comes out. ``...`` stands for dims without a name, aligned at the right as
in broadcasting. They, and dims with a name in lower case, may be sharded; every rank needs a dim whole whose name is in
capitals, and those that ``*`` stands for. A name with a + may be sharded too, over one dim of the mesh: the operator
communicates over that, in the group that it is given, and what comes out is whole. ``seed`` is a scalar from which
every shard derives a seed of its own.

How the first tensor lies decides how the others must lie. What comes out is sharded as what went in; a sum over a
sharded dim (a gradient of a weight, a summed loss) comes out as ``Partial``, and DTensor adds it up where it is used.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

if TYPE_CHECKING:
    from torch.distributed.tensor import DeviceMesh, DTensor, Placement

#: Types that no DTensor has.
ORDINARY = frozenset((Tensor, torch.nn.Parameter, type(None)))
#: An odd constant; shards' seeds lie far apart.
_SEED_STEP = 0x9E37_79B9_7F4A_7C15 >> 1 | 1


def is_sharded(tensor: Tensor | None) -> bool:
    """Whether ``tensor`` is a DTensor."""
    return any_sharded((tensor,))


def any_sharded(tensors: Sequence[Tensor | None]) -> bool:
    """Whether one is a DTensor. The module that defines it is imported by whoever makes one, not by braze."""
    if all(type(t) in ORDINARY for t in tensors):
        return False
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and any(isinstance(t, module.DTensor) for t in tensors)


def run(name: str, fn: Callable[..., Any], signature: str, tensors: Sequence[Tensor | None]) -> Any:
    """``fn`` of the local parts of ``tensors``, as DTensors; with the ``group`` that shares an axis with a +, if any.

    Raises:
        TypeError: if DTensors are mixed with plain tensors.
        ValueError: if the tensors lie on several meshes, or in a way that would need communication.
    """
    from torch.distributed.tensor import DTensor

    first = tensors[0]
    if not isinstance(first, DTensor) or any(t is not None and not is_sharded(t) and t.dim() for t in tensors):
        kinds = ", ".join("None" if t is None else type(t).__name__ for t in tensors)
        raise TypeError(
            f"{name}: tensors must be all DTensors or all plain ones, got {kinds}; "
            "distribute the others, e.g. DTensor.from_local(t, x.device_mesh, [Replicate()])"
        )
    mesh, placements = first.device_mesh, first.placements
    inputs, outputs = parse(signature)
    own = axes(inputs[0], first.dim())
    sizes = dict(zip(own, first.shape, strict=True))
    cut = [_cut_axis(name, own, placement, m) for m, placement in enumerate(placements)]
    if "+" in signature:
        _cut_by_others(cut, sizes, tensors, inputs)
    local = [
        None if t is None else _local(name, t, names, first, sizes, cut)
        for t, names in zip(tensors, inputs, strict=True)
    ]
    joined = [m for m, axis in enumerate(cut) if axis is not None and axis.endswith("+")]
    if len(joined) > 1:
        raise ValueError(
            f"{name}: the classes may be sharded over one mesh dim only, but mesh dims {joined} shard them; "
            "gather them over the others, e.g. t.redistribute(placements=...)"
        )
    for m in joined:
        fn, cut[m] = functools.partial(fn, group=mesh.get_group(m)), None  # what fn returns is whole
    return _wrap(fn(*local), outputs, cut, sizes, mesh)


def parse(signature: str) -> tuple[list[list[str]], list[list[str]]]:
    """The names in a signature: a list for each tensor that goes in, and for each that comes out."""
    ins, outs = ([part.split() for part in side.split(",")] for side in signature.split("->"))
    return ins, outs


def axes(names: Sequence[str], dims: int) -> list[str]:
    """A name for each of so many dims; those under ``...`` and ``*`` are numbered from the right."""
    for wild, prefix in (("...", "i"), ("*", "I")):
        if wild in names and dims >= len(names) - 1:
            at = names.index(wild)
            covered = [f"{prefix}{i}" for i in reversed(range(dims - len(names) + 1))]
            return [*names[:at], *covered, *names[at + 1 :]]
    # Fewer dims than names: one sample without its batch dim. What remains must be whole.
    return list(names) if len(names) == dims else [f"I{i}" for i in range(dims)]


def layout(
    names: Sequence[str], shape: Sequence[int], sizes: Mapping[str, int], cut: Sequence[str | None]
) -> tuple[list[Placement], list[Placement]]:
    """How a tensor and its gradient must lie where each mesh dim cuts such an axis (None: holds copies).

    ``sizes`` are those of the axes of the first tensor. A tensor that lacks an axis, or broadcasts over it, is copied,
    and its gradient is a partial sum.
    """
    from torch.distributed.tensor import Partial, Replicate, Shard

    own = axes(names, len(shape))
    wanted: list[Placement] = []
    gradient: list[Placement] = []
    for axis in cut:
        if axis is None:
            wanted, gradient = [*wanted, Replicate()], [*gradient, Replicate()]
        elif axis in own and shape[own.index(axis)] == sizes[axis]:
            shard = Shard(own.index(axis))
            wanted, gradient = [*wanted, shard], [*gradient, shard]
        else:
            wanted, gradient = [*wanted, Replicate()], [*gradient, Partial()]
    return wanted, gradient


def _cut_axis(name: str, own: Sequence[str], placement: Placement, m: int) -> str | None:
    """The axis that mesh dim m cuts; None if it holds copies.

    Raises:
        ValueError: if it holds partial sums, or cuts what must be whole.
    """
    from torch.distributed.tensor import Replicate, Shard

    if isinstance(placement, Replicate):
        return None
    if not isinstance(placement, Shard):
        raise ValueError(
            f"{name}: the first tensor must be sharded or replicated, got {placement} on mesh dim {m}; "
            "add it up first, e.g. x.redistribute(placements=[Replicate()])"
        )
    axis = own[placement.dim]
    if axis.isupper():
        raise ValueError(
            f"{name}: every rank needs dim {placement.dim} of the first tensor whole, but mesh dim {m} shards it; "
            "gather it first, e.g. x.redistribute(placements=[Replicate()]), or shard another dim"
        )
    return axis


def _cut_by_others(
    cut: list[str | None],
    sizes: dict[str, int],
    tensors: Sequence[Tensor | None],
    inputs: Sequence[Sequence[str]],
) -> None:
    """Enter the axes with a + that the first tensor lacks, and that others are sharded over where it holds copies."""
    from torch.distributed.tensor import Shard

    for t, names in zip(tensors[1:], inputs[1:], strict=True):
        if t is None or "+" not in "".join(names):
            continue
        own = axes(names, t.dim())
        new = {axis: size for axis, size in zip(own, t.shape, strict=True) if axis[-1] == "+" and axis not in sizes}
        for m, placement in enumerate(cast("DTensor", t).placements):
            if cut[m] is None and isinstance(placement, Shard) and own[placement.dim] in new:
                cut[m] = own[placement.dim]
        sizes.update(new)


def _local(
    name: str,
    tensor: Tensor,
    names: Sequence[str],
    first: DTensor,
    sizes: Mapping[str, int],
    cut: Sequence[str | None],
) -> Tensor:
    """What this rank holds of ``tensor``."""
    if names == ["seed"]:
        return _own_seed(tensor, cut, first.device_mesh)
    if not is_sharded(tensor):  # a scalar
        return tensor
    distributed = cast("DTensor", tensor)
    if distributed.device_mesh != first.device_mesh:
        raise ValueError(
            f"{name}: all tensors must lie on one mesh, got {first.device_mesh} and {distributed.device_mesh}"
        )
    wanted, gradient = layout(names, tensor.shape, sizes, cut)
    if list(distributed.placements) != wanted:
        raise ValueError(
            f"{name}: with the first tensor {list(first.placements)}, a tensor of shape {tuple(tensor.shape)} must be "
            f"{wanted}, got {list(distributed.placements)}; redistribute it: t.redistribute(placements={wanted})"
        )
    return distributed.to_local(grad_placements=gradient)


def _own_seed(seed: Tensor, cut: Sequence[str | None], mesh: DeviceMesh) -> Tensor:
    """A seed for this shard. Ranks that hold copies of one shard keep the same."""
    shard = 0
    for m, axis in enumerate(cut):
        if axis is not None:
            shard = shard * mesh.size(m) + mesh.get_local_rank(m)
    local = cast("DTensor", seed).to_local() if is_sharded(seed) else seed
    return local if shard == 0 else local ^ (shard * _SEED_STEP & (2**62 - 1))


def _wrap(
    results: Any,
    outputs: Sequence[Sequence[str]],
    cut: Sequence[str | None],
    sizes: Mapping[str, int],
    mesh: DeviceMesh,
) -> Any:
    """The local results as DTensors; what lacks an axis that is cut is a partial sum over it."""
    from torch.distributed.tensor import DTensor

    wrapped = []
    for result, names in zip([results] if isinstance(results, Tensor) else results, outputs, strict=True):
        own = axes(names, result.dim())
        shape = [sizes[axis] if axis in cut else size for axis, size in zip(own, result.shape, strict=True)]
        _, placements = layout(names, shape, sizes, cut)
        stride = _stride(result, shape)
        wrapped.append(
            DTensor.from_local(result, mesh, placements, run_check=False, shape=torch.Size(shape), stride=stride)
        )
    return wrapped[0] if isinstance(results, Tensor) else tuple(wrapped)


def _stride(local: Tensor, shape: Sequence[int]) -> tuple[int, ...]:
    """The strides of a dense tensor of ``shape`` whose dims are ordered in memory as those of ``local``."""
    stride = [0] * local.dim()
    step = 1
    for dim in sorted(range(local.dim()), key=lambda d: (local.stride(d), -d)):
        stride[dim], step = step, step * max(shape[dim], 1)
    return tuple(stride)
