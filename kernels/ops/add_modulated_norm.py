"""The joint of two branches in a block of a diffusion transformer: a gated residual, then an adaptive norm.

    h = residual + gate·x
    y = norm(h)·(1 + scale) + shift                             norm: LayerNorm or RMSNorm over the last dim

scale, shift and gate are one row for each sample, or for each token.

Source: Peebles and Xie, Scalable Diffusion Models with Transformers (2023), adaLN-Zero; FLUX and Stable Diffusion 3.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .. import dispatch
from ..op import Call, Draw, ErrorInput, Op, Traffic
from . import modulated_norm, row_norm


def reference(
    x: Tensor, residual: Tensor, gate: Tensor | None, scale: Tensor, shift: Tensor | None, **options: Any
) -> tuple[Tensor, Tensor]:
    """Gated residual and modulated norm in plain PyTorch: ``gate``, ``scale`` and ``shift`` broadcast to x."""
    return row_norm.add_reference(x, residual, scale, shift, gate, None, **options)


def add_modulated_layer_norm(
    x: Tensor,
    residual: Tensor,
    gate: Tensor | None,
    scale: Tensor,
    shift: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    eps: float = 1e-6,
) -> tuple[Tensor, Tensor]:
    """``h = residual + gate · x; return modulated_layer_norm(h, scale, shift, …), h``, in one pass over memory.

    This is what a block of a diffusion transformer does between its attention, whose output is x, and its MLP.

    Args:
        x: floating-point tensor [B, ..., D].
        residual: like x; its dtype may be wider (a float32 residual stream).
        gate: like scale, or None for no gate.
        scale: as in :func:`.modulated_layer_norm`.
        shift: like scale, or None for no shift.
        weight: as in :func:`.modulated_layer_norm`.
        bias: as in :func:`.modulated_layer_norm`.
        eps: added to the variance.

    Returns:
        (normed, new_residual): normed like x, new_residual = h in the wider dtype of x and residual.

    Raises:
        TypeError: if x, gate, scale or shift is not floating point.
        ValueError: as :func:`.modulated_layer_norm`, or if residual has another shape than x, or gate than scale.
    """
    return _add(ADD_MODULATED_LAYER_NORM, x, residual, gate, scale, shift, weight, bias, eps=eps, center=True)


def add_modulated_rms_norm(
    x: Tensor,
    residual: Tensor,
    gate: Tensor | None,
    scale: Tensor,
    shift: Tensor | None,
    weight: Tensor | None = None,
    *,
    eps: float = 1e-6,
) -> tuple[Tensor, Tensor]:
    """``h = residual + gate · x; return modulated_rms_norm(h, scale, shift, …), h``, in one pass over memory.

    Arguments, results and errors are those of :func:`add_modulated_layer_norm`.
    """
    return _add(ADD_MODULATED_RMS_NORM, x, residual, gate, scale, shift, weight, None, eps=eps, center=False)


def _add(
    op: Op,
    x: Tensor,
    residual: Tensor,
    gate: Tensor | None,
    scale: Tensor,
    shift: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    *,
    eps: float,
    center: bool,
) -> tuple[Tensor, Tensor]:
    row_norm.check_affine(op.name, x, weight, bias)
    row_norm.check_residual(op.name, x, residual)
    scale, shift, gate = modulated_norm.modulation(op.name, x, scale=scale, shift=shift, gate=gate)
    scale, shift, offset = modulated_norm.fold(scale, shift, weight, bias)
    return dispatch.run(op, x, residual, gate, scale, shift, eps=float(eps), weight_offset=offset, center=center)


def _run(
    run: Callable[..., tuple[Tensor, Tensor]],
    x: Tensor,
    residual: Tensor,
    gate: Tensor | None,
    scale: Tensor,
    shift: Tensor | None,
    **options: Any,
) -> tuple[Tensor, Tensor]:
    return run(x, residual, scale, shift, gate, None, **options)


def _aten(
    center: bool, x: Tensor, residual: Tensor, gate: Tensor | None, *others: Tensor | None, **options: Any
) -> tuple[Tensor, Tensor]:
    h = (residual + (x if gate is None else gate * x)).to(torch.promote_types(x.dtype, residual.dtype))
    return modulated_norm.aten(center, h, *others, **options).to(x.dtype), h  # type: ignore[arg-type]


def _inputs(draw: Draw, *, B: int, S: int, D: int, tokens: bool = False, affine: int = 0, gated: bool = True) -> Call:
    x, residual = draw.tensor(B, S, D), draw.tensor(B, S, D)
    gate, scale, shift = modulated_norm.rows(draw, 3, B=B, S=S, D=D, tokens=tokens)
    return Call(
        (x, residual, gate if gated else None, scale, shift, *[draw.weight(D) for _ in range(affine)]), {"eps": 1e-6}
    )


def _errors() -> Iterator[ErrorInput]:
    x, m = torch.zeros(2, 3, 8), torch.zeros(2, 8)
    yield ErrorInput(Call((x, m, m, m, m)), ValueError, r"residual must have the shape of x.*got \(2, 8\)")
    yield ErrorInput(Call((x, x, x, m, m)), ValueError, r"gate must have the shape of scale, \(2, 8\), got \(2, 3, 8\)")
    yield ErrorInput(Call((x, x, m.long(), m, m)), TypeError, r"gate must be a floating-point.*int64")


def _traffic(
    statistics: int, itemsize: int, *, B: int, S: int, D: int, tokens: bool = False, affine: int = 0, gated: bool = True
) -> Traffic:
    """Of the residual, h and the gate beside these; backward dh_out, and with a gate x, dx and the gate's gradient."""
    alone = modulated_norm.traffic(statistics, itemsize, B=B, S=S, D=D, tokens=tokens, affine=affine)
    size, gate = B * S * D * itemsize, B * (S if tokens else 1) * D * itemsize
    if not gated:
        return Traffic(alone.forward + 2 * size, alone.backward + size)
    return Traffic(alone.forward + 2 * size + gate, alone.backward + 3 * size + 2 * gate)


def _op(name: str, fn: Callable[..., tuple[Tensor, Tensor]], *, center: bool, **fields: Any) -> Op:
    return Op(
        name=name,
        fn=fn,
        reference=reference,
        impls={"triton": partial(_run, row_norm.triton), "compile": partial(_run, row_norm.compiled)},
        small=partial(_run, row_norm.small),
        inputs=_inputs,
        dims=modulated_norm.DIMS,
        bench=modulated_norm.BENCH,
        audit=modulated_norm.AUDIT,
        traffic=partial(_traffic, 1 + center),
        flops=lambda B, S, D: (11 if center else 8) * B * S * D,
        aten=partial(_aten, center),
        axes="... D, ... D, ... D, ... D, ... D -> ... D, ... D",
        errors=_errors,
        **fields,
    )


ADD_MODULATED_LAYER_NORM = _op(
    "add_modulated_layer_norm",
    add_modulated_layer_norm,
    center=True,
    replaces="`residual + gate * x`, then a modulated `F.layer_norm`: between the branches of a DiT block",
    variants={k: v for k, v in modulated_norm.VARIANTS.items() if k != "affine"} | {"no gate": {"gated": False}},
)

ADD_MODULATED_RMS_NORM = _op(
    "add_modulated_rms_norm",
    add_modulated_rms_norm,
    center=False,
    replaces="`residual + gate * x`, then a modulated `F.rms_norm`",
    variants={"default": {}},
)
