"""LayerNorm, alone and fused with the residual add that feeds it.

    h = x, or dropout(x) + residual
    y = (h − mean(h)) / √(var(h) + ε) · weight + bias        over the last dim, var with divisor D

Source: Ba, Kiros and Hinton, Layer Normalization (2016); ``torch.nn.functional.layer_norm``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import dispatch
from ..op import Call, Draw, ErrorInput, Op, Options, Traffic
from . import checks, row_norm
from .dropout import drawn


def reference(x: Tensor, weight: Tensor | None, bias: Tensor | None, *, eps: float) -> Tensor:
    """LayerNorm in plain PyTorch."""
    return row_norm.reference(x, weight, bias, eps=eps, weight_offset=0.0, center=True)


def add_reference(
    x: Tensor, residual: Tensor, weight: Tensor | None, bias: Tensor | None, seed: Tensor | None, **options: Any
) -> tuple[Tensor, Tensor]:
    """Dropout, residual add and LayerNorm in plain PyTorch."""
    return row_norm.add_reference(x, residual, weight, bias, None, seed, weight_offset=0.0, center=True, **options)


def layer_norm(x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None, *, eps: float = 1e-5) -> Tensor:
    """Layer normalization over the last dim: ``(x − mean(x)) / √(var(x) + eps) · weight + bias``.

    Computed in float32 and rounded once. :class:`LayerNorm` flattens a longer ``normalized_shape``.

    Args:
        x: floating-point tensor [..., D].
        weight: [D], or None for no scale. Its dtype may differ from x's.
        bias: [D], or None for no shift.
        eps: added to the variance.

    Returns:
        [..., D] in x's dtype.

    Raises:
        TypeError: if x is not floating point.
        ValueError: if x is a scalar, or weight or bias is not [D].
    """
    row_norm.check_affine("layer_norm", x, weight, bias)
    return dispatch.run(LAYER_NORM, x, weight, bias, eps=float(eps))


def add_layer_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    eps: float = 1e-5,
    p: float = 0.0,
    training: bool = True,
    seed: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """``h = dropout(x) + residual; return layer_norm(h, …), h``, in one pass over memory.

    Args:
        x: floating-point tensor [..., D].
        residual: like x; its dtype may be wider (a float32 residual stream).
        weight: [D], or None for no scale.
        bias: [D], or None for no shift.
        eps: added to the variance.
        p: probability of a zero in the dropout of x, which is never stored, nor its mask.
        training: False drops nothing.
        seed: of the dropout, as in :func:`~braze.kernels.dropout`.

    Returns:
        (normed, new_residual): normed [..., D] in x's dtype, new_residual = h in the wider dtype of x and residual.

    Raises:
        TypeError: if x is not floating point.
        ValueError: if x is a scalar, weight or bias is not [D], residual has another shape than x, p is not in [0, 1],
            or the seed is not an int64 scalar.
    """
    row_norm.check_affine("add_layer_norm", x, weight, bias)
    row_norm.check_residual("add_layer_norm", x, residual)
    checks.dropout("add_layer_norm", p, seed)
    seed, constants = drawn(x, p, training, seed)
    return dispatch.run(ADD_LAYER_NORM, x, residual, weight, bias, seed, eps=float(eps), **constants)


class LayerNorm(torch.nn.LayerNorm):
    """Drop-in for ``torch.nn.LayerNorm``: same arguments, same ``state_dict``; runs :func:`layer_norm`."""

    def forward(self, input: Tensor) -> Tensor:
        """[..., *normalized_shape] → the same shape and dtype."""
        weight, bias = (None if p is None else p.flatten() for p in (self.weight, self.bias))
        flat = input.flatten(-len(self.normalized_shape))
        return layer_norm(flat, weight, bias, eps=self.eps).view(input.shape)


def _alone(run: Callable[..., Tensor], x: Tensor, *affine: Tensor | None, eps: float) -> Tensor:
    return run(x, None, *affine, None, None, eps=eps, weight_offset=0.0, center=True)


def _added(
    run: Callable[..., tuple[Tensor, Tensor]],
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    seed: Tensor | None,
    **options: Any,
) -> tuple[Tensor, Tensor]:
    return run(x, residual, weight, bias, None, seed, weight_offset=0.0, center=True, **options)


def _aten(x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None, *, eps: float = 1e-5) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], weight, bias, eps)


def _add_aten(
    x: Tensor,
    residual: Tensor,
    *affine: Tensor | None,
    eps: float = 1e-5,
    p: float = 0.0,
    training: bool = True,
    seed: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    h = F.dropout(x, p, training) + residual if p else x + residual
    return _aten(h, *affine, eps=eps).to(x.dtype), h


def _affine(draw: Draw, D: int, weight: bool, bias: bool) -> tuple[Tensor | None, Tensor | None]:
    return draw.weight(D) if weight else None, draw.weight(D) if bias else None


def _inputs(draw: Draw, *, N: int, D: int, weight: bool = True, bias: bool = True) -> Call:
    return Call((draw.tensor(N, D), *_affine(draw, D, weight, bias)), {"eps": 1e-5})


def _add_inputs(draw: Draw, *, N: int, D: int, weight: bool = True, bias: bool = True, **options: Any) -> Call:
    if "p" in options:
        options["seed"] = draw.integers(0, 2**62)
    return Call((draw.tensor(N, D), draw.tensor(N, D), *_affine(draw, D, weight, bias)), {"eps": 1e-5, **options})


def _errors() -> Iterator[ErrorInput]:
    x = torch.zeros(2, 8)
    yield ErrorInput(Call((torch.zeros(2, 8, dtype=torch.long),)), TypeError, r"x must be a floating-point.*int64")
    yield ErrorInput(Call((torch.tensor(1.0),)), ValueError, "at least one dimension")
    yield ErrorInput(Call((x, torch.ones(7))), ValueError, r"weight must have the shape.*\(8,\), got \(7,\)")
    yield ErrorInput(Call((x, torch.ones(8), torch.ones(1, 8))), ValueError, r"bias must have the shape.*got \(1, 8\)")


def _add_errors() -> Iterator[ErrorInput]:
    x = torch.zeros(2, 8)
    yield ErrorInput(Call((x, torch.zeros(2, 8), torch.ones(7))), ValueError, r"weight must have the shape")
    yield ErrorInput(Call((x, torch.zeros(8))), ValueError, r"residual must have the shape of x, \(2, 8\), got \(8,\)")
    yield ErrorInput(
        Call((x, x), {"seed": torch.zeros(1)}), ValueError, r"seed must be a scalar.*\(1,\) of torch.float32"
    )


def _traffic(itemsize: int, *, N: int, D: int, weight: bool = True, bias: bool = True) -> Traffic:
    return row_norm.traffic(itemsize, weight + bias, statistics=2, N=N, D=D, residual=False)


def _add_traffic(itemsize: int, *, N: int, D: int, weight: bool = True, bias: bool = True, p: float = 0.0) -> Traffic:
    return row_norm.traffic(itemsize, weight + bias, statistics=2, N=N, D=D, residual=True, dropped=p > 0.0)


_DIMS = {"N": (0, 1, 2, 5, 129), "D": (1, 31, 32, 33, 127, 128, 129, 1023, 1025, 16_384, 16_385)}
_BENCH = ({"N": 2048, "D": 1024}, {"N": 4096, "D": 4096})
_AUDIT = ({"N": 512, "D": 128}, {"N": 512, "D": 1024}, {"N": 512, "D": 8192}, {"N": 16, "D": 262_144})
_VARIANTS: dict[str, Options] = {
    "default": {},
    "no bias": {"bias": False},
    "no affine": {"weight": False, "bias": False},
}

LAYER_NORM = Op(
    name="layer_norm",
    replaces="`F.layer_norm` over the last dim",
    fn=layer_norm,
    reference=reference,
    impls={"triton": partial(_alone, row_norm.triton), "compile": partial(_alone, row_norm.compiled)},
    small=partial(_alone, row_norm.small),
    inputs=_inputs,
    dims=_DIMS,
    bench=_BENCH,
    audit=_AUDIT,
    traffic=_traffic,
    flops=lambda N, D: 7 * N * D,
    aten=_aten,
    axes="... D, D, D -> ... D",
    errors=_errors,
    variants=_VARIANTS,
    modules=(LayerNorm,),
    autocast_to_float32=frozenset({"cuda"}),
)

ADD_LAYER_NORM = Op(
    name="add_layer_norm",
    replaces="dropout, residual add, then `F.layer_norm`",
    fn=add_layer_norm,
    reference=add_reference,
    impls={"triton": partial(_added, row_norm.triton), "compile": partial(_added, row_norm.compiled)},
    small=partial(_added, row_norm.small),
    inputs=_add_inputs,
    dims=_DIMS,
    bench=_BENCH,
    audit=_AUDIT,
    traffic=_add_traffic,
    flops=lambda N, D: 8 * N * D,
    aten=_add_aten,
    axes="... D, ... D, D, D, seed -> ... D, ... D",
    errors=_add_errors,
    variants={**_VARIANTS, "dropout": {"p": 0.1}},
)
