"""Normalization of every head of the queries or keys, then rotary position embedding.

    z = n · (weight + weight_offset) + bias     n = x / √(mean(x²) + ε), or the same of x − mean(x), over the D elements
    y = z · cos + rotate(z) · sin               on the first R of them; the rest of z passes through

Source: Henry et al., Query-Key Normalization for Transformers (2020); with LayerNorm, Dehghani et al., Scaling Vision
Transformers to 22 Billion Parameters (2023); with RMSNorm, Qwen3 and Gemma 3 (2025). RoPE as in :mod:`.rope`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import dispatch
from ..autograd import Gradients, fused, vjp
from ..compiled import compiled, compiled_call
from ..op import Call, Draw, ErrorInput, Op, Traffic
from . import rope, row_norm


def reference(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, cos: Tensor, sin: Tensor, *, interleaved: bool, **norm: Any
) -> Tensor:
    """Normalization and rotation in plain PyTorch: float32 (or wider) in between, the result in the dtype of ``x``."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    normed = row_norm.reference(wide, weight, bias, **norm)
    return rope.reference(normed, cos, sin, interleaved=interleaved, dtype=x.dtype)


def qk_norm_rope(
    x: Tensor,
    weight: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    *,
    eps: float = 1e-6,
    norm: str = "rms",
    bias: Tensor | None = None,
    weight_offset: float = 0.0,
    interleaved: bool = False,
) -> Tensor:
    """Normalize each head, then turn it by its position, in one pass: ``rope(rms_norm(x, weight), cos, sin)``.

    Computed in float32 and rounded once. Heads may lie anywhere in memory, as for :func:`rope`: queries transposed to
    [B, H, S, D] are not copied. The backward pass keeps x alone and computes the statistics again.

    The gradient flows to x, weight and bias. If cos or sin requires one too, the plain form runs.

    Args:
        x: floating-point tensor [..., D] of two dims or more, e.g. the queries [B, H, S, D].
        weight: [D], or None for no scale. Its dtype may differ from x's.
        cos: floating-point tensor that broadcasts to [..., R], R ≤ D and even, as for :func:`rope`.
        sin: likewise, with the same R.
        eps: added to the mean square, or to the variance.
        norm: ``"rms"`` (Qwen3, Gemma 3) or ``"layer"``, which subtracts the mean (ViT-22B, Chameleon).
        bias: [D], or None for no shift.
        weight_offset: added to the weight; 1.0 for models that store ``weight − 1`` (Gemma).
        interleaved: pair elements (2i, 2i + 1), not (i, i + R/2), as for :func:`rope`.

    Returns:
        [..., D] in x's dtype.

    Raises:
        TypeError: if x, cos or sin is not floating point.
        ValueError: if weight or bias is not [D], cos or sin does not fit x, or there is no such norm.
    """
    rope.check("qk_norm_rope", "x", x, cos, sin)
    row_norm.check_affine("qk_norm_rope", x, weight, bias)
    if norm not in ("rms", "layer"):
        raise ValueError(f"qk_norm_rope: norm must be 'rms' or 'layer', got {norm!r}")
    options = {"eps": float(eps), "weight_offset": float(weight_offset), "center": norm == "layer"}
    return dispatch.run(QK_NORM_ROPE, x, weight, bias, cos, sin, **options, interleaved=bool(interleaved))


def _triton(*tensors: Tensor | None, **options: Any) -> Tensor:
    if _tables_need_gradients(tensors):
        return reference(*tensors, **options)  # type: ignore[arg-type]
    from ..triton import qk_norm_rope as kernels

    return fused(kernels.forward, kernels.backward, vjp(reference), tensors, options)


def _compiled(*tensors: Tensor | None, **options: Any) -> Tensor:
    if _tables_need_gradients(tensors):
        return compiled(reference)(*tensors, **options)
    return fused(_compiled_forward, _compiled_backward, vjp(reference), tensors, options)


def _tables_need_gradients(tensors: tuple[Tensor | None, ...]) -> bool:
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors[-2:])


def _compiled_forward(*tensors: Tensor | None, **options: Any) -> Any:
    return compiled_call(reference, tensors, options), tensors


def _compiled_backward(grads: Any, saved: Any, needs: Any, **options: Any) -> Gradients:
    return *compiled_call(_gradients, (*grads, *saved), {"needs": needs[:3], **options}), None, None


def _gradients(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    *,
    needs: tuple[bool, ...],
    interleaved: bool,
    **options: Any,
) -> Gradients:
    """The gradients of x, weight and bias: the cotangent turned back, then through the norm's closed form."""
    wide = torch.promote_types(x.dtype, torch.float32)
    dz = rope.turned_back(dy.to(wide), cos, sin, interleaved=interleaved)
    mean, rstd = row_norm.statistics(x.to(wide), eps=options["eps"], center=options["center"])
    needs = (needs[0], False, *needs[1:3], False)
    normed = (x, weight, bias, mean, rstd, None, None, None)
    _, dx, dweight, dbias, _ = row_norm.gradients(dz, None, *normed, needs=needs, **options)
    return dx, dweight, dbias


def _aten(
    x: Tensor,
    weight: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    *,
    eps: float = 1e-6,
    norm: str = "rms",
    bias: Tensor | None = None,
    weight_offset: float = 0.0,
    interleaved: bool = False,
) -> Tensor:
    if weight is not None and weight_offset:
        weight = weight + weight_offset
    if norm == "layer":
        z = F.layer_norm(x, x.shape[-1:], weight, bias, eps)
    else:
        z = F.rms_norm(x, x.shape[-1:], weight, eps)
        z = z if bias is None else z + bias
    return rope.aten(z, cos, sin, interleaved=interleaved).to(x.dtype)


def _inputs(
    draw: Draw,
    *,
    B: int,
    H: int,
    S: int,
    D: int,
    weight: bool = True,
    bias: bool = False,
    partial: bool = False,
    own: bool = False,
    **options: Any,
) -> Call:
    R = rope.turning_elements(D, partial)
    table = (B, 1, S, R) if own else (S, R)
    x, scale, shift = draw.tensor(B, H, S, D), draw.weight(D), draw.weight(D)
    cos, sin = draw.constant(*table), draw.constant(*table)
    return Call((x, scale if weight else None, cos, sin), {**options, **({"bias": shift} if bias else {})})


def _errors() -> Iterator[ErrorInput]:
    x, weight, table = torch.zeros(2, 3, 5, 8), torch.ones(8), torch.zeros(5, 8)
    yield ErrorInput(Call((x.long(), weight, table, table)), TypeError, r"x must be a floating-point.*int64")
    yield ErrorInput(
        Call((x, torch.ones(7), table, table)), ValueError, r"weight must have the shape.*\(8,\), got \(7,\)"
    )
    bias = {"bias": torch.ones(3, 8)}
    yield ErrorInput(Call((x, weight, table, table), bias), ValueError, r"bias must have the shape.*got \(3, 8\)")
    yield ErrorInput(Call((x, weight, table[:4], table)), ValueError, r"cos must broadcast to x.*got \(4, 8\)")
    yield ErrorInput(Call((x, weight, table, table), {"norm": "batch"}), ValueError, "'rms' or 'layer', got 'batch'")


def _traffic(
    itemsize: int,
    *,
    B: int,
    H: int,
    S: int,
    D: int,
    weight: bool = True,
    bias: bool = False,
    partial: bool = False,
    own: bool = False,
    **_: Any,
) -> Traffic:
    """x, y, cos and sin forward; x, dy, dx, cos and sin backward; the parameters, and their gradients, once."""
    heads = B * H * S * D * itemsize
    tables = 2 * (B if own else 1) * S * rope.turning_elements(D, partial) * itemsize
    row = D * itemsize
    return Traffic(
        forward=2 * heads + tables + (weight + bias) * row, backward=3 * heads + tables + (2 * weight + bias) * row
    )


QK_NORM_ROPE = Op(
    name="qk_norm_rope",
    replaces="`RMSNorm` or `LayerNorm` of every head, then the rotary embedding",
    fn=qk_norm_rope,
    reference=reference,
    impls={"triton": _triton, "compile": _compiled},
    inputs=_inputs,
    dims={"B": (0, 1, 2, 3), "H": (1, 2, 5, 33), "S": (0, 1, 2, 7, 33), "D": (1, 2, 31, 64, 66, 128, 2048, 2050)},
    # Queries of Qwen3-8B and of Gemma 3 4B.
    bench=({"B": 1, "H": 32, "S": 2048, "D": 128}, {"B": 1, "H": 8, "S": 2048, "D": 256}),
    audit=(
        {"B": 1, "H": 16, "S": 64, "D": 128},
        {"B": 1, "H": 32, "S": 128, "D": 128},
        {"B": 1, "H": 8, "S": 128, "D": 256},
    ),
    traffic=_traffic,
    flops=lambda B, H, S, D: 7 * B * H * S * D,
    aten=_aten,
    axes="... D, D, D, ... R, ... R -> ... D",
    errors=_errors,
    variants={
        "default": {},
        "layer norm with bias": {"norm": "layer", "bias": True, "eps": 1e-5},
        "Gemma's offset, interleaved": {"weight_offset": 1.0, "interleaved": True},
        "no weight, partial, own positions": {"weight": False, "partial": True, "own": True},
        "layer norm, interleaved, partial": {"norm": "layer", "bias": True, "interleaved": True, "partial": True},
    },
)
