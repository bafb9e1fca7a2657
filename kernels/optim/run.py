"""How a bucket of parameters is updated: by a Triton launch, by PyTorch's fused CPU kernel, or one by one."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from .. import dispatch
from ..compiled import compiled_call
from .bucket import Bucket, Kind
from .rule import FusedCall, key, random_keys, update

if TYPE_CHECKING:
    from .step import FusedStep


class Around(NamedTuple):
    """What surrounds the rule in a step.

    Attributes:
        factor: of the gradients.
        found_inf: not 0 if there is to be no step.
        weight: 1 − decay of the running averages.
        seed: of stochastic rounding.
    """

    factor: Tensor | None
    found_inf: Tensor | None
    weight: float
    seed: int


def run(optimizer: FusedStep, kind: Kind, bucket: Bucket, around: Around) -> None:
    """One step of every parameter in the bucket."""
    steps = [step for step in bucket.steps if step is not None]
    if steps:
        torch._foreach_add_(steps, 1 if around.found_inf is None else 1 - around.found_inf)
    if kind.rule.direction is not None:
        bucket.grads = kind.rule.direction(kind, bucket, optimizer.param_groups, around.factor, around.found_inf)
        kind, around = kind._replace(gradient=bucket.grads[0].dtype), around._replace(factor=None)
    if kind.device.type == "cpu" and dispatch.asked() is None and _has_aten(kind):
        _aten(optimizer, kind, bucket, around)
        return
    widest = max((kind.parameter, kind.gradient), key=lambda dtype: dtype.itemsize)
    elements = max(p.numel() for p in bucket.params)
    backend = dispatch.preferred(kind.rule, kind.device.type, widest, elements).backend
    if backend == "triton" and kind.dense:
        _triton(optimizer, kind, bucket, around)
    else:
        _one_by_one(optimizer, kind, bucket, around, compiled=backend == "compile")


def _has_aten(kind: Kind) -> bool:
    # In bfloat16 and float16, torch 2.11's fused SGD is wrong on the CPU, and the fused Adam divides float16 by zero.
    alike = kind.parameter == kind.gradient == kind.state and kind.parameter in (torch.float32, torch.float64)
    return kind.rule.aten is not None and kind.dense and alike


def _aten(optimizer: FusedStep, kind: Kind, bucket: Bucket, around: Around) -> None:
    assert kind.rule.aten is not None
    scale = None if around.factor is None else 1.0 / around.factor
    calls = list(zip(bucket.groups, bucket.first, strict=True))
    for call in dict.fromkeys(calls):
        own = [i for i, its in enumerate(calls) if its == call]
        params, grads = ([row[i] for i in own] for row in (bucket.params, bucket.grads))
        steps = [step for i in own if (step := bucket.steps[i]) is not None]
        states = [list(row) for row in zip(*(bucket.states[i] for i in own), strict=True)]
        index, first = call
        hyper = kind.rule.hyper(optimizer.param_groups[index])
        kind.rule.aten(FusedCall(params, grads, states, steps, hyper, kind.options, first, scale))
    averages = [a for a in bucket.averages if a is not None]
    if averages:
        torch._foreach_lerp_(averages, [p.to(averages[0].dtype) for p in bucket.params], around.weight)
    if "clear" in kind.options:
        torch._foreach_zero_(bucket.grads)


def _one_by_one(optimizer: FusedStep, kind: Kind, bucket: Bucket, around: Around, *, compiled: bool) -> None:
    if around.found_inf is not None and around.found_inf:
        return
    scalars: dict[Any, Tensor] = {}
    for i, p in enumerate(bucket.params):
        step, index = bucket.steps[i], bucket.groups[i]
        now: Any = step
        if step is not None:
            now = step.item() if step.device.type == "cpu" else step.double()
        if (index, now) not in scalars:
            hyper = kind.rule.hyper(optimizer.param_groups[index])
            scalars[index, now] = _numbers(kind.rule.scalars(hyper, now), p)
        keys = None
        if "stochastic" in kind.options:
            whole = now.long() if isinstance(now, Tensor) else int(now)
            keys = _numbers(random_keys(around.seed, bucket.numbers[i], whole), p, torch.int64)
        states, scales = _three(bucket.states[i]), _three(bucket.scales[i])
        tensors = (p, bucket.grads[i], *states, *scales, bucket.averages[i], bucket.lost[i])
        if kind.dense:
            tensors = tuple(None if t is None else t.as_strided((t.numel(),), (1,)) for t in tensors)
        operands = (*tensors, scalars[index, now], around.factor, keys)
        options = {
            "reference": kind.rule.reference,
            "options": kind.options,
            "first": bucket.first[i],
            "weight": around.weight,
        }
        if compiled and p.numel() >= dispatch.SMALLEST_COMPILED:
            compiled_call(update, operands, options)
        else:
            update(*operands, **options)  # type: ignore[arg-type]  # one tuple for both calls


def _three(states: tuple[Tensor, ...]) -> tuple[Tensor | None, ...]:
    return (*states, None, None, None)[:3]


def _numbers(values: Any, p: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Numbers, some of them perhaps on p's device already, as one tensor there."""
    dtype = dtype or torch.promote_types(p.dtype, torch.float32)
    if not any(isinstance(value, Tensor) for value in values):
        return torch.tensor(values, dtype=dtype, device=p.device)
    return torch.stack([torch.as_tensor(value, dtype=dtype, device=p.device).reshape(()) for value in values])


def _triton(optimizer: FusedStep, kind: Kind, bucket: Bucket, around: Around) -> None:
    from ..triton import optimizers as kernels

    states, scales = (
        [list(row) for row in zip(*map(_three, columns), strict=True)] for columns in (bucket.states, bucket.scales)
    )
    roles: list[list[Any]] = [bucket.params, bucket.grads, bucket.steps, *states, bucket.averages, bucket.lost, *scales]
    keys = [key(around.seed, number) for number in bucket.numbers]
    own = sorted(set(bucket.groups))
    hyper = [kind.rule.hyper(optimizer.param_groups[g]) for g in own]
    index = kind.device.index
    with contextlib.nullcontext() if index is None else torch.accelerator.device_index(index):
        table = kernels.table(roles, list(map(own.index, bucket.groups)), keys, bucket.first, hyper)
        kernels.step(
            kind.rule.name,
            table,
            len(bucket.states[0]),
            kind.options,
            factor=around.factor,
            found_inf=around.found_inf,
            average=around.weight,
        )
        if kind.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            optimizer.captured.append(table)
