"""How measurements are kept: flat records, with the machine and the versions that they were taken on beside them."""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import os
import platform
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

#: One measurement, JSON values only: what was measured (op, provider, pass, dtype, shape, …) and its figures.
Record = dict[str, Any]


def write(path: Path, command: str, records: Sequence[Record]) -> None:
    """Write ``{"command", "environment", "records"}`` as JSON, a line for each record.

    The file holds what it held, or all of this: a command may call it after every case, and be cut off at any time.
    """
    lines = ",\n".join(json.dumps(record) for record in records)
    replace(
        path,
        f'{{"command": {json.dumps(command)}, "environment": {json.dumps(environment())}, "records": [\n{lines}\n]}}\n',
    )


def replace(path: Path, text: str) -> None:
    """Write a text file whole, or leave it as it was."""
    # A device such as /dev/stdout is written to, not replaced.
    if path.exists() and not path.is_file():
        path.write_text(text)
        return
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        beside.write_text(text)
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)


def environment() -> dict[str, Any]:
    """What a figure depends on besides the code that it names."""
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "commit": _commit(),
        "python": platform.python_version(),
        **{name: _version(name) for name in ("braze", "torch", "triton", "lightning", "transformers")},
        "processor": _processor(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _commit() -> str | None:
    git = ["git", "-C", str(Path(__file__).parent)]
    try:
        # An installed copy may lie inside somebody else's repository, whose commit would say nothing.
        if subprocess.run([*git, "ls-files", "--error-unmatch", "records.py"], capture_output=True).returncode:
            return None
        describe = [*git, "describe", "--always", "--dirty", "--abbrev=12"]
        return subprocess.run(describe, capture_output=True, text=True).stdout.strip() or None
    except FileNotFoundError:
        return None


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()
