"""The most memory that tensors take at one time, from PyTorch's own record of what it allocates."""

from __future__ import annotations

import gc
import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from . import timing


def most_allocated(profiler: profile) -> int:
    """The most bytes that were allocated and not yet freed, from the profile's own start on."""
    return _most(_events(profiler), 0.0, float("inf"))


def available(device: torch.device) -> int:
    """The bytes that may be filled on a device."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2


def peak(work: timing.Work, device: torch.device) -> int:
    """The most bytes that a call of ``work`` has allocated at one time, above what was there before."""
    return peaks({"": work}, device)[""]


def peaks(works: Mapping[str, timing.Work], device: torch.device) -> dict[str, int]:
    """The same for each of several works."""
    gc.collect()  # what a cycle keeps would be freed within a call, and count as negative
    if device.type == "cuda":
        return {name: _cuda_peak(work, device) for name, work in works.items()}
    marks = {name: f"braze work {i}" for i, name in enumerate(works)}
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        for name, work in works.items():
            (call,) = timing.ready(work, 1)
            with record_function(marks[name]):
                result = call()
            del result, call
    events = _events(profiler)
    spans = {e["name"]: (e["ts"], e["ts"] + e["dur"]) for e in events if e.get("name") in marks.values()}
    return {name: _most(events, *spans[mark]) for name, mark in marks.items()}


def _cuda_peak(work: timing.Work, device: torch.device) -> int:
    (call,) = timing.ready(work, 1)
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    call()
    return torch.cuda.max_memory_allocated(device) - before


def _events(profiler: profile) -> list[dict[str, Any]]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        return json.loads(path.read_text())["traceEvents"]


def _most(events: list[dict[str, Any]], start: float, end: float) -> int:
    sizes = [(e["ts"], e["args"]["Bytes"]) for e in events if e.get("name") == "[memory]" and start <= e["ts"] <= end]
    held = most = 0
    for _, size in sorted(sizes):
        held += size
        most = max(most, held)
    return most
