"""LayerNorm of images: over the channels, at every pixel.

    y = (x − mean_c(x)) / √(var_c(x) + ε) · weight_c + bias_c        var with divisor C

Source: Liu et al., A ConvNet for the 2020s (ConvNeXt, 2022); ``timm.layers.LayerNorm2d``.
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
from ..op import Call, Draw, ErrorInput, Op, Traffic
from . import row_norm
from .channel_norm import channels_last, check, draw_images, per_channel


def reference(x: Tensor, weight: Tensor | None, bias: Tensor | None, *, eps: float) -> Tensor:
    """LayerNorm over dim 1 in plain PyTorch: float32 (or wider) inside, the result in the dtype of ``x``."""
    return _scaled(x, weight, bias, *_statistics(*_sums(x), C=x.shape[1], eps=eps))


def _sums(x: Tensor) -> tuple[Tensor, Tensor]:
    """The sum of each pixel, and its sum of squares about the mean."""
    n = x.to(torch.promote_types(x.dtype, torch.float32))
    total = n.sum(1, keepdim=True)
    return total, (n - total / x.shape[1]).square().sum(1, keepdim=True)


def _statistics(total: Tensor, squares: Tensor, *, C: int, eps: float) -> tuple[Tensor, Tensor]:
    """The mean of each pixel, and its 1/√(var + ε)."""
    return total / C, torch.rsqrt(squares / C + eps)


def _scaled(x: Tensor, weight: Tensor | None, bias: Tensor | None, mean: Tensor, rstd: Tensor) -> Tensor:
    y = (x.to(rstd.dtype) - mean) * rstd
    if weight is not None:
        y = y * per_channel(weight, y)
    if bias is not None:
        y = y + per_channel(bias, y)
    return y.to(x.dtype)


def layer_norm_2d(x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None, *, eps: float = 1e-6) -> Tensor:
    """ConvNeXt's normalization: ``(x − mean(x)) / √(var(x) + eps) · weight + bias`` over the channels of each pixel.

    Computed in float32 and rounded once. The channels are read where they lie: images in ``torch.channels_last`` are
    rows of channels, in the contiguous format their pixels are walked in blocks; neither is permuted or copied.

    Args:
        x: floating-point tensor [N, C, H, W].
        weight: [C], or None for no scale. Its dtype may differ from x's.
        bias: [C], or None for no shift.
        eps: added to the variance.

    Returns:
        [N, C, H, W] in x's dtype and memory format.

    Raises:
        TypeError: if x is not floating point.
        ValueError: if x has not four dims, or weight or bias is not [C].
    """
    check("layer_norm_2d", x, weight=weight, bias=bias)
    if x.dim() != 4:
        raise ValueError(f"layer_norm_2d: x must be [N, C, H, W], got {tuple(x.shape)}; unsqueeze what is missing")
    return dispatch.run(LAYER_NORM_2D, x, weight, bias, eps=float(eps))


class LayerNorm2d(torch.nn.LayerNorm):
    """Drop-in for timm's ``LayerNorm2d``: same arguments, same ``state_dict``; runs :func:`layer_norm_2d`.

    Args:
        num_channels: C.
        eps: added to the variance.
        affine: learn a scale and a shift for each channel.
    """

    def __init__(self, num_channels: int, eps: float = 1e-6, affine: bool = True, **factory: Any) -> None:
        super().__init__(num_channels, eps=eps, elementwise_affine=affine, **factory)

    def forward(self, x: Tensor) -> Tensor:
        """[N, C, H, W] → the same shape, dtype and memory format."""
        return layer_norm_2d(x, self.weight, self.bias, eps=self.eps)


def _triton(x: Tensor, weight: Tensor | None, bias: Tensor | None, *, eps: float) -> Tensor:
    if channels_last(x):
        return _rows(row_norm.triton, x, weight, bias, eps)
    from ..triton import layer_norm_2d as kernels

    return fused(kernels.forward, kernels.backward, vjp(reference), (x, weight, bias), {"eps": eps})


def _compiled(x: Tensor, weight: Tensor | None, bias: Tensor | None, *, eps: float) -> Tensor:
    if channels_last(x):
        return _rows(row_norm.compiled, x, weight, bias, eps)
    return fused(_compiled_forward, _compiled_backward, _second, (x, weight, bias), {"eps": eps})


def _compiled_forward(x: Tensor, weight: Tensor | None, bias: Tensor | None, **options: Any) -> Any:
    # Not one call: that would work 1/√(…) out again for every element.
    saved = (x, weight, bias, *_statistics(*compiled_call(_sums, (x,), {}), C=x.shape[1], **options))
    return compiled_call(_scaled, saved, {}), saved


def _compiled_backward(grads: Any, saved: Any, needs: Any, *, eps: float) -> Gradients:
    return compiled_call(_gradients, (*grads, *saved), {"needs": tuple(needs)})


def _second(grads: Any, saved: Any, needs: Any, **options: Any) -> Gradients:
    return vjp(reference)(grads, saved[:3], needs, **options)


def _gradients(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    *,
    needs: tuple[bool, bool, bool],
) -> Gradients:
    """The gradients in closed form; sums over pixels in two levels, an image at a time, for their rounding error."""
    n = (x.to(rstd.dtype) - mean) * rstd
    g = dy.to(n.dtype)
    dweight = (g * n).flatten(2).sum(-1).sum(0).to(weight.dtype) if weight is not None and needs[1] else None
    dbias = g.flatten(2).sum(-1).sum(0).to(bias.dtype) if bias is not None and needs[2] else None
    if not needs[0]:
        return None, dweight, dbias
    if weight is not None:
        g = g * per_channel(weight, g)
    dx = (g - n * (g * n).mean(1, keepdim=True) - g.mean(1, keepdim=True)) * rstd
    return dx.to(x.dtype), dweight, dbias


def _small(x: Tensor, weight: Tensor | None, bias: Tensor | None, *, eps: float) -> Tensor:
    y = _rows(row_norm.small, x, weight, bias, eps)
    return y if channels_last(x) else y.contiguous()


def _rows(run: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    y = run(x.permute(0, 2, 3, 1), None, weight, bias, None, None, eps=eps, weight_offset=0.0, center=True)
    return y.permute(0, 3, 1, 2)


def _aten(x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None, *, eps: float = 1e-6) -> Tensor:
    return F.layer_norm(x.permute(0, 2, 3, 1), x.shape[1:2], weight, bias, eps).permute(0, 3, 1, 2)


def _inputs(
    draw: Draw, *, N: int, C: int, H: int, W: int, affine: bool = True, bias: bool = True, channels_last: bool = False
) -> Call:
    x = draw_images(draw, N, C, H, W, channels_last=channels_last)
    return Call((x, draw.weight(C) if affine else None, draw.weight(C) if affine and bias else None), {"eps": 1e-6})


def _errors() -> Iterator[ErrorInput]:
    x = torch.zeros(2, 8, 3, 3)
    yield ErrorInput(Call((x.long(),)), TypeError, r"x must be a floating-point.*int64")
    yield ErrorInput(Call((x[0],)), ValueError, r"x must be \[N, C, H, W\], got \(8, 3, 3\)")
    yield ErrorInput(Call((x, torch.ones(3))), ValueError, r"weight must have .* \(8,\), got \(3,\)")
    yield ErrorInput(Call((x, torch.ones(8), torch.ones(8, 1, 1))), ValueError, r"bias must have .*got \(8, 1, 1\)")


def _traffic(
    itemsize: int, *, N: int, C: int, H: int, W: int, affine: bool = True, bias: bool = True, **_: Any
) -> Traffic:
    return row_norm.traffic(itemsize, affine + (affine and bias), statistics=2, N=N * H * W, D=C, residual=False)


LAYER_NORM_2D = Op(
    name="layer_norm_2d",
    replaces="`F.layer_norm` over the channels of images, between two permutes",
    fn=layer_norm_2d,
    reference=reference,
    impls={"triton": _triton, "compile": _compiled},
    small=_small,
    inputs=_inputs,
    dims={"N": (0, 1, 2, 3), "C": (1, 31, 33, 96, 1024, 1025), "H": (0, 1, 3), "W": (1, 7, 33)},
    # ConvNeXt-T's first and third stages.
    bench=({"N": 8, "C": 96, "H": 56, "W": 56}, {"N": 8, "C": 384, "H": 14, "W": 14}),
    audit=(
        {"N": 2, "C": 96, "H": 16, "W": 16},
        {"N": 2, "C": 384, "H": 16, "W": 16},
        {"N": 8, "C": 768, "H": 8, "W": 8},
        {"N": 2, "C": 1536, "H": 16, "W": 16},
    ),
    traffic=_traffic,
    flops=lambda N, C, H, W: 7 * N * C * H * W,
    aten=_aten,
    axes="n C h w, C, C -> n C h w",
    errors=_errors,
    variants={
        "default": {},
        "no bias": {"bias": False},
        "no affine": {"affine": False},
        "channels last": {"channels_last": True},
    },
    modules=(LayerNorm2d,),
    autocast_to_float32=frozenset({"cuda"}),
)
