"""The contract is worth what it catches: kernels broken on purpose must fail it."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import pytest
import torch

import braze.kernels.triton
from braze.kernels import OPS
from braze.kernels.op import Op

from .contract import Case, check_against_reference


class Mutant(NamedTuple):
    """A kernel file with one thing broken, and the operator that should notice."""

    op: str
    kernels: str
    before: str
    after: str


MUTANTS = {
    "wrong derivative": Mutant(
        "rms_norm", "norm", "out = g - normed * (tl.sum(g * normed, 1) / D)[:, None]", "out = g + 0.0"
    ),
    "wrong derivative of the weight": Mutant("layer_norm", "norm", "dw += g * normed", "dw += g"),
    "missing mask on the load": Mutant(
        "layer_norm",
        "norm",
        "row = tl.where(mask, row - mu[:, None], 0.0)",
        "row = row - mu[:, None]",
    ),
    "missing contiguous() on the cotangent": Mutant("rms_norm", "norm", "dy = grads[0].contiguous()", "dy = grads[0]"),
    "missing contiguous() on the input": Mutant("rms_norm", "norm", "x_rows = rows(x)", "x_rows = x.flatten(0, -2)"),
    "under-launched grid": Mutant("rms_norm", "norm", "(long_norm.forward, (N,),", "(long_norm.forward, (N // 2,),"),
    "under-launched columns": Mutant(
        "rms_norm",
        "norm",
        "long_norm.backward, (P * G, column_blocks)",
        "long_norm.backward, (P * G, column_blocks - 1)",
    ),
    "a persistent loop that never goes round": Mutant(
        "rms_norm",
        "norm",
        "for tile in range(tl.program_id(0) % P, tl.cdiv(T, BLOCK_N), P):",
        "for tile in range(tl.program_id(0) % P, tl.program_id(0) % P + 1):",
    ),
    "wrong eps": Mutant(
        "rms_norm",
        "norm",
        "r = 1.0 / tl.sqrt(tl.sum(row * row, 1) / D + eps)",
        "r = 1.0 / tl.sqrt(tl.sum(row * row, 1) / D + 2 * eps)",
    ),
    "eps outside the root": Mutant(
        "rms_norm",
        "norm",
        "r = 1.0 / tl.sqrt(tl.sum(row * row, 1) / D + eps)",
        "r = 1.0 / (tl.sqrt(tl.sum(row * row, 1) / D) + eps)",
    ),
    "the gradient of the new residual forgotten": Mutant(
        "add_rms_norm", "norm", "dh_out = grads[1].contiguous() if len(grads) == 2 else None", "dh_out = None"
    ),
    "every sample modulated as the first": Mutant(
        "add_modulated_layer_norm",
        "norm",
        "w = tl.load(weight + group * weight_stride + d,",
        "w = tl.load(weight + d,",
    ),
    "the gradient of the gate of one program only": Mutant(
        "add_modulated_layer_norm",
        "norm",
        "at_partial = (p * (tl.num_programs(0) // P) + group) * D + d",
        "at_partial = group * D + d",
    ),
    "another group's weight": Mutant(
        "gated_rms_norm", "gated_norm", "w = tl.load(weight + d,", "w = tl.load(weight + d % D,"
    ),
    "a gradient along the vector where its length is clamped": Mutant(
        "l2_normalize", "l2_normalize", "tl.where(tl.sqrt(squares) <= eps, 0.0, dot)", "dot"
    ),
}

#: A ragged block, more rows than one round of the persistent loop holds, and a row longer than one program does.
DIMS = ({"N": 5, "D": 33}, {"N": 129, "D": 129}, {"N": 2, "D": 16_385})


#: Where a plain call does not reach what is broken.
VARIANTS = {"l2_normalize": ("some below eps",)}


def _dims(op: Op) -> list[dict[str, int]]:
    """These, with two of every other dim; N rows are B samples of one token, or B of N of an operator on samples."""
    rows = {"N": "S"} if "N" not in op.dims else {}
    return [{**dict.fromkeys(op.dims, 2), **{rows.get(name, name): size for name, size in d.items()}} for d in DIMS]


def _cases(op: str) -> list[Case]:
    (found,) = [o for o in OPS if o.name == op]
    return [
        Case(found, dims, torch.float32, variant=variant, layout=layout, cotangent_layout=layout, regime=regime)
        for dims in _dims(found)
        for variant in VARIANTS.get(op, ("default",))
        for layout in ("contiguous", "strided", "expanded")
        for regime in ("ordinary", "tiny")
    ]


def _survives(op: str) -> bool:
    for case in _cases(op):
        try:
            check_against_reference(case, "triton")
        except Exception as failure:  # a wrong answer, or a crash: either way it was noticed
            print(case, failure)
            return False
    return True


@pytest.mark.parametrize("mutant", MUTANTS.values(), ids=MUTANTS)
def test_a_broken_kernel_fails_the_contract(mutant: Mutant, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(braze.kernels.triton, mutant.kernels, _broken(mutant, tmp_path))
    assert not _survives(mutant.op), f"{mutant.after!r} went unnoticed"


@pytest.mark.parametrize("op", sorted({m.op for m in MUTANTS.values()}))
def test_the_kernels_as_they_are_pass(op: str) -> None:
    assert _survives(op)


def _broken(mutant: Mutant, folder: Path) -> ModuleType:
    original: Any = importlib.import_module(f"braze.kernels.triton.{mutant.kernels}")
    source = Path(original.__file__).read_text()
    assert mutant.before in source, "the kernel was rewritten: rewrite this mutant too"
    file = folder / "broken.py"
    file.write_text(source.replace(mutant.before, mutant.after))
    name = "braze.kernels.triton.broken"  # in the package, for its relative imports
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    finally:
        del sys.modules[name]
    return module
