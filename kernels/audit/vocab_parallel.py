"""The audit of kernels of classes in parts: ``python -m braze.kernels.audit.vocab_parallel traffic|code [TARGET …]``.

No operator's call reaches them with no group of processes. It prints a JSON record a line, for each kernel, option,
size and dtype.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .machine_code import TARGETS, compiled, read
from .traffic import metered

NAME = "vocab_parallel"


class Case(NamedTuple):
    """Logits of N positions and the V classes of a process, and what is done with them."""

    options: str
    dtype: torch.dtype
    N: int
    V: int
    weighted: bool = False
    smoothed: bool = False
    softcap: float | None = None


#: Two blocks a row, and sixteen rows a block.
SIZES = ((16, 8192), (256, 256))
OPTIONS: dict[str, dict[str, Any]] = {
    "default": {},
    "smoothed": {"smoothed": True},
    "everything": {"weighted": True, "smoothed": True, "softcap": 30.0},
}
CASES = [
    Case(name, dtype, N, V, **options)
    for name, options in OPTIONS.items()
    for N, V in SIZES
    for dtype in (torch.bfloat16, torch.float32)
]


def launches(case: Case, device: str) -> dict[str, Callable[[], object]]:
    """Each kernel's, by its name."""
    from ..triton import vocab_parallel as kernels

    N, V = case.N, case.V
    x = torch.zeros(N, V, dtype=case.dtype, device=device)
    target = torch.zeros(N, dtype=torch.int64, device=device)
    weight = torch.ones(V, device=device) if case.weighted else None

    def row() -> Tensor:
        return torch.zeros(N, device=device)

    of_all = (row(), row(), row(), row(), row() if case.smoothed else None)
    options: dict[str, Any] = {"ignore_index": -100, "softcap": case.softcap, "smoothed": case.smoothed}
    return {
        "_statistics": lambda: kernels.statistics(x, target, weight, **options),
        "_gradient": lambda: kernels.gradient(x, target, weight, *of_all, softcap=case.softcap),
    }


def least_bytes(case: Case, kernel: str) -> int:
    """What a kernel must move: logits, places, and a few float32 for each position."""
    numbers, passes = (2 + case.smoothed, 1) if kernel == "_statistics" else (4 + case.smoothed, 2)
    return case.N * (passes * case.V * case.dtype.itemsize + 8 + 4 * numbers)


def facts(case: Case, kernel: str) -> dict[str, Any]:
    """What a record is about, in the words of an operator's."""
    return {
        "op": NAME,
        "provider": "triton",
        "variant": case.options,
        "dtype": str(case.dtype).removeprefix("torch."),
        "shape": {"N": case.N, "V": case.V},
        "pass": kernel.removeprefix("_"),
        "kernel": kernel,
    }


def traffic(case: Case) -> Iterator[dict[str, Any]]:
    """Bytes moved, and the least that could be."""
    for kernel, run in launches(case, "cpu").items():
        with metered() as meter:
            run()
        moved, least = meter.moved[kernel], least_bytes(case, kernel)
        counted = {"bytes": moved, "least_bytes": least, "ratio": moved / least, f"bytes of {kernel}": moved}
        yield {"measure": "traffic", **facts(case, kernel), **counted, "allowed_ratio": None, "reason": None}


def code(case: Case) -> Iterator[dict[str, Any]]:
    """A record for each target."""
    for kernel, run in launches(case, "meta").items():
        with compiled(sys.argv[2:] or tuple(TARGETS)) as kernels:
            run()
        for found in read(kernels, ("sm_90",)):
            yield {"measure": "code", **facts(case, kernel), **found._asdict()}


if __name__ == "__main__":
    # A cache has the weights for all but the first rows; its traffic is not the memory's.
    wanted = {"traffic": ("default", "smoothed"), "code": ("default", "everything")}[sys.argv[1]]
    audit = {"traffic": traffic, "code": code}[sys.argv[1]]
    for case in CASES:
        if case.options in wanted:
            for record in audit(case):
                print(json.dumps(record), flush=True)
