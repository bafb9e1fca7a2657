"""Adaptive normalization of diffusion transformers: a row norm whose scale and shift come from a condition.

    y = norm(x)·(1 + scale) + shift                             norm: LayerNorm or RMSNorm over the last dim

scale and shift are one row for each sample, or for each token.

Source: Peebles and Xie, Scalable Diffusion Models with Transformers (2023), adaLN-Zero; FLUX and Stable Diffusion 3.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, ClassVar

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
    scale, shift = modulation(name, x, scale=scale, shift=shift)
    scale, shift, offset = fold(scale, shift, weight, bias)
    return dispatch.run(MODULATED_LAYER_NORM, x, scale, shift, eps=float(eps), weight_offset=offset, center=True)


def modulated_rms_norm(
    x: Tensor, scale: Tensor, shift: Tensor | None, weight: Tensor | None = None, *, eps: float = 1e-6
) -> Tensor:
    """Root-mean-square normalization over the last dim, modulated: ``rms_norm(x, weight) · (1 + scale) + shift``.

    Arguments, result and errors are those of :func:`modulated_layer_norm`.
    """
    name = "modulated_rms_norm"
    row_norm.check_affine(name, x, weight)
    scale, shift = modulation(name, x, scale=scale, shift=shift)
    scale, shift, offset = fold(scale, shift, weight, None)
    return dispatch.run(MODULATED_RMS_NORM, x, scale, shift, eps=float(eps), weight_offset=offset, center=False)


#: ε by the name that diffusers has for a norm; both are computed in float32 here.
_EPS = {"layer_norm": 1e-6, "fp32_layer_norm": 1e-5}


class _AdaLayerNorm(torch.nn.Module):
    """A linear map of the condition to several rows for each sample, and a LayerNorm with no weight of its own."""

    rows: ClassVar[int]

    def __init__(self, embedding_dim: int, norm_type: str = "layer_norm", bias: bool = True) -> None:
        super().__init__()
        if norm_type not in _EPS:
            raise ValueError(f"{type(self).__name__}: norm_type must be one of {', '.join(_EPS)}, got {norm_type!r}")
        self.silu = torch.nn.SiLU()
        self.linear = torch.nn.Linear(embedding_dim, self.rows * embedding_dim, bias=bias)
        self.norm = LayerNorm(embedding_dim, eps=_EPS[norm_type], elementwise_affine=False)

    def _parts(self, emb: Tensor) -> tuple[Tensor, ...]:
        return self.linear(self.silu(emb)).chunk(self.rows, dim=1)


class AdaLayerNormZero(_AdaLayerNorm):
    """Drop-in for the module of that name in diffusers, without an embedder of its own: same ``state_dict``.

    The first norm of a block: a linear map of the condition gives six rows, of which this norm takes a shift and a
    scale, and hands on the gate of the first branch and shift, scale and gate of the second.

    Args:
        embedding_dim: D, and the size of the condition.
        num_embeddings: None: the condition is embedded outside.
        norm_type: ``"layer_norm"``, with ε = 1e-6, or ``"fp32_layer_norm"``, with 1e-5.
        bias: whether the linear map has one.
    """

    rows = 6

    def __init__(
        self, embedding_dim: int, num_embeddings: int | None = None, norm_type: str = "layer_norm", bias: bool = True
    ) -> None:
        if num_embeddings is not None:
            raise ValueError(
                f"AdaLayerNormZero: num_embeddings must be None, got {num_embeddings}; embed the timestep and the "
                "label outside, and pass the result as emb"
            )
        super().__init__(embedding_dim, norm_type, bias)

    def forward(self, x: Tensor, emb: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """[B, S, D] and [B, D] → (normed, gate_msa, shift_mlp, scale_mlp, gate_mlp); rows are [B, D]."""
        shift, scale, *others = self._parts(emb)
        gate, shift_mlp, scale_mlp, gate_mlp = others
        return modulated_layer_norm(x, scale, shift, eps=self.norm.eps), gate, shift_mlp, scale_mlp, gate_mlp


class AdaLayerNormZeroSingle(_AdaLayerNorm):
    """Drop-in for the module of that name in diffusers, the norm of FLUX's single blocks: same ``state_dict``.

    Args:
        embedding_dim: D, and the size of the condition.
        norm_type: as for :class:`AdaLayerNormZero`.
        bias: whether the linear map has one.
    """

    rows = 3

    def forward(self, x: Tensor, emb: Tensor) -> tuple[Tensor, Tensor]:
        """[B, S, D] and [B, D] → (normed, gate), gate [B, D]."""
        shift, scale, gate = self._parts(emb)
        return modulated_layer_norm(x, scale, shift, eps=self.norm.eps), gate


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


def modulation(name: str, x: Tensor, **rows: Tensor | None) -> list[Any]:
    """Scale, shift and gate, checked, with the dims of x."""
    checks.floating(name, **rows)
    return checks.rows_of_groups(name, x, **rows)


def fold(
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


def aten(
    center: bool, x: Tensor, scale: Tensor, shift: Tensor | None, *affine: Tensor | None, eps: float = 1e-6
) -> Tensor:
    """The plain calls: the norm that ``center`` stands for, then the modulation."""
    norm: Callable[..., Tensor] = F.layer_norm if center else F.rms_norm
    y = norm(x, x.shape[-1:], *affine, eps=eps) * (1 + scale)
    return (y if shift is None else y + shift).to(x.dtype)


def rows(draw: Draw, count: int, *, B: int, S: int, D: int, tokens: bool) -> list[Tensor]:
    """So many rows for each sample, or each token: the parts of what one linear map gave, as they are in a model."""
    whole = draw.weight(B, S if tokens else 1, count * D)
    return [part.detach().requires_grad_() for part in whole.chunk(count, -1)]


def _inputs(draw: Draw, *, B: int, S: int, D: int, tokens: bool = False, affine: int = 0) -> Call:
    x = draw.tensor(B, S, D)
    return Call(
        (x, *rows(draw, 2, B=B, S=S, D=D, tokens=tokens), *[draw.weight(D) for _ in range(affine)]), {"eps": 1e-6}
    )


def _errors() -> Iterator[ErrorInput]:
    x, m = torch.zeros(2, 3, 8), torch.zeros(2, 8)
    yield ErrorInput(Call((x.long(), m, m)), TypeError, r"x must be a floating-point.*int64")
    yield ErrorInput(Call((x, m.long(), m)), TypeError, r"scale must be a floating-point.*int64")
    yield ErrorInput(Call((torch.tensor(1.0), m, m)), ValueError, "at least one dimension")
    yield ErrorInput(Call((x, m, m, torch.ones(7))), ValueError, r"weight must have the shape.*\(8,\), got \(7,\)")
    yield ErrorInput(Call((x, x[:1], m)), ValueError, r"scale must have a row for each sample.*got \(1, 3, 8\)")
    yield ErrorInput(Call((x, m, x)), ValueError, r"shift must have the shape of scale, \(2, 8\), got \(2, 3, 8\)")


def traffic(
    statistics: int, itemsize: int, *, B: int, S: int, D: int, tokens: bool = False, affine: int = 0
) -> Traffic:
    """x, y, scale, shift forward; dy, x, dx, scale and the gradients of scale and shift backward; the statistics."""
    size, rows, numbers = B * S * D * itemsize, B * (S if tokens else 1) * D, 4 * statistics * B * S
    if not affine:
        rows *= itemsize
        return Traffic(2 * size + 2 * rows + numbers, 3 * size + 3 * rows + numbers)
    # Folded in float32 first, and unfolded last, by what PyTorch has; the least is as if that were free.
    return Traffic(2 * size + 8 * rows + numbers, 3 * size + 12 * rows + numbers)


DIMS = {"B": (0, 1, 3), "S": (1, 2, 33, 129), "D": (1, 31, 32, 33, 127, 129, 1023, 1025, 8193, 16_385)}
# DiT-XL/2 at 256², FLUX.1 at 1024².
BENCH = ({"B": 16, "S": 256, "D": 1152}, {"B": 1, "S": 4096, "D": 3072})
AUDIT = ({"B": 1, "S": 1024, "D": 256}, {"B": 1, "S": 1024, "D": 3072}, {"B": 2, "S": 16, "D": 32_768})
VARIANTS: dict[str, Options] = {"default": {}, "for each token": {"tokens": True}, "affine": {"affine": 2}}
_RMS_VARIANTS: dict[str, Options] = {"default": {}, "weight": {"affine": 1}}


def _op(name: str, fn: Callable[..., Tensor], *, center: bool, **fields: Any) -> Op:
    return Op(
        name=name,
        fn=fn,
        reference=reference,
        impls={"triton": partial(_alone, row_norm.triton), "compile": partial(_alone, row_norm.compiled)},
        small=partial(_alone, row_norm.small),
        inputs=_inputs,
        dims=DIMS,
        bench=BENCH,
        audit=AUDIT,
        traffic=partial(traffic, 1 + center),
        flops=lambda B, S, D: (9 if center else 6) * B * S * D,
        aten=partial(aten, center),
        axes="... D, ... D, ... D -> ... D",
        errors=_errors,
        **fields,
    )


MODULATED_LAYER_NORM = _op(
    "modulated_layer_norm",
    modulated_layer_norm,
    center=True,
    replaces="`F.layer_norm(x) * (1 + scale) + shift`: adaLN of DiT, FLUX, SD3",
    variants=VARIANTS,
    excess={
        ("affine", "forward"): Excess(1.03, "scale and shift are folded with the norm's own weight and bias first"),
        ("affine", "backward"): Excess(1.04, "and their gradients unfolded last"),
    },
    modules=(AdaLayerNormContinuous, AdaLayerNormZero, AdaLayerNormZeroSingle),
)

MODULATED_RMS_NORM = _op(
    "modulated_rms_norm",
    modulated_rms_norm,
    center=False,
    replaces="`F.rms_norm(x) * (1 + scale) + shift`",
    variants=_RMS_VARIANTS,
)
