"""One operator on one shape and dtype, as the ``ops`` benchmark measures it."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from braze.kernels.op import Call, Dims, Draw, Op

from . import timing
from .accuracy import leaves, tensors
from .ceilings import MATMUL_INTENSITY
from .records import Record

FORWARD, BACKWARD, BOTH = PASSES = ("forward", "backward", "forward+backward")
#: What a quick run shrinks its sizes to: forward passes take tenths of a millisecond there, on two cores.
QUICK_BYTES, QUICK_FLOPS = 4 * 2**20, 2**30

Function = Callable[..., Any]


@dataclass(frozen=True)
class Case:
    """One operator on one shape and dtype."""

    op: Op
    dims: Dims
    dtype: torch.dtype
    device: torch.device
    variant: str = "default"

    @property
    def options(self) -> dict[str, Any]:
        """What the operator's description is asked with."""
        return {**self.op.variants[self.variant], **self.dims}

    def call(self) -> Call:
        """The arguments: always the same, differentiable where they can be."""
        return self.op.inputs(Draw(0, self.dtype, self.device), **self.options)

    def passes(self) -> tuple[str, ...]:
        """What there is to time."""
        return PASSES if self.op.differentiable else (FORWARD,)

    def least_bytes(self, which: str, itemsize: int | None = None) -> int:
        """What the operator must move at least."""
        traffic = self.op.traffic(itemsize or self.dtype.itemsize, **self.options)
        return {FORWARD: traffic.forward, BACKWARD: traffic.backward, BOTH: sum(traffic)}[which]

    def matmul_flops(self, which: str) -> int | None:
        """The operations of an operator that matrix products bound: a backward pass has twice those of a forward pass.

        None of an operator of another kind, and of a backward pass alone, whose work may have been done forward.
        """
        bound = any(self.op.flops(**dims) > MATMUL_INTENSITY * 4 * _elements(self.op, dims) for dims in self.op.bench)
        return self.op.flops(**self.dims) * (3 if which == BOTH else 1) if bound and which != BACKWARD else None

    def tiny(self) -> Case:
        """The same operator at the least size above 1 that its tests have for each dim: some are not defined for 1."""
        return replace(self, dims={name: min(n for n in sizes if n > 1) for name, sizes in self.op.dims.items()})

    def work(self, which: str, function: Function, call: Call, cotangents: Sequence[Tensor]) -> timing.Work:
        """One pass of a step of training: the forward pass records its graph, the backward pass uses one up."""
        args, kwargs = call
        wanted = leaves(call)

        def forward() -> Sequence[Tensor]:
            return tensors(function(*args, **kwargs))

        def backward(outputs: Sequence[Tensor]) -> object:
            return torch.autograd.grad(outputs, wanted, cotangents)

        if which == FORWARD:
            return forward
        return timing.Prepared(forward, backward) if which == BACKWARD else lambda: backward(forward())

    def copy(self, which: str) -> timing.Work:
        """A copy that moves the operator's least bytes."""
        source = torch.ones(self.least_bytes(which) // 2, dtype=torch.int8, device=self.device)
        target = torch.empty_like(source)
        return lambda: target.copy_(source)

    def record(self, which: str, provider: str, **figures: Any) -> Record:
        """A flat record of one measurement."""
        sizes = " ".join(f"{name}={size}" for name, size in self.dims.items())
        return {
            "benchmark": "ops",
            "op": self.op.name,
            "provider": provider,
            "pass": which,
            "dtype": str(self.dtype).removeprefix("torch."),
            "shape": sizes if self.variant == "default" else f"{sizes}, {self.variant}",
            "device": device_name(self.device),
            "threads": torch.get_num_threads(),
            **figures,
        }


def device_name(device: torch.device) -> str:
    """The device as a reader should know it."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def cases(ops: Sequence[Op], dtypes: Sequence[torch.dtype], device: torch.device, *, quick: bool) -> Iterator[Case]:
    """Every benchmark size of every operator and its variants; ``quick``: one size of each, shrunk, in one dtype."""
    for op in ops:
        if quick:
            yield Case(op, quick_dims(op), dtypes[0], device)
            continue
        by_size = sorted(op.bench, key=lambda dims: _elements(op, dims))
        for dims, variant, dtype in itertools.product(by_size, op.bench_variants, dtypes):
            yield Case(op, dims, dtype, device, variant)


def quick_dims(op: Op) -> Dims:
    """The smallest benchmark size, its largest dim halved until few bytes and operations are left."""
    dims = dict(min(op.bench, key=lambda dims: _elements(op, dims)))
    while _elements(op, dims) * 4 > QUICK_BYTES or op.flops(**dims) > QUICK_FLOPS:
        longest = max(dims, key=lambda name: dims[name])
        dims[longest] //= 2
    return dims


def _elements(op: Op, dims: Dims) -> int:
    return op.traffic(1, **op.variants["default"], **dims).forward
