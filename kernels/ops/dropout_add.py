"""The tail of a residual block: bias, dropout and the residual add.

    y[n, d] = residual[n, d] + ((x[n, d] + bias[d]) / (1 − p)  if kept(seed, n, d)  else 0)

The mask is that of dropout.py: a function of the seed and of an element's place, so the backward pass needs the seed
and dy, and x is not kept.

Source: ``torch.nn.functional.dropout`` between a linear layer and the sum, as in ``torch.nn.TransformerEncoderLayer``.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import dispatch
from ..autograd import Gradients, fused
from ..by_rows import column_sum
from ..compiled import compiled_call
from ..op import Call, Draw, ErrorInput, Op, Traffic
from . import checks
from .dropout import constants, kept, new_seed, small


def reference(
    x: Tensor, residual: Tensor, bias: Tensor | None, seed: Tensor | int | None, *, threshold: int, scale: float
) -> Tensor:
    """The sum in plain PyTorch: float32 (or wider) inside, one rounding. No seed is no dropout."""
    narrow = torch.promote_types(x.dtype, residual.dtype)
    h = x.to(torch.promote_types(narrow, torch.float32))
    if bias is not None:
        h = h + bias.to(h.dtype)
    return (residual.to(h.dtype) + _dropped(h, seed, threshold, scale)).to(narrow)


def _dropped(h: Tensor, seed: Tensor | int | None, threshold: int, scale: float) -> Tensor:
    return h if seed is None else torch.where(kept(seed, h.shape, threshold), h * scale, 0.0)


def dropout_add(
    x: Tensor,
    residual: Tensor,
    bias: Tensor | None = None,
    *,
    p: float = 0.0,
    training: bool = True,
    seed: Tensor | None = None,
) -> Tensor:
    """Residual add of a biased tensor under dropout: ``residual + dropout(x + bias)``, in one pass over memory.

    Computed in float32 and rounded once. Nothing of x's size is kept for the backward pass: the mask is a function of
    the seed, the same on every device and in every implementation.

    Args:
        x: floating-point tensor [..., D], such as a linear layer's result without its bias.
        residual: of x's shape; its dtype may differ (a float32 residual stream).
        bias: [D], or None for none.
        p: probability that an element of ``x + bias`` is dropped; the others are multiplied by ``1 / (1 − p)``.
        training: False is p = 0.
        seed: int64 scalar tensor on x's device, for a mask that can be asked for again; None draws one from PyTorch's
            generator.

    Returns:
        [..., D] in the dtype that ``x + residual`` promotes to.

    Raises:
        TypeError: if a tensor is not floating point.
        ValueError: if x is a scalar, residual has another shape, bias is not [D], p is not in [0, 1], or the seed is
            not an int64 scalar.
    """
    checks.floating("dropout_add", x=x, residual=residual, bias=bias)
    checks.per_channel("dropout_add", x, bias=bias)
    checks.like("dropout_add", x, residual=residual)
    checks.dropout("dropout_add", p, seed)
    if not training or p == 0.0:
        return dispatch.run(DROPOUT_ADD, x, residual, bias, None, **constants(0.0))
    seed = new_seed(x.device) if seed is None else seed
    return dispatch.run(DROPOUT_ADD, x, residual, bias, seed, **constants(p))


def _triton(*tensors: Tensor | None, **options: Any) -> Tensor:
    from ..triton import dropout_add as kernels

    return fused(kernels.forward, kernels.backward, _second, tensors, options)


def _compiled(*tensors: Tensor | None, **options: Any) -> Tensor:
    return fused(_compiled_forward, _compiled_backward, _second, tensors, options)


def _compiled_forward(
    x: Tensor, residual: Tensor, bias: Tensor | None, seed: Tensor | None, **options: Any
) -> tuple[Tensor, Any]:
    y = compiled_call(reference, (x, residual, bias, seed), options)
    return y, (x.new_empty(0), residual.new_empty(0), bias, seed)


def _compiled_backward(grads: Any, saved: Any, needs: Any, **options: Any) -> Gradients:
    return compiled_call(_gradients, (*grads, *saved), {"needs": needs, **options})


def _second(grads: Any, saved: Any, needs: Any, **options: Any) -> Gradients:
    return _gradients(*grads, *saved, needs=needs, **options)


def _gradients(
    dy: Tensor,
    x: Tensor,
    residual: Tensor,
    bias: Tensor | None,
    seed: Tensor | None,
    *,
    needs: tuple[bool, bool, bool, bool],
    threshold: int,
    scale: float,
) -> Gradients:
    """The gradients of x, residual and bias; x and residual are empty, and only name their dtypes."""
    dh = _dropped(dy.to(torch.promote_types(dy.dtype, torch.float32)), seed, threshold, scale)
    dbias = column_sum(bias, dh) if bias is not None and needs[2] else None
    return dh.to(x.dtype), dy.to(residual.dtype), dbias, None


def _aten(
    x: Tensor,
    residual: Tensor,
    bias: Tensor | None = None,
    *,
    p: float = 0.0,
    training: bool = True,
    seed: Tensor | None = None,
) -> Tensor:
    return residual + F.dropout(x if bias is None else (x + bias).to(x.dtype), p, training)


def _inputs(draw: Draw, *, N: int, D: int, p: float = 0.1, bias: bool = True, own_dtype: bool = False) -> Call:
    residual = draw.weight(N, D) if own_dtype else draw.tensor(N, D)
    parameter = draw.weight(D) if bias else None
    return Call((draw.tensor(N, D), residual, parameter), {"p": p, "seed": draw.integers(0, 2**62)})


def _errors() -> Iterator[ErrorInput]:
    x, bias = torch.zeros(2, 8), torch.zeros(8)
    yield ErrorInput(Call((x.long(), x)), TypeError, r"x must be a floating-point.*int64")
    yield ErrorInput(Call((x, x.long())), TypeError, r"residual must be a floating-point.*int64")
    yield ErrorInput(Call((x, x, bias.long())), TypeError, r"bias must be a floating-point.*int64")
    yield ErrorInput(Call((torch.tensor(1.0), torch.tensor(1.0))), ValueError, "at least one dimension")
    yield ErrorInput(Call((x, bias)), ValueError, r"residual must have the shape of x, \(2, 8\), got \(8,\)")
    yield ErrorInput(Call((x, x, bias[:7])), ValueError, r"bias must have the shape.*\(8,\), got \(7,\)")
    yield ErrorInput(Call((x, x), {"p": -0.1}), ValueError, "p must be a probability.*got -0.1")
    yield ErrorInput(
        Call((x, x), {"p": 0.5, "seed": torch.zeros(2)}), ValueError, r"seed must be a scalar.*\(2,\) of torch.float32"
    )


def _traffic(itemsize: int, *, N: int, D: int, p: float = 0.1, bias: bool = True, **_: Any) -> Traffic:
    """x, residual, y, bias, seed forward; dy, dx, dbias, seed backward, where without dropout dx is dy itself."""
    dropout = p > 0.0
    passes = (2 if dropout else 1) if dropout or bias else 0
    return Traffic(
        forward=(3 * N * D + bias * D) * itemsize + 8 * dropout,
        backward=(passes * N * D + bias * D) * itemsize + 8 * dropout,
    )


DROPOUT_ADD = Op(
    name="dropout_add",
    replaces="`residual + F.dropout(x + bias)`",
    fn=dropout_add,
    reference=reference,
    impls={"triton": _triton, "compile": _compiled},
    small=small(reference),
    inputs=_inputs,
    dims={"N": (0, 1, 2, 33, 129), "D": (0, 1, 31, 32, 33, 127, 256, 257, 1025)},
    # BERT-base (batch 8) and GPT-2 XL.
    bench=({"N": 4096, "D": 768}, {"N": 4096, "D": 1600}),
    audit=({"N": 1024, "D": 512}, {"N": 512, "D": 1600}),
    traffic=_traffic,
    flops=lambda N, D: 22 * N * D,
    aten=_aten,
    axes="... d, ... d, d, seed -> ... d",
    errors=_errors,
    variants={
        "default": {},
        "no bias": {"bias": False},
        "no dropout": {"p": 0.0},
        "residual of its own dtype": {"own_dtype": True},
    },
    random=True,
)
