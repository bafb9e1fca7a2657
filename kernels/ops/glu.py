"""Gated linear units: SwiGLU, GeGLU, ReGLU and the original GLU.

    y = act(gate) · up        act as in activations.py

Source: Shazeer, GLU Variants Improve Transformer (2020); Dauphin et al., Language Modeling with Gated Convolutional
Networks (2017).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import dispatch
from ..autograd import fused, vjp
from ..op import Call, Draw, ErrorInput, Op, Traffic
from . import checks
from .activations import ACTIVATIONS, check_activation


def reference(gate: Tensor, up: Tensor, *, activation: str) -> Tensor:
    """``act(gate) · up`` in plain PyTorch: float32 (or wider) inside, one rounding."""
    narrow = torch.promote_types(gate.dtype, up.dtype)
    wide = torch.promote_types(narrow, torch.float32)
    return (ACTIVATIONS[activation](gate.to(wide)) * up.to(wide)).to(narrow)


def packed_reference(x: Tensor, *, activation: str, gate_first: bool) -> Tensor:
    """The same of the two halves of the last dim."""
    first, second = x.chunk(2, -1)
    gate, up = (first, second) if gate_first else (second, first)
    return reference(gate, up, activation=activation)


def glu(gate: Tensor, up: Tensor, *, activation: str = "silu") -> Tensor:
    """Gated linear unit: ``act(gate) · up``, elementwise.

    Computed in float32 and rounded once; the backward pass keeps only gate and up, and recomputes the rest.

    Args:
        gate: floating-point tensor [...].
        up: of gate's shape; its dtype may differ.
        activation: ``"silu"`` (SwiGLU), ``"gelu"`` (GeGLU, with the exact Φ), ``"gelu_tanh"``, ``"quick_gelu"``,
            ``"relu"``, ``"relu_squared"`` or ``"sigmoid"``.

    Returns:
        [...] in the dtype that gate and up promote to, as ``act(gate) * up`` gives.

    Raises:
        TypeError: if gate or up is not floating point.
        ValueError: if their shapes differ, or there is no such activation.
    """
    checks.floating("glu", gate=gate, up=up)
    check_activation("glu", activation)
    if gate.shape != up.shape:
        raise ValueError(
            f"glu: up must have the shape of gate, {tuple(gate.shape)}, got {tuple(up.shape)}; "
            "expand one first if it should broadcast"
        )
    return dispatch.run(GLU_OP, gate, up, activation=activation)


def packed_glu(x: Tensor, *, activation: str = "silu", gate_first: bool = True) -> Tensor:
    """Gated linear unit of one packed tensor ``x = [gate | up]``: ``act(gate) · up``, with no copy of either half.

    The gradient is written straight into one tensor like x.

    Args:
        x: floating-point tensor [..., 2D].
        activation: as in :func:`glu`.
        gate_first: whether x is ``[gate | up]``, or ``[up | gate]`` as in ``torch.nn.functional.glu``, which is this
            function with ``activation="sigmoid", gate_first=False``.

    Returns:
        [..., D] in x's dtype.

    Raises:
        TypeError: if x is not floating point.
        ValueError: if x is a scalar, its last dim is odd, or there is no such activation.
    """
    checks.floating("packed_glu", x=x)
    check_activation("packed_glu", activation)
    if x.dim() == 0:
        raise ValueError("packed_glu: x must have at least one dimension to halve, got a scalar")
    if x.shape[-1] % 2:
        raise ValueError(
            f"packed_glu: x must hold gate and up side by side, so its last dim must be even, got {tuple(x.shape)}; "
            "pass them separately to glu"
        )
    return dispatch.run(PACKED_GLU, x, activation=activation, gate_first=gate_first)


class GLU(torch.nn.GLU):
    """Drop-in for ``torch.nn.GLU``; runs :func:`packed_glu` on the two halves of ``dim``.

    As in ``torch.nn.GLU`` the second half is the gate, and its activation the sigmoid; the packed projection of a
    transformer's MLP is ``GLU(activation="silu", gate_first=True)``.

    Args:
        dim: the dimension to halve.
        activation: as in :func:`glu`.
        gate_first: as in :func:`packed_glu`.
    """

    #: On the class too, so that a ``torch.nn.GLU`` becomes one of these by a change of class alone.
    activation: str = "sigmoid"
    gate_first: bool = False

    def __init__(self, dim: int = -1, *, activation: str = "sigmoid", gate_first: bool = False) -> None:
        super().__init__(dim)
        check_activation("GLU", activation)
        self.activation, self.gate_first = activation, gate_first

    def forward(self, x: Tensor) -> Tensor:
        """[..., 2D, ...] → [..., D, ...], D at ``dim``."""
        size = x.shape[self.dim]
        if size % 2:
            raise ValueError(f"GLU: x must have an even size at dim {self.dim} to halve, got {tuple(x.shape)}")
        halved = list(x.shape)
        halved[self.dim] = size // 2
        # The halves of ``dim`` are the halves of everything from ``dim`` on.
        return packed_glu(x.flatten(self.dim), activation=self.activation, gate_first=self.gate_first).view(halved)

    def extra_repr(self) -> str:
        """The arguments."""
        return f"dim={self.dim}, activation={self.activation!r}, gate_first={self.gate_first}"


def _triton(gate: Tensor, up: Tensor, **options: Any) -> Tensor:
    from ..triton import glu as kernels

    return fused(kernels.forward, kernels.backward, vjp(reference), (gate, up), options)


def _packed_triton(x: Tensor, **options: Any) -> Tensor:
    from ..triton import glu as kernels

    return fused(kernels.packed_forward, kernels.packed_backward, vjp(packed_reference), (x,), options)


def _aten(gate: Tensor, up: Tensor, *, activation: str) -> Tensor:
    activate = F.gelu if activation == "gelu" else ACTIVATIONS[activation]
    return activate(gate) * up


def _packed_aten(x: Tensor, *, activation: str, gate_first: bool = True) -> Tensor:
    first, second = x.chunk(2, -1)
    return _aten(first, second, activation=activation) if gate_first else _aten(second, first, activation=activation)


def _inputs(draw: Draw, *, N: int, D: int, activation: str, own_dtype: bool = False) -> Call:
    up = draw.weight(N, D) if own_dtype else draw.tensor(N, D)
    return Call((draw.tensor(N, D), up), {"activation": activation})


def _packed_inputs(draw: Draw, *, N: int, D: int, **options: Any) -> Call:
    return Call((draw.tensor(N, 2 * D),), options)


def _errors() -> Iterator[ErrorInput]:
    x = torch.zeros(2, 8)
    yield ErrorInput(Call((x.long(), x)), TypeError, r"gate must be a floating-point.*int64")
    yield ErrorInput(Call((x, x.long())), TypeError, r"up must be a floating-point.*int64")
    yield ErrorInput(Call((x, torch.zeros(8))), ValueError, r"up must have the shape of gate, \(2, 8\), got \(8,\)")
    yield ErrorInput(Call((x, x), {"activation": "swish"}), ValueError, r"one of silu, gelu, .*got 'swish'")


def _packed_errors() -> Iterator[ErrorInput]:
    x = torch.zeros(2, 8)
    yield ErrorInput(Call((x.long(),)), TypeError, r"x must be a floating-point.*int64")
    yield ErrorInput(Call((torch.tensor(1.0),)), ValueError, "at least one dimension")
    yield ErrorInput(Call((torch.zeros(2, 7),)), ValueError, r"last dim must be even, got \(2, 7\)")
    yield ErrorInput(Call((x,), {"activation": "swish"}), ValueError, r"one of silu, gelu, .*got 'swish'")


def _traffic(itemsize: int, *, N: int, D: int, **_: Any) -> Traffic:
    """gate, up, y forward; dy, gate, up, dgate, dup backward."""
    return Traffic(forward=3 * N * D * itemsize, backward=5 * N * D * itemsize)


_DIMS = {"N": (0, 1, 2, 33, 129), "D": (0, 1, 31, 32, 33, 127, 1023, 1025, 2048, 2049)}
# SmolLM2-135M and Llama-3.1-8B.
_AUDIT = ({"N": 64, "D": 512}, {"N": 64, "D": 14_336})
_BENCH = ({"N": 2048, "D": 1536}, {"N": 2048, "D": 14_336})


def _flops(N: int, D: int) -> int:
    """σ counts as three: exp, add, divide."""
    return 5 * N * D


GLU_OP = Op(
    name="glu",
    replaces="`act(gate) * up`: SwiGLU, GeGLU, ReGLU, GLU",
    fn=glu,
    reference=reference,
    impls={"triton": _triton},
    inputs=_inputs,
    dims=_DIMS,
    bench=_BENCH,
    audit=_AUDIT,
    traffic=_traffic,
    flops=_flops,
    aten=_aten,
    axes="... d, ... d -> ... d",
    errors=_errors,
    variants={
        "default": {"activation": "silu"},
        "gelu": {"activation": "gelu"},
        "gelu_tanh": {"activation": "gelu_tanh"},
        "relu": {"activation": "relu"},
        "sigmoid": {"activation": "sigmoid"},
        "up of its own dtype": {"activation": "silu", "own_dtype": True},
    },
)

PACKED_GLU = Op(
    name="packed_glu",
    replaces="`act(gate) * up` of `x.chunk(2, -1)`; `F.glu`",
    fn=packed_glu,
    reference=packed_reference,
    impls={"triton": _packed_triton},
    inputs=_packed_inputs,
    dims=_DIMS,
    bench=_BENCH,
    audit=_AUDIT,
    traffic=_traffic,
    flops=_flops,
    aten=_packed_aten,
    axes="... D -> ... H",
    errors=_packed_errors,
    variants={
        "default": {"activation": "silu"},
        "gelu": {"activation": "gelu"},
        "gelu_tanh": {"activation": "gelu_tanh"},
        "relu": {"activation": "relu"},
        "torch's GLU": {"activation": "sigmoid", "gate_first": False},
    },
    modules=(GLU,),
)
