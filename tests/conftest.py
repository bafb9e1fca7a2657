"""Test-wide setup, before braze or Triton is imported: Triton reads TRITON_INTERPRET when a kernel is defined."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # the suite runs one process per core

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

import importlib.util
from typing import Any

import hypothesis
import pytest

from . import poison

hypothesis.settings.register_profile("default", max_examples=15, derandomize=True, deadline=None, database=None)
# A thousand for each operator and implementation: the Triton kernels are drawn for in four parts, one for each dtype.
hypothesis.settings.register_profile("deep", max_examples=250, deadline=None, print_blob=True)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))


if importlib.util.find_spec("triton") is not None and not torch.cuda.is_available():
    from . import interpreter

    interpreter.as_on_a_gpu()

poison.poison_compiled_code()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a GPU, and there is none here"))


@pytest.fixture
def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture
def walked(monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """The places of the tokens of each chunk behind a head, as they are computed."""
    from braze.kernels.ops import head_chunks

    seen: list[list[int]] = []
    chunks = head_chunks._chunks

    def recorded(total: int, counted: torch.Tensor | None, most: int):
        for index in chunks(total, counted, most):
            places = range(total)[index] if isinstance(index, slice) else index.tolist()
            seen.append(list(places))
            yield index

    monkeypatch.setattr(head_chunks, "_chunks", recorded)
    return seen


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the operators that run."""
    from braze.kernels import dispatch

    found: list[str] = []
    run = dispatch.run

    def recorded(op: Any, *args: Any, **options: Any) -> Any:
        found.append(op.name)
        return run(op, *args, **options)

    monkeypatch.setattr(dispatch, "run", recorded)
    return found
