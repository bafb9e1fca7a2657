"""Gradients clipped by their norm where parameters are sharded over different meshes."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm


def clip_grad_norm_over_meshes_(parameters: Iterable[Tensor], max_norm: float) -> Tensor:
    """As ``torch.nn.utils.clip_grad_norm_``, which adds up norms of one device mesh only.

    Where some layers are cut up for tensor parallelism and others are not, FSDP2 leaves parameters on two meshes: the
    norm of each group is gathered, and the norm of these norms clips all of them.

    Args:
        parameters: plain and DTensors; those without a gradient do not count.
        max_norm: of all gradients together.

    Returns:
        the norm before, a plain tensor.
    """
    groups: dict[object, list[Tensor]] = {}
    for parameter in parameters:
        if parameter.grad is not None:
            mesh = parameter.grad.device_mesh if isinstance(parameter.grad, DTensor) else None
            groups.setdefault(mesh, []).append(parameter)
    norms = [_whole(get_total_norm([p.grad for p in group])) for group in groups.values()]  # type: ignore[misc]
    total = torch.linalg.vector_norm(torch.stack(norms)) if norms else torch.zeros(())
    for group in groups.values():
        clip_grads_with_norm_(group, max_norm, total)
    return total


def _whole(norm: Tensor) -> Tensor:
    return norm.full_tensor() if isinstance(norm, DTensor) else norm
