"""Kernels of known bytes and registers, and what the audit says of them: ``python audit_meter.py traffic|code``."""

from __future__ import annotations

import json
import sys

import torch
import triton
import triton.language as tl

from braze.kernels.audit.machine_code import compiled, read
from braze.kernels.audit.traffic import metered


@triton.jit
def copy(x, y, N, BLOCK: tl.constexpr, TWICE: tl.constexpr):
    n = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(x + n, n < N)
    if TWICE:
        value += tl.load(x + n, n < N)
    tl.store(y + n, value, n < N)


@triton.jit
def count(total, BLOCK: tl.constexpr):
    tl.atomic_add(total + tl.arange(0, BLOCK) % 2, 1.0)


@triton.jit
def strided_copy(x, y, N, step, BLOCK: tl.constexpr):
    n = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y + n * step, tl.load(x + n * step, n < N), n < N)


@triton.jit
def hoard(x, y, BLOCK: tl.constexpr):
    n = tl.arange(0, BLOCK)
    value = tl.load(x + n).to(tl.float32)
    total = tl.sum(value, 0)
    tl.store(y + n, value / total)


def traffic() -> dict[str, dict[str, int]]:
    x, y = torch.ones(1000), torch.empty(1000)
    found = {}
    for name, twice in (("copy", False), ("copy twice", True)):
        with metered() as meter:
            copy[(triton.cdiv(1000, 256),)](x, y, 1000, BLOCK=256, TWICE=twice)
        found[name] = {"read": meter.read.total(), "written": meter.written.total()}
    with metered() as meter:
        count[(1,)](torch.zeros(2), BLOCK=8)
        zeros = meter.moved["zeros"] + meter.moved["zero_"]
    found["atomic"] = {"read": meter.read["count"], "written": meter.written["count"], "zeros": zeros}
    with metered() as meter:
        (x[::2].contiguous() + 1).view(5, 100)[0]
    found["plain operations"] = {"read": meter.read.total(), "written": meter.written.total()}
    return found


def code() -> dict[str, dict[str, dict[str, object]]]:
    x = torch.empty(65_536, device="meta")
    found = {}
    with compiled() as kernels:
        copy[(1,)](x, x, 65_536, BLOCK=1024, TWICE=False, num_warps=4)
        strided_copy[(1,)](x, x, 65_536, 3, BLOCK=1024, num_warps=4)
        # 65,536 float32 values in 128 threads are 512 registers a thread; no NVIDIA GPU has more than 255.
        hoard[(1,)](x, x, BLOCK=65_536, num_warps=4)
    for kernel in read(kernels):
        found.setdefault(kernel.kernel, {})[kernel.target] = kernel._asdict()
    return found


if __name__ == "__main__":
    print(json.dumps({"traffic": traffic, "code": code}[sys.argv[1]]()))
