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
    "under-launched grid": Mutant("rms_norm", "norm", "(_forward_long, (N,),", "(_forward_long, (N // 2,),"),
    "under-launched columns": Mutant(
        "rms_norm", "norm", "_backward_long, (column_blocks, programs)", "_backward_long, (column_blocks - 1, programs)"
    ),
    "a persistent loop that never goes round": Mutant(
        "rms_norm",
        "norm",
        "for tile in range(tl.program_id(0), tl.cdiv(N, BLOCK_N), tl.num_programs(0)):",
        "for tile in range(tl.program_id(0), tl.program_id(0) + 1):",
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
    "a bias that the derivative forgets": Mutant(
        "bias_act",
        "bias_act",
        "_, pulled = act(h, dout, ACTIVATION)",
        "_, pulled = act(h - (0.0 if bias is None else b[None, :]), dout, ACTIVATION)",
    ),
    "another mask in the backward pass": Mutant(
        "dropout_add",
        "dropout_add",
        "g = tl.where(kept(seed, n, d, threshold), g * scale, 0.0)",
        "g = tl.where(kept(seed, n + 1, d, threshold), g * scale, 0.0)",
    ),
    "a scale that its own gradient has": Mutant(
        "scale_add",
        "scale_add",
        "            if scale is not None:\n                g *= gamma[None, :]\n            tl.store(dx",
        "            tl.store(dx",
    ),
    "columns of one program only in the gradient of alpha": Mutant(
        "dyt",
        "dyt",
        "program = tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)",
        "program = tl.program_id(1)",
    ),
}

#: The first dim and the last; those between are 1. A ragged block, more rows than one round of the persistent loop
#: holds, and a row longer than one program does.
DIMS = ((5, 33), (129, 129), (2, 16_385))


def _cases(op: str) -> list[Case]:
    (found,) = [o for o in OPS if o.name == op]
    first, *_, last = found.dims
    return [
        Case(
            found,
            {**dict.fromkeys(found.dims, 1), first: N, last: D},
            torch.float32,
            layout=layout,
            cotangent_layout=layout,
            regime=regime,
        )
        for N, D in DIMS
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
