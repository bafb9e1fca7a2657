"""Liger-Kernel 0.8: after the signatures in its ``transformers/functional.py``; not run here, checked where it runs.

Its norms compute in float32 throughout, as the operators do (``casting_mode="gemma"``), and leave the cotangent alone
(``in_place=False``), which others get too. Its cross-entropy writes the gradient over the logits: it gets a copy, whose
time counts.
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from .peer import Peer


def _rms_norm(x: Tensor, weight: Tensor, *, eps: float) -> Tensor:
    from liger_kernel.transformers.functional import liger_rms_norm

    return liger_rms_norm(x, weight, eps, 0.0, "gemma", False)


def _add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, *, eps: float) -> tuple[Tensor, Tensor]:
    from liger_kernel.transformers.functional import liger_fused_add_rms_norm

    return liger_fused_add_rms_norm(x, residual, weight, eps, 0.0, "gemma", False)


def _modulated_rms_norm(x: Tensor, scale: Tensor, shift: Tensor, *, eps: float) -> Tensor:
    from liger_kernel.transformers.functional import liger_modulated_rms_norm

    return liger_modulated_rms_norm(x, None, scale.squeeze(1), shift.squeeze(1), eps, 0.0, "gemma", False)


def _layer_norm(x: Tensor, weight: Tensor, bias: Tensor, *, eps: float) -> Tensor:
    from liger_kernel.transformers.functional import liger_layer_norm

    return liger_layer_norm(x, weight, bias, eps)


def _group_norm(x: Tensor, num_groups: int, weight: Tensor, bias: Tensor, *, eps: float, activation: str) -> Tensor:
    from liger_kernel.transformers.functional import liger_group_norm

    assert activation == "silu"
    return F.silu(liger_group_norm(x, weight, bias, x.shape[1], num_groups, eps))


def _dyt(x: Tensor, alpha: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    from liger_kernel.transformers.functional import liger_dyt

    return liger_dyt(x, alpha, weight, bias)


def _glu(gate: Tensor, up: Tensor, *, activation: str) -> Tensor:
    from liger_kernel.transformers.functional import liger_swiglu

    assert activation == "silu"
    return liger_swiglu(gate, up)


def _softmax(x: Tensor) -> Tensor:
    from liger_kernel.transformers.functional import liger_softmax

    return liger_softmax(x)


def _cross_entropy(x: Tensor, target: Tensor, _: None) -> Tensor:
    from liger_kernel.transformers.functional import liger_cross_entropy

    return liger_cross_entropy(x.clone(), target)


def _linear_cross_entropy(hidden: Tensor, weight: Tensor, target: Tensor, bias: None, **_: None) -> Tensor:
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    return liger_fused_linear_cross_entropy(hidden, weight, target, bias)


def _linear_distillation(hidden: Tensor, weight: Tensor, *teacher: Any) -> Tensor:
    from liger_kernel.transformers.functional import liger_fused_linear_jsd

    return liger_fused_linear_jsd(hidden, weight, *teacher, jsd_beta=0.0)  # β = 0: forward KL


LIGER = Peer(
    name="liger",
    module="liger_kernel",
    distribution="liger-kernel",
    functions={
        "add_rms_norm": _add_rms_norm,
        "cross_entropy": _cross_entropy,
        "dyt": _dyt,
        "glu": _glu,
        "group_norm": _group_norm,
        "layer_norm": _layer_norm,
        "linear_cross_entropy": _linear_cross_entropy,
        "linear_distillation": _linear_distillation,
        "modulated_rms_norm": _modulated_rms_norm,
        "rms_norm": _rms_norm,
        "softmax": _softmax,
    },
)
