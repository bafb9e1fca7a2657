"""Measured launch parameters: where they come from, what they change, and that results do not depend on them."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed: no kernel to launch")

from braze.kernels import OPS, RMS_NORM
from braze.kernels.op import Op
from braze.kernels.triton import launch_table, norm
from braze.kernels.triton.launch_table import Ask

from .contract import Case, check_against_reference

in_the_interpreter = pytest.mark.skipif(torch.cuda.is_available(), reason="writes the interpreter's table")


def asks(case: Case) -> list[Ask]:
    """What the launches of a call, forward and backward, ask."""
    found: dict[Ask, None] = {}
    with launch_table.answering(lambda ask: found.setdefault(ask)):
        check_against_reference(case, "triton")
    return list(found)


def scaled(ask: Ask, only: str | None, factor: float) -> dict[str, int]:
    """The free parameters of an ask, the only one of a name or all of them times ``factor``, but at least 1."""
    return {name: max(1, int(n * factor)) if only in (None, name) else n for name, n in ask.free}


def sizes(op: Op) -> Iterator[dict[str, int]]:
    """Small sizes with ragged ends, and, one by one, the largest of each dim: rows longer than a program holds."""
    least = {name: min(n for n in tested if n > 1) for name, tested in op.dims.items()}
    fitting = itertools.product(*([n for n in tested if n <= 129] for tested in op.dims.values()))
    yield dict(zip(op.dims, max((f for f in fitting if math.prod(f) <= 2000), key=math.prod), strict=True))
    for name, tested in op.dims.items():
        if max(tested) > 129 and math.prod({**least, name: max(tested)}.values()) <= 150_000:
            yield {**least, name: max(tested)}


with_kernels = pytest.mark.parametrize("op", [op for op in OPS if "triton" in op.impls], ids=str)


@with_kernels
def test_no_result_depends_on_a_free_parameter(op: Op, device: str) -> None:
    """Each parameter halved and doubled by itself; in every variant, and at large sizes, all of them together.

    The interpreter has no warps: those are for a GPU to judge, as the search does.
    """
    small, *large = (Case(op, dims, torch.float32, device=device) for dims in sizes(op))
    names = {name for ask in asks(small) for name, _ in ask.free}
    assert "num_warps" in names
    variants = (dataclasses.replace(small, variant=variant) for variant in op.variants)
    changed = [*((small, name) for name in names - {"num_warps"}), *((case, None) for case in (*variants, *large))]
    for case, only in changed:
        for factor in (0.5, 2):
            with launch_table.answering(lambda ask, only=only, factor=factor: scaled(ask, only, factor)):
                check_against_reference(case, "triton")


def test_the_check_above_sees_a_block_that_is_not_free(monkeypatch: pytest.MonkeyPatch, device: str) -> None:
    """Half of the block that has to cover a row leaves the other half unwritten."""
    case = Case(RMS_NORM, {"N": 3, "D": 129}, torch.float32, device=device)
    assert {name for ask in asks(case) for name, _ in ask.free} == {"BLOCK_N", "num_warps", "programs"}

    def halved(*asked: Any, **fixed: Any) -> dict[str, Any]:
        return launch_table.measured(*asked, **{**fixed, "BLOCK_D": fixed["BLOCK_D"] // 2})

    monkeypatch.setattr(norm, "measured", halved)
    with pytest.raises(AssertionError):
        check_against_reference(case, "triton")


#: A class of shapes: every row of 65 to 128 elements, in whatever number.
CLASS = [{"N": 2, "D": 128}, {"N": 33, "D": 65}, {"N": 129, "D": 127}]


@pytest.fixture
def table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The file of the interpreter's device, which nothing is in yet."""
    monkeypatch.setattr(launch_table, "FOLDER", tmp_path)
    launch_table.forget()
    yield tmp_path / "cpu.json"
    launch_table.forget()


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """The constants of norm's launches, as they come."""
    found: list[dict[str, Any]] = []
    launch = norm.launch

    def noted(kernel: Any, grid: Any, *arguments: Any, **meta: Any) -> None:
        found.append({"kernel": kernel, "grid": grid, **meta})
        launch(kernel, grid, *arguments, **meta)

    monkeypatch.setattr(norm, "launch", noted)
    return found


def blocks(launched: list[dict[str, Any]], kernel: Any) -> set[tuple[int, int]]:
    return {(meta["BLOCK_N"], meta["num_warps"]) for meta in launched if meta["kernel"] is kernel}


@in_the_interpreter
def test_an_entry_changes_what_is_launched_and_no_result(table: Path, launched: list[dict[str, Any]]) -> None:
    cases = [Case(RMS_NORM, dims, torch.float32) for dims in CLASS]
    forward, backward = asks(cases[0])
    assert asks(cases[1]) == asks(cases[2]) == [forward, backward]
    assert blocks(launched, norm._forward) == {(32, 8)}
    launched.clear()
    table.write_text(
        launch_table.text("cpu", [launch_table.to_json(forward, {"BLOCK_N": 4, "num_warps": 2, "programs": 16})])
    )
    launch_table.forget()
    for case in cases:
        check_against_reference(case, "triton")
    assert blocks(launched, norm._forward) == {(4, 2)}
    assert blocks(launched, norm._backward) == {(32, 8)}  # of which the table says nothing
    assert max(meta["grid"][0] for meta in launched if meta["kernel"] is norm._forward) == 16


@in_the_interpreter
def test_an_entry_speaks_for_its_own_question_only(table: Path, launched: list[dict[str, Any]]) -> None:
    (ask, _) = asks(Case(RMS_NORM, CLASS[1], torch.float32))
    table.write_text(
        launch_table.text("cpu", [launch_table.to_json(ask, {"BLOCK_N": 4, "num_warps": 2, "programs": 16})])
    )
    launch_table.forget()
    launched.clear()
    others = [
        Case(RMS_NORM, CLASS[1], torch.bfloat16),
        Case(RMS_NORM, {"N": 33, "D": 129}, torch.float32),
        Case(next(op for op in OPS if op.name == "layer_norm"), CLASS[1], torch.float32),
        Case(next(op for op in OPS if op.name == "add_rms_norm"), CLASS[1], torch.float32),
    ]
    for case in others:
        check_against_reference(case, "triton")
    assert launched
    assert all(meta["BLOCK_N"] != 4 for meta in launched)


@in_the_interpreter
def test_a_table_is_read_once(table: Path, launched: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch) -> None:
    reads: list[Path] = []
    read = launch_table.read
    monkeypatch.setattr(launch_table, "read", lambda file: (reads.append(file), read(file))[1])
    for _ in range(3):
        check_against_reference(Case(RMS_NORM, CLASS[0], torch.float32), "triton")
    assert reads == [table]


ENTRY: dict[str, Any] = {
    "kernel": "norm._forward", "operands": ["bfloat16", "absent", "number"], "fixed": {"CENTER": True, "SLOPE": 0.1},
    "reasoned": {"BLOCK_N": 2, "num_warps": 4}, "measured": {"BLOCK_N": 1, "num_warps": 8},
}  # fmt: skip


def test_an_entry_is_what_was_asked_and_answered() -> None:
    ask = launch_table.from_json(json.loads(json.dumps(ENTRY)))
    assert ask.operands == (torch.bfloat16, None, float)
    assert launch_table.to_json(ask, ENTRY["measured"]) == ENTRY


@pytest.mark.parametrize("measured", [{"BLOCK_N": 1}, {"BLOCK_N": 3, "num_warps": 8}, {"BLOCK_N": 0, "num_warps": 8}])
def test_an_entry_that_cannot_be_launched_is_refused(measured: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=r"powers of two for \['BLOCK_N', 'num_warps'\], got \{'BLOCK_N': [013]"):
        launch_table.from_json({**ENTRY, "measured": measured})


@pytest.mark.parametrize(
    "text",
    ["", "[]", "{}", '{"entries": [{}]}', launch_table.text("A Device", [{**ENTRY, "operands": ["bfloat17"]}])],
    ids=["empty", "a list", "no entries", "an empty entry", "an unknown dtype"],
)
def test_a_file_that_is_no_table_is_named(text: str, tmp_path: Path) -> None:
    (tmp_path / "a-device.json").write_text(text)
    with pytest.raises(ValueError, match=r"a-device\.json must be a table of launch parameters.* delete it"):
        launch_table.read(tmp_path / "a-device.json")


def test_every_table_of_the_package_can_be_read() -> None:
    for file in Path(launch_table.__file__).with_name("launches").glob("*.json"):
        assert len(launch_table.read(file)) == len(json.loads(file.read_text())["entries"])
        assert launch_table.slug(json.loads(file.read_text())["device"]) == file.stem


def test_devices_have_files_of_their_own() -> None:
    assert launch_table.path("NVIDIA H100 80GB HBM3").name == "nvidia-h100-80gb-hbm3.json"
    assert launch_table.path("AMD Radeon RX 7900 XT/XTX").name == "amd-radeon-rx-7900-xt-xtx.json"
