"""What operators with a process group share: the check of it, its sums, and copies of modules that hold one.

A sum over a group has two meanings in a backward pass. Where every process goes on to a loss of its own, the sum's
gradient is the sum of theirs (``batch_norm_sync``). Where all go on alike to one loss, as tensor-parallel ones do, all
have the same gradient already: :func:`added_up`, whose counterpart is :func:`shared` (the g and f of Megatron-LM).
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from .. import sharding

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

Module = TypeVar("Module", bound=torch.nn.Module)


def check_group(name: str, x: Tensor, group: Any) -> None:
    """Raise unless ``group`` can join the processes' own tensors, of which x is one.

    Raises:
        RuntimeError: if torch.distributed is not initialized.
        TypeError: if group is no process group with this process in it, or x is a DTensor.
    """
    if not dist.is_available() or not dist.is_initialized():
        raise RuntimeError(
            f"{name}: group needs torch.distributed, which is not initialized; call "
            "torch.distributed.init_process_group first, or pass group=None in a single process"
        )
    if not isinstance(group, dist.ProcessGroup):
        raise TypeError(
            f"{name}: group must be a torch.distributed.ProcessGroup with this process in it, got {group!r}; "
            "e.g. torch.distributed.group.WORLD"
        )
    if sharding.is_sharded(x):
        raise TypeError(
            f"{name}: group is for plain tensors, every process with its own, got x of type DTensor; "
            "pass x.to_local(), and the other tensors local too"
        )


def named(name: str) -> ProcessGroup:
    """The group whose ``group_name`` that is: what an operator in a compiled graph has of it."""
    return dist.distributed_c10d._resolve_process_group(dist.distributed_c10d.GroupName(name))


def all_reduce(t: Tensor, operation: str, group: ProcessGroup) -> Tensor:
    """The "sum" or "max" over all processes. A sum of half precision is rounded once, at its end."""
    from torch.distributed import _functional_collectives as functional

    wide = torch.promote_types(t.dtype, torch.float32) if t.is_floating_point() else t.dtype
    # Not dist.all_reduce, which writes into its operand: torch 2.11 compiles a wrong gradient from that.
    found = functional.wait_tensor(functional.all_reduce(t.to(wide).contiguous(), operation, group)).to(t.dtype)
    # Nor what comes out, or an alias of it: torch 2.11 compiles a gradient of zeros from that.
    return found.clone() if torch.compiler.is_compiling() else found


def gathered(t: Tensor, group: ProcessGroup) -> Tensor:
    """[P, ...]: what t is in each process."""
    table = t.new_zeros(group.size(), *t.shape)
    table[group.rank()] = t
    return all_reduce(table, "sum", group)


def added_up(t: Tensor, group: ProcessGroup) -> Tensor:
    """The sum over all processes, which all go on with alike: its gradient is that of each part."""
    return _AddedUp.apply(t, group)


def shared(t: Tensor, group: ProcessGroup) -> Tensor:
    """T, the same in all processes, each of which goes on to a part of its own: its gradient is the sum of theirs."""
    return _Shared.apply(t, group)


class _AddedUp(torch.autograd.Function):
    @staticmethod
    def forward(ctx, t, group):
        ctx.group = group
        return all_reduce(t, "sum", group)

    @staticmethod
    def backward(ctx, grad):
        return shared(grad, ctx.group), None


class _Shared(torch.autograd.Function):
    @staticmethod
    def forward(ctx, t, group):
        ctx.group = group
        return t.view_as(t)

    @staticmethod
    def backward(ctx, grad):
        return added_up(grad, ctx.group), None


def deepcopy(module: Module, group: ProcessGroup | None, memo: dict[int, Any]) -> Module:
    """``copy.deepcopy`` of a module that holds ``group``: a handle, which torch refuses to copy."""
    memo[id(group)] = group
    copied = module.__class__.__new__(module.__class__)
    memo[id(module)] = copied
    copied.__dict__.update(copy.deepcopy(module.__dict__, memo))
    return copied
