"""The most memory that tensors take at one time, from PyTorch's own record of what it allocates."""

from __future__ import annotations

import gc
import json
import tempfile
from collections.abc import Callable
from pathlib import Path

from torch.profiler import ProfilerActivity, profile


def most_allocated(profiler: profile) -> int:
    """The most bytes that were allocated and not yet freed, from the profile's own start on."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    allocations = sorted((e["ts"], e["args"]["Bytes"]) for e in events if e.get("name") == "[memory]")
    held = most = 0
    for _, size in allocations:
        held += size
        most = max(most, held)
    return most


def peak(work: Callable[[], object]) -> int:
    """The most bytes that a call of ``work`` has allocated at one time, on the CPU."""
    gc.collect()  # what a cycle keeps would be freed within the profile, and count as negative
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        work()
    return most_allocated(profiler)
