"""Gradients whose rows are written out together: which calls get them, and that they are right."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from braze.kernels import OPS, by_rows, compiled, dyt, layer_norm, rms_norm, use_backend
from braze.kernels.op import Op

from .contract import Case, check_against_reference

NAMES = (
    "add_layer_norm",
    "add_rms_norm",
    "dyt",
    "gated_add",
    "gated_rms_norm",
    "layer_norm",
    "modulated_layer_norm",
    "modulated_rms_norm",
    "rms_norm",
    "scale_add",
)
#: Eight rows, or twelve, that share one row of parameters; an odd number of elements.
DIMS = {"N": 8, "B": 1, "S": 12, "T": 12, "K": 1, "D": 33}
#: Without parameters that rows share, or with a mask as a fourth operand.
IN_TWO_LOOPS = ("dropout", "for each token", "no affine", "no weight", "sigmoid, no weight", "stochastic depth alone")
CALLS = [
    pytest.param(op, variant, dtype, id=f"{op.name}, {variant}, {dtype}")
    for op in OPS
    if op.name in NAMES
    for variant in op.variants
    for dtype in (torch.float32, torch.bfloat16)
    if dtype == torch.float32 or variant == "default"
]


@pytest.fixture
def together(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The numbers of rows that are written out, of small calls too."""
    for name in ("_exact_calls", "_shapes", "_widths"):
        monkeypatch.setattr(compiled, name, {})
    monkeypatch.setattr(by_rows, "SHORTEST", 1)
    monkeypatch.setattr(by_rows, "LARGE", 0)
    found: list[int] = []

    def interleaved(parts: Any, shape: Any) -> Any:
        found.extend(len(parts) for part in parts[:1] if part is not None)
        return before(parts, shape)

    before = by_rows._interleaved
    monkeypatch.setattr(by_rows, "_interleaved", interleaved)
    return found


@pytest.mark.parametrize(("op", "variant", "dtype"), CALLS)
def test_rows_that_are_written_out_together_are_within_the_error_budget(
    op: Op, variant: str, dtype: torch.dtype, together: list[int]
) -> None:
    dims = {name: DIMS[name] for name in op.dims}
    check_against_reference(Case(op, dims, dtype, variant=variant), "compile")
    assert set(together) == (set() if variant in IN_TWO_LOOPS else {by_rows.TOGETHER[0]})


@pytest.mark.parametrize(
    ("rows", "width", "dtype", "expected"),
    [
        (4096, 1024, torch.float32, 4),
        (2048, 1024, torch.float32, 4),
        (2047, 1025, torch.float32, 0),  # not in fours
        (8192, 4096, torch.bfloat16, 8),  # the sums over fours would be mapped anew each time, ...
        (8196, 4096, torch.bfloat16, 0),  # ... and these rows do not come in eights
        (16_384, 4096, torch.bfloat16, 0),
        (2048, 1024, torch.bfloat16, 0),  # fits in a cache
        (65_536, 128, torch.float32, 0),  # short
    ],
)
def test_long_rows_of_large_operands_are_written_out(
    rows: int, width: int, dtype: torch.dtype, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(by_rows, "known_shapes", lambda: True)
    x, weight = torch.empty(rows, width, dtype=dtype), torch.empty(width, dtype=dtype)
    assert by_rows._together((x, x, x[:, :1]), (weight,), by_rows.LARGE) == expected
    assert not by_rows._together((x, x, x, x), (weight,), by_rows.LARGE)
    assert not by_rows._together((x, x), (None,), by_rows.LARGE)


def test_eight_rows_are_written_out_where_four_leave_too_many_sums(
    together: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(by_rows, "FRESH", 2 * 33 * 5 * 4)
    op = next(op for op in OPS if op.name == "layer_norm")
    check_against_reference(Case(op, {"N": 32, "D": 33}, torch.float32), "compile")
    assert set(together) == {8}


def test_no_rows(together: list[int]) -> None:
    x, alpha, weight = (torch.randn(shape, requires_grad=True) for shape in ((0, 33), (1,), (33,)))
    with use_backend("compile"):
        found = torch.autograd.grad(dyt(x, alpha, weight).sum(), [x, alpha, weight])
    assert [g.shape for g in found] == [x.shape, alpha.shape, weight.shape]
    assert not any(g.any() for g in found)


def test_an_input_that_needs_no_gradient_gets_none(together: list[int]) -> None:
    x, weight, bias = torch.randn(8, 33), torch.randn(33, requires_grad=True), torch.randn(33)
    for wanted in (weight, bias):
        weight.requires_grad_(wanted is weight)
        bias.requires_grad_(wanted is bias)
        with use_backend("compile"):
            (found,) = torch.autograd.grad(layer_norm(x, weight, bias).sum(), [wanted])
        (expected,) = torch.autograd.grad(torch.nn.functional.layer_norm(x, (33,), weight, bias).sum(), [wanted])
        torch.testing.assert_close(found, expected)
    assert not together  # no gradient by rows: there is nothing to interleave


def test_any_number_of_rows_in_code_for_any_shape(together: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled, "MOST_SHAPES", 0)
    weight = torch.randn(33, requires_grad=True)
    for n in (8, 12, 13):
        x = torch.randn(n, 33)
        with use_backend("compile"):
            (found,) = torch.autograd.grad(rms_norm(x, weight).sum(), [weight])
        (expected,) = torch.autograd.grad(torch.nn.functional.rms_norm(x, (33,), weight).sum(), [weight])
        torch.testing.assert_close(found, expected)
    assert not together
