"""Batch normalization, fused with the residual add and the activation behind it.

    z = (x − mean) / √(var + ε) · weight_c + bias_c (+ residual)      of each channel, over the batch or as tracked
    y = act(z)                                                        act ∈ {identity, relu, silu}

Source: Ioffe and Szegedy, Batch Normalization (2015); ``torch.nn.functional.batch_norm``. With a residual it ends every
block of a ResNet (He et al., 2016).
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
from ..op import Call, Draw, ErrorInput, Excess, Op, Traffic
from .channel_norm import ACTIVATIONS, activation_name, check, dense, draw_images, per_channel, pulled_back


def reference(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    mean: Tensor | None,
    var: Tensor | None,
    *,
    training: bool,
    eps: float,
    activation: str,
) -> Any:
    """Batch normalization in plain PyTorch: float32 (or wider) inside; in training y, mean and variance, else y."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    if training:
        mean = _channel_mean(wide)
        var = _channel_mean((wide - per_channel(mean, wide)).square())
    assert mean is not None
    assert var is not None
    n = (wide - per_channel(mean, wide)) * per_channel(torch.rsqrt(var.to(wide.dtype) + eps), wide)
    y = ACTIVATIONS[activation](_shifted(n, weight, bias, residual)).to(x.dtype)
    return (y, mean, var) if training else y


def _channel_mean(x: Tensor) -> Tensor:
    """[C]: the mean over each image, then over the batch, which halves a sum's rounding error."""
    return (x.flatten(2).mean(-1) if x.dim() > 2 else x).mean(0)


def _shifted(n: Tensor, weight: Tensor | None, bias: Tensor | None, residual: Tensor | None) -> Tensor:
    if weight is not None:
        n = n * per_channel(weight, n)
    if bias is not None:
        n = n + per_channel(bias, n)
    return n if residual is None else n + residual.to(n.dtype)


def batch_norm_act(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    *,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    activation: str | None = None,
) -> Tensor:
    """Batch normalization, residual add and activation: ``act((x − mean) / √(var + eps) · weight + bias + residual)``.

    Computed in float32 and rounded once. The backward pass keeps the inputs and the channels' statistics, and
    recomputes what the activation saw. Images in ``torch.channels_last`` are read where they lie.

    Args:
        x: floating-point tensor [N, C, *].
        running_mean: [C]: normalizes in evaluation; in training moves towards the batch's mean, in place. May be None
            in training.
        running_var: likewise, towards the batch's variance with divisor n − 1.
        weight: [C], or None for no scale. Its dtype may differ from x's.
        bias: [C], or None for no shift.
        residual: of x's shape, added before the activation, or None.
        training: normalize with the mean and the variance (with divisor n) of the batch.
        momentum: how far the running statistics move, of the way to the batch's.
        eps: added to the variance.
        activation: None, ``"relu"`` or ``"silu"``.

    Returns:
        [N, C, *] in x's dtype and memory format.

    Raises:
        TypeError: if x is not floating point.
        ValueError: if x has fewer than two dims, a parameter is not [C], residual has another shape than x, there is
            no such activation, evaluation lacks its statistics, or training has one element of each channel.
    """
    check("batch_norm_act", x, running_mean=running_mean, running_var=running_var, weight=weight, bias=bias)
    if residual is not None and residual.shape != x.shape:
        raise ValueError(
            f"batch_norm_act: residual must have the shape of x, {tuple(x.shape)}, got {tuple(residual.shape)}; "
            "expand it first if it should broadcast"
        )
    options: dict[str, Any] = {"eps": float(eps), "activation": activation_name("batch_norm_act", activation)}
    if not training:
        if running_mean is None or running_var is None:
            raise ValueError(
                "batch_norm_act: evaluation needs running_mean and running_var, got None; pass training=True to "
                "normalize with the batch's own"
            )
        statistics = (running_mean, running_var)
        return dispatch.run(BATCH_NORM_ACT, x, weight, bias, residual, *statistics, training=False, **options)
    elements = x[:, :1].numel()
    if elements == 1:
        raise ValueError(
            f"batch_norm_act: training needs more than one element of each channel, got {tuple(x.shape)}; "
            "use a larger batch, or training=False"
        )
    y, mean, var = dispatch.run(BATCH_NORM_ACT, x, weight, bias, residual, None, None, training=True, **options)
    if elements:
        _move(running_mean, mean, momentum)
        _move(running_var, var * (elements / (elements - 1)), momentum)
    return y


@torch.no_grad()
def _move(running: Tensor | None, batch: Tensor, momentum: float) -> None:
    if running is not None:
        running.mul_(1.0 - momentum).add_(batch.to(running.dtype), alpha=momentum)


class BatchNormAct2d(torch.nn.BatchNorm2d):
    """``torch.nn.BatchNorm2d`` and the activation behind it, with the ``state_dict`` of the norm alone.

    Loads what ``torch.nn.BatchNorm2d`` or timm's ``BatchNormAct2d`` saved, and the other way round.

    Args:
        num_features: C.
        eps: added to the variance.
        momentum: how far the running statistics move; None for the average of all batches.
        affine: learn a scale and a shift for each channel.
        track_running_stats: keep running statistics for evaluation.
        act: None, ``"relu"`` or ``"silu"``.
    """

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        act: str | None = None,
        **factory: Any,
    ) -> None:
        super().__init__(num_features, eps, momentum, affine, track_running_stats, **factory)
        activation_name("BatchNormAct2d", act)
        self.act = act

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        """[N, C, H, W], and a residual like it → the same shape, dtype and memory format."""
        self._check_input_dim(input)
        training = self.training or self.running_mean is None
        momentum = self.momentum
        if self.training and self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
            if momentum is None:
                momentum = 1.0 / float(self.num_batches_tracked)
        return batch_norm_act(
            input,
            self.running_mean,
            self.running_var,
            self.weight,
            self.bias,
            residual,
            training=training,
            momentum=momentum or 0.0,
            eps=self.eps,
            activation=self.act,
        )

    def extra_repr(self) -> str:
        """The arguments."""
        return f"{super().extra_repr()}, act={self.act!r}"


def _y(x: Tensor, *others: Tensor | None, **options: Any) -> Tensor:
    found = reference(x, *others, **options)
    return found[0] if options["training"] else found


def _triton(*tensors: Tensor | None, **options: Any) -> Any:
    from ..triton import batch_norm as kernels

    return fused(kernels.forward, kernels.backward, vjp(_y), tensors, options, statistics=2 * options["training"])


def _compiled(*tensors: Tensor | None, **options: Any) -> Any:
    return fused(_compiled_forward, _compiled_backward, vjp(_y), tensors, options, statistics=2 * options["training"])


def _compiled_forward(x: Tensor, *others: Tensor | None, **options: Any) -> Any:
    return compiled_call(reference, (dense(x), *others), options), (x, *others)


def _compiled_backward(grads: Any, saved: Any, needs: Any, **options: Any) -> Gradients:
    x, *others = saved
    return compiled_call(_gradients, (dense(grads[0]), dense(x), *others), {"needs": tuple(needs), **options})


def _gradients(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    mean: Tensor | None,
    var: Tensor | None,
    *,
    needs: tuple[bool, ...],
    training: bool,
    eps: float,
    activation: str,
) -> Gradients:
    """The gradients in closed form, from the means over each channel of a·n and a."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    if training:
        mean = _channel_mean(wide)
        var = _channel_mean((wide - per_channel(mean, wide)).square())
    assert mean is not None
    assert var is not None
    rstd = per_channel(torch.rsqrt(var.to(wide.dtype) + eps), wide)
    n = (wide - per_channel(mean, wide)) * rstd
    a = pulled_back(dy, _shifted(n, weight, bias, residual), activation)
    mean_an, mean_a = _channel_mean(a * n), _channel_mean(a)
    elements = x[:, :1].numel()
    dweight = (mean_an * elements).to(weight.dtype) if weight is not None and needs[1] else None
    dbias = (mean_a * elements).to(bias.dtype) if bias is not None and needs[2] else None
    dresidual = a.to(residual.dtype) if residual is not None and needs[3] else None
    dx = a - n * per_channel(mean_an, n) - per_channel(mean_a, n) if training else a
    dx = dx * rstd if weight is None else dx * (rstd * per_channel(weight, n))
    return dx.to(x.dtype) if needs[0] else None, dweight, dbias, dresidual, None, None


def _aten(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    *,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    activation: str | None = None,
) -> Tensor:
    y = F.batch_norm(x, running_mean, running_var, weight, bias, training, momentum, eps)
    return ACTIVATIONS[activation or "none"](y if residual is None else y + residual)


def _inputs(
    draw: Draw, *, N: int, C: int, S: int, residual: bool = False, affine: bool = True, channels_last: bool = False,
    **options: Any,
) -> Call:  # fmt: skip
    # A tensor needs four dims for torch to call its format channels_last.
    size = (S, 1) if channels_last else (S,)
    x = draw_images(draw, N, C, *size, channels_last=channels_last)
    mean, var = draw.weight(C).detach(), draw.weight(C).detach().square() + 0.5
    weight, bias = (draw.weight(C) if affine else None for _ in range(2))
    added = draw_images(draw, N, C, *size, channels_last=channels_last) if residual else None
    return Call((x, mean, var, weight, bias, added), options)


def _errors() -> Iterator[ErrorInput]:
    x, ones = torch.zeros(2, 8, 3), torch.ones(8)
    yield ErrorInput(Call((x.long(), ones, ones)), TypeError, r"x must be a floating-point.*int64")
    yield ErrorInput(Call((torch.zeros(8), ones, ones)), ValueError, r"at least two dims.*\(8,\)")
    yield ErrorInput(Call((x, ones[:3], ones)), ValueError, r"running_mean must have .* \(8,\), got \(3,\)")
    yield ErrorInput(Call((x, ones, ones, ones[:3])), ValueError, r"weight must have .* \(8,\), got \(3,\)")
    yield ErrorInput(Call((x, ones, ones, None, None, x[:1])), ValueError, r"residual must have .*got \(1, 8, 3\)")
    yield ErrorInput(Call((x, None, None)), ValueError, "evaluation needs running_mean and running_var")
    yield ErrorInput(Call((x[:1, :, :1], ones, ones), {"training": True}), ValueError, r"more than one.*\(1, 8, 1\)")
    yield ErrorInput(Call((x, ones, ones), {"activation": "gelu"}), ValueError, r"None, 'relu' or 'silu', got 'gelu'")


def _traffic(
    itemsize: int, *, N: int, C: int, S: int, residual: bool = False, affine: bool = True, **_: Any
) -> Traffic:
    """x, residual, y forward; dy, x, residual, dx, dresidual backward; statistics and parameters once."""
    images, parameters = N * C * S * itemsize, 2 * affine * C * itemsize
    return Traffic(
        forward=(2 + residual) * images + parameters + 8 * C,
        backward=(3 + 2 * residual) * images + 2 * parameters + 8 * C,
    )


_FORWARD = "x is read for the batch's statistics, then again"
_BACKWARD = "dy, x and the residual are read for the channels' sums, then again"


def _axes(*_: Tensor | None, training: bool, **__: Any) -> str:
    """The statistics of a batch are those of all of it: in training only channels may be sharded."""
    if training:
        return "N c *, c, c, N c *, c, c -> N c *, c, c"
    return "n c ..., c, c, n c ..., c, c -> n c ..."


BATCH_NORM_ACT = Op(
    name="batch_norm_act",
    replaces="`F.batch_norm`, residual add, `F.relu` or `F.silu`",
    fn=batch_norm_act,
    reference=reference,
    impls={"triton": _triton, "compile": _compiled},
    inputs=_inputs,
    dims={"N": (0, 1, 2, 5), "C": (1, 3, 33, 65), "S": (7, 33, 129, 1025, 4097)},
    # ResNet-50's first and third stages.
    bench=({"N": 8, "C": 64, "S": 3136}, {"N": 8, "C": 256, "S": 196}),
    audit=({"N": 8, "C": 64, "S": 1024}, {"N": 32, "C": 1024, "S": 64}),
    traffic=_traffic,
    excess={
        ("default", "forward"): Excess(1.52, _FORWARD),
        ("default", "backward"): Excess(1.69, _BACKWARD),
        ("residual", "forward"): Excess(1.35, _FORWARD),
        ("residual", "backward"): Excess(1.62, _BACKWARD),
        ("channels last", "forward"): Excess(1.55, _FORWARD),
        ("channels last", "backward"): Excess(1.72, _BACKWARD),
        ("evaluation", "backward"): Excess(1.62, "training's kernels, which need the sums first, serve this rare pass"),
    },
    flops=lambda N, C, S: 9 * N * C * S,
    aten=_aten,
    axes=_axes,
    errors=_errors,
    variants={
        "default": {"training": True, "activation": "relu"},
        "residual": {"training": True, "activation": "relu", "residual": True},
        "channels last": {"training": True, "activation": "silu", "channels_last": True},
        "evaluation": {"activation": "relu", "residual": True},
        "evaluation, no affine": {"affine": False},
    },
    module=BatchNormAct2d,
)
