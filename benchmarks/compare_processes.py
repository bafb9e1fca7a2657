"""The two ends of a process that times one checkout for ``compare``: :class:`Other` asks, ``main`` answers.

A line of JSON goes each way. The process finds braze in the folder that is first on its path, and nowhere else: an
installed copy would be timed in the place of the commit, silently.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import IO, Any

#: By this name the process imports the asking tree's timing code, whatever ``braze.benchmarks`` is at its commit.
TIMING = "braze_compare"


class Refusal(Exception):
    """Nothing can be compared, and why."""


class Other:
    """The asking end. As work of ``timing.compare`` it is called, and asked for the seconds of so many calls."""

    def __init__(self, name: str, folder: Path, device: str) -> None:
        self.name, self.folder, self.device = name, folder, device

    def __enter__(self) -> Other:
        link = self.folder / TIMING
        link.symlink_to(Path(__file__).resolve().parent, target_is_directory=True)
        # Its own session: Ctrl-C is for the asking process, which then ends this one.
        self._process = subprocess.Popen(
            [sys.executable, "-m", f"{TIMING}.compare_processes", str(self.folder), self.device],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=self.folder, start_new_session=True,
            env={**os.environ, "PYTHONPATH": str(self.folder)},
        )  # fmt: skip
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.kill()
        self._process.communicate()

    def started(self) -> None:
        """Wait until it has imported its own braze, and refuse it if that failed."""
        answer = self._read()
        if "error" in answer:
            raise Refusal(f"the process {self.name!r} cannot start: {answer['error']}")

    def prepare(self, case: Mapping[str, Any]) -> str | None:
        """Make the case's call ready; what stands in the way, if something does."""
        return self._ask(do="prepare", case=dict(case)).get("error")

    def __call__(self) -> None:
        """Run the prepared call once."""
        self.seconds(1)

    def seconds(self, repetitions: int) -> float:
        """The seconds that so many calls take."""
        answer = self._ask(do="time", repetitions=repetitions)
        if "error" in answer:
            raise Refusal(f"the process {self.name!r} failed while it was timed: {answer['error']}")
        return answer["seconds"]

    def _ask(self, **request: Any) -> dict[str, Any]:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return self._read()

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise Refusal(f"the process {self.name!r} ended by itself, with status {self._process.wait()}")
        return json.loads(line)


def main() -> None:
    """Answer until the asking end closes."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a library prints must not pass for an answer
    folder, device = sys.argv[1:]
    try:
        operators = _operators(Path(folder))
    except Exception as error:
        _answer(answers, error=f"{type(error).__name__}: {error}")
        return
    _answer(answers)
    work: Callable[[], object] | None = None
    for line in sys.stdin:
        request = json.loads(line)
        try:
            if request["do"] == "prepare":
                work = None
                work = _work(operators, device, **request["case"])
                _answer(answers)
            else:
                _answer(answers, seconds=_clock(device)(work, request["repetitions"]))
        except Exception as error:  # whatever a commit's operator raises
            _answer(answers, error=f"{type(error).__name__}: {error}")


def _answer(answers: IO[str], **fields: Any) -> None:
    answers.write(json.dumps(fields) + "\n")
    answers.flush()


def _operators(folder: Path) -> dict[str, Any]:
    # Editable installs put a finder of their own behind those of the path.
    sys.meta_path[:] = [finder for finder in sys.meta_path if "__editable__" not in getattr(finder, "__module__", "")]
    sys.path[:] = [path for path in sys.path if "__editable__" not in path]
    import braze.kernels

    found = Path(str(braze.kernels.__file__))
    if not found.is_relative_to(folder):
        raise ImportError(f"braze.kernels must come from {folder}, but came from {found}")
    return {op.name: op for op in braze.kernels.OPS}


def _clock(device: str) -> Callable[[Any, int], float]:
    from . import timing

    if device == "cpu":
        return timing.cpu_clock
    import torch

    return timing.CudaClock(torch.device(device))


def _work(
    operators: Mapping[str, Any], device: str, op: str, dims: dict[str, int], dtype: str, backward: bool
) -> Callable[[], object]:
    import torch

    from braze.kernels.op import Draw

    if op not in operators:
        raise LookupError(f"there is no operator {op}")
    described = operators[op]
    args, kwargs = described.inputs(
        Draw(0, getattr(torch, dtype), torch.device(device)), **{**described.variants["default"], **dims}
    )

    def forward() -> Any:
        with torch.no_grad():
            return described.fn(*args, **kwargs)

    if not backward:
        forward()
        return forward
    leaves = [
        t for t in torch.utils._pytree.tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor) and t.requires_grad
    ]
    outputs = _tensors(described.fn(*args, **kwargs))
    cotangents = [torch.ones_like(y) for y in outputs]

    def forward_and_backward() -> Any:
        return torch.autograd.grad(_tensors(described.fn(*args, **kwargs)), leaves, cotangents)

    forward_and_backward()
    return forward_and_backward


def _tensors(outputs: Any) -> list[Any]:
    return list(outputs) if isinstance(outputs, tuple | list) else [outputs]


if __name__ == "__main__":
    main()
