"""Steps run one after another within a budget of seconds, each in a process of its own with a limit of its own.

A table of all steps is written again whenever one starts or ends: a run that is cut off leaves behind what it did, what
it was at, and what it never came to.
"""

from __future__ import annotations

import contextlib
import datetime
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from . import records

#: A step is not begun in less: an interpreter with torch takes several seconds to start.
LEAST_SECONDS = 15.0
HEADS = ("step", "status", "start", "end", "seconds", "last line", "command")


@dataclass
class Step:
    """One command, and how long it may take."""

    name: str
    command: list[str]
    limit: float
    status: str = "not run"
    start: str = ""
    end: str = ""
    seconds: float = 0.0
    last_line: str = ""

    def line(self) -> str:
        """Its line in the table."""
        facts = (self.name, self.status, self.start, self.end, f"{self.seconds:.1f}", self.last_line)
        return "\t".join(" ".join(str(fact).split()) for fact in (*facts, " ".join(self.command)))


def run(
    steps: list[Step],
    seconds: float,
    summary: Path,
    logs: Path,
    environment: Mapping[str, str],
    tell: Callable[[Step], object],
) -> None:
    """Run the steps in order until the budget is spent; ``tell`` is called when one starts and when it ends.

    Steps whose status is not "not run" are left as they are: they cannot run here, and say why.
    """
    logs.mkdir(parents=True, exist_ok=True)
    write(summary, steps)
    deadline = time.monotonic() + seconds
    for step in steps:
        left = deadline - time.monotonic()
        if step.status != "not run" or left < LEAST_SECONDS:
            continue
        step.status, step.start = "running", _now()
        write(summary, steps)
        tell(step)
        began = time.monotonic()
        log = logs / f"{step.name.replace(' ', '-')}.log"
        step.status = _in_child(step.command, min(step.limit, left), log, environment)
        step.end, step.seconds, step.last_line = _now(), time.monotonic() - began, _last_line(log)
        write(summary, steps)
        tell(step)


def write(summary: Path, steps: Iterable[Step]) -> None:
    """Write the table; tabs between columns."""
    records.replace(summary, "\n".join(["\t".join(HEADS), *(step.line() for step in steps)]) + "\n")


def _in_child(command: list[str], limit: float, log: Path, environment: Mapping[str, str]) -> str:
    with log.open("wb") as output:
        # Its own group, so that a limit ends the processes that it started too.
        child = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, env=environment,
            start_new_session=True,
        )  # fmt: skip
    try:
        return f"exit {child.wait(limit)}"
    except subprocess.TimeoutExpired:
        return f"ended at its limit of {limit:.0f} s"
    finally:
        _end(child)


def _end(child: subprocess.Popen) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)
    child.wait()


def _last_line(log: Path) -> str:
    lines = log.read_text(errors="replace").split("\n")
    return next((line.strip()[:160] for line in reversed(lines) if line.strip()), "")


def _now() -> str:
    return datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
