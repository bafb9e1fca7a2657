"""The gated residual of a diffusion transformer's block.

    h = residual + gate·x                       gate is one row for each sample, or for each token

Source: Peebles and Xie, Scalable Diffusion Models with Transformers (2023), adaLN-Zero.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .. import dispatch
from ..autograd import Gradients, fused
from ..by_rows import Factors, by_rows
from ..compiled import compiled_call
from ..op import Call, Draw, ErrorInput, Op, Traffic
from . import checks, row_norm


def reference(residual: Tensor, x: Tensor, gate: Tensor) -> Tensor:
    """Gated residual in plain PyTorch: float32 (or wider) inside, one rounding; ``gate`` broadcasts to x."""
    wide = torch.promote_types(x.dtype, torch.float32)
    h = residual + x.to(wide) * gate.to(wide)
    return h.to(torch.promote_types(residual.dtype, x.dtype))


def gated_add(residual: Tensor, x: Tensor, gate: Tensor) -> Tensor:
    """``residual + gate · x``, with a row of the gate for each sample or each token.

    Computed in float32 and rounded once. The gradient of the gate is summed over the tokens that share it in float32,
    always in the same order.

    Args:
        residual: floating-point tensor [B, ..., D].
        x: of its shape; its dtype may differ.
        gate: [B, D], one row for each sample; or with the dims of x, of which the last before D may be 1: [B, 1, D], or
            [B, S, D] for a row for each token. Its dtype may differ too.

    Returns:
        [B, ..., D] in the wider dtype of residual and x.

    Raises:
        TypeError: if residual, x or gate is not floating point.
        ValueError: if residual has another shape than x, or gate none of these.
    """
    checks.floating("gated_add", residual=residual, x=x, gate=gate)
    row_norm.check_residual("gated_add", x, residual)
    (rows,) = checks.rows_of_groups("gated_add", x, gate=gate)
    return dispatch.run(GATED_ADD, residual, x, rows)


def _triton(residual: Tensor, x: Tensor, gate: Tensor) -> Tensor:
    from ..triton import gated_add as kernels

    return fused(kernels.forward, kernels.backward, _second, (residual, x, gate), {})


def _compiled(residual: Tensor, x: Tensor, gate: Tensor) -> Tensor:
    return fused(_compiled_forward, _compiled_backward, _second, (residual, x, gate), {})


def _compiled_forward(residual: Tensor, x: Tensor, gate: Tensor) -> Any:
    return compiled_call(reference, (residual, x, gate), {}), (x, gate)


def _compiled_backward(grads: Any, saved: Any, needs: Any) -> Gradients:
    return (*grads, *compiled_call(_gradients, (*grads, *saved), {"needs": needs}))


def _second(grads: Any, saved: Any, needs: Any) -> Gradients:
    return (*grads, *_gradients(*grads, *saved, needs=needs))


def _gradients(dh: Tensor, x: Tensor, gate: Tensor, *, needs: tuple[bool, bool, bool]) -> Gradients:
    """The gradients of x and the gate; the residual's is ``dh``."""
    (dx,), (dgate,) = by_rows(partial(_gradients_of_rows, needs=needs), (dh, x), (gate,))
    return dx, dgate


def _gradients_of_rows(
    dh: Tensor, x: Tensor, gate: Tensor, *, needs: tuple[bool, bool, bool]
) -> tuple[tuple[Tensor | None], tuple[Factors | None]]:
    g = dh.to(torch.promote_types(dh.dtype, torch.float32))
    dx = (g * gate.to(g.dtype)).to(x.dtype) if needs[1] else None
    return (dx,), ((g, x.to(g.dtype)) if needs[2] else None,)


def _aten(residual: Tensor, x: Tensor, gate: Tensor) -> Tensor:
    return (residual + gate * x).to(torch.promote_types(residual.dtype, x.dtype))


def _inputs(draw: Draw, *, B: int, S: int, D: int, tokens: bool = False) -> Call:
    gate = draw.weight(B, S if tokens else 1, 2 * D).chunk(2, -1)[0].detach().requires_grad_()
    return Call((draw.tensor(B, S, D), draw.tensor(B, S, D), gate))


def _errors() -> Iterator[ErrorInput]:
    x = torch.zeros(2, 3, 8)
    yield ErrorInput(Call((x.long(), x, x)), TypeError, r"residual must be a floating-point.*int64")
    yield ErrorInput(Call((x, x, x.long())), TypeError, r"gate must be a floating-point.*int64")
    yield ErrorInput(Call((x[0], x, x)), ValueError, r"residual must have the shape of x.*got \(3, 8\)")
    yield ErrorInput(Call((x, x, x[:1])), ValueError, r"gate must have a row for each sample.*got \(1, 3, 8\)")
    yield ErrorInput(Call((x, x, x[0, 0])), ValueError, r"gate must have a row for each sample.*got \(8,\)")


def _traffic(itemsize: int, *, B: int, S: int, D: int, tokens: bool = False) -> Traffic:
    """residual, x, gate and h; dh, x, gate and the gradients of x and the gate. The residual's is dh itself."""
    size, rows = B * S * D * itemsize, B * (S if tokens else 1) * D * itemsize
    return Traffic(forward=3 * size + rows, backward=3 * size + 2 * rows)


GATED_ADD = Op(
    name="gated_add",
    replaces="`residual + gate * x`",
    fn=gated_add,
    reference=reference,
    impls={"triton": _triton, "compile": _compiled},
    inputs=_inputs,
    dims={"B": (0, 1, 3), "S": (1, 2, 33, 129), "D": (1, 31, 32, 33, 127, 257, 1023, 2049)},
    bench=({"B": 16, "S": 256, "D": 1152}, {"B": 1, "S": 4096, "D": 3072}),
    audit=({"B": 2, "S": 256, "D": 256}, {"B": 1, "S": 512, "D": 3072}),
    traffic=_traffic,
    flops=lambda B, S, D: 2 * B * S * D,
    aten=_aten,
    axes="... d, ... d, ... d -> ... d",
    errors=_errors,
    variants={"default": {}, "for each token": {"tokens": True}},
)
