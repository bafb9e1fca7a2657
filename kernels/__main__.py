"""``python -m braze.kernels``: which implementation every operator would run on this machine, and why.

``--table`` prints the table of all operators instead, in Markdown; ``plan MODEL`` what ``fuse`` would do with a model.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import warnings

import torch

from . import OPS, dispatch, plan, table
from .fuse.named import FORMS, named

DEVICES = ("cpu", "cuda")
DTYPES = (torch.float32, torch.bfloat16)
HEADER = ("operator", "device", "dtype", "runs", "why")


def rows() -> list[tuple[str, ...]]:
    """One row for each operator, device and dtype: what runs for large tensors in eager mode."""
    return [
        (op.name, device, str(dtype).removeprefix("torch."), *_choice(op, device, dtype))
        for op in OPS
        for device in DEVICES
        for dtype in DTYPES
    ]


def main() -> None:
    """Print the rows as plain text, columns aligned; no package beyond torch is needed."""
    parser = argparse.ArgumentParser("python -m braze.kernels", description="Which implementation runs here, and why.")
    parser.add_argument("--table", action="store_true", help="print the table of all operators, in Markdown")
    commands = parser.add_subparsers(dest="command")
    planning = commands.add_parser("plan", help="what fuse would do with a model", description=f"MODEL: {FORMS}.")
    planning.add_argument("model", metavar="MODEL")
    planning.add_argument("--json", action="store_true", help="print the records as JSON")
    arguments = parser.parse_args()
    if arguments.table:
        print(table.markdown(), end="")
        return
    if arguments.command == "plan":
        try:
            report = plan(named(arguments.model))
        except ValueError as error:
            planning.error(str(error))
        print(json.dumps(report.as_dicts(), indent=1) if arguments.json else report)
        return
    print(f"braze {importlib.metadata.version('braze')}, torch {torch.__version__}, {_gpu()}")
    print(f"Large tensors in eager mode; on the CPU, under {dispatch.SMALLEST_COMPILED} elements all run eager.")
    print("Inside torch.compile and torch.export every operator is its plain reference, for the compiler to fuse.\n")
    lines = [HEADER, *rows()]
    widths = [max(len(row[column]) for row in lines) for column in range(len(HEADER))]
    for row in lines:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def _choice(op: dispatch.Op, device: str, dtype: torch.dtype) -> tuple[str, str]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the warning is the reason that the table prints
            choice = dispatch.preferred(op, device, dtype, dispatch.SMALLEST_COMPILED)
    except RuntimeError as error:  # BRAZE_BACKEND asks for what cannot run here
        return "error", str(error)
    if device == "cuda" and not torch.cuda.is_available():
        return f"({choice.backend})", f"{choice.reason}, were there a GPU"
    return choice


def _gpu() -> str:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"


if __name__ == "__main__":
    main()
