"""Running the auditing process from another one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from typing import Any, Literal


class Auditor:
    """An auditing process of one kind, for any number of audits: it takes 3 s to start."""

    def __init__(self, what: Literal["traffic", "code"]) -> None:
        self.what = what
        self._process = self._start()

    def _start(self) -> subprocess.Popen[str]:
        return _python(["-m", "braze.kernels.audit", self.what], interpret=self.what == "traffic")

    def audit(
        self,
        *,
        quick: bool,
        ops: Sequence[str] = (),
        targets: Sequence[str] = (),
        progress: Callable[[int, int], None] = lambda done, calls: None,
    ) -> list[dict[str, Any]]:
        """Every record of an audit of ``ops``, or of all operators, for ``targets``, or for all.

        ``progress(done, calls)`` is called after each operator.

        Raises:
            RuntimeError: if a kernel does not run or compile, with what the auditing process said.
        """
        if self._process.poll() is not None:
            self._process = self._start()
        process = self._process
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(json.dumps({"quick": quick, "ops": ops, "targets": targets}) + "\n")
        process.stdin.flush()
        records: list[dict[str, Any]] = []
        calls = 0
        for line in process.stdout:
            answer = json.loads(line)
            if "end" in answer:
                return records
            calls = answer.get("calls", calls)
            if "record" in answer:
                records.append(answer["record"])
            else:
                progress(answer.get("done", 0), calls)
        raise RuntimeError(f"the audit of {self.what} failed:\n{self.close()}")

    def close(self) -> str:
        """End the process; what it wrote to its standard error."""
        return self._process.communicate()[1]


def audit(what: Literal["traffic", "code"], **asked: Any) -> list[dict[str, Any]]:
    """The records of one audit, as :meth:`Auditor.audit` takes it."""
    auditor = Auditor(what)
    try:
        return auditor.audit(**asked)
    finally:
        auditor.close()


def audit_others(
    kernels: Literal["optimizers", "vocab_parallel"], what: Literal["traffic", "code"], targets: Sequence[str] = ()
) -> list[dict[str, Any]]:
    """Every record of an audit of kernels that no operator's call reaches; of code for ``targets``, or for all.

    Raises:
        RuntimeError: as :func:`audit`.
    """
    with _python(["-m", f"braze.kernels.audit.{kernels}", what, *targets], interpret=what == "traffic") as process:
        lines, errors = process.communicate()
    if process.returncode:
        raise RuntimeError(f"the audit of {what} failed:\n{errors}")
    return [json.loads(line) for line in lines.splitlines()]


def _python(arguments: Sequence[str], *, interpret: bool) -> subprocess.Popen[str]:
    environment = {**os.environ, "TRITON_INTERPRET": "1" if interpret else "0"}
    return subprocess.Popen(
        [sys.executable, *arguments],
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
