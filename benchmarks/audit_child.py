"""The auditing process of one model: ``python -m braze.benchmarks.audit_child MODEL --size N [--bare]``.

It prints one JSON object. ``--bare`` takes training steps of the model as ``Module.to`` converts it, with nothing that
keeps oneDNN from crashing: the exit status is the answer.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from braze.layouts import LayoutReport, audit, specifier

BATCH = 2
#: Sides of the images of ``--bare``: under 96 oneDNN overwrites too little for a crash.
BARE_SIDE, BARE_STEPS = 160, 3


def main() -> None:
    """Audit, and print."""
    parser = argparse.ArgumentParser("python -m braze.benchmarks.audit_child", description=__doc__)
    parser.add_argument("model", help=specifier.FORMS)
    parser.add_argument("--size", type=int, required=True)
    parser.add_argument("--bare", action="store_true")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    model = specifier.build(arguments.model).train()
    if arguments.bare:
        bare_steps(model)
        print(json.dumps({}))
        return
    x = specifier.example(model, BATCH, arguments.size)
    if any(isinstance(m, nn.Conv3d) for m in model.modules()):
        x = torch.randn(BATCH, 3, 8, arguments.size, arguments.size)  # frames
    start = time.perf_counter()
    report = audit(model, x)
    print(json.dumps({**figures(report), "image": x.shape[-1], "seconds": time.perf_counter() - start,
                      "conversion_error": conversion_error(model)}))  # fmt: skip


def figures(report: LayoutReport) -> dict[str, Any]:
    """The flat figures of a report, and the operator that loses most bytes."""
    found: dict[str, Any] = {}
    for device in ("cpu", "cuda"):
        counts = report.convolutions[device]  # type: ignore[index]
        found |= {
            f"{device}_verdict": report.verdict(device),  # type: ignore[arg-type]
            f"{device}_convolutions": counts.forward,
            f"{device}_nchw": counts.forward_nchw,
            f"{device}_nchw_backward": counts.backward_nchw,
            f"{device}_bytes_lost": report.bytes(device, "loses"),  # type: ignore[arg-type]
            f"{device}_bytes_transposed": report.bytes(device, "transposes"),  # type: ignore[arg-type]
        }
    losses = [event for event in report if event.kind == "loses" and event.device == "cpu"]
    sizes: dict[str, int] = {}
    for event in sorted(losses, key=lambda event: event.backward):
        where = f"{event.op} at {'/'.join(event.line.split('/')[-2:])}"
        sizes[where] = sizes.get(where, 0) + event.bytes
    return {**found, "worst": max(sizes, key=lambda where: sizes[where]) if sizes else "", "unpredicted": report.unpredicted}


def conversion_error(model: nn.Module) -> str | None:
    """What ``Module.to(memory_format=torch.channels_last)`` says, where it refuses."""
    try:
        copy.deepcopy(model).to(memory_format=torch.channels_last)
    except RuntimeError as error:
        return str(error)
    return None


def bare_steps(model: nn.Module) -> None:
    """Forward and backward in channels_last, and enough allocations to meet a heap that is damaged."""
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    x = specifier.example(model, BATCH, BARE_SIDE).to(memory_format=torch.channels_last)
    for _ in range(BARE_STEPS):
        outputs = [leaf for leaf in tree_leaves(model(x)) if isinstance(leaf, Tensor) and leaf.requires_grad]
        torch.autograd.backward(outputs, [torch.ones_like(output) for output in outputs])
        _ = [torch.empty(37 * size) for size in range(1, 200)]


if __name__ == "__main__":
    main()
