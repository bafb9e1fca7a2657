"""The two MLPs of a transformer, which keep nothing of their wide middle for the backward pass.

    mlp        y = act(x·W₁ᵀ + b₁)·W₂ᵀ + b₂
    gated_mlp  y = (act(x·Wgᵀ) ⊙ (x·Wuᵀ))·Wdᵀ

The matrix products are PyTorch's own; what is between them runs as :func:`bias_act` or :func:`glu`. For the backward
pass only x and the weights are kept, none of the tensors [..., H] that autograd would keep; it multiplies x by the
first weights again: 7 products for 6 forward and backward, 11 for 9 if gated.

Sources: Vaswani et al., Attention Is All You Need (2017); Shazeer, GLU Variants Improve Transformer (2020); the
recomputation is that of Chen et al., Training Deep Nets with Sublinear Memory Cost (2016).
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
from ..op import Call, Draw, ErrorInput, Op, Traffic
from . import bias_act as bias_act_op
from . import checks
from . import glu as glu_op
from .activations import ACTIVATIONS, check_activation
from .autocast import autocast_operands, without_autocast
from .bias_act import bias_act
from .glu import glu


def reference(x: Tensor, w1: Tensor, b1: Tensor | None, w2: Tensor, b2: Tensor | None, *, activation: str) -> Tensor:
    """The MLP in plain PyTorch: products in the dtype of the operands, the activation in float32 (or wider)."""
    return F.linear(bias_act_op.reference(F.linear(x, w1), b1, activation=activation), w2, b2)


def gated_reference(x: Tensor, w_gate: Tensor, w_up: Tensor, w_down: Tensor, *, activation: str) -> Tensor:
    """The gated MLP in plain PyTorch, likewise."""
    return F.linear(glu_op.reference(F.linear(x, w_gate), F.linear(x, w_up), activation=activation), w_down)


def mlp(
    x: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None = None,
    *,
    activation: str = "gelu",
) -> Tensor:
    """Two linear layers with an activation between them: ``act(x @ w1.T + b1) @ w2.T + b2``.

    Of all that the backward pass needs only x and the weights are kept. Under autocast the products run in its dtype.

    Args:
        x: floating-point tensor [..., D].
        w1: [H, D], as ``torch.nn.Linear`` keeps it.
        b1: [H], or None for none.
        w2: [O, H].
        b2: [O], or None for none.
        activation: as in :func:`bias_act`.

    Returns:
        [..., O] in x's dtype (autocast's under autocast).

    Raises:
        TypeError: if a tensor is not floating point, or, without autocast, has another dtype than x.
        ValueError: if shapes do not fit, or there is no such activation.
    """
    check_activation("mlp", activation)
    checks.linear_operands("mlp", x=(x, "D"), w1=(w1, "HD"), b1=(b1, "H"), w2=(w2, "OH"), b2=(b2, "O"))
    return dispatch.run(MLP_OP, x, w1, b1, w2, b2, activation=activation)


def gated_mlp(x: Tensor, w_gate: Tensor, w_up: Tensor, w_down: Tensor, *, activation: str = "silu") -> Tensor:
    """Gated MLP: ``(act(x @ w_gate.T) * (x @ w_up.T)) @ w_down.T``.

    Of all that the backward pass needs only x and the weights are kept. Under autocast the products run in its dtype.

    Args:
        x: floating-point tensor [..., D].
        w_gate: [H, D], as ``torch.nn.Linear`` keeps it.
        w_up: [H, D].
        w_down: [O, H].
        activation: as in :func:`glu`.

    Returns:
        [..., O] in x's dtype (autocast's under autocast).

    Raises:
        TypeError: if a tensor is not floating point, or, without autocast, has another dtype than x.
        ValueError: if shapes do not fit, or there is no such activation.
    """
    check_activation("gated_mlp", activation)
    checks.linear_operands("gated_mlp", x=(x, "D"), w_gate=(w_gate, "HD"), w_up=(w_up, "HD"), w_down=(w_down, "OH"))
    return dispatch.run(GATED_MLP, x, w_gate, w_up, w_down, activation=activation)


class MLP(torch.nn.Module):
    """Two linear layers ``fc1`` and ``fc2`` with an activation between them; runs :func:`mlp`.

    Its ``state_dict`` is that of timm's ``Mlp``. The linear layers hold parameters and are not called: hooks on them
    do not run.

    Args:
        in_features: D.
        hidden_features: H; None is D.
        out_features: O; None is D.
        activation: as in :func:`mlp`.
        bias: whether both layers have one.
        device: of the parameters.
        dtype: of the parameters.
    """

    def __init__(
        self,
        in_features: int,
        hidden_features: int | None = None,
        out_features: int | None = None,
        *,
        activation: str = "gelu",
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_activation("MLP", activation)
        self.activation = activation
        hidden = hidden_features or in_features
        self.fc1 = torch.nn.Linear(in_features, hidden, bias, device=device, dtype=dtype)
        self.fc2 = torch.nn.Linear(hidden, out_features or in_features, bias, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        """[..., D] → [..., O]."""
        fc1, fc2 = self.fc1, self.fc2
        return mlp(x, fc1.weight, fc1.bias, fc2.weight, fc2.bias, activation=self.activation)

    def extra_repr(self) -> str:
        """What the children do not say."""
        return f"activation={self.activation!r}"


class GatedMLP(torch.nn.Module):
    """Linear layers ``gate_proj``, ``up_proj`` and ``down_proj`` without bias, as in Llama; runs :func:`gated_mlp`.

    The linear layers hold parameters and are not called: hooks on them do not run.

    Args:
        hidden_size: D.
        intermediate_size: H.
        activation: as in :func:`gated_mlp`.
        device: of the parameters.
        dtype: of the parameters.
    """

    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int,
        *,
        activation: str = "silu",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_activation("GatedMLP", activation)
        self.activation = activation
        linear = partial(torch.nn.Linear, bias=False, device=device, dtype=dtype)
        self.gate_proj = linear(hidden_size, intermediate_size)
        self.up_proj = linear(hidden_size, intermediate_size)
        self.down_proj = linear(intermediate_size, hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        """[..., D] → [..., D]."""
        gate, up, down = self.gate_proj.weight, self.up_proj.weight, self.down_proj.weight
        return gated_mlp(x, gate, up, down, activation=self.activation)

    def extra_repr(self) -> str:
        """What the children do not say."""
        return f"activation={self.activation!r}"


def _hidden(x: Tensor, w1: Tensor, b1: Tensor | None, *, activation: str) -> Tensor:
    return bias_act(F.linear(x, w1), b1, activation=activation)


def _gated_hidden(x: Tensor, w_gate: Tensor, w_up: Tensor, *, activation: str) -> Tensor:
    return glu(F.linear(x, w_gate), F.linear(x, w_up), activation=activation)


def _recomputed(hidden: Callable[..., Tensor], reference: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The operator that feeds ``hidden`` of its first three tensors to a linear layer of the others."""

    def forward(*tensors: Any, **options: Any) -> tuple[Tensor, Any]:
        return F.linear(hidden(*tensors[:3], **options), *tensors[3:]), tensors

    def backward(grads: Any, saved: Any, needs: Any, **options: Any) -> Gradients:
        with without_autocast(saved[0].device.type):  # dtypes were settled on the way forward
            return _gradients(hidden, grads[0], saved, needs, options)

    def run(*tensors: Tensor | None, **options: Any) -> Tensor:
        tensors = autocast_operands(*tensors)
        assert tensors[0] is not None
        with without_autocast(tensors[0].device.type):
            return fused(forward, backward, vjp(reference), tensors, options)

    return run


def _gradients(hidden: Callable[..., Tensor], dy: Tensor, saved: Any, needs: Any, options: dict[str, Any]) -> Gradients:
    """The gradients, by autograd through ``hidden`` and by hand through the linear layer behind it."""
    leaves = [t if t is None else t.detach().requires_grad_(need) for t, need in zip(saved[:3], needs[:3], strict=True)]
    with torch.enable_grad():
        h = hidden(*leaves, **options)
    weight = saved[3]
    dy_rows, h_rows = dy.reshape(-1, dy.shape[-1]), h.detach().view(-1, h.shape[-1])
    outer = [dy_rows.mT @ h_rows if needs[3] else None, dy_rows.sum(0) if len(saved) > 4 and needs[4] else None]
    wanted = [t for t in leaves if t is not None and t.requires_grad]
    found = iter(torch.autograd.grad(h, wanted, (dy_rows @ weight).view(h.shape)) if wanted else ())
    return [*(next(found) if need else None for need in needs[:3]), *outer[: len(needs) - 3]]


_mlp = _recomputed(_hidden, reference)
_gated_mlp = _recomputed(_gated_hidden, gated_reference)


def _aten(x: Tensor, w1: Tensor, b1: Tensor | None, w2: Tensor, b2: Tensor | None, *, activation: str) -> Tensor:
    activate = F.gelu if activation == "gelu" else ACTIVATIONS[activation]
    return F.linear(activate(F.linear(x, w1, b1)), w2, b2)


def _gated_aten(x: Tensor, w_gate: Tensor, w_up: Tensor, w_down: Tensor, *, activation: str) -> Tensor:
    return F.linear(ACTIVATIONS[activation](F.linear(x, w_gate)) * F.linear(x, w_up), w_down)


def _inputs(draw: Draw, *, N: int, D: int, H: int, activation: str, bias: bool = True) -> Call:
    b1, b2 = (draw.tensor(H), draw.tensor(D)) if bias else (None, None)
    return Call((draw.tensor(N, D), draw.tensor(H, D), b1, draw.tensor(D, H), b2), {"activation": activation})


def _gated_inputs(draw: Draw, *, N: int, D: int, H: int, activation: str) -> Call:
    weights = (draw.tensor(H, D), draw.tensor(H, D), draw.tensor(D, H))
    return Call((draw.tensor(N, D), *weights), {"activation": activation})


def _errors() -> Iterator[ErrorInput]:
    x, w1, b1, w2 = torch.zeros(2, 8), torch.zeros(16, 8), torch.zeros(16), torch.zeros(8, 16)
    yield ErrorInput(Call((x.long(), w1, b1, w2)), TypeError, r"x must be a floating-point.*int64")
    yield ErrorInput(Call((x, w1.double(), b1, w2)), TypeError, r"w1 must have the dtype of x.*got torch.float64")
    yield ErrorInput(Call((torch.tensor(1.0), w1, b1, w2)), ValueError, "at least one dimension")
    yield ErrorInput(Call((x, w2, b1, w2)), ValueError, r"w1 must be \[H=8, D=8\], got \(8, 16\)")
    yield ErrorInput(Call((x, w1, b1[:7], w2)), ValueError, r"b1 must be \[H=16\], got \(7,\)")
    yield ErrorInput(Call((x, w1, b1, w1)), ValueError, r"w2 must be .*H=16\], got \(16, 8\)")
    yield ErrorInput(Call((x, w1, b1, w2), {"activation": "swish"}), ValueError, r"one of silu, gelu, .*got 'swish'")


def _gated_errors() -> Iterator[ErrorInput]:
    x, w, down = torch.zeros(2, 8), torch.zeros(16, 8), torch.zeros(8, 16)
    yield ErrorInput(Call((x, w, w[:7], down)), ValueError, r"w_up must be \[H=16, D=8\], got \(7, 8\)")
    yield ErrorInput(Call((x, w, w.half(), down)), TypeError, r"w_up must have the dtype of x.*got torch.float16")
    yield ErrorInput(Call((x, w, w, down), {"activation": "swish"}), ValueError, r"one of silu, gelu, .*got 'swish'")


def _traffic(itemsize: int, *, N: int, D: int, H: int, bias: bool = True, **_: Any) -> Traffic:
    """Each product's operands and result, and those of bias_act; the backward pass has the way to it twice."""
    product = N * D + H * D + N * H
    activated = 2 * N * H + bias * H
    return Traffic(
        forward=(2 * product + activated + bias * D) * itemsize,
        backward=(5 * product + activated + 3 * N * H + bias * (2 * H + N * D + D)) * itemsize,
    )


def _gated_traffic(itemsize: int, *, N: int, D: int, H: int, **_: Any) -> Traffic:
    """Each product's operands and result, and those of glu; the backward pass has the way to it twice."""
    product = N * D + H * D + N * H
    return Traffic(
        forward=(3 * product + 3 * N * H) * itemsize,
        backward=(8 * product + 8 * N * H + 3 * N * D) * itemsize,
    )


_DIMS = {"N": (0, 1, 2, 33), "D": (1, 8, 31), "H": (1, 32, 65)}
_AUDIT = ({"N": 512, "D": 128, "H": 512},)

MLP_OP = Op(
    name="mlp",
    replaces="two `nn.Linear` and the activation between them, which nothing keeps",
    fn=mlp,
    reference=reference,
    impls={"triton": _mlp, "compile": _mlp},
    inputs=_inputs,
    dims=_DIMS,
    # ViT-B (batch 16) and GPT-2 XL.
    bench=({"N": 3152, "D": 768, "H": 3072}, {"N": 4096, "D": 1600, "H": 6400}),
    audit=_AUDIT,
    traffic=_traffic,
    flops=lambda N, D, H: 4 * N * D * H + 8 * N * H,
    aten=_aten,
    axes="... D, H D, H, O H, O -> ... O",
    errors=_errors,
    variants={"default": {"activation": "gelu"}, "no bias": {"activation": "relu_squared", "bias": False}},
    modules=(MLP,),
)

GATED_MLP = Op(
    name="gated_mlp",
    replaces="`down_proj(act(gate_proj(x)) * up_proj(x))`, of which nothing is kept",
    fn=gated_mlp,
    reference=gated_reference,
    impls={"triton": _gated_mlp, "compile": _gated_mlp},
    inputs=_gated_inputs,
    dims=_DIMS,
    # SmolLM2-135M and Llama-3.1-8B.
    bench=({"N": 2048, "D": 576, "H": 1536}, {"N": 2048, "D": 4096, "H": 14_336}),
    audit=_AUDIT,
    traffic=_gated_traffic,
    flops=lambda N, D, H: 6 * N * D * H + 5 * N * H,
    aten=_gated_aten,
    axes="... D, H D, H D, O H -> ... O",
    errors=_gated_errors,
    variants={"default": {"activation": "silu"}},
    modules=(GatedMLP,),
)
