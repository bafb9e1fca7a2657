"""What a machine can do at most, measured in the run whose figures are held against it."""

from __future__ import annotations

import functools
import subprocess
from collections.abc import Sequence
from typing import NamedTuple

import torch

from . import timing

ROUNDS = 7
#: Bytes of each of the two buffers of the copy, and the size of the square matrices: far beyond what fits into a cache.
CPU_COPY, CUDA_COPY = 512 * 2**20, 2 * 2**30
CPU_MATMUL, CUDA_MATMUL = 2048, 8192
#: Products that take as many seconds are long enough, and larger ones are not tried: where a processor has no
#: instructions for a dtype (bfloat16 with AVX2) one of 2048 takes more than a minute.
LONG_PRODUCT = 0.1
#: More floating-point operations than that for each byte that must move in float32: a matrix product bounds the
#: operator. At their benchmark sizes those without one have 5 at most (``dice_bce_loss``), those with one 54 at least.
MATMUL_INTENSITY = 25


class Ceilings(NamedTuple):
    """10⁹ bytes a second of a copy, read and written; 10¹² operations a second of a matrix product, by dtype.

    ``launch_us``: the microseconds that the host takes to queue a kernel of torch's own that does next to nothing.
    """

    copy_gbs: float
    matmul_tflops: dict[str, float]
    launch_us: float | None = None

    def matmul(self, dtype: torch.dtype) -> float | None:
        """The ceiling of a dtype, if it was measured."""
        return self.matmul_tflops.get(str(dtype))

    def seconds(self, dtype: torch.dtype, moved: float, flops: float) -> float | None:
        """The roofline: of the bytes, or of the matrix products if those take longer; None if theirs is not known."""
        copying = moved / (1e9 * self.copy_gbs)
        ceiling = self.matmul(dtype) if flops else float("inf")
        return None if ceiling is None else max(copying, flops / (1e12 * ceiling))


def measure(device: torch.device, dtypes: Sequence[torch.dtype]) -> Ceilings:
    """Medians of a few large copies and products. A GPU's are timed after a flush of its L2 cache."""
    gpu = device.type == "cuda"
    clock = timing.clock_for(device)
    matmuls = {str(dtype): _matmul_tflops(dtype, CUDA_MATMUL if gpu else CPU_MATMUL, device, clock) for dtype in dtypes}
    copy = _copy_gbs(CUDA_COPY if gpu else CPU_COPY, device, clock)
    return Ceilings(copy, matmuls, _launch_us(device) if gpu else None)


def clocks_mhz(device: torch.device) -> dict[str, int]:
    """The clocks of a GPU's multiprocessors and memory now, as fields of a record; nothing where nobody knows."""
    if device.type != "cuda":
        return {}
    names = {"sm_clock_mhz": "clocks.sm", "memory_clock_mhz": "clocks.mem"}
    query = ["nvidia-smi", f"--query-gpu={','.join(names.values())}", "--format=csv,noheader,nounits"]
    # By its name of its own: CUDA_VISIBLE_DEVICES numbers the devices anew for torch, and not for nvidia-smi.
    query += ["--id", f"GPU-{torch.cuda.get_device_properties(device).uuid}"]
    try:
        line = subprocess.run(query, capture_output=True, text=True, check=True, timeout=10).stdout.splitlines()[0]
        return {name: int(value) for name, value in zip(names, line.split(","), strict=True)}
    except (OSError, subprocess.SubprocessError, ValueError, IndexError):
        return {}


def _copy_gbs(size: int, device: torch.device, clock: timing.Clock) -> float:
    source = torch.ones(size, dtype=torch.int8, device=device)
    target = torch.empty_like(source)
    return 2 * size / _seconds(lambda: target.copy_(source), clock) / 1e9


def _matmul_tflops(dtype: torch.dtype, n: int, device: torch.device, clock: timing.Clock) -> float:
    size = n // 8
    while True:
        a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
        work = functools.partial(torch.matmul, a, b)
        work()  # the first one of all loads what it needs
        if size == n or clock(work, 1) >= LONG_PRODUCT:
            return 2 * size**3 / _seconds(work, clock) / 1e12
        size *= 2


def _seconds(work: timing.Work, clock: timing.Clock, repetitions: int = 1) -> float:
    return timing.compare({"it": work}, clock, ROUNDS, repetitions).quartiles("it").median


def _launch_us(device: torch.device) -> float:
    return 1e6 * _seconds(torch.zeros(1, device=device).zero_, timing.host_clock, repetitions=200)
