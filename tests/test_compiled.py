"""The compiled CPU forms: what compiles anew, and what must not."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._dynamo.utils import counters

from braze.kernels import RMS_NORM, compiled, rms_norm, special_functions, use_backend
from braze.kernels.by_rows import column_sum
from braze.kernels.exp_sums import peak_and_exp_sum
from braze.kernels.ops import binary_losses

from . import budget
from .poison import poisoned_allocations

SPECIAL: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "silu": F.silu,
}


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled, "_exact_calls", {})
    monkeypatch.setattr(compiled, "_flexible_calls", {})
    monkeypatch.setattr(compiled, "_shapes", {})
    monkeypatch.setattr(compiled, "_widths", {})
    monkeypatch.setattr(compiled, "_ran", set())
    monkeypatch.setattr(compiled, "MOST_SHAPES", 0)


def graphs() -> int:
    return counters["stats"]["unique_graphs"]


def check(rows: int, width: int, eps: float = 1e-6) -> None:
    x = torch.randn(rows, width, generator=torch.Generator().manual_seed(0))
    with use_backend("compile"), torch.no_grad():
        torch.testing.assert_close(rms_norm(x, eps=eps), RMS_NORM.reference(x, None, eps=eps, weight_offset=0.0))


def test_the_first_shapes_have_code_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled, "MOST_SHAPES", 2)
    before = graphs()
    for rows in (48, 33, 48, 33):
        check(rows, 64)
    assert len(compiled._exact_calls) == 2
    for rows in (2, 100, 48):
        check(rows, 64)
    assert len(compiled._exact_calls) == 2
    assert graphs() == before + 1  # for any number of rows


def test_each_stage_of_a_model_has_code_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled, "MOST_SHAPES", 1)
    before = graphs()
    for rows, width in ((48, 64), (24, 96), (12, 128), (6, 256)):
        check(rows, width)
    assert len(compiled._exact_calls) == 4
    assert graphs() == before
    for width in (512, 640):
        check(3, width)
    assert len(compiled._exact_calls) == 4
    assert graphs() == before + 1  # for any width


def test_code_of_a_shape_is_for_its_surroundings_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled, "MOST_SHAPES", 2)
    check(48, 64)
    check(48, 64, eps=0.5)
    with poisoned_allocations():
        check(48, 64)
    with torch.autocast("cpu", torch.bfloat16):
        check(48, 64)
    assert len(compiled._exact_calls) == 4


CALLS = """
import torch
from torch._dynamo.utils import counters
from braze.kernels import compiled, rms_norm, use_backend

compiled.MOST_SHAPES = 1
with use_backend("compile"), torch.no_grad():
    for rows in (48, 33):
        rms_norm(torch.randn(rows, 64))
print(*(counters["inductor"][f"fxgraph_cache_{event}"] for event in ("miss", "hit", "bypass")))
"""


def test_another_process_finds_the_code_on_disk(tmp_path: Path) -> None:
    """That of one shape, and that of any; not what was made for another number of threads."""
    for threads, found in (("1", "2 0 0"), ("1", "0 2 0"), ("2", "2 0 0")):
        environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path), "OMP_NUM_THREADS": threads}
        run = subprocess.run([sys.executable, "-c", CALLS], env=environment, capture_output=True, text=True, check=True)
        assert run.stdout.strip() == found


def test_another_number_of_rows_runs_the_same_code() -> None:
    check(48, 64)
    before = graphs()
    for rows in (2, 33, 100):
        check(rows, 64)
    assert graphs() == before


def test_options_are_constants_of_the_code() -> None:
    check(48, 64)
    before = graphs()
    check(48, 64, eps=0.5)
    assert graphs() == before + 1


def test_the_first_widths_have_code_of_their_own_and_the_others_share_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled, "MOST_WIDTHS", 1)
    before = graphs()
    check(48, 64)
    check(48, 80)
    assert graphs() == before + 2
    for width in (96, 33, 64):
        check(48, width)
    assert graphs() == before + 2


def test_sizes_on_all_sides_of_many_boundaries_run() -> None:
    """Dynamo gives up after eight variants, with an error."""
    boundaries = [2**i for i in range(3, 13)]

    def stepped(x: Tensor, *, factor: float) -> Tensor:
        return x * factor * sum(x.shape[0] > boundary for boundary in boundaries)

    before = graphs()
    for _ in range(2):
        for i, boundary in enumerate(boundaries):
            got = compiled.compiled_call(stepped, (torch.ones(boundary, 4),), {"factor": 0.5})
            torch.testing.assert_close(got, torch.full((boundary, 4), 0.5 * i))
    assert graphs() == before + len(boundaries)


@pytest.mark.parametrize("most_shapes", [0, 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", [4_096, 16_384, 16_385])
def test_a_long_row_of_equal_numbers_is_added_up_in_blocks(
    width: int, dtype: torch.dtype, most_shapes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compiled, "MOST_SHAPES", most_shapes)
    x = torch.full((2, width), 0.7373, dtype=dtype)
    total, mean = compiled.compiled_call(lambda x: (x.float().sum(-1), x.float().mean()), (x,), {})
    wide = x.double()
    errors = [(total.double() / wide.sum(-1) - 1.0).abs().max(), (mean.double() / wide.mean() - 1.0).abs()]
    assert max(errors) <= 8 * torch.finfo(torch.float32).eps  # in one go: 31 and 42


@pytest.mark.parametrize("most_shapes", [0, 1])
def test_many_rows_of_equal_numbers_are_added_up_in_blocks(most_shapes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled, "MOST_SHAPES", most_shapes)
    x = torch.full((65_539, 16), 0.7373)
    total = compiled.compiled_call(lambda x: column_sum(x[0], x), (x,), {})
    error = (total.double() / x.double().sum(0) - 1.0).abs().max()
    assert error <= 8 * torch.finfo(torch.float32).eps  # as a sum of 2,048 blocks: 47


@pytest.mark.parametrize("most_shapes", [0, 2], ids=["any shape", "one shape"])
def test_a_normalizer_in_blocks_knows_infinities(most_shapes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled, "MOST_SHAPES", most_shapes)
    x = torch.randn(6, 3_000) - 200.0  # where 0 is far above the maximum
    x[0, :1_024], x[1, 2_048:], x[2], x[3, -1], x[4, 0] = -torch.inf, -torch.inf, -torch.inf, torch.inf, torch.nan
    peak, total = compiled.compiled_call(peak_and_exp_sum, (x,), {"dim": 1})
    torch.testing.assert_close(peak, x.amax(1, keepdim=True), rtol=0, atol=0, equal_nan=True)
    truth = (x.double() - peak.double()).exp().sum(1, keepdim=True)
    truth[2] = 0.0  # of nothing
    torch.testing.assert_close(total.double(), truth, rtol=1e-5, atol=0, equal_nan=True)


def test_logarithms_are_right_to_the_last_bits() -> None:
    z = torch.linspace(0, 1, 200_000)[1:]
    errors = compiled.compiled_call(binary_losses._log1p, (z,), {}).double() / z.double().log1p() - 1
    assert errors.abs().max() <= 2 * torch.finfo(torch.float32).eps


@pytest.mark.parametrize("name", ["exp", "sigmoid"])
def test_exponentials_are_right_to_the_last_bits(name: str) -> None:
    function = getattr(torch, name)
    x = torch.cat(
        [torch.linspace(-86.9, 88.7228, 200_000), torch.logspace(-45, 0, 5_000), -torch.logspace(-45, 0, 5_000)]
    )
    errors = compiled.compiled_call(function, (x,), {}).double() / function(x.double()) - 1
    steps = 2 + (0 if special_functions.quick_bits() else x.abs())  # or as if x were rounded
    assert (errors.abs() <= steps * torch.finfo(torch.float32).eps).all()

    x = torch.tensor([-1e30, -1e3, -88.0, 88.73, 1e3, 1e30, torch.inf, -torch.inf, torch.nan, 0.0, -0.0]).repeat(3)
    got, truth = compiled.compiled_call(function, (x,), {}), function(x.double()).float()
    tiny = truth < 1.8e-38  # exp(−86.9): what is less may be 0
    torch.testing.assert_close(got[~tiny], truth[~tiny], rtol=0, atol=0, equal_nan=True)
    assert ((got[tiny] >= 0) & (got[tiny] <= 1.0001 * truth[tiny])).all()


def test_tanh_is_as_right_on_either_side() -> None:
    """Where it is nearly −1 or 1 an error is that of its slope, too, which a parameter's gradient adds up."""
    x = torch.linspace(-15, 15, 300_000)
    errors = compiled.compiled_call(torch.tanh, (x,), {}).double() - x.double().tanh()
    assert errors.abs().max() <= torch.finfo(torch.float32).eps


@pytest.mark.parametrize("exact", [False, True], ids=["any shape", "one shape"])
@pytest.mark.parametrize("name", SPECIAL)
def test_special_functions_are_right_everywhere(name: str, exact: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the smallest to the largest number, with the derivative; infinities give what they give in float64."""
    function = SPECIAL[name]
    monkeypatch.setattr(compiled, "MOST_SHAPES", 2 * exact)
    magnitudes = torch.cat([torch.logspace(-45, 1, 5_000), torch.linspace(0, 15, 20_000), torch.logspace(1, 9, 5_000)])

    def both(x: Tensor) -> tuple[Tensor, Tensor]:
        y, pullback = torch.func.vjp(function, x)
        return y, *pullback(torch.ones_like(y))

    for largest in (0.25, 1.0, 15.0, 1e9):
        for x in (magnitudes.clamp(max=largest), -magnitudes.clamp(max=largest)):
            assert budget.excess(compiled.compiled_call(both, (x,), {}), both(x), both(x.double())) <= 1

    x = torch.tensor([torch.inf, -torch.inf, torch.nan, 0.0, -0.0]).repeat(7)
    for mine, truth in zip(compiled.compiled_call(both, (x,), {}), both(x.double()), strict=True):
        torch.testing.assert_close(mine, truth.float(), rtol=0, atol=0, equal_nan=True)
