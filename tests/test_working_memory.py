"""What compiled forms allocate besides their results: what is cheap to work out again is not written to memory."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch

from braze.benchmarks import memory, timing
from braze.benchmarks.accuracy import tensors
from braze.benchmarks.ops_case import BACKWARD, FORWARD, Case
from braze.kernels import (
    ADD_MODULATED_LAYER_NORM,
    BATCH_NORM_ACT,
    BINARY_CROSS_ENTROPY,
    CROSS_ENTROPY,
    GROUP_NORM,
    SOFT_TARGET_CROSS_ENTROPY,
    linear_distillation_loss,
    use_backend,
)
from braze.kernels.op import Op
from braze.kernels.ops import vocab_parallel

CPU = torch.device("cpu")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("op", "variant", "dims", "which", "results"),
    [
        (SOFT_TARGET_CROSS_ENTROPY, "default", {"N": 16, "C": 9_000}, FORWARD, 0),
        (CROSS_ENTROPY, "default", {"N": 16, "C": 9_000}, FORWARD, 0),
        (CROSS_ENTROPY, "softcap", {"N": 16, "C": 9_000}, FORWARD, 0),
        (BINARY_CROSS_ENTROPY, "default", {"N": 16, "D": 9_001}, FORWARD, 0),
        (BATCH_NORM_ACT, "default", {"N": 4, "C": 16, "S": 1_024}, BACKWARD, 1),
        (BATCH_NORM_ACT, "hardswish", {"N": 4, "C": 16, "S": 1_024}, BACKWARD, 1),
        (GROUP_NORM, "relu", {"N": 4, "G": 4, "K": 4, "S": 1_024}, BACKWARD, 1),
        (ADD_MODULATED_LAYER_NORM, "default", {"B": 2, "S": 256, "D": 512}, BACKWARD, 2),
    ],
    ids=[
        "soft targets",
        "classes",
        "capped",
        "binary",
        "batch norm, relu",
        "batch norm, hardswish",
        "group norm, relu",
        "gated sum and norm",
    ],
)
def test_nothing_of_the_size_of_x_is_written_but_results(
    op: Op, variant: str, dims: Mapping[str, int], which: str, results: int, dtype: torch.dtype
) -> None:
    if (variant, dtype) == ("hardswish", torch.bfloat16) and torch.__version__ < "2.12":
        pytest.skip("the compiler of torch 2.11 writes dy·act'(z) in float32 there")
    case = Case(op, dims, dtype, CPU, variant)
    call = case.call()
    with use_backend("compile"):
        outputs = tensors(op.fn(*call.args, **call.kwargs))
        work = case.work(which, op.fn, call, [torch.ones_like(y) for y in outputs])
        timing.ready(work, 1)[0]()  # compiles
        # A quarter is for sums of rows and channels, and the gradients of parameters.
        assert memory.peak(work, CPU) < (results + 0.25) * call.args[0].nbytes


#: Cut into blocks, whose sum and that of the rest read it twice.
CLASSES = 20_000


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "tv"])
def test_distillation_has_the_logits_of_two_models_and_no_probabilities(divergence: str, dtype: torch.dtype) -> None:
    N, D = 32, 4
    hidden, teacher_hidden = (torch.randn(N, D, dtype=dtype) for _ in range(2))
    weight, teacher_weight = (torch.randn(CLASSES, D, dtype=dtype) for _ in range(2))

    def loss() -> torch.Tensor:
        return linear_distillation_loss(hidden, weight, teacher_hidden, teacher_weight, divergence=divergence)

    with use_backend("compile"):
        loss()  # compiles
        assert memory.peak(loss, CPU) < 2.25 * N * CLASSES * dtype.itemsize


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_statistics_of_a_part_of_the_classes_are_a_few_numbers_a_row(dtype: torch.dtype) -> None:
    x = torch.randn(64, CLASSES).to(dtype)
    target = torch.arange(len(x))
    statistics = vocab_parallel.pieces("compile").statistics

    def found() -> tuple[torch.Tensor, ...]:
        return statistics(x, target, None, ignore_index=-100, softcap=None, smoothed=True)

    found()  # compiles
    assert memory.peak(found, CPU) < 0.25 * x.nbytes
