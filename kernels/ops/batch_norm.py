"""Batch normalization, fused with the residual add and the activation behind it.

    z = (x − mean) / √(var + ε) · weight_c + bias_c (+ residual)      of each channel, over the batch or as tracked
    y = act(z)                                                        act as in channel_norm.py

Source: Ioffe and Szegedy, Batch Normalization (2015); ``torch.nn.functional.batch_norm``. With a residual it ends every
block of a ResNet (He et al., 2016).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import dispatch
from ..autograd import Gradients, fused, vjp
from ..compiled import compiled_call
from ..op import Call, Draw, ErrorInput, Excess, Op, Traffic
from . import process_groups
from .batch_norm_pieces import PLAIN, Pieces, gradients, moments, normalize, parameter_gradients, sums
from .batch_norm_sync import synchronized
from .channel_norm import Activation, activated, check, checked_activation, dense, draw_images

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


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
    activation: Activation,
    group: ProcessGroup | None = None,
) -> Any:
    """Batch normalization in plain PyTorch: float32 (or wider) inside; in training y, mean and variance, else y.

    With a group also the number of elements of a channel in all its processes.
    """
    if group is not None:
        tensors = (x, weight, bias, residual, mean, var)
        return synchronized(PLAIN, *tensors, training=training, group=group, eps=eps, activation=activation)
    if training:
        mean, var = moments(x)
    y = normalize(x, weight, bias, residual, mean, var, eps=eps, activation=activation)
    return (y, mean, var) if training else y


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
    negative_slope: float = 0.01,
    group: ProcessGroup | None = None,
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
        activation: None, ``"relu"``, ``"silu"``, ``"gelu"``, ``"hardswish"``, ``"relu6"`` or ``"leaky_relu"``.
        negative_slope: of ``"leaky_relu"``.
        group: in training, take the statistics over the batches of all its processes, which may be of different sizes,
            as ``torch.nn.SyncBatchNorm`` does; all of them must make this call. None for those of this process alone.
            The gradients of weight and bias are this process's share, for DistributedDataParallel to bring together.
            x must be a plain tensor: a DTensor may be sharded over its batch in evaluation only.

    Returns:
        [N, C, *] in x's dtype and memory format.

    Raises:
        RuntimeError: if there is a group, but torch.distributed is not initialized.
        TypeError: if x is not floating point, or group is no process group, or comes with a DTensor.
        ValueError: if x has fewer than two dims, a parameter is not [C], residual has another shape than x, there is
            no such activation, evaluation lacks its statistics, or training has one element of each channel. (How many
            a group of processes has is not waited for: the running variance becomes NaN.)
    """
    check("batch_norm_act", x, running_mean=running_mean, running_var=running_var, weight=weight, bias=bias)
    if residual is not None and residual.shape != x.shape:
        raise ValueError(
            f"batch_norm_act: residual must have the shape of x, {tuple(x.shape)}, got {tuple(residual.shape)}; "
            "expand it first if it should broadcast"
        )
    act = checked_activation("batch_norm_act", activation, negative_slope)
    options: dict[str, Any] = {"eps": float(eps), "activation": act}
    if not training:
        if running_mean is None or running_var is None:
            raise ValueError(
                "batch_norm_act: evaluation needs running_mean and running_var, got None; pass training=True to "
                "normalize with the batch's own"
            )
        statistics = (running_mean, running_var)
        return dispatch.run(BATCH_NORM_ACT, x, weight, bias, residual, *statistics, training=False, **options)
    if group is not None:
        process_groups.check_group("batch_norm_act", x, group)
    shared = group is not None and group.size() > 1
    elements = x.shape[0] * x.shape[2:].numel()
    if elements == 1 and not shared:
        raise ValueError(
            f"batch_norm_act: training needs more than one element of each channel, got {tuple(x.shape)}; "
            "use a larger batch, or training=False"
        )
    if shared:
        options["group"] = group
    y, mean, var, *count = dispatch.run(BATCH_NORM_ACT, x, weight, bias, residual, None, None, training=True, **options)
    if shared:
        (elements,) = count
    if shared or elements:
        with torch.no_grad():
            _move((running_mean, running_var), (mean, var * (elements / (elements - 1))), momentum)
    return y


def _move(running: Sequence[Tensor | None], batch: Sequence[Tensor], momentum: float) -> None:
    tracked = [(own, found.to(own.dtype)) for own, found in zip(running, batch, strict=True) if own is not None]
    if tracked:
        to, found = zip(*tracked, strict=True)
        torch._foreach_mul_(to, 1.0 - momentum)  # not lerp: ∞ would become NaN
        torch._foreach_add_(to, found, alpha=momentum)


class BatchNormAct2d(torch.nn.BatchNorm2d):
    """``torch.nn.BatchNorm2d`` and the activation behind it, with the ``state_dict`` of the norm alone.

    Loads what ``torch.nn.BatchNorm2d`` or timm's ``BatchNormAct2d`` saved, and the other way round.

    Args:
        num_features: C.
        eps: added to the variance.
        momentum: how far the running statistics move; None for the average of all batches.
        affine: learn a scale and a shift for each channel.
        track_running_stats: keep running statistics for evaluation.
        act: as ``activation`` of :func:`batch_norm_act`.
        process_group: as of ``torch.nn.SyncBatchNorm``: the processes to share statistics with in training. Unlike
            there, None is this process alone; ``torch.distributed.group.WORLD`` is all, once they are initialized. A
            built model is synchronized by setting this attribute of its norms, not by
            ``SyncBatchNorm.convert_sync_batchnorm``, which would put norms without an activation in their place.
        negative_slope: of ``act="leaky_relu"``.
    """

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        act: str | None = None,
        process_group: ProcessGroup | None = None,
        negative_slope: float = 0.01,
        **factory: Any,
    ) -> None:
        super().__init__(num_features, eps, momentum, affine, track_running_stats, **factory)
        checked_activation("BatchNormAct2d", act, negative_slope)
        self.act, self.negative_slope = act, negative_slope
        self.process_group = process_group

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
            negative_slope=self.negative_slope,
            group=self.process_group if self.training else None,
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> BatchNormAct2d:
        return process_groups.deepcopy(self, self.process_group, memo)

    def extra_repr(self) -> str:
        """The arguments."""
        return f"{super().extra_repr()}, act={self.act!r}"


def _y(x: Tensor, *others: Tensor | None, **options: Any) -> Tensor:
    found = reference(x, *others, **options)
    return found[0] if options["training"] else found


def _triton(*tensors: Tensor | None, **options: Any) -> Any:
    from ..triton import batch_norm as kernels

    if "group" in options:
        pieces = Pieces(kernels.moments, kernels.normalize, kernels.sums, kernels.gradients)
        return synchronized(pieces, *tensors, **options)
    return fused(kernels.forward, kernels.backward, vjp(_y), tensors, options, statistics=2 * options["training"])


def _compiled(*tensors: Tensor | None, **options: Any) -> Any:
    if "group" in options:
        pieces = Pieces(*(functools.partial(_compiled_piece, piece) for piece in PLAIN))
        return synchronized(pieces, *tensors, **options)
    return fused(_compiled_forward, _compiled_backward, vjp(_y), tensors, options, statistics=2 * options["training"])


def _compiled_forward(x: Tensor, *others: Tensor | None, **options: Any) -> Any:
    found = compiled_call(reference, (dense(x), *others), options)
    return found, (x, *others[:3], *(found[1:] if options["training"] else others[3:]))


def _compiled_piece(piece: Callable[..., Any], *tensors: Tensor | None, **options: Any) -> Any:
    laid = (t if t is None or t.dim() == 1 else dense(t) for t in tensors)
    return compiled_call(piece, tuple(laid), options)


def _compiled_backward(grads: Any, saved: Any, needs: Any, **options: Any) -> Gradients:
    x, *others = saved
    tensors = (dense(grads[0]), dense(x), *others)
    return compiled_call(_closed_form, tensors, {"needs": tuple(needs), **options}, recompute=True)


def _closed_form(
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
    activation: Activation,
) -> Gradients:
    """The gradients in closed form, from the sums over each channel of a·n and a."""
    tensors = (dy, x, weight, bias, residual, mean, var)
    found = sums(*tensors, eps=eps, activation=activation)
    dweight, dbias = parameter_gradients(found, weight, bias, needs[1:3])
    means = found / x[:, :1].numel() if training else None
    dx, dresidual = gradients(*tensors, means, needs=(needs[0], needs[3]), eps=eps, activation=activation)
    return dx, dweight, dbias, dresidual, None, None


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
    negative_slope: float = 0.01,
) -> Tensor:
    y = F.batch_norm(x, running_mean, running_var, weight, bias, training, momentum, eps)
    return activated(y if residual is None else y + residual, (activation or "none", negative_slope))


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
    group = {"training": True, "group": "world"}
    yield ErrorInput(Call((x, ones, ones), group), RuntimeError, "group needs torch.distributed, which is not initial")
    yield ErrorInput(Call((x, ones, ones), {"activation": "elu"}), ValueError, r"None or one of 'relu', .*got 'elu'")


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
    replaces="`F.batch_norm`, residual add, activation",
    fn=batch_norm_act,
    reference=reference,
    impls={"triton": _triton, "compile": _compiled},
    inputs=_inputs,
    dims={"N": (0, 1, 2, 5), "C": (1, 3, 33, 65), "S": (7, 33, 129, 1025, 4097)},
    # ResNet-50's first and third stages.
    bench=({"N": 8, "C": 64, "S": 3136}, {"N": 8, "C": 256, "S": 196}),
    audit=({"N": 8, "C": 16, "S": 1024}, {"N": 32, "C": 1024, "S": 64}),
    traffic=_traffic,
    excess={
        ("default", "forward"): Excess(1.52, _FORWARD),
        ("default", "backward"): Excess(1.69, _BACKWARD),
        ("residual", "forward"): Excess(1.35, _FORWARD),
        ("residual", "backward"): Excess(1.62, _BACKWARD),
        ("channels last", "forward"): Excess(1.55, _FORWARD),
        ("channels last", "backward"): Excess(1.72, _BACKWARD),
        ("hardswish", "forward"): Excess(1.52, _FORWARD),
        ("hardswish", "backward"): Excess(1.69, _BACKWARD),
        ("gelu", "forward"): Excess(1.52, _FORWARD),
        ("gelu", "backward"): Excess(1.69, _BACKWARD),
        ("evaluation", "backward"): Excess(1.62, "training's kernels, which need the sums first, serve this rare pass"),
    },
    flops=lambda N, C, S: 9 * N * C * S,
    aten=_aten,
    axes=_axes,
    errors=_errors,
    variants={
        "default": {"training": True, "activation": "relu"},
        "residual": {"training": True, "activation": "leaky_relu", "negative_slope": 0.2, "residual": True},
        "channels last": {"training": True, "activation": "silu", "channels_last": True},
        "hardswish": {"training": True, "activation": "hardswish"},
        "gelu": {"training": True, "activation": "gelu"},
        "evaluation": {"activation": "relu6", "residual": True},
        "evaluation, no affine": {"affine": False},
    },
    bench_variants=("default", "channels last"),
    modules=(BatchNormAct2d,),
)
