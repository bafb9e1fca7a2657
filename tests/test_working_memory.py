"""What compiled forms allocate besides their results: what is cheap to work out again is not written to memory."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch

from braze.benchmarks import memory, timing
from braze.benchmarks.accuracy import tensors
from braze.benchmarks.ops_case import BACKWARD, FORWARD, Case
from braze.kernels import BATCH_NORM_ACT, GROUP_NORM, SOFT_TARGET_CROSS_ENTROPY, use_backend
from braze.kernels.op import Op

CPU = torch.device("cpu")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("op", "variant", "dims", "which", "results"),
    [
        (SOFT_TARGET_CROSS_ENTROPY, "default", {"N": 16, "C": 9_000}, FORWARD, 0),
        (BATCH_NORM_ACT, "default", {"N": 4, "C": 16, "S": 1_024}, BACKWARD, 1),
        (BATCH_NORM_ACT, "hardswish", {"N": 4, "C": 16, "S": 1_024}, BACKWARD, 1),
        (GROUP_NORM, "relu", {"N": 4, "G": 4, "K": 4, "S": 1_024}, BACKWARD, 1),
    ],
    ids=["soft targets", "batch norm, relu", "batch norm, hardswish", "group norm, relu"],
)
def test_nothing_of_the_size_of_x_is_written_but_results(
    op: Op, variant: str, dims: Mapping[str, int], which: str, results: int, dtype: torch.dtype
) -> None:
    case = Case(op, dims, dtype, CPU, variant)
    call = case.call()
    with use_backend("compile"):
        outputs = tensors(op.fn(*call.args, **call.kwargs))
        work = case.work(which, op.fn, call, [torch.ones_like(y) for y in outputs])
        timing.ready(work, 1)[0]()  # compiles
        # A quarter is for sums of rows and channels, and the gradients of parameters.
        assert memory.peak(work, CPU) < (results + 0.25) * call.args[0].nbytes
