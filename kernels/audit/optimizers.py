"""The audit of the optimizers' kernels: ``python -m braze.kernels.audit.optimizers traffic|code [TARGET …]``.

It prints a JSON record a line, for each thing that a step may do.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..optim import quantization
from .machine_code import TARGETS, Compiled, compiled, read
from .traffic import metered

#: Elements of the parameters that are updated together: one of many tiles, one of a part of a tile.
SIZES = (64 * 2048, 1000)


class Case(NamedTuple):
    """A step: the rule, its states, what it does besides, and the dtypes of parameters and states."""

    rule: str
    states: int
    options: tuple[str, ...]
    parameter: torch.dtype = torch.float32
    state: torch.dtype = torch.float32


#: Each rule as it is used most, and AdamW with all that may surround it, for three roundings; all with states in 8
#: bits, whose dtype is int8 here.
CASES = {
    "SGD": Case("sgd", 0, ()),
    "SGD, momentum": Case("sgd", 1, ("momentum",)),
    "SGD, Nesterov momentum": Case("sgd", 1, ("momentum", "nesterov", "maximize")),
    "Adam": Case("adam", 2, ("step",)),
    "Adam, AMSGrad": Case("adam", 3, ("step", "amsgrad")),
    "AdamW": Case("adam", 2, ("step", "decoupled")),
    "AdamW, averaged and cleared": Case("adam", 2, ("step", "decoupled", "average", "clear")),
    "AdamW, bfloat16, stochastic": Case("adam", 2, ("step", "decoupled", "stochastic"), torch.bfloat16),
    "AdamW, bfloat16 states too": Case(
        "adam", 2, ("step", "decoupled", "stochastic"), torch.bfloat16, torch.bfloat16
    ),
    "AdamW, bfloat16, Kahan": Case("adam", 2, ("step", "decoupled", "kahan"), torch.bfloat16),
    "Lion": Case("lion", 1, ()),
    "SGD, momentum, 8-bit states": Case("sgd", 1, ("momentum",), state=torch.int8),
    "Adam, AMSGrad, 8-bit states": Case("adam", 3, ("step", "amsgrad"), state=torch.int8),
    "AdamW, 8-bit states": Case("adam", 2, ("step", "decoupled"), state=torch.int8),
    "AdamW, averaged, 8-bit states, stochastic": Case(
        "adam", 2, ("step", "decoupled", "average", "stochastic"), state=torch.int8
    ),
    "AdamW, bfloat16, stochastic, 8-bit states": Case(
        "adam", 2, ("step", "decoupled", "stochastic"), torch.bfloat16, torch.int8
    ),
    "Lion, 8-bit states": Case("lion", 1, (), state=torch.int8),
}  # fmt: skip


def least_bytes(case: Case, sizes: Sequence[int] = SIZES) -> int:
    """What a step of parameters of these sizes must move: all but the gradient is read and written."""
    bytes_each = 2 * case.parameter.itemsize + case.parameter.itemsize + 2 * case.states * case.state.itemsize
    bytes_each += 2 * torch.float32.itemsize if "average" in case.options else 0
    bytes_each += case.parameter.itemsize if "clear" in case.options else 0
    bytes_each += 2 * case.parameter.itemsize if "kahan" in case.options else 0
    scales = sum(map(quantization.blocks, sizes)) if case.state == torch.int8 else 0
    return sum(sizes) * bytes_each + 2 * case.states * scales * torch.float32.itemsize


def launches(case: Case, device: str) -> None:
    """The step."""
    from ..triton import optimizers as kernels

    def each(dtype: torch.dtype, wanted: bool = True) -> list[Tensor | None]:
        return [torch.zeros(size, dtype=dtype, device=device) if wanted else None for size in SIZES]

    states = [each(case.state, s < case.states) for s in range(3)]
    scales: list[list[Tensor | None]] = [[None] * len(SIZES)] * 3
    for s in range(case.states if case.state == torch.int8 else 0):
        scales[s] = [torch.zeros(quantization.blocks(size), device=device) for size in SIZES]
    averages = each(torch.float32, "average" in case.options)
    lost = each(case.parameter, "kahan" in case.options)
    steps = [torch.ones((), device=device) for _ in SIZES]
    roles: list[list[Any]] = [each(case.parameter), each(case.parameter), steps, *states, averages, lost, *scales]
    hyper = [[0.1] * {"sgd": 4, "adam": 5, "lion": 4}[case.rule]]
    table = kernels.table(roles, [0, 0], [1, 2], [False, False], hyper)
    number = torch.zeros((), device=device)
    kernels.step(case.rule, table, case.states, case.options, factor=number, found_inf=number, average=0.1)


def traffic(targets: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Bytes moved, and the least that could be; there are no targets."""
    for name, case in CASES.items():
        with metered() as meter:
            launches(case, "cpu")
        moved, least = meter.moved["_step"], least_bytes(case)
        yield {"case": name, "bytes": moved, "least_bytes": least, "ratio": moved / least}


def code(targets: Sequence[str]) -> Iterator[dict[str, Any]]:
    """A record for each case and target."""
    found: list[tuple[str, Compiled]] = []
    for name, case in CASES.items():
        with compiled(targets) as kernels:
            launches(case, "meta")
        found += [(name, kernel) for kernel in kernels]
    for (name, _), kernel in zip(found, read([kernel for _, kernel in found]), strict=True):
        yield {"case": name, **kernel._asdict()}


if __name__ == "__main__":
    for record in {"traffic": traffic, "code": code}[sys.argv[1]](sys.argv[2:] or tuple(TARGETS)):
        print(json.dumps(record), flush=True)
