"""The demo's own measuring instruments, on runs whose figures are known."""

from __future__ import annotations

import pytest

pytest.importorskip("lightning", reason="needs the extra braze[bench]")
pytest.importorskip("rich", reason="needs the extra braze[bench]")

from braze.benchmarks import data, demo
from braze.benchmarks.result import BLOCK, PROFILED, Result


def test_ratios_pair_turns_and_leave_out_warm_up_and_profiled_steps() -> None:
    warm, profiled = [100.0] * BLOCK, [50.0] * PROFILED
    vanilla = Result(seconds=[*warm, *[1.0] * BLOCK, *[10.0] * BLOCK, *profiled])
    fused = Result(seconds=[*warm, *[2.0] * BLOCK, *[5.0] * BLOCK, *profiled])
    assert demo._paired_ratios(vanilla, fused) == [0.5, 2.0]


def test_no_file_is_in_both_halves_of_the_source_text() -> None:
    train, validation = data.source_text(256)
    assert len(train) > 5 * len(validation) > 0
    windows = {bytes(train[i].tolist()) for i in range(len(train))}
    shared = sum(bytes(validation[i].tolist()) in windows for i in range(len(validation)))
    assert shared == 0
