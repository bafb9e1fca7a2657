"""Logarithm of the softmax.

    y = x − max x − log Σ exp(x − max x)        over one dim

Source: ``torch.nn.functional.log_softmax``.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import dispatch
from ..autograd import Gradients, fused, vjp
from ..compiled import compiled_call
from ..exp_sums import peak_and_exp_sum
from ..op import Call, Draw, ErrorInput, Excess, Op, Traffic
from . import checks


def reference(x: Tensor) -> Tensor:
    """Log-softmax over the last dim in plain PyTorch: float32 (or wider) inside, the result in the dtype of ``x``."""
    return torch.log_softmax(x.to(torch.promote_types(x.dtype, torch.float32)), -1).to(x.dtype)


def log_softmax(x: Tensor, *, dim: int = -1) -> Tensor:
    """Logarithm of the softmax of x over ``dim``: ``x − log Σ exp(x)``.

    Computed in float32 and rounded once. The backward pass keeps x, not the rounded y, of which no exponential would be
    accurate in half precision.

    Args:
        x: floating-point tensor [..., D].
        dim: the dim whose exponentials sum to 1. Any other than the last is moved there by a copy.

    Returns:
        like x.

    Raises:
        TypeError: if x is not floating point.
        ValueError: if x is a scalar.
        IndexError: if x has no such dim.
    """
    _check(x, dim)
    if dim in (-1, x.dim() - 1):
        return dispatch.run(LOG_SOFTMAX, x)
    return dispatch.run(LOG_SOFTMAX, x.movedim(dim, -1)).movedim(-1, dim)


class LogSoftmax(torch.nn.LogSoftmax):
    """Drop-in for ``torch.nn.LogSoftmax``: same argument; runs :func:`log_softmax`."""

    def forward(self, x: Tensor) -> Tensor:
        """Any shape → the same shape and dtype, the exponentials summing to 1 over ``dim``."""
        return super().forward(x) if self.dim is None else log_softmax(x, dim=self.dim)


def _check(x: Tensor, dim: int) -> None:
    checks.floating("log_softmax", x=x)
    if x.dim() == 0:
        raise ValueError("log_softmax: x must have at least one dimension to sum over, got a scalar")
    if not -x.dim() <= dim < x.dim():
        raise IndexError(f"log_softmax: dim must be in [{-x.dim()}, {x.dim() - 1}] for x {tuple(x.shape)}, got {dim}")


def _triton(x: Tensor) -> Tensor:
    from ..triton import log_softmax as kernels

    return fused(kernels.forward, kernels.backward, vjp(reference), (x,), {})


def _compiled(x: Tensor) -> Tensor:
    if x.dtype == torch.float32:
        # ATen's kernels: at the sizes below 0.57 to 0.88 of the compiled form's time, on two cores of an EPYC.
        return torch.log_softmax(x, -1)
    return fused(_compiled_forward, _compiled_backward, vjp(reference), (x,), {})


def _compiled_forward(x: Tensor) -> tuple[Tensor, Any]:
    y, *statistics = compiled_call(_with_statistics, (x,), {})
    return y, (x, *statistics)


def _compiled_backward(grads: Any, saved: Any, needs: Any) -> Gradients:
    return (compiled_call(_gradient, (*grads, *saved), {}),)


def _with_statistics(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(y, max x, log Σ exp(x − max x)).

    The statistics spare the backward pass two sums over each row: bfloat16 [16384, 32] takes it 0.22 ms for 0.56, on
    one core of an EPYC.
    """
    s = x.to(torch.promote_types(x.dtype, torch.float32))
    peak, total = peak_and_exp_sum(s, -1)
    log_sum = total.log()
    return (s - peak - log_sum).to(x.dtype), peak, log_sum


def _gradient(dy: Tensor, x: Tensor, peak: Tensor, log_sum: Tensor) -> Tensor:
    """dy − p·Σ dy."""
    p = (x.to(peak.dtype) - peak - log_sum).exp()
    g = dy.to(p.dtype)
    return (g - p * g.sum(-1, keepdim=True)).to(x.dtype)


def _inputs(draw: Draw, *, N: int, D: int, **options: Any) -> Call:
    return Call((draw.tensor(N, D),), options)


def _errors() -> Iterator[ErrorInput]:
    x = torch.zeros(2, 8)
    yield ErrorInput(Call((x.long(),)), TypeError, r"x must be a floating-point.*int64")
    yield ErrorInput(Call((torch.tensor(1.0),)), ValueError, "at least one dimension")
    yield ErrorInput(Call((x,), {"dim": 2}), IndexError, r"dim must be in \[-2, 1\] for x \(2, 8\), got 2")


def _traffic(itemsize: int, *, N: int, D: int, **options: Any) -> Traffic:
    """x, y forward; dy, x, dx backward; 8 bytes of statistics a row."""
    statistics = 8 * (D if options.get("dim") == 0 else N)
    return Traffic(forward=2 * N * D * itemsize + statistics, backward=3 * N * D * itemsize + statistics)


_COPIED = "rows along another dim are copied together first"

LOG_SOFTMAX = Op(
    name="log_softmax",
    replaces="`F.log_softmax`",
    fn=log_softmax,
    reference=reference,
    impls={"triton": _triton, "compile": _compiled},
    inputs=_inputs,
    dims={"N": (0, 1, 2, 5, 129), "D": (1, 31, 32, 33, 127, 129, 1023, 1025, 16_384, 16_385)},
    # A GPT-2 vocabulary; the characters of speech recognition.
    bench=({"N": 4096, "D": 1024}, {"N": 2048, "D": 50_304}, {"N": 16_384, "D": 32}),
    audit=({"N": 512, "D": 512}, {"N": 64, "D": 4096}, {"N": 16, "D": 262_144}),
    traffic=_traffic,
    excess={
        ("dim 0", "forward"): Excess(2.01, _COPIED),
        ("dim 0", "backward"): Excess(2.35, _COPIED),
    },
    flops=lambda N, D: 5 * N * D,
    aten=lambda x, dim=-1: F.log_softmax(x, dim),
    axes="... D -> ... D",
    errors=_errors,
    variants={"default": {}, "dim 0": {"dim": 0}},
    modules=(LogSoftmax,),
    autocast_to_float32=frozenset({"cuda", "xpu"}),
)
