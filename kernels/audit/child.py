"""Running the auditing process from another one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from typing import Any, Literal


def audit(
    what: Literal["traffic", "code"],
    *,
    quick: bool,
    ops: Sequence[str] = (),
    targets: Sequence[str] = (),
    progress: Callable[[int, int], None] = lambda done, calls: None,
) -> list[dict[str, Any]]:
    """Every record of an audit of ``ops``, or of all operators, for ``targets``, or for all.

    ``progress(done, calls)`` is called as they come.

    Raises:
        RuntimeError: if a kernel does not run or compile, with what the auditing process said.
    """
    chosen = [f"--op={op}" for op in ops] + [f"--target={target}" for target in targets]
    arguments = ["-m", "braze.kernels.audit", what, *(["--quick"] if quick else []), *chosen]
    records = []
    with _python(arguments, interpret=what == "traffic") as process:
        assert process.stdout is not None
        assert process.stderr is not None
        calls = json.loads(process.stdout.readline() or "{}").get("calls", 0)
        for line in process.stdout:
            record = json.loads(line)
            progress(record.pop("call"), calls)
            records.append(record)
        errors = process.stderr.read()
    if process.returncode:
        raise RuntimeError(f"the audit of {what} failed:\n{errors}")
    progress(calls, calls)
    return records


def audit_others(
    kernels: Literal["optimizers", "vocab_parallel"], what: Literal["traffic", "code"]
) -> list[dict[str, Any]]:
    """Every record of an audit of kernels that no operator's call reaches.

    Raises:
        RuntimeError: as :func:`audit`.
    """
    with _python(["-m", f"braze.kernels.audit.{kernels}", what], interpret=what == "traffic") as process:
        lines, errors = process.communicate()
    if process.returncode:
        raise RuntimeError(f"the audit of {what} failed:\n{errors}")
    return [json.loads(line) for line in lines.splitlines()]


def _python(arguments: Sequence[str], *, interpret: bool) -> subprocess.Popen[str]:
    environment = {**os.environ, "TRITON_INTERPRET": "1" if interpret else "0"}
    return subprocess.Popen(
        [sys.executable, *arguments], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
