"""NVIDIA's apex with its CUDA extensions: after the signatures of its source; not run here, checked where it runs."""

from __future__ import annotations

from torch import Tensor

from .peer import Peer


def _rms_norm(x: Tensor, weight: Tensor, *, eps: float) -> Tensor:
    from apex.normalization.fused_layer_norm import fused_rms_norm_affine

    return fused_rms_norm_affine(x, weight, x.shape[-1:], eps)


def _layer_norm(x: Tensor, weight: Tensor, bias: Tensor, *, eps: float) -> Tensor:
    from apex.normalization.fused_layer_norm import fused_layer_norm_affine

    return fused_layer_norm_affine(x, weight, bias, x.shape[-1:], eps)


APEX = Peer(
    name="apex",
    module="apex.normalization",
    distribution="apex",
    functions={"layer_norm": _layer_norm, "rms_norm": _rms_norm},
)
