"""Bias and activation, the seam between two linear layers.

    y = act(x + bias)        act as in activations.py, bias over the last dim

Source: ``torch.nn.functional`` of the same names; the activation's argument is never stored.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import dispatch
from ..autograd import Gradients, fused, vjp
from ..by_rows import column_sum
from ..compiled import compiled_call
from ..op import Call, Draw, ErrorInput, Op, Traffic
from . import checks
from .activations import ACTIVATIONS, check_activation


def reference(x: Tensor, bias: Tensor | None, *, activation: str) -> Tensor:
    """``act(x + bias)`` in plain PyTorch: float32 (or wider) inside, the result in the dtype of ``x``."""
    return ACTIVATIONS[activation](_shifted(x, bias)).to(x.dtype)


def _shifted(x: Tensor, bias: Tensor | None) -> Tensor:
    h = x.to(torch.promote_types(x.dtype, torch.float32))
    return h if bias is None else h + bias.to(h.dtype)


def bias_act(x: Tensor, bias: Tensor | None = None, *, activation: str = "gelu") -> Tensor:
    """Activation of a biased tensor: ``act(x + bias)``, in one pass over memory.

    Computed in float32 and rounded once. The backward pass keeps x and bias, recomputes the rest, and adds the bias's
    gradient up in the same pass.

    Args:
        x: floating-point tensor [..., D], such as a linear layer's result without its bias.
        bias: [D], or None for none. Its dtype may differ from x's.
        activation: ``"gelu"``, ``"gelu_tanh"``, ``"quick_gelu"``, ``"silu"``, ``"relu"``, ``"relu_squared"`` or
            ``"sigmoid"``.

    Returns:
        [..., D] in x's dtype.

    Raises:
        TypeError: if x or bias is not floating point.
        ValueError: if x is a scalar, bias is not [D], or there is no such activation.
    """
    checks.floating("bias_act", x=x, bias=bias)
    checks.per_channel("bias_act", x, bias=bias)
    check_activation("bias_act", activation)
    return dispatch.run(BIAS_ACT, x, bias, activation=activation)


class BiasAct(torch.nn.Module):
    """A learned bias and an activation; runs :func:`bias_act`. The linear layer before it takes ``bias=False``.

    Args:
        num_features: size of the last dim.
        activation: as in :func:`bias_act`.
        device: of the bias.
        dtype: of the bias.
    """

    def __init__(
        self,
        num_features: int,
        activation: str = "gelu",
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_activation("BiasAct", activation)
        self.num_features, self.activation = num_features, activation
        self.bias = torch.nn.Parameter(torch.zeros(num_features, device=device, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        """[..., num_features] → the same shape and dtype."""
        return bias_act(x, self.bias, activation=self.activation)

    def extra_repr(self) -> str:
        """The arguments."""
        return f"{self.num_features}, activation={self.activation!r}"


def _triton(x: Tensor, bias: Tensor | None, **options: Any) -> Tensor:
    from ..triton import bias_act as kernels

    return fused(kernels.forward, kernels.backward, vjp(reference), (x, bias), options)


def _compiled(x: Tensor, bias: Tensor | None, **options: Any) -> Tensor:
    return fused(_compiled_forward, _compiled_backward, vjp(reference), (x, bias), options)


def _compiled_forward(x: Tensor, bias: Tensor | None, **options: Any) -> Any:
    return compiled_call(reference, (x, bias), options), (x, bias)


def _compiled_backward(grads: Any, saved: Any, needs: Any, **options: Any) -> Gradients:
    return compiled_call(_gradients, (*grads, *saved), {"needs": needs, **options})


def _gradients(dy: Tensor, x: Tensor, bias: Tensor | None, *, needs: tuple[bool, bool], activation: str) -> Gradients:
    """The gradients of x and bias; autograd through the reference would add dx up along whole columns, one by one."""
    h = _shifted(x, bias)
    (dh,) = torch.func.vjp(ACTIVATIONS[activation], h)[1](dy.to(h.dtype))
    dx = dh.to(x.dtype)
    if bias is None or not needs[1]:
        return dx, None
    # A bias of x's dtype sums what was rounded for x: in float32, dh would be written to memory for this alone. Forward
    # and backward, bfloat16 [3152, 3072] takes 14 ms on one core of an EPYC; it would take 37.
    return dx, column_sum(bias, dx if bias.dtype == x.dtype else dh)


def _aten(x: Tensor, bias: Tensor | None = None, *, activation: str) -> Tensor:
    activate = F.gelu if activation == "gelu" else ACTIVATIONS[activation]
    return activate(x if bias is None else (x + bias).to(x.dtype))


def _inputs(draw: Draw, *, N: int, D: int, activation: str, bias: bool = True) -> Call:
    return Call((draw.tensor(N, D), draw.weight(D) if bias else None), {"activation": activation})


def _errors() -> Iterator[ErrorInput]:
    x, bias = torch.zeros(2, 8), torch.zeros(8)
    yield ErrorInput(Call((x.long(),)), TypeError, r"x must be a floating-point.*int64")
    yield ErrorInput(Call((x, bias.long())), TypeError, r"bias must be a floating-point.*int64")
    yield ErrorInput(Call((torch.tensor(1.0),)), ValueError, "at least one dimension")
    yield ErrorInput(Call((x, bias[:7])), ValueError, r"bias must have the shape.*\(8,\), got \(7,\)")
    yield ErrorInput(Call((x, bias), {"activation": "swish"}), ValueError, r"one of silu, gelu, .*got 'swish'")


def _traffic(itemsize: int, *, N: int, D: int, bias: bool = True, **_: Any) -> Traffic:
    """x and y forward; dy, x, dx backward; the bias, and its gradient."""
    return Traffic(
        forward=(2 * N * D + bias * D) * itemsize,
        backward=(3 * N * D + 2 * bias * D) * itemsize,
    )


BIAS_ACT = Op(
    name="bias_act",
    replaces="`act(x + bias)`",
    fn=bias_act,
    reference=reference,
    impls={"triton": _triton, "compile": _compiled},
    inputs=_inputs,
    dims={"N": (0, 1, 2, 33, 129), "D": (0, 1, 31, 32, 33, 127, 256, 257, 1025)},
    # The wide layers of ViT-B (batch 16) and GPT-2 XL.
    bench=({"N": 3152, "D": 3072}, {"N": 4096, "D": 6400}),
    audit=({"N": 512, "D": 256}, {"N": 512, "D": 6400}),
    traffic=_traffic,
    flops=lambda N, D: 8 * N * D,
    aten=_aten,
    axes="... d, d -> ... d",
    errors=_errors,
    variants={
        "default": {"activation": "gelu"},
        "gelu_tanh": {"activation": "gelu_tanh"},
        "quick_gelu": {"activation": "quick_gelu"},
        "relu": {"activation": "relu"},
        "relu_squared": {"activation": "relu_squared"},
        "silu, no bias": {"activation": "silu", "bias": False},
    },
    modules=(BiasAct,),
)
