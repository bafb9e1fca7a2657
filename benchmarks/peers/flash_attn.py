"""flash-attn 2.8's Triton norms and loss: after the signatures of its source; not run here, checked where they run.

Its rotary embedding takes tables of half the width; the operators' test tables have two different halves.
"""

from __future__ import annotations

from torch import Tensor

from .peer import Peer


def _rms_norm(x: Tensor, weight: Tensor, *, eps: float) -> Tensor:
    from flash_attn.ops.triton.layer_norm import rms_norm_fn

    return rms_norm_fn(x, weight, None, eps=eps)


def _add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, *, eps: float) -> tuple[Tensor, Tensor]:
    from flash_attn.ops.triton.layer_norm import rms_norm_fn

    return rms_norm_fn(x, weight, None, residual=residual, eps=eps, prenorm=True)


def _layer_norm(x: Tensor, weight: Tensor, bias: Tensor, *, eps: float) -> Tensor:
    from flash_attn.ops.triton.layer_norm import layer_norm_fn

    return layer_norm_fn(x, weight, bias, eps=eps)


def _add_layer_norm(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, *, eps: float) -> tuple[Tensor, Tensor]:
    from flash_attn.ops.triton.layer_norm import layer_norm_fn

    return layer_norm_fn(x, weight, bias, residual=residual, eps=eps, prenorm=True)


def _cross_entropy(x: Tensor, target: Tensor, _: None) -> Tensor:
    from flash_attn.losses.cross_entropy import CrossEntropyLoss

    return CrossEntropyLoss()(x, target).to(x.dtype)


def _glu(gate: Tensor, up: Tensor, *, activation: str) -> Tensor:
    from flash_attn.ops.activations import swiglu

    assert activation == "silu"
    return swiglu(gate, up)


FLASH_ATTN = Peer(
    name="flash_attn",
    module="flash_attn",
    distribution="flash-attn",
    functions={
        "add_layer_norm": _add_layer_norm,
        "add_rms_norm": _add_rms_norm,
        "cross_entropy": _cross_entropy,
        "glu": _glu,
        "layer_norm": _layer_norm,
        "rms_norm": _rms_norm,
    },
)
