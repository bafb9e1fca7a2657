"""Compiling the launches that an operator makes for GPUs that are not there, and reading the machine code.

A stand-in driver names the target; every launch inside :func:`compiled` is compiled for each target, with the dtypes,
alignments and constants of its real arguments, and is not run; :func:`read` then tells what became of them. The
assembler and disassembler come with Triton.
"""

from __future__ import annotations

import bisect
import functools
import itertools
import re
import struct
import subprocess
import tempfile
from collections.abc import Iterator, Mapping, Sequence
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


class Compiled(NamedTuple):
    """A kernel's machine code for one target: a CUDA object, or AMD's assembly."""

    kernel: str
    target: str
    warps: int
    code: bytes | str


class Code(NamedTuple):
    """What a kernel became. Widths are bits for each thread: 0 where there is no such access, None where not read."""

    kernel: str
    target: str
    warps: int
    registers: int
    #: Bytes of stack and local memory for each thread: registers that did not fit.
    spills: int
    widest_load: int | None
    widest_store: int | None
    #: The part of the bytes in load and store instructions that accesses of 128 bits or more carry.
    wide: float | None


@contextmanager
def compiled(targets: Sequence[str] = tuple(TARGETS)) -> Iterator[list[Compiled]]:
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
    kernels: list[Compiled] = []
    stand_in = _StandIn()
    launch = JITFunction.run

    def compile_for_all(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        for target in targets:
            stand_in.target = target
            nvidia_only = () if TARGETS[target][0] == "cuda" else ("maxnreg",)
            options = {name: value for name, value in kwargs.items() if name not in nvidia_only}
            kernel = launch(self, *args, grid=grid, warmup=True, **options)
            code = kernel.asm["cubin" if "cubin" in kernel.asm else "amdgcn"]
            kernels.append(Compiled(kernel.metadata.name, target, kernel.metadata.num_warps, code))

    with mock.patch.object(JITFunction, "run", compile_for_all), mock.patch.object(driver, "_active", stand_in):
        yield kernels


def read(kernels: Sequence[Compiled], disassembled: Sequence[str] = tuple(TARGETS)) -> list[Code]:
    """What each kernel became. NVIDIA code for a target that is not ``disassembled`` has no widths."""
    distinct = {k.code: k.target for k in kernels if isinstance(k.code, bytes) and k.target in disassembled}
    accesses: dict[bytes, _Accesses] = {}
    for target in set(distinct.values()):
        accesses |= _nvidia_accesses(target, [code for code, of in distinct.items() if of == target])
    return [_read(kernel, accesses) for kernel in kernels]


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


#: Width in bits of each load, and of each store.
_Accesses = dict[str, list[int]]


def _read(kernel: Compiled, nvidia: Mapping[bytes, _Accesses]) -> Code:
    accesses: _Accesses | None
    if isinstance(kernel.code, bytes):
        registers, spills = _resources(kernel.code)
        accesses = nvidia.get(kernel.code)
    else:
        registers, spills, accesses = _read_amdgcn(kernel.code)
    widest_load = widest_store = wide = None
    if accesses is not None:
        widest_load, widest_store = max(accesses["load"], default=0), max(accesses["store"], default=0)
        widths = accesses["load"] + accesses["store"]
        wide = sum(width for width in widths if width >= 128) / max(sum(widths), 1)
    return Code(kernel.kernel, kernel.target, kernel.warps, registers, spills, widest_load, widest_store, wide)


def _tool(name: str, option: Sequence[str], binary: bytes) -> str:
    from triton.backends import nvidia

    with tempfile.NamedTemporaryFile() as file:
        file.write(binary)
        file.flush()
        command = [str(Path(nvidia.__file__).parent / "bin" / name), *option, file.name]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout


@functools.cache
def _resources(cubin: bytes) -> tuple[int, int]:
    text = _tool("cuobjdump", ["--dump-resource-usage"], cubin)
    usage = re.search(r"REG:(\d+) STACK:(\d+) .*?LOCAL:(\d+)", text)
    if usage is None:
        raise RuntimeError(f"cuobjdump named no resource usage; it printed:\n{text[:500]}")
    return int(usage[1]), int(usage[2]) + int(usage[3])


def _nvidia_accesses(target: str, cubins: Sequence[bytes]) -> dict[bytes, _Accesses]:
    """Those of each kernel. The disassembler takes 0.5 s to start, so it is given all instructions in one file."""
    programs = [_instructions(cubin) for cubin in cubins]
    ends = list(itertools.accumulate(map(len, programs)))
    found: dict[bytes, _Accesses] = {cubin: {"load": [], "store": []} for cubin in cubins}
    listing = _tool("nvdisasm", ["--binary", f"SM{TARGETS[target][1]}"], b"".join(programs))
    for place, instruction in re.findall(r"/\*([0-9a-f]+)\*/\s+(.*)", listing):
        access = re.search(r"\b(LDG|STG)((?:\.\w+)+)", instruction)
        if access:
            of = cubins[bisect.bisect_right(ends, int(place, 16))]
            found[of]["load" if access[1] == "LDG" else "store"].append(_nvidia_width(access[2]))
    return found


def _instructions(cubin: bytes) -> bytes:
    """The code sections of a CUDA object, which is a 64-bit ELF file."""
    (table,) = struct.unpack_from("<Q", cubin, 40)
    size, count, names = struct.unpack_from("<3H", cubin, 58)
    sections = [struct.unpack_from("<IIQQQQ", cubin, table + number * size) for number in range(count)]
    texts = [s for s in sections if cubin.startswith(b".text.", sections[names][4] + s[0])]
    return b"".join(cubin[offset : offset + length] for *_, offset, length in texts)


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

    found: _Accesses = {"load": [], "store": []}
    for kind, width in re.findall(r"\b(?:global|buffer)_(load|store)_[us]?(byte|short|dwordx[234]|dword)\b", text):
        found[kind].append(_AMD_WIDTHS[width])
    return metadata("vgpr_count"), metadata("private_segment_fixed_size"), found
