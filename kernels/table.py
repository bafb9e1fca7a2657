"""The operator table, in Markdown: what there is, and what was measured of it."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from . import OPS
from .op import Draw, Op

#: Where a checkout keeps what its benchmarks found; an installed package has none.
RESULTS = Path(__file__).parent.parent / "benchmarks" / "results"

HEADER = (
    "operator",
    "module",
    "replaces",
    "dtypes",
    "backends",
    "differentiable",
    "bytes ÷ least, forward / backward",
    "ATen ÷ braze on the CPU, forward / both",
)

PREFACE = """# Operators

`python -m braze.kernels --table > docs/operators.md` writes this page from the operators themselves.

Bytes are those that the Triton kernels move in the interpreter, over the least possible, for the plain call and in
brackets for the worst variant (`python -m braze.benchmarks kernels --json benchmarks/results/kernels.json`). Times are
geometric means over the operator's benchmark sizes, above 1 where braze is faster
(`python -m braze.benchmarks ops --device cpu --json benchmarks/results/ops-cpu.json`, {machine}).
On a GPU: not measured yet. A dash is what there is not, or what was not measured. Every operator that computes in
floating point takes float64 too, in the plain form, and mixed dtypes of activations and weights.

"""


def markdown(results: Path = RESULTS) -> str:
    """The page: a preface and one row for each operator."""
    kernels, times = _read(results / "kernels.json"), _read(results / "ops-cpu.json")
    rows = [HEADER, ("---",) * len(HEADER), *(_row(op, kernels["records"], times["records"]) for op in OPS)]
    return PREFACE.format(machine=_machine(times)) + "".join(f"| {' | '.join(row)} |\n" for row in rows)


def _read(file: Path) -> dict[str, Any]:
    return json.loads(file.read_text()) if file.exists() else {"records": []}


def _machine(found: dict[str, Any]) -> str:
    environment = found.get("environment")
    if environment is None:
        return "which was not run"
    return f"{environment['cores']} cores of an {environment['processor']}, torch {environment['torch']}"


def _row(op: Op, kernels: Iterable[dict[str, Any]], times: Iterable[dict[str, Any]]) -> tuple[str, ...]:
    smallest = {name: max(size for size in sizes if size <= 33) for name, sizes in op.dims.items()}
    call = op.inputs(Draw(0), **smallest, **next(iter(op.variants.values())))
    tensors = [t for t in pytree.tree_leaves(call) if isinstance(t, Tensor)]
    floating = tensors[0].is_floating_point()
    return (
        f"`{op.name}`",
        ", ".join(f"`{module.__name__}`" for module in op.modules) or "-",
        op.replaces,
        "float32, float16, bfloat16" if floating else _dtype(tensors[0].dtype),
        ", ".join(["triton"] * ("triton" in op.impls) + ["compile", "eager"]),
        "to any order" if any(t.requires_grad for t in tensors) else "-",
        " / ".join(_bytes(op, which, kernels) for which in ("forward", "backward")),
        " / ".join(_speed(op, which, times) for which in ("forward", "forward+backward")),
    )


def _dtype(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _bytes(op: Op, which: str, records: Iterable[dict[str, Any]]) -> str:
    ratios = [
        record["ratio"]
        for record in records
        if record["measure"] == "traffic" and record["op"] == op.name and record["pass"] == which
    ]
    if not ratios:
        return "-"
    plain = f"{ratios[0]:.2f}"
    worst = f"{max(ratios):.2f}"
    return plain if worst == plain else f"{plain} ({worst})"


def _speed(op: Op, which: str, records: Iterable[dict[str, Any]]) -> str:
    wanted = {"benchmark": "ops geometric mean", "op": op.name, "provider": "aten", "pass": which}
    found = (f"{r['ratio']:.2f}" for r in records if all(r[name] == value for name, value in wanted.items()))
    return next(found, "-")
