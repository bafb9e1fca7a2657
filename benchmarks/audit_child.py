"""Auditing one model, in a process of its own."""

from __future__ import annotations

import contextlib
import copy
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from braze.layouts import LayoutReport, audit, specifier

from .child import messages

BATCH, FRAMES = 2, 8
#: For the steps that may crash: with images of under 96² oneDNN overwrites too little.
BARE_SIDE, BARE_STEPS = 160, 3


def audited(model_name: str, side: int) -> dict[str, Any]:
    """Audit a model in training, on random images (frames, for a model of videos)."""
    torch.manual_seed(0)
    model = specifier.build(model_name).train()
    x = specifier.example(model, BATCH, side)
    if any(isinstance(module, nn.Conv3d) for module in model.modules()):
        x = torch.randn(BATCH, 3, FRAMES, side, side)
    start = time.perf_counter()
    report = audit(model, x)
    seconds = round(time.perf_counter() - start, 1)
    return {**figures(report), "image": x.shape[-1], "seconds": seconds, "conversion_error": conversion_error(model)}


def figures(report: LayoutReport) -> dict[str, Any]:
    """The flat figures of a report, and the operator that loses most bytes."""
    found: dict[str, Any] = {}
    for device in ("cpu", "cuda"):
        counts = report.convolutions[device]
        found |= {
            f"{device}_verdict": report.verdict(device),
            f"{device}_convolutions": counts.forward,
            f"{device}_nchw": counts.forward_nchw,
            f"{device}_nchw_backward": counts.backward_nchw,
            f"{device}_gaps": counts.forward_gaps,
            f"{device}_gaps_backward": counts.backward_gaps,
            f"{device}_bytes_lost": report.bytes(device, "loses"),
            f"{device}_bytes_transposed": report.bytes(device, "transposes"),
        }
    losses = [event for event in report if event.kind == "loses" and event.device == "cpu"]
    sizes: dict[str, int] = {}
    for event in sorted(losses, key=lambda event: event.backward):
        where = f"{event.op} at {'/'.join(event.line.split('/')[-2:])}"
        sizes[where] = sizes.get(where, 0) + event.bytes
    return {
        **found,
        "worst": max(sizes, key=lambda where: sizes[where]) if sizes else "",
        "unpredicted": report.unpredicted,
    }


def conversion_error(model: nn.Module) -> str | None:
    """What ``Module.to(memory_format=torch.channels_last)`` says, where it refuses."""
    try:
        copy.deepcopy(model).to(memory_format=torch.channels_last)
    except RuntimeError as error:
        return str(error)
    return None


def bare_steps(model_name: str) -> dict[str, Any]:
    """Train in channels_last as ``Module.to`` converts, with nothing that keeps oneDNN from crashing.

    Returning is the answer: allocations meet a heap that is damaged.
    """
    model = specifier.build(model_name).train()
    model.to(memory_format=torch.channels_last)
    x = specifier.example(model, BATCH, BARE_SIDE).to(memory_format=torch.channels_last)
    for _ in range(BARE_STEPS):
        outputs = [leaf for leaf in tree_leaves(model(x)) if isinstance(leaf, Tensor) and leaf.requires_grad]
        torch.autograd.backward(outputs, [torch.ones_like(output) for output in outputs])
        _ = [torch.empty(37 * size) for size in range(1, 200)]
    return {}


def _answer(task: Callable[..., dict[str, Any]], *arguments: Any) -> Iterator[Any]:
    """What ``task`` returns, or the exception that it raises."""
    try:
        yield task(*arguments)
    except Exception as error:
        yield error


def in_child(task: Callable[..., dict[str, Any]], *arguments: Any, seconds: float) -> dict[str, Any]:
    """What ``task`` returns in a process of its own, forked from one that has the libraries imported.

    Raises:
        ChildDied: if the process ends without an answer, or has none after ``seconds``.
    """
    answers = messages(_answer, task, *arguments, preload=(__name__, "timm", "torchvision"), seconds=seconds)
    with contextlib.closing(answers):  # what the process does after its answer is of no interest
        found = next(answers)
    if isinstance(found, Exception):
        raise found
    return found
