"""The kernels, judged with no GPU: bytes, spills, access width, targets. And the audit itself, on known kernels."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any, Literal

import pytest
from hypothesis import settings
from packaging.version import Version

from braze.kernels.audit.cases import audited_operators
from braze.kernels.audit.child import Auditor, audit_others
from braze.kernels.audit.machine_code import TARGETS
from braze.kernels.op import Op

_TRITON = importlib.util.find_spec("triton") is not None
pytestmark = pytest.mark.skipif(not _TRITON, reason="Triton is not installed: no kernel to audit")

#: Where an older Triton stores rows two bytes at a time, which 3.9 stores sixteen at a time.
NARROW = (
    {("image_normalize", "gfx942")}
    if _TRITON and Version(importlib.metadata.version("triton")) < Version("3.9")
    else ()
)
#: A token with a gate or a scale of its own has a program of its own: 256 elements of bfloat16 are 512 bytes, of which
#: each of AMD's 64 lanes has 64 bits.
SHORT = {"target": "gfx942", "variant": "for each token", "dtype": "bfloat16"}


def widest(record: dict[str, Any]) -> int:
    """The widest access that there can be, up to 128 bits."""
    return 64 if record.items() >= SHORT.items() and record["shape"]["D"] == 256 else 128


def in_one_process(op: Op, *more: Any, id: str) -> Any:
    """A parameter set whose tests share a worker, because they share the audit of an operator."""
    return pytest.param(op, *more, id=id, marks=pytest.mark.xdist_group(f"audit of {op}"))


each_op = pytest.mark.parametrize("op", [in_one_process(op, id=str(op)) for op in audited_operators()])
each_pass = pytest.mark.parametrize(
    ("op", "which"),
    [
        in_one_process(op, which, id=f"{op}-{which}")
        for op in audited_operators()
        for which in ("forward", "backward")
        if which == "forward" or op.differentiable
    ],
)


def targets(op: str | None = None) -> set[str]:
    """Machine code takes much of the suite's time: the short profile makes it for one target in turn besides sm_90."""
    if settings.get_current_profile_name() == "deep":
        return set(TARGETS)
    others = [target for target in TARGETS if target != "sm_90"]
    place = 0 if op is None else [str(audited) for audited in audited_operators()].index(op)
    return {"sm_90", others[place % len(others)]}


_auditors: dict[str, Auditor] = {}


@pytest.fixture(scope="module", autouse=True)
def _auditors_end() -> Iterator[None]:
    yield
    while _auditors:
        _auditors.popitem()[1].close()


@cache
def audited(what: Literal["traffic", "code"], op: str) -> list[dict[str, Any]]:
    if what not in _auditors:
        _auditors[what] = Auditor(what)
    return _auditors[what].audit(quick=True, ops=[op], targets=sorted(targets(op)) if what == "code" else ())


def records(what: Literal["traffic", "code"], op: Op, which: str) -> list[dict[str, Any]]:
    found = [r for r in audited(what, op.name) if r["pass"] == which]
    assert found, f"the audit of {what} has nothing on the {which} pass of {op}"
    return found


@each_pass
def test_moves_the_least_bytes_or_says_why(op, which):
    for record in records("traffic", op, which):
        call = f"{record['variant']} {record['dtype']} {record['shape']}"
        assert record["ratio"] > 0.98, f"{call}: a launch went unseen, or the least is not the least"
        assert record["ratio"] <= (record["allowed_ratio"] or 1.02), call


@each_op
def test_stated_reasons_are_needed(op):
    for (variant, which), excess in op.excess.items():
        ratios = [r["ratio"] for r in records("traffic", op, which) if r["variant"] == variant]
        assert ratios, f"{op} states a reason for {variant!r}, which it has not"
        assert max(ratios) > 1.02, f"{op} {variant} {which} no longer needs: {excess.reason}"


@each_pass
def test_no_register_spills(op, which):
    found = records("code", op, which)
    assert {r["target"] for r in found} == targets(op.name)
    assert [r for r in found if r["spills"]] == []


@each_pass
def test_memory_is_accessed_128_bits_at_a_time(op, which):
    # Some kernels only write a number for each row, or for each column: those of the plain call, or of one variant.
    traffic = records("traffic", op, which)
    reductions = {r["variant"] for r in traffic if r["bytes_written"] <= r["bytes"] / 20}
    plain = traffic[0]["variant"]
    code = records("code", op, which)
    for target in targets(op.name) & {"sm_90", "gfx942"} - {target for name, target in NARROW if name == op.name}:
        calls: dict[str, list[dict[str, Any]]] = {}
        for record in code:
            if record["target"] == target and record["widest_load"] is not None:
                calls.setdefault(f"{record['variant']} {record['dtype']} {record['shape']}", []).append(record)
        assert calls
        for call, kernels in calls.items():
            least = widest(kernels[0])
            assert all(r["widest_load"] >= least for r in kernels), (call, kernels)
            if not {kernels[0]["variant"], plain} & reductions:
                assert max(r["widest_store"] for r in kernels) >= least, (call, kernels)


@pytest.mark.xdist_group("audit of vocab_parallel")
def test_kernels_of_classes_in_parts_move_the_least_bytes():
    found = audit_others("vocab_parallel", "traffic")
    assert {r["kernel"] for r in found} == {"_statistics", "_gradient"}
    for record in found:
        assert 0.98 < record["ratio"] <= 1.02, record


@pytest.mark.xdist_group("audit of vocab_parallel")
def test_kernels_of_classes_in_parts_spill_nothing_and_access_128_bits_at_a_time():
    found = audit_others("vocab_parallel", "code", sorted(targets()))
    assert {r["target"] for r in found} == targets()
    for record in found:
        assert record["spills"] == 0, record
        if record["target"] == "sm_90":
            assert record["widest_load"] >= 128, record
            # A row's statistics are numbers; the gradient is as large as the logits.
            assert record["kernel"] == "_statistics" or record["widest_store"] >= 128, record


def meter(what: str) -> Any:
    environment = {**os.environ, "TRITON_INTERPRET": "1" if what == "traffic" else "0"}
    command = [sys.executable, str(Path(__file__).with_name("audit_meter.py")), what]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_the_meter_counts_known_bytes():
    found = meter("traffic")
    assert found["copy"] == {"read": 4000, "written": 4000}
    assert found["copy twice"] == {"read": 8000, "written": 4000}
    assert found["atomic"]["read"] == found["atomic"]["written"] == 8 * 4
    assert found["plain operations"] == {"read": 4000, "written": 4000}


def test_the_machine_code_of_known_kernels_is_read_right():
    found = meter("code")
    for target in TARGETS:
        assert found["copy"][target]["spills"] == 0
        assert found["copy"][target]["widest_load"] == found["copy"][target]["widest_store"] == 128
        assert found["copy"][target]["wide"] == 1.0
        assert found["strided_copy"][target]["widest_load"] == found["strided_copy"][target]["widest_store"] == 32
        assert found["strided_copy"][target]["wide"] == 0.0
    for target in ("sm_80", "sm_90", "sm_100"):
        assert found["hoard"][target]["spills"] > 0
