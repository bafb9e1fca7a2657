"""RMSNorm, alone and fused with the residual add that feeds it.

    h = x, or dropout(x) + residual
    y = h / √(mean(h²) + ε) · (weight + weight_offset)        over the last dim

Source: Zhang and Sennrich, Root Mean Square Layer Normalization (2019); ``torch.nn.functional.rms_norm``.
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


def reference(x: Tensor, weight: Tensor | None, *, eps: float, weight_offset: float) -> Tensor:
    """RMSNorm in plain PyTorch."""
    return row_norm.reference(x, weight, None, eps=eps, weight_offset=weight_offset, center=False)


def add_reference(
    x: Tensor, residual: Tensor, weight: Tensor | None, seed: Tensor | None, **options: Any
) -> tuple[Tensor, Tensor]:
    """Dropout, residual add and RMSNorm in plain PyTorch."""
    return row_norm.add_reference(x, residual, weight, None, None, seed, center=False, **options)


def rms_norm(
    x: Tensor, weight: Tensor | None = None, *, eps: float | None = None, weight_offset: float = 0.0
) -> Tensor:
    """Root-mean-square normalization over the last dim: ``x / √(mean(x²) + eps) · (weight + weight_offset)``.

    Computed in float32 and rounded once, so it is at least as accurate as forms that round before the weight.

    Args:
        x: floating-point tensor [..., D].
        weight: [D], or None for no scale. Its dtype may differ from x's.
        eps: added to the mean square. None is float32's machine epsilon (float64's for float64), as in
            ``torch.nn.functional.rms_norm``.
        weight_offset: added to the weight; 1.0 for models that store ``weight − 1`` (Gemma).

    Returns:
        [..., D] in x's dtype.

    Raises:
        TypeError: if x is not floating point.
        ValueError: if x is a scalar, or weight is not [D].
    """
    row_norm.check_affine("rms_norm", x, weight)
    return dispatch.run(RMS_NORM, x, weight, eps=_eps(x, eps), weight_offset=float(weight_offset))


def add_rms_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None = None,
    *,
    eps: float | None = None,
    weight_offset: float = 0.0,
    p: float = 0.0,
    training: bool = True,
    seed: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """``h = dropout(x) + residual; return rms_norm(h, weight), h``, in one pass over memory.

    Args:
        x: floating-point tensor [..., D].
        residual: like x; its dtype may be wider (a float32 residual stream).
        weight: [D], or None for no scale.
        eps: as in :func:`rms_norm`.
        weight_offset: as in :func:`rms_norm`.
        p: probability of a zero in the dropout of x, which is never stored, nor its mask.
        training: False drops nothing.
        seed: of the dropout, as in :func:`~braze.kernels.dropout`.

    Returns:
        (normed, new_residual): normed [..., D] in x's dtype, new_residual = h in the wider dtype of x and residual.

    Raises:
        TypeError: if x is not floating point.
        ValueError: if x is a scalar, weight is not [D], residual has another shape than x, p is not in [0, 1], or the
            seed is not an int64 scalar.
    """
    row_norm.check_affine("add_rms_norm", x, weight)
    row_norm.check_residual("add_rms_norm", x, residual)
    checks.dropout("add_rms_norm", p, seed)
    seed, constants = drawn(x, p, training, seed)
    options = {"eps": _eps(x, eps), "weight_offset": float(weight_offset), **constants}
    return dispatch.run(ADD_RMS_NORM, x, residual, weight, seed, **options)


class RMSNorm(torch.nn.RMSNorm):
    """Drop-in for ``torch.nn.RMSNorm``: same arguments, same ``state_dict``; runs :func:`rms_norm`."""

    def forward(self, x: Tensor) -> Tensor:
        """[..., *normalized_shape] → the same shape and dtype."""
        weight = None if self.weight is None else self.weight.flatten()
        flat = x.flatten(-len(self.normalized_shape))
        return rms_norm(flat, weight, eps=self.eps).view(x.shape)


def _eps(x: Tensor, eps: float | None) -> float:
    return float(torch.finfo(torch.promote_types(x.dtype, torch.float32)).eps if eps is None else eps)


def _alone(run: Callable[..., Tensor], x: Tensor, weight: Tensor | None, **options: Any) -> Tensor:
    return run(x, None, weight, None, None, None, center=False, **options)


def _added(
    run: Callable[..., tuple[Tensor, Tensor]],
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None,
    seed: Tensor | None,
    **options: Any,
) -> tuple[Tensor, Tensor]:
    return run(x, residual, weight, None, None, seed, center=False, **options)


def _aten(x: Tensor, weight: Tensor | None = None, *, eps: float | None = None, weight_offset: float = 0.0) -> Tensor:
    if weight is not None and weight_offset:
        weight = weight + weight_offset
    return F.rms_norm(x, x.shape[-1:], weight, eps)


def _add_aten(
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None = None,
    *,
    p: float = 0.0,
    training: bool = True,
    seed: Tensor | None = None,
    **options: Any,
) -> tuple[Tensor, Tensor]:
    h = F.dropout(x, p, training) + residual if p else x + residual
    return _aten(h, weight, **options).to(x.dtype), h


def _inputs(draw: Draw, *, N: int, D: int, weight: bool = True, **options: Any) -> Call:
    return Call((draw.tensor(N, D), draw.weight(D) if weight else None), options)


def _add_inputs(draw: Draw, *, N: int, D: int, weight: bool = True, **options: Any) -> Call:
    if "p" in options:
        options["seed"] = draw.integers(0, 2**62)
    return Call((draw.tensor(N, D), draw.tensor(N, D), draw.weight(D) if weight else None), options)


def _errors() -> Iterator[ErrorInput]:
    x = torch.zeros(2, 8)
    yield ErrorInput(Call((torch.zeros(2, 8, dtype=torch.long),)), TypeError, r"x must be a floating-point.*int64")
    yield ErrorInput(Call((torch.tensor(1.0),)), ValueError, "at least one dimension")
    yield ErrorInput(Call((x, torch.ones(7))), ValueError, r"weight must have the shape.*\(8,\), got \(7,\)")


def _add_errors() -> Iterator[ErrorInput]:
    x = torch.zeros(2, 8)
    yield ErrorInput(Call((x, torch.zeros(2, 8), torch.ones(7))), ValueError, r"weight must have the shape")
    yield ErrorInput(Call((x, torch.zeros(8))), ValueError, r"residual must have the shape of x, \(2, 8\), got \(8,\)")
    yield ErrorInput(Call((x, x), {"p": -0.1}), ValueError, "p must be a probability.*got -0.1")


def _traffic(itemsize: int, *, N: int, D: int, weight: bool = True, **_: Any) -> Traffic:
    return row_norm.traffic(itemsize, int(weight), N=N, D=D, residual=False)


def _add_traffic(itemsize: int, *, N: int, D: int, weight: bool = True, p: float = 0.0, **_: Any) -> Traffic:
    return row_norm.traffic(itemsize, int(weight), N=N, D=D, residual=True, dropped=p > 0.0)


_DIMS = {"N": (0, 1, 2, 5, 129), "D": (1, 31, 32, 33, 127, 128, 129, 1023, 1025, 16_384, 16_385)}
_BENCH = ({"N": 2048, "D": 1024}, {"N": 4096, "D": 4096})
_AUDIT = ({"N": 512, "D": 128}, {"N": 512, "D": 1024}, {"N": 512, "D": 8192}, {"N": 16, "D": 262_144})
_VARIANTS: dict[str, Options] = {
    "default": {"eps": 1e-6},
    "torch's eps": {"eps": None},
    "no weight": {"weight": False, "eps": 1e-6},
    "Gemma's offset": {"eps": 1e-6, "weight_offset": 1.0},
}

RMS_NORM = Op(
    name="rms_norm",
    replaces="`F.rms_norm`; with `weight_offset=1` Gemma's",
    fn=rms_norm,
    reference=reference,
    impls={"triton": partial(_alone, row_norm.triton), "compile": partial(_alone, row_norm.compiled)},
    small=partial(_alone, row_norm.small),
    inputs=_inputs,
    dims=_DIMS,
    bench=_BENCH,
    audit=_AUDIT,
    traffic=_traffic,
    flops=lambda N, D: 4 * N * D,
    aten=_aten,
    axes="... D, D -> ... D",
    errors=_errors,
    variants=_VARIANTS,
    modules=(RMSNorm,),
)

ADD_RMS_NORM = Op(
    name="add_rms_norm",
    replaces="dropout, residual add, then `F.rms_norm`",
    fn=add_rms_norm,
    reference=add_reference,
    impls={"triton": partial(_added, row_norm.triton), "compile": partial(_added, row_norm.compiled)},
    small=partial(_added, row_norm.small),
    inputs=_add_inputs,
    dims=_DIMS,
    bench=_BENCH,
    audit=_AUDIT,
    traffic=_add_traffic,
    flops=lambda N, D: 5 * N * D,
    aten=_add_aten,
    axes="... D, ... D, D, seed -> ... D, ... D",
    errors=_add_errors,
    variants={**_VARIANTS, "dropout": {"eps": 1e-6, "p": 0.1}},
)
