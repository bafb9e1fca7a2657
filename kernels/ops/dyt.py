"""Dynamic tanh, which stands where a normalization layer would.

    y = weight · tanh(alpha·x) + bias        alpha a number, weight and bias over the last dim

Source: Zhu, Chen, He, LeCun and Liu, Transformers without Normalization (2025).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .. import dispatch
from ..autograd import Gradients, fused, vjp
from ..by_rows import Factors, by_rows
from ..compiled import compiled_call
from ..op import Call, Draw, ErrorInput, Op, Traffic
from . import checks


def reference(x: Tensor, alpha: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Dynamic tanh in plain PyTorch: float32 (or wider) inside, the result in the dtype of ``x``."""
    wide = torch.promote_types(x.dtype, torch.float32)
    y = torch.tanh(alpha.to(wide) * x.to(wide)) * weight.to(wide)
    if bias is not None:
        y = y + bias.to(wide)
    return y.to(x.dtype)


def dyt(x: Tensor, alpha: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Dynamic tanh: ``tanh(alpha * x) * weight + bias``, with no statistics of any row.

    Computed in float32 and rounded once. The backward pass keeps x and the parameters, and recomputes the rest.

    Args:
        x: floating-point tensor [..., D].
        alpha: one learned number, [] or [1], on x's device; it is never read by the host.
        weight: [D]. Its dtype may differ from x's, and so may those of alpha and bias.
        bias: [D], or None for none.

    Returns:
        [..., D] in x's dtype.

    Raises:
        TypeError: if a tensor is not floating point.
        ValueError: if x is a scalar, alpha is not one number, or weight or bias is not [D].
    """
    checks.floating("dyt", x=x, alpha=alpha, weight=weight, bias=bias)
    checks.per_channel("dyt", x, weight=weight, bias=bias)
    if alpha.shape not in ((), (1,)):
        raise ValueError(f"dyt: alpha must be one number, [] or [1], got {tuple(alpha.shape)}; weight is per channel")
    return dispatch.run(DYT, x, alpha, weight, bias)


class DyT(torch.nn.Module):
    """The paper's DyT layer, with its parameters ``alpha`` [1], ``weight`` and ``bias``; runs :func:`dyt`.

    Args:
        normalized_shape: the last dims of x, as in ``torch.nn.LayerNorm``.
        init_alpha: what alpha starts as; the paper finds 0.5 right outside of language models.
        device: of the parameters.
        dtype: of the parameters.
    """

    def __init__(
        self,
        normalized_shape: int | Sequence[int],
        init_alpha: float = 0.5,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.normalized_shape = (normalized_shape,) if isinstance(normalized_shape, int) else tuple(normalized_shape)
        self.init_alpha = init_alpha
        self.alpha = torch.nn.Parameter(torch.full((1,), init_alpha, device=device, dtype=dtype))
        self.weight = torch.nn.Parameter(torch.ones(self.normalized_shape, device=device, dtype=dtype))
        self.bias = torch.nn.Parameter(torch.zeros(self.normalized_shape, device=device, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        """[..., *normalized_shape] → the same shape and dtype."""
        flat = x.flatten(-len(self.normalized_shape))
        return dyt(flat, self.alpha, self.weight.flatten(), self.bias.flatten()).view(x.shape)

    def extra_repr(self) -> str:
        """The arguments."""
        return f"{self.normalized_shape}, init_alpha={self.init_alpha}"


def _triton(*tensors: Tensor | None) -> Tensor:
    from ..triton import dyt as kernels

    return fused(kernels.forward, kernels.backward, vjp(reference), tensors, {})


def _compiled(*tensors: Tensor | None) -> Tensor:
    return fused(_compiled_forward, _compiled_backward, vjp(reference), tensors, {})


def _compiled_forward(*tensors: Tensor | None) -> Any:
    return compiled_call(reference, tensors, {}), tensors


def _compiled_backward(grads: Any, saved: Any, needs: Any) -> Gradients:
    return compiled_call(_gradients, (*grads, *saved), {"needs": needs})


def _gradients(
    dy: Tensor,
    x: Tensor,
    alpha: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *,
    needs: tuple[bool, bool, bool, bool],
) -> Gradients:
    """The gradients in closed form; autograd through the reference would add up along whole columns, one by one."""
    wide = torch.promote_types(x.dtype, torch.float32)
    alphas = alpha.to(wide).view(1).expand(x.shape[-1])  # one for each column, whose gradients are added up last
    body = partial(_gradients_of_rows, needs=needs)
    (dx,), (dalphas, dweight, dbias) = by_rows(body, (dy, x), (alphas, weight, bias), costly=True)
    return dx, None if dalphas is None else dalphas.sum().to(alpha.dtype).view(alpha.shape), dweight, dbias


def _gradients_of_rows(
    dy: Tensor, x: Tensor, alpha: Tensor, weight: Tensor, bias: Tensor | None, *, needs: tuple[bool, bool, bool, bool]
) -> tuple[tuple[Tensor], tuple[Factors | None, ...]]:
    """The gradient of x, and the factors of those of alpha, weight and bias."""
    g, h = dy.to(alpha.dtype), x.to(alpha.dtype)
    t = torch.tanh(alpha * h)
    s = g * weight.to(alpha.dtype) * (1.0 - t * t)
    factors = (s, h), (g, t), (g,)
    return ((alpha * s).to(x.dtype),), tuple(f if need else None for f, need in zip(factors, needs[1:], strict=True))


def _aten(x: Tensor, alpha: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    y = torch.tanh(alpha * x) * weight
    return (y if bias is None else y + bias).to(x.dtype)


def _inputs(draw: Draw, *, N: int, D: int, bias: bool = True) -> Call:
    return Call((draw.tensor(N, D), draw.weight(1), draw.weight(D), draw.weight(D) if bias else None))


def _errors() -> Iterator[ErrorInput]:
    x, alpha, weight = torch.zeros(2, 8), torch.ones(1), torch.ones(8)
    yield ErrorInput(Call((x.long(), alpha, weight)), TypeError, r"x must be a floating-point.*int64")
    yield ErrorInput(Call((x, alpha.long(), weight)), TypeError, r"alpha must be a floating-point.*int64")
    yield ErrorInput(Call((torch.tensor(1.0), alpha, weight)), ValueError, "at least one dimension")
    yield ErrorInput(Call((x, weight, weight)), ValueError, r"alpha must be one number.*got \(8,\)")
    yield ErrorInput(Call((x, alpha, weight[:7])), ValueError, r"weight must have the shape.*\(8,\), got \(7,\)")
    yield ErrorInput(Call((x, alpha, weight, weight[:7])), ValueError, r"bias must have the shape.*\(8,\), got \(7,\)")


def _traffic(itemsize: int, *, N: int, D: int, bias: bool = True) -> Traffic:
    """x, y, the parameters forward; dy, x, dx backward, with alpha and weight, and every parameter's gradient."""
    return Traffic(
        forward=(2 * N * D + (1 + bias) * D + 1) * itemsize,
        backward=(3 * N * D + (2 + bias) * D + 2) * itemsize,
    )


DYT = Op(
    name="dyt",
    replaces="timm's `DynamicTanh`: `tanh(alpha * x) * weight + bias`",
    fn=dyt,
    reference=reference,
    impls={"triton": _triton, "compile": _compiled},
    inputs=_inputs,
    dims={"N": (0, 1, 2, 33, 129), "D": (0, 1, 31, 32, 33, 127, 256, 257, 1025)},
    bench=({"N": 2048, "D": 1024}, {"N": 4096, "D": 4096}),
    audit=({"N": 512, "D": 512}, {"N": 512, "D": 4096}),
    traffic=_traffic,
    flops=lambda N, D: 8 * N * D,
    aten=_aten,
    axes="... d, , d, d -> ... d",
    errors=_errors,
    variants={"default": {}, "no bias": {"bias": False}},
    modules=(DyT,),
)
