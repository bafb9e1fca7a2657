"""Freed memory that the process keeps: counted in page faults, which are the same on every machine."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

from braze.benchmarks import freed_memory
from braze.layouts import keep_freed_memory

glibc = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the C library is not glibc")

#: The page faults of tensors whose memory tensors before them have freed. Not from the first on: glibc 2.36 asks for a
#: little more than a tensor has, to align it, and may find a second place for the second one.
FAULTS = """
import resource, sys, torch
from braze.layouts import keep_freed_memory

if sys.argv[1] == "kept" and not keep_freed_memory():
    sys.exit("glibc does not serve malloc")
for step in range(8):
    if step == 4:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(2**27, dtype=torch.uint8)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(way: str) -> int:
    done = subprocess.run([sys.executable, "-c", FAULTS, way], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


@glibc
def test_tensors_get_the_pages_of_those_before() -> None:
    assert 10 * faults("kept") < faults("given back")


def test_other_c_libraries_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "libc_ver", lambda: ("", ""))
    monkeypatch.setattr("ctypes.CDLL", None)
    assert not keep_freed_memory()


@glibc
def test_both_ways_of_a_model_are_measured_in_turns() -> None:
    pytest.importorskip("timm")
    records = list(freed_memory.measure("vit-b", "quick", 2))
    assert [(r["pass"], r["provider"]) for r in records] == [
        (which, way) for which in ("inference", "training") for way in (freed_memory.KEPT, freed_memory.GIVEN_BACK)
    ]
    assert all(r["median_ms"] > 0 and r["process_bytes"] > 0 and r["page_faults"] >= 0 for r in records)
    assert ["ratio" in r for r in records] == [False, True, False, True]
