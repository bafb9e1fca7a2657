"""Compiling the launches that an operator makes for GPUs that are not there, and reading the machine code.

A stand-in driver names the target; every launch inside :func:`compiled` is compiled for each target, with the dtypes,
alignments and constants of its real arguments, and is not run. The assembler and disassembler come with Triton.
"""

from __future__ import annotations

import functools
import os
import re
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

#: GPU architectures by the names that they go by: backend, architecture, threads in a warp.
TARGETS: dict[str, tuple[str, int | str, int]] = {
    "sm_80": ("cuda", 80, 32),  # A100
    "sm_90": ("cuda", 90, 32),  # H100
    "sm_100": ("cuda", 100, 32),  # B200
    "gfx942": ("hip", "gfx942", 64),  # MI300X
}


class Code(NamedTuple):
    """What a kernel became. Widths are bits for each thread; 0 where there is no such access."""

    kernel: str
    target: str
    warps: int
    registers: int
    #: Bytes of stack and local memory for each thread: registers that did not fit.
    spills: int
    widest_load: int
    widest_store: int
    #: The part of the bytes in load and store instructions that accesses of 128 bits or more carry.
    wide: float


@contextmanager
def compiled(targets: Sequence[str] = tuple(TARGETS)) -> Iterator[list[Code]]:
    """Compile every Triton launch inside the block for ``targets`` instead of running it.

    Pass tensors on the ``meta`` device: nothing reads them.

    Raises:
        RuntimeError: if Triton was imported with TRITON_INTERPRET=1.
    """
    from triton import knobs
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    if knobs.runtime.interpret:
        raise RuntimeError("TRITON_INTERPRET=1 leaves nothing to compile; unset it before triton is imported")
    codes: list[Code] = []
    stand_in = _StandIn()
    launch = JITFunction.run

    def compile_for_all(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        for target in targets:
            stand_in.target = target
            codes.append(_read(target, launch(self, *args, grid=grid, warmup=True, **kwargs)))

    with mock.patch.object(JITFunction, "run", compile_for_all), mock.patch.object(driver, "_active", stand_in):
        yield codes


class _StandIn:
    """What the compiler asks of a GPU driver. One device number for each target keeps Triton's caches apart."""

    target = "sm_90"

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget(*TARGETS[self.target])

    def get_current_device(self) -> int:
        return list(TARGETS).index(self.target)

    def get_current_stream(self, device: int) -> int:
        return 0


def _read(target: str, kernel: Any) -> Code:
    if "cubin" in kernel.asm:
        registers, spills, instructions = _read_cubin(kernel.asm["cubin"])
    else:
        registers, spills, instructions = _read_amdgcn(kernel.asm["amdgcn"])
    loads = [width for is_load, width in instructions if is_load]
    stores = [width for is_load, width in instructions if not is_load]
    widths = loads + stores
    return Code(
        kernel=kernel.metadata.name,
        target=target,
        warps=kernel.metadata.num_warps,
        registers=registers,
        spills=spills,
        widest_load=max(loads, default=0),
        widest_store=max(stores, default=0),
        wide=sum(width for width in widths if width >= 128) / max(sum(widths), 1),
    )


_Accesses = list[tuple[bool, int]]


@functools.cache
def _read_cubin(cubin: bytes) -> tuple[int, int, _Accesses]:
    from triton.backends import nvidia

    cuobjdump = Path(nvidia.__file__).parent / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [os.fspath(cuobjdump), "--dump-resource-usage", "--dump-sass", file.name]
        text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    usage = re.search(r"REG:(\d+) STACK:(\d+) .*?LOCAL:(\d+)", text)
    if usage is None:
        raise RuntimeError(f"cuobjdump named no resource usage; it printed:\n{text[:500]}")
    accesses = [
        (kind == "LDG", _nvidia_width(modifiers)) for kind, modifiers in re.findall(r"\b(LDG|STG)((?:\.\w+)+)", text)
    ]
    return int(usage[1]), int(usage[2]) + int(usage[3]), accesses


def _nvidia_width(modifiers: str) -> int:
    found = re.search(r"\.[US]?(8|16|64|128|256)(?:\.|$)", modifiers)
    return int(found[1]) if found else 32


_AMD_WIDTHS = {"byte": 8, "short": 16, "dword": 32, "dwordx2": 64, "dwordx3": 96, "dwordx4": 128}


@functools.cache
def _read_amdgcn(text: str) -> tuple[int, int, _Accesses]:
    def metadata(name: str) -> int:
        found = re.search(rf"\.{name}:\s+(\d+)", text)
        if found is None:
            raise RuntimeError(f"the AMD assembly has no .{name}")
        return int(found[1])

    accesses = [
        (kind == "load", _AMD_WIDTHS[width])
        for kind, width in re.findall(r"\b(?:global|buffer)_(load|store)_[us]?(byte|short|dwordx[234]|dword)\b", text)
    ]
    return metadata("vgpr_count"), metadata("private_segment_fixed_size"), accesses
