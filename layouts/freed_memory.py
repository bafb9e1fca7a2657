"""Memory that CPU tensors freed, kept for the next ones."""

from __future__ import annotations

import ctypes
import platform
from typing import Any

#: Of mallopt(3), as malloc.h numbers them.
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4


def keep_freed_memory() -> bool:
    """Keep what CPU tensors free in the process, for the next ones, in place of giving it back to the system.

    PyTorch takes the memory of a CPU tensor from ``malloc``. That of glibc maps a large block for itself alone and
    unmaps it when the tensor goes, and gives back what is free at the end of the heap. A training step allocates what
    the step before has freed, so that in each of them the kernel has to find and clear all of these pages again, one
    page fault for every 4 KiB. After this call blocks of any size come from the heap, which does not shrink.

    It holds for the whole process, from now on, and cannot be taken back. The process stays as large as it once was,
    and free blocks that lie scattered in the heap may be too small for a large tensor, so that it grows. Other threads
    than the main one have heaps of 64 MiB, which glibc does give back. CUDA tensors have an allocator of PyTorch's own,
    which does the same for them.

    Returns:
        Whether glibc serves ``malloc`` and took the settings. Where it does not, because the system has another C
        library or an allocator was preloaded (jemalloc, tcmalloc), nothing is done.

    Source: mallopt(3).
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    glibc, loaded = ctypes.CDLL("libc.so.6"), ctypes.CDLL(None)
    if _address(glibc.malloc) != _address(loaded.malloc):
        return False
    return all(glibc.mallopt(option, value) for option, value in ((M_MMAP_MAX, 0), (M_TRIM_THRESHOLD, -1)))


def _address(function: Any) -> int | None:
    return ctypes.cast(function, ctypes.c_void_p).value
