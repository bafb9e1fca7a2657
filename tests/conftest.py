"""Test-wide setup, before braze or Triton is imported: Triton reads TRITON_INTERPRET when a kernel is defined."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # the suite runs one process per core

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

import importlib.util

import hypothesis
import pytest

hypothesis.settings.register_profile("default", max_examples=15, derandomize=True, deadline=None, database=None)
hypothesis.settings.register_profile("deep", max_examples=1000, deadline=None, print_blob=True)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))


def round_to_bfloat16_as_a_gpu_does() -> None:
    """Triton's interpreter cuts a float32 off where a GPU rounds it to the nearest bfloat16."""
    from triton.runtime import interpreter

    cast = interpreter.InterpreterBuilder.cast_impl

    def rounded(self, source, target):
        if source.dtype.scalar != interpreter.tl.float32 or target.scalar != interpreter.tl.bfloat16:
            return cast(self, source, target)
        bits = torch.from_numpy(source.data.copy()).bfloat16().view(torch.uint16).numpy()
        return interpreter.TensorHandle(bits, target.scalar)

    interpreter.InterpreterBuilder.cast_impl = rounded


if importlib.util.find_spec("triton") is not None:
    round_to_bfloat16_as_a_gpu_does()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a GPU, and there is none here"))


@pytest.fixture
def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"
