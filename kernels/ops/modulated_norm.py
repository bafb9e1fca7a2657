"""Adaptive normalization of diffusion transformers: a row norm whose scale and shift come from a condition.

    y = norm(x)·(1 + scale) + shift                             norm: LayerNorm or RMSNorm over the last dim

and the joint of two branches of a block, the gated residual before it:

    h = residual + gate·x
    y = norm(h)·(1 + scale) + shift

scale, shift and gate are one row for each sample, or for each token.

Source: Peebles and Xie, Scalable Diffusion Models with Transformers (2023), adaLN-Zero; FLUX and Stable Diffusion 3.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import dispatch
from ..op import Call, Draw, ErrorInput, Excess, Op, Options, Traffic
from . import checks, row_norm
from .layer_norm import LayerNorm
from .rms_norm import RMSNorm


def reference(x: Tensor, scale: Tensor, shift: Tensor | None, **options: Any) -> Tensor:
    """Modulated norm in plain PyTorch: ``scale`` and ``shift`` broadcast to x."""
    return row_norm.reference(x, scale, shift, **options)


def add_reference(
    x: Tensor, residual: Tensor, gate: Tensor, scale: Tensor, shift: Tensor | None, **options: Any
) -> tuple[Tensor, Tensor]:
    """Gated residual and modulated norm in plain PyTorch: ``gate``, ``scale`` and ``shift`` broadcast to x."""
    return row_norm.add_reference(x, residual, scale, shift, gate, None, **options)


def modulated_layer_norm(
    x: Tensor,
    scale: Tensor,
    shift: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    eps: float = 1e-6,
) -> Tensor:
    """Layer normalization over the last dim, modulated: ``layer_norm(x, weight, bias) · (1 + scale) + shift``.

    Computed in float32 and rounded once. The gradients of scale and shift are summed over the tokens that share them in
    float32, always in the same order.

    Args:
        x: floating-point tensor [B, ..., D].
        scale: [B, D], one row for each sample; or with the dims of x, of which the last before D may be 1: [B, 1, D],
            or [B, S, D] for a row for each token. Its dtype may differ from x's.
        shift: like scale, or None for no shift.
        weight: [D], or None. With weight or bias, a product of the size of scale is made first.
        bias: [D], or None.
        eps: added to the variance.

    Returns:
        like x.

    Raises:
        TypeError: if x, scale or shift is not floating point.
        ValueError: if x is a scalar, weight or bias is not [D], scale has none of these shapes, or shift has another.
    """
    name = "modulated_layer_norm"
    row_norm.check_affine(name, x, weight, bias)
    scale, shift = _modulation(name, x, scale=scale, shift=shift)
    scale, shift, offset = _fold(scale, shift, weight, bias)
    return dispatch.run(MODULATED_LAYER_NORM, x, scale, shift, eps=float(eps), weight_offset=offset, center=True)


def modulated_rms_norm(
    x: Tensor, scale: Tensor, shift: Tensor | None, weight: Tensor | None = None, *, eps: float = 1e-6
) -> Tensor:
    """Root-mean-square normalization over the last dim, modulated: ``rms_norm(x, weight) · (1 + scale) + shift``.

    Arguments, result and errors are those of :func:`modulated_layer_norm`.
    """
    name = "modulated_rms_norm"
    row_norm.check_affine(name, x, weight)
    scale, shift = _modulation(name, x, scale=scale, shift=shift)
    scale, shift, offset = _fold(scale, shift, weight, None)
    return dispatch.run(MODULATED_RMS_NORM, x, scale, shift, eps=float(eps), weight_offset=offset, center=False)


def add_modulated_layer_norm(
    x: Tensor,
    residual: Tensor,
    gate: Tensor,
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
        gate: like scale.
        scale: as in :func:`modulated_layer_norm`.
        shift: like scale, or None for no shift.
        weight: as in :func:`modulated_layer_norm`.
        bias: as in :func:`modulated_layer_norm`.
        eps: added to the variance.

    Returns:
        (normed, new_residual): normed like x, new_residual = h in the wider dtype of x and residual.

    Raises:
        TypeError: if x, gate, scale or shift is not floating point.
        ValueError: as :func:`modulated_layer_norm`, or if residual has another shape than x, or gate than scale.
    """
    return _add(ADD_MODULATED_LAYER_NORM, x, residual, gate, scale, shift, weight, bias, eps=eps, center=True)


def add_modulated_rms_norm(
    x: Tensor,
    residual: Tensor,
    gate: Tensor,
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


class AdaLayerNormContinuous(torch.nn.Module):
    """Drop-in for the module of that name in diffusers: same arguments, same ``state_dict``.

    A linear map of the condition gives scale and shift, and :func:`modulated_layer_norm` (``norm_type="rms_norm"``:
    :func:`modulated_rms_norm`) the rest.

    Args:
        embedding_dim: D.
        conditioning_embedding_dim: size of the condition.
        elementwise_affine: whether the norm has a weight, and a bias, of its own.
        eps: of the norm.
        bias: whether the linear map, and an affine norm, have a bias.
        norm_type: ``"layer_norm"`` or ``"rms_norm"``.
    """

    def __init__(
        self,
        embedding_dim: int,
        conditioning_embedding_dim: int,
        elementwise_affine: bool = True,
        eps: float = 1e-5,
        bias: bool = True,
        norm_type: str = "layer_norm",
    ) -> None:
        super().__init__()
        self.eps = eps
        self.silu = torch.nn.SiLU()
        self.linear = torch.nn.Linear(conditioning_embedding_dim, 2 * embedding_dim, bias=bias)
        self.norm: LayerNorm | RMSNorm
        if norm_type == "layer_norm":
            self.norm = LayerNorm(embedding_dim, eps, elementwise_affine, bias)
        elif norm_type == "rms_norm":
            self.norm = RMSNorm(embedding_dim, eps, elementwise_affine)
        else:
            raise ValueError(f"AdaLayerNormContinuous: norm_type must be 'layer_norm' or 'rms_norm', got {norm_type!r}")

    def forward(self, x: Tensor, conditioning_embedding: Tensor) -> Tensor:
        """[B, S, D] and [B, C] → like x."""
        scale, shift = self.linear(self.silu(conditioning_embedding).to(x.dtype)).chunk(2, dim=1)
        if isinstance(self.norm, LayerNorm):
            return modulated_layer_norm(x, scale, shift, self.norm.weight, self.norm.bias, eps=self.eps)
        return modulated_rms_norm(x, scale, shift, self.norm.weight, eps=self.eps)


def _add(
    op: Op,
    x: Tensor,
    residual: Tensor,
    gate: Tensor,
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
    scale, shift, gate = _modulation(op.name, x, scale=scale, shift=shift, gate=gate)
    scale, shift, offset = _fold(scale, shift, weight, bias)
    return dispatch.run(op, x, residual, gate, scale, shift, eps=float(eps), weight_offset=offset, center=center)


def _modulation(name: str, x: Tensor, **rows: Tensor | None) -> list[Any]:
    """Scale, shift and gate, checked, with the dims of x."""
    checks.floating(name, **rows)
    return checks.rows_of_groups(name, x, **rows)


def _fold(
    scale: Tensor, shift: Tensor | None, weight: Tensor | None, bias: Tensor | None
) -> tuple[Tensor, Tensor | None, float]:
    """(scale, shift, offset) such that ``n·(scale + offset) + shift`` is the modulated norm of affine rows."""
    if weight is None and bias is None:
        return scale, shift, 1.0
    factor = 1.0 + scale.to(torch.promote_types(scale.dtype, torch.float32))
    if bias is not None:
        moved = factor * bias.to(factor.dtype)
        shift = moved if shift is None else moved + shift.to(factor.dtype)
    return factor if weight is None else factor * weight.to(factor.dtype), shift, 0.0


def _alone(run: Callable[..., Tensor], x: Tensor, scale: Tensor, shift: Tensor | None, **options: Any) -> Tensor:
    return run(x, None, scale, shift, None, None, **options)


def _added(
    run: Callable[..., tuple[Tensor, Tensor]],
    x: Tensor,
    residual: Tensor,
    gate: Tensor,
    scale: Tensor,
    shift: Tensor | None,
    **options: Any,
) -> tuple[Tensor, Tensor]:
    return run(x, residual, scale, shift, gate, None, **options)


def _aten(
    center: bool, x: Tensor, scale: Tensor, shift: Tensor | None, *affine: Tensor | None, eps: float = 1e-6
) -> Tensor:
    norm: Callable[..., Tensor] = F.layer_norm if center else F.rms_norm
    y = norm(x, x.shape[-1:], *affine, eps=eps) * (1 + scale)
    return (y if shift is None else y + shift).to(x.dtype)


def _add_aten(
    center: bool, x: Tensor, residual: Tensor, gate: Tensor, *others: Tensor | None, **options: Any
) -> tuple[Tensor, Tensor]:
    h = (residual + gate * x).to(torch.promote_types(x.dtype, residual.dtype))
    return _aten(center, h, *others, **options).to(x.dtype), h  # type: ignore[arg-type]


def _rows(draw: Draw, count: int, *, B: int, S: int, D: int, tokens: bool) -> list[Tensor]:
    """So many rows for each sample, or each token: the parts of what one linear map gave, as they are in a model."""
    whole = draw.weight(B, S if tokens else 1, count * D)
    return [part.detach().requires_grad_() for part in whole.chunk(count, -1)]


def _inputs(draw: Draw, *, B: int, S: int, D: int, tokens: bool = False, affine: int = 0) -> Call:
    x = draw.tensor(B, S, D)
    return Call(
        (x, *_rows(draw, 2, B=B, S=S, D=D, tokens=tokens), *[draw.weight(D) for _ in range(affine)]), {"eps": 1e-6}
    )


def _add_inputs(draw: Draw, *, B: int, S: int, D: int, tokens: bool = False, affine: int = 0) -> Call:
    x, residual = draw.tensor(B, S, D), draw.tensor(B, S, D)
    gate, scale, shift = _rows(draw, 3, B=B, S=S, D=D, tokens=tokens)
    return Call((x, residual, gate, scale, shift, *[draw.weight(D) for _ in range(affine)]), {"eps": 1e-6})


def _errors() -> Iterator[ErrorInput]:
    x, m = torch.zeros(2, 3, 8), torch.zeros(2, 8)
    yield ErrorInput(Call((x.long(), m, m)), TypeError, r"x must be a floating-point.*int64")
    yield ErrorInput(Call((x, m.long(), m)), TypeError, r"scale must be a floating-point.*int64")
    yield ErrorInput(Call((torch.tensor(1.0), m, m)), ValueError, "at least one dimension")
    yield ErrorInput(Call((x, m, m, torch.ones(7))), ValueError, r"weight must have the shape.*\(8,\), got \(7,\)")
    yield ErrorInput(Call((x, x[:1], m)), ValueError, r"scale must have a row for each sample.*got \(1, 3, 8\)")
    yield ErrorInput(Call((x, m, x)), ValueError, r"shift must have the shape of scale, \(2, 8\), got \(2, 3, 8\)")


def _add_errors() -> Iterator[ErrorInput]:
    x, m = torch.zeros(2, 3, 8), torch.zeros(2, 8)
    yield ErrorInput(Call((x, m, m, m, m)), ValueError, r"residual must have the shape of x.*got \(2, 8\)")
    yield ErrorInput(Call((x, x, x, m, m)), ValueError, r"gate must have the shape of scale, \(2, 8\), got \(2, 3, 8\)")
    yield ErrorInput(Call((x, x, m.long(), m, m)), TypeError, r"gate must be a floating-point.*int64")


def _traffic(
    statistics: int, itemsize: int, *, B: int, S: int, D: int, tokens: bool = False, affine: int = 0
) -> Traffic:
    """x, y, scale, shift forward; dy, x, dx, scale and the gradients of scale and shift backward; the statistics."""
    size, rows, numbers = B * S * D * itemsize, B * (S if tokens else 1) * D, 4 * statistics * B * S
    if not affine:
        rows *= itemsize
        return Traffic(2 * size + 2 * rows + numbers, 3 * size + 3 * rows + numbers)
    # Folded in float32 first, and unfolded last, by what PyTorch has; the least is as if that were free.
    return Traffic(2 * size + 8 * rows + numbers, 3 * size + 12 * rows + numbers)


def _add_traffic(
    statistics: int, itemsize: int, *, B: int, S: int, D: int, tokens: bool = False, affine: int = 0
) -> Traffic:
    """Of the residual, h and the gate beside these; backward x, dh_out, the residual's gradient and the gate's."""
    alone = _traffic(statistics, itemsize, B=B, S=S, D=D, tokens=tokens, affine=affine)
    size, gate = B * S * D * itemsize, B * (S if tokens else 1) * D * itemsize
    return Traffic(alone.forward + 2 * size + gate, alone.backward + 3 * size + 2 * gate)


_DIMS = {"B": (0, 1, 3), "S": (1, 2, 33, 129), "D": (1, 31, 32, 33, 127, 129, 1023, 1025, 8193, 16_385)}
# DiT-XL/2 at 256², FLUX.1 at 1024².
_BENCH = ({"B": 16, "S": 256, "D": 1152}, {"B": 1, "S": 4096, "D": 3072})
_AUDIT = ({"B": 1, "S": 1024, "D": 512}, {"B": 1, "S": 512, "D": 3072}, {"B": 2, "S": 16, "D": 32_768})
_VARIANTS: dict[str, Options] = {"default": {}, "for each token": {"tokens": True}, "affine": {"affine": 2}}
_RMS_VARIANTS: dict[str, Options] = {"default": {}, "weight": {"affine": 1}}


def _op(name: str, fn: Callable[..., Tensor], *, center: bool, **fields: Any) -> Op:
    return Op(
        name=name,
        fn=fn,
        reference=reference,
        impls={"triton": partial(_alone, row_norm.triton), "compile": partial(_alone, row_norm.compiled)},
        inputs=_inputs,
        dims=_DIMS,
        bench=_BENCH,
        audit=_AUDIT,
        traffic=partial(_traffic, 1 + center),
        flops=lambda B, S, D: (9 if center else 6) * B * S * D,
        aten=partial(_aten, center),
        axes="... D, ... D, ... D -> ... D",
        errors=_errors,
        **fields,
    )


def _add_op(name: str, fn: Callable[..., tuple[Tensor, Tensor]], *, center: bool, **fields: Any) -> Op:
    return Op(
        name=name,
        fn=fn,
        reference=add_reference,
        impls={"triton": partial(_added, row_norm.triton), "compile": partial(_added, row_norm.compiled)},
        inputs=_add_inputs,
        dims=_DIMS,
        bench=_BENCH,
        audit=_AUDIT,
        traffic=partial(_add_traffic, 1 + center),
        flops=lambda B, S, D: (11 if center else 8) * B * S * D,
        aten=partial(_add_aten, center),
        axes="... D, ... D, ... D, ... D, ... D -> ... D, ... D",
        errors=_add_errors,
        **fields,
    )


MODULATED_LAYER_NORM = _op(
    "modulated_layer_norm",
    modulated_layer_norm,
    center=True,
    replaces="`F.layer_norm(x) * (1 + scale) + shift`: adaLN of DiT, FLUX, SD3",
    variants=_VARIANTS,
    excess={
        ("affine", "forward"): Excess(1.03, "scale and shift are folded with the norm's own weight and bias first"),
        ("affine", "backward"): Excess(1.04, "and their gradients unfolded last"),
    },
    modules=(AdaLayerNormContinuous,),
)

MODULATED_RMS_NORM = _op(
    "modulated_rms_norm",
    modulated_rms_norm,
    center=False,
    replaces="`F.rms_norm(x) * (1 + scale) + shift`",
    variants=_RMS_VARIANTS,
)

ADD_MODULATED_LAYER_NORM = _add_op(
    "add_modulated_layer_norm",
    add_modulated_layer_norm,
    center=True,
    replaces="`residual + gate * x`, then a modulated `F.layer_norm`: between the branches of a DiT block",
    variants={k: v for k, v in _VARIANTS.items() if k != "affine"},
)

ADD_MODULATED_RMS_NORM = _add_op(
    "add_modulated_rms_norm",
    add_modulated_rms_norm,
    center=False,
    replaces="`residual + gate * x`, then a modulated `F.rms_norm`",
    variants={"default": {}},
)
