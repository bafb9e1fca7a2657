"""Memory that is handed out holds NaN (integers: their maximum), so that an element which nobody wrote shows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor


def poison_compiled_code() -> None:
    """Fill the buffers of all code that is compiled for the CPU, which does not allocate them with torch.empty."""
    guards = torch._C._dynamo.guards
    empty = guards._empty_strided_cpu

    def poisoned(size: Sequence[int], stride: Sequence[int], dtype: torch.dtype) -> Tensor:
        if dtype.is_floating_point or dtype.is_complex:
            return empty(size, stride, dtype).fill_(float("nan"))
        return empty(size, stride, dtype).fill_(True if dtype == torch.bool else torch.iinfo(dtype).max)

    guards._empty_strided_cpu = poisoned


@contextmanager
def poisoned_allocations() -> Iterator[None]:
    """Have torch.empty fill what it returns: a mode in which the compiler makes other code, which is not what runs."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    assert torch.empty(1).isnan().all(), "torch.utils.deterministic.fill_uninitialized_memory is off"
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)
