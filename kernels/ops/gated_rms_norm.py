"""RMSNorm with a gate, the output norm of Mamba-2 and of Gated DeltaNet.

    y = rms_norm(x)·weight · act(gate)       norm_before_gate
    y = rms_norm(x · act(gate))·weight       otherwise

act is silu or sigmoid; the mean square is that of the last dim, or of groups of adjacent elements in it.

Source: Dao and Gu, Transformers are SSMs (2024), and mamba_ssm's module of this name; Yang, Kautz and Hatamizadeh,
Gated Delta Networks (2025).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import dispatch
from ..autograd import Gradients, fused, vjp
from ..by_rows import Factors, by_rows
from ..compiled import compiled_call
from ..op import Call, Draw, ErrorInput, Op, Traffic
from . import checks, row_norm

_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"silu": F.silu, "sigmoid": torch.sigmoid}


def reference(x: Tensor, gate: Tensor, weight: Tensor | None, **options: Any) -> Tensor:
    """Gated RMSNorm in plain PyTorch: float32 (or wider) inside, one rounding."""
    return _forward(x, gate, weight, **options)[0]


def _forward(
    x: Tensor,
    gate: Tensor,
    weight: Tensor | None,
    *,
    eps: float,
    activation: str,
    norm_before_gate: bool,
    groups: int,
) -> tuple[Tensor, Tensor]:
    """(y, the 1/√(…) of the groups of each row)."""
    u = x.to(torch.promote_types(x.dtype, torch.float32))
    a = _ACTIVATIONS[activation](gate.to(u.dtype))
    if not norm_before_gate:
        u = u * a
    grouped = _grouped(u, groups)
    rstd = torch.rsqrt(grouped.square().mean(-1, keepdim=True) + eps)
    y = (grouped * rstd).flatten(-2)
    if weight is not None:
        y = y * weight.to(y.dtype)
    if norm_before_gate:
        y = y * a
    return y.to(x.dtype), rstd


def _grouped(x: Tensor, groups: int) -> Tensor:
    return x.unflatten(-1, (groups, x.shape[-1] // groups))


def gated_rms_norm(
    x: Tensor,
    gate: Tensor,
    weight: Tensor | None = None,
    *,
    eps: float = 1e-5,
    activation: str = "silu",
    norm_before_gate: bool = True,
    group_size: int | None = None,
) -> Tensor:
    """RMSNorm with a gate: ``rms_norm(x) · weight · act(gate)``, or ``rms_norm(x · act(gate)) · weight``.

    Computed in float32 and rounded once. The backward pass keeps x and gate, and recomputes the rest.

    Args:
        x: floating-point tensor [..., D].
        gate: of x's shape; its dtype may differ.
        weight: [D], or None for no scale.
        eps: added to the mean square.
        activation: ``"silu"`` or ``"sigmoid"``.
        norm_before_gate: which of the two; True for Gated DeltaNet (Qwen3-Next), False for Mamba-2.
        group_size: elements of the last dim that are normalized together; None is all of them.

    Returns:
        [..., D] in x's dtype.

    Raises:
        TypeError: if x or gate is not floating point.
        ValueError: if x is a scalar, gate has another shape than x, weight is not [D], there is no such activation, or
            the last dim is not a multiple of group_size.
    """
    row_norm.check_affine("gated_rms_norm", x, weight)
    checks.floating("gated_rms_norm", gate=gate)
    if gate.shape != x.shape:
        raise ValueError(
            f"gated_rms_norm: gate must have the shape of x, {tuple(x.shape)}, got {tuple(gate.shape)}; "
            "expand it first if it should broadcast"
        )
    if activation not in _ACTIVATIONS:
        raise ValueError(f"gated_rms_norm: activation must be one of {', '.join(_ACTIVATIONS)}, got {activation!r}")
    return dispatch.run(
        GATED_RMS_NORM,
        x,
        gate,
        weight,
        eps=float(eps),
        activation=activation,
        norm_before_gate=bool(norm_before_gate),
        groups=_groups(x.shape[-1], group_size),
    )


def _groups(D: int, group_size: int | None) -> int:
    if group_size is None:
        return 1
    if group_size < 1 or D % group_size:
        raise ValueError(
            f"gated_rms_norm: group_size must divide the last dim of x, {D}, got {group_size}; "
            "pass the elements of one group, not the number of groups"
        )
    return D // group_size


class RMSNormGated(torch.nn.Module):
    """Drop-in for the gated ``RMSNorm`` of mamba_ssm: same arguments, same ``state_dict``; runs :func:`gated_rms_norm`.

    The modules of transformers (``Qwen3NextRMSNormGated``, ``MambaRMSNormGated`` and their copies) have the same keys.
    They round to x's dtype before the weight, or before the gate; here everything is rounded once, at the end.

    Args:
        hidden_size: D.
        eps: added to the mean square.
        group_size: as in :func:`gated_rms_norm`.
        norm_before_gate: as in :func:`gated_rms_norm`.
        device: of the weight.
        dtype: of the weight.
        activation: as in :func:`gated_rms_norm`.
    """

    def __init__(
        self,
        hidden_size: int,
        eps: float = 1e-5,
        group_size: int | None = None,
        norm_before_gate: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        activation: str = "silu",
    ) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(hidden_size, device=device, dtype=dtype))
        self.eps, self.group_size = eps, group_size
        self.norm_before_gate, self.activation = norm_before_gate, activation

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        """[..., D] and a gate of the same shape → the same shape, in x's dtype."""
        return gated_rms_norm(
            x,
            z,
            self.weight,
            eps=self.eps,
            activation=self.activation,
            norm_before_gate=self.norm_before_gate,
            group_size=self.group_size,
        )

    def extra_repr(self) -> str:
        """The arguments."""
        return (
            f"{self.weight.numel()}, eps={self.eps}, group_size={self.group_size}, "
            f"norm_before_gate={self.norm_before_gate}, activation={self.activation!r}"
        )


def _triton(x: Tensor, gate: Tensor, weight: Tensor | None, **options: Any) -> Tensor:
    from ..triton import gated_norm

    return fused(gated_norm.forward, gated_norm.backward, vjp(reference), (x, gate, weight), options)


def _compiled(x: Tensor, gate: Tensor, weight: Tensor | None, **options: Any) -> Tensor:
    return fused(_compiled_forward, _compiled_backward, vjp(reference), (x, gate, weight), options)


def _compiled_forward(*tensors: Tensor | None, **options: Any) -> Any:
    y, rstd = compiled_call(_forward, tensors, options)
    return y, (*tensors, rstd)


def _compiled_backward(grads: Any, saved: Any, needs: Any, **options: Any) -> Gradients:
    return compiled_call(_gradients, (*grads, *saved), {"needs": needs, **options})


def _gradients(dy: Tensor, x: Tensor, gate: Tensor, weight: Tensor | None, rstd: Tensor, **options: Any) -> Gradients:
    body = partial(_gradients_of_rows, **options)
    results, parameters = by_rows(body, (dy, x, gate, rstd.flatten(-2)), (weight,))
    return *results, *parameters


def _gradients_of_rows(
    dy: Tensor,
    x: Tensor,
    gate: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    *,
    needs: tuple[bool, bool, bool],
    activation: str,
    norm_before_gate: bool,
    groups: int,
    **_: Any,
) -> tuple[tuple[Tensor, Tensor], tuple[Factors | None]]:
    """The gradients of x and gate in closed form, and the factors of the weight's."""
    value, z, g = (t.to(rstd.dtype) for t in (x, gate, dy))
    rstd = rstd.unsqueeze(-1)
    a, slope = _activated(z, activation)
    n = (_grouped(value if norm_before_gate else value * a, groups) * rstd).flatten(-2)
    factors = (g, n, a) if norm_before_gate else (g, n)
    dweight = factors if weight is not None and needs[2] else None
    if weight is not None:
        g = g * weight.to(g.dtype)
    pulled = g * n
    if norm_before_gate:
        g = g * a
    mean = _grouped(g * n, groups).mean(-1, keepdim=True)
    du = ((_grouped(g, groups) - _grouped(n, groups) * mean) * rstd).flatten(-2)
    if not norm_before_gate:
        pulled = du * value
        du = du * a
    return (du.to(x.dtype), (pulled * slope).to(gate.dtype)), (dweight,)


def _activated(z: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    """act(z) and act'(z)."""
    s = torch.sigmoid(z)
    if activation == "sigmoid":
        return s, s * (1.0 - s)
    return z * s, s * (1.0 + z * (1.0 - s))


def _aten(
    x: Tensor,
    gate: Tensor,
    weight: Tensor | None = None,
    *,
    eps: float = 1e-5,
    activation: str = "silu",
    norm_before_gate: bool = True,
    group_size: int | None = None,
) -> Tensor:
    a = _ACTIVATIONS[activation](gate)
    u = x if norm_before_gate else x * a
    size = group_size or x.shape[-1]
    y = F.rms_norm(u.unflatten(-1, (x.shape[-1] // size, size)), (size,), eps=eps).flatten(-2)
    if weight is not None:
        y = y * weight
    return (y * a if norm_before_gate else y).to(x.dtype)


def _inputs(draw: Draw, *, N: int, K: int, D: int, weight: bool = True, **options: Any) -> Call:
    tensors = (draw.tensor(N, K * D), draw.tensor(N, K * D), draw.weight(K * D) if weight else None)
    return Call(tensors, {"eps": 1e-5, "group_size": D, **options})


def _errors() -> Iterator[ErrorInput]:
    x = torch.zeros(2, 8)
    yield ErrorInput(Call((x.long(), x)), TypeError, r"x must be a floating-point.*int64")
    yield ErrorInput(Call((x, x.long())), TypeError, r"gate must be a floating-point.*int64")
    yield ErrorInput(Call((x, x[0])), ValueError, r"gate must have the shape of x, \(2, 8\), got \(8,\)")
    yield ErrorInput(Call((x, x, torch.ones(7))), ValueError, r"weight must have the shape.*\(8,\), got \(7,\)")
    yield ErrorInput(Call((x, x), {"activation": "relu"}), ValueError, "one of silu, sigmoid, got 'relu'")
    yield ErrorInput(Call((x, x), {"group_size": 3}), ValueError, "group_size must divide.*8, got 3")


def _traffic(itemsize: int, *, N: int, K: int, D: int, weight: bool = True, **_: Any) -> Traffic:
    """x, gate, y forward; dy, x, gate, dx, dgate backward; the statistics and the weight."""
    size, row, numbers = N * K * D * itemsize, weight * K * D * itemsize, 4 * N * K
    return Traffic(forward=3 * size + row + numbers, backward=5 * size + 2 * row + numbers)


GATED_RMS_NORM = Op(
    name="gated_rms_norm",
    replaces="`F.rms_norm(x) * silu(gate)` of Mamba-2, Gated DeltaNet",
    fn=gated_rms_norm,
    reference=reference,
    impls={"triton": _triton, "compile": _compiled},
    inputs=_inputs,
    dims={"N": (0, 1, 2, 5, 129), "K": (1, 3), "D": (1, 31, 32, 33, 127, 129, 1023, 1025, 8192, 8193)},
    # Qwen3-Next: 32 heads of 128, as rows; Mamba-2 2.7B.
    bench=({"N": 65_536, "K": 1, "D": 128}, {"N": 2048, "K": 1, "D": 5120}),
    audit=({"N": 512, "K": 4, "D": 128}, {"N": 512, "K": 1, "D": 8192}, {"N": 16, "K": 2, "D": 65_536}),
    traffic=_traffic,
    flops=lambda N, K, D: 9 * N * K * D,
    aten=_aten,
    axes="... D, ... D, D -> ... D",
    errors=_errors,
    variants={
        "default": {},
        "gate before the norm": {"norm_before_gate": False},
        "sigmoid, no weight": {"activation": "sigmoid", "weight": False},
    },
    modules=(RMSNormGated,),
)
