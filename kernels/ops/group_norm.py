"""Group normalization, alone and fused with the activation behind it.

    z = (x − mean(x)) / √(var(x) + ε) · weight_c + bias_c        over each group of C / G channels, var with divisor n
    y = act(z)                                                   act as in channel_norm.py

Source: Wu and He, Group Normalization (2018); ``torch.nn.functional.group_norm``. GroupNorm then SiLU is every block of
a diffusion U-Net (Ho et al., Denoising Diffusion Probabilistic Models, 2020).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import dispatch
from ..autograd import Gradients, fused, vjp
from ..compiled import compiled_call, plain_call
from ..op import Call, Draw, ErrorInput, Excess, Op, Traffic
from .channel_norm import (
    Activation,
    activated,
    check,
    checked_activation,
    dense,
    draw_images,
    per_channel,
    pulled_back,
)


def reference(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, *, num_groups: int, eps: float, activation: Activation
) -> Tensor:
    """Group normalization in plain PyTorch: float32 (or wider) inside, the result in the dtype of ``x``."""
    n, _ = _normed(x, num_groups, eps)
    return activated(_affine(n.flatten(1, 2), weight, bias), activation).to(x.dtype)


def _normed(x: Tensor, num_groups: int, eps: float) -> tuple[Tensor, Tensor]:
    """[N, G, C / G, *]: x without the means of its groups and with variance 1, and 1/√(var + ε)."""
    n = x.to(torch.promote_types(x.dtype, torch.float32)).unflatten(1, (num_groups, x.shape[1] // num_groups))
    n = n - _mean(n)
    rstd = torch.rsqrt(_mean(n.square()) + eps)
    return n * rstd, rstd


def _mean(n: Tensor) -> Tensor:
    """Over all dims but the first two: within a channel, then of the channels, which halves a sum's rounding error."""
    within = tuple(range(3, n.dim()))
    return (n.mean(within, keepdim=True) if within else n).mean(2, keepdim=True)


def _affine(n: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    if weight is not None:
        n = n * per_channel(weight, n)
    if bias is not None:
        n = n + per_channel(bias, n)
    return n


def group_norm(
    x: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    eps: float = 1e-5,
    activation: str | None = None,
    negative_slope: float = 0.01,
) -> Tensor:
    """Group normalization, and the activation behind it: ``act((x − mean(x)) / √(var(x) + eps) · weight + bias)``.

    Computed in float32 and rounded once. The backward pass keeps x and the groups' statistics, and recomputes what the
    activation saw. Images in ``torch.channels_last`` are read where they lie.

    Args:
        x: floating-point tensor [N, C, *].
        num_groups: G, a divisor of C: statistics are those of C / G adjacent channels of a sample.
        weight: [C], or None for no scale. Its dtype may differ from x's.
        bias: [C], or None for no shift.
        eps: added to the variance.
        activation: None, ``"relu"``, ``"silu"``, ``"gelu"``, ``"hardswish"``, ``"relu6"`` or ``"leaky_relu"``.
        negative_slope: of ``"leaky_relu"``.

    Returns:
        [N, C, *] in x's dtype and memory format.

    Raises:
        TypeError: if x is not floating point.
        ValueError: if x has fewer than two dims, num_groups does not divide C, weight or bias is not [C], or there is
            no such activation.
    """
    check("group_norm", x, weight=weight, bias=bias)
    if num_groups < 1 or x.shape[1] % num_groups:
        raise ValueError(
            f"group_norm: num_groups must divide the {x.shape[1]} channels of x, got {num_groups}; "
            "channels are dim 1: x is [N, C, ...]"
        )
    act = checked_activation("group_norm", activation, negative_slope)
    return dispatch.run(GROUP_NORM, x, weight, bias, num_groups=int(num_groups), eps=float(eps), activation=act)


class GroupNorm(torch.nn.GroupNorm):
    """Drop-in for ``torch.nn.GroupNorm``: same arguments, same ``state_dict``; runs :func:`group_norm`."""

    def forward(self, input: Tensor) -> Tensor:
        """[N, C, *] → the same shape, dtype and memory format."""
        return group_norm(input, self.num_groups, self.weight, self.bias, eps=self.eps)


class GroupNormAct(torch.nn.GroupNorm):
    """``torch.nn.GroupNorm`` and the activation behind it, with the ``state_dict`` of the norm alone.

    Loads what ``torch.nn.GroupNorm`` or timm's ``GroupNormAct`` saved, and the other way round.

    Args:
        num_channels: C. It comes first, as in timm.
        num_groups: G, a divisor of C.
        eps: added to the variance.
        affine: learn a scale and a shift for each channel.
        act: as ``activation`` of :func:`group_norm`.
        negative_slope: of ``act="leaky_relu"``.
    """

    def __init__(
        self,
        num_channels: int,
        num_groups: int = 32,
        eps: float = 1e-5,
        affine: bool = True,
        act: str | None = "relu",
        negative_slope: float = 0.01,
        **factory: Any,
    ) -> None:
        super().__init__(num_groups, num_channels, eps=eps, affine=affine, **factory)
        checked_activation("GroupNormAct", act, negative_slope)
        self.act, self.negative_slope = act, negative_slope

    def forward(self, input: Tensor) -> Tensor:
        """[N, C, *] → the same shape, dtype and memory format."""
        act, slope = self.act, self.negative_slope
        return group_norm(
            input, self.num_groups, self.weight, self.bias, eps=self.eps, activation=act, negative_slope=slope
        )

    def extra_repr(self) -> str:
        """The arguments."""
        return f"{super().extra_repr()}, act={self.act!r}"


def _triton(x: Tensor, weight: Tensor | None, bias: Tensor | None, **options: Any) -> Tensor:
    from ..triton import group_norm as kernels

    return fused(kernels.forward, kernels.backward, vjp(reference), (x, weight, bias), options)


def _small(x: Tensor, weight: Tensor | None, bias: Tensor | None, **options: Any) -> Tensor:
    # ATen adds the gradients of the parameters up pixel by pixel where those lie apart, which is over the error budget.
    if _single(x, **options) or not x.is_contiguous():
        return reference(x, weight, bias, **options)
    return _widened(x, weight, bias, **options)[0]


def _compiled(x: Tensor, weight: Tensor | None, bias: Tensor | None, **options: Any) -> Tensor:
    if _single(x, **options):
        return reference(x, weight, bias, **options)
    return fused(_compiled_forward, _compiled_backward, vjp(reference), (x, weight, bias), options)


def _single(x: Tensor, *, num_groups: int, **_: Any) -> bool:
    """Whether groups have an element at the most, which is not for ATen's operator.

    It refuses images without pixels; and x·scale + shift, which should be the bias, is off by a rounding of x/√ε.
    """
    return x.numel() <= x.shape[0] * num_groups


def _compiled_forward(x: Tensor, weight: Tensor | None, bias: Tensor | None, **options: Any) -> Any:
    tensors = (dense(x), weight, bias)
    if x.is_contiguous() and all(t is None or t.dtype == torch.float32 for t in tensors):
        # Nothing to convert: compiled, this would be the same two passes, and [2, 1280, 256] took 0.40 ms for 0.30.
        y, *statistics = plain_call(_in_one_dtype, tensors, options)
    else:
        y, *statistics = compiled_call(_widened, tensors, options)
    return y, (x, weight, bias, *statistics)


def _compiled_backward(grads: Any, saved: Any, needs: Any, *, activation: Activation, **_: Any) -> Gradients:
    x, *others = saved
    options = {"needs": tuple(needs), "activation": activation}
    # Of no activation there is nothing to recompute, and an exponential costs more than to read it.
    recompute = activation[0] not in ("none", "silu", "gelu")
    return compiled_call(_gradients, (dense(grads[0]), dense(x), *others), options, recompute=recompute)


def _in_one_dtype(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, *, num_groups: int, eps: float, activation: Activation
) -> tuple[Tensor, Tensor, Tensor]:
    """y, from one pass over a group for both its moments; mean and 1/√(var + ε)."""
    z, mean, rstd = torch.native_group_norm(x, weight, bias, *_sizes(x), num_groups, eps)
    return activated(z, activation, inplace=True), mean, rstd


def _widened(x: Tensor, weight: Tensor | None, bias: Tensor | None, **options: Any) -> tuple[Tensor, ...]:
    wide = torch.promote_types(x.dtype, torch.float32)
    affine = (None if p is None else p.to(wide) for p in (weight, bias))
    y, *statistics = _in_one_dtype(x.to(wide), *affine, **options)
    return y.to(x.dtype), *statistics


def _gradients(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    *,
    needs: tuple[bool, bool, bool],
    activation: Activation,
) -> Gradients:
    N, G = mean.shape
    K = x.shape[1] // G
    r = rstd.unsqueeze(-1)
    gain = None if weight is None else weight.to(mean.dtype).view(G, K)
    scale = r if gain is None else r * gain
    # Beside each other the compiler writes them to memory; or it would work them out for each pixel, and write z.
    centre, scale = torch.stack([t.expand(N, G, K) for t in (mean.unsqueeze(-1), scale)])
    centre, scale = (_over_pixels(t.reshape(N, -1), x) for t in (centre, scale))
    centred = x.to(mean.dtype) - centre
    z = centred * scale
    a = pulled_back(dy, z if bias is None else z + per_channel(bias, z), activation)
    # Centred: Σ a·x − mean·Σ a would be a rounding error, and no more than that in a group of equals.
    by_channel = [t.reshape(N, G, K, -1).sum(-1) for t in (a * centred, a)]
    dx, dweight, dbias = None, None, None
    if needs[0]:
        by_group = by_channel if gain is None else [t * gain for t in by_channel]
        n = x.numel() // mean.numel()
        # Scaled before they are added up: of a factor behind the sum each pixel would work out its own.
        curve, shift = ((t / n).sum(-1, keepdim=True) for t in (by_group[0] * r * r * r, by_group[1] * r))
        curve, shift = (_over_pixels(t.expand_as(by_channel[0]).reshape(N, -1), x) for t in (curve, shift))
        dx = (a * scale - centred * curve - shift).to(x.dtype)
    if weight is not None and needs[1]:
        dweight = (by_channel[0] * r).sum(0).flatten().to(weight.dtype)
    if bias is not None and needs[2]:
        dbias = by_channel[1].sum(0).flatten().to(bias.dtype)
    return dx, dweight, dbias


def _over_pixels(t: Tensor, x: Tensor) -> Tensor:
    """[N, C] as [N, C, 1, ...], to be broadcast over x."""
    return t.view(*t.shape, *[1] * (x.dim() - 2))


def _sizes(x: Tensor) -> tuple[int, int, int]:
    return x.shape[0], x.shape[1], math.prod(x.shape[2:])


def _aten(
    x: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    eps: float = 1e-5,
    activation: str | None = None,
    negative_slope: float = 0.01,
) -> Tensor:
    return activated(F.group_norm(x, num_groups, weight, bias, eps), (activation or "none", negative_slope))


def _inputs(
    draw: Draw, *, N: int, G: int, K: int, S: int, groups: int | None = None, affine: bool = True,
    channels_last: bool = False, **options: Any,
) -> Call:  # fmt: skip
    # A tensor needs four dims for torch to call its format channels_last.
    x = draw_images(draw, N, G * K, *((S, 1) if channels_last else (S,)), channels_last=channels_last)
    weight, bias = (draw.weight(G * K) if affine else None for _ in range(2))
    return Call((x, groups or G, weight, bias), {"eps": 1e-5, **options})


def _errors() -> Iterator[ErrorInput]:
    x = torch.zeros(2, 8, 3)
    yield ErrorInput(Call((x.long(), 2)), TypeError, r"x must be a floating-point.*int64")
    yield ErrorInput(Call((torch.zeros(8), 2)), ValueError, r"at least two dims.*\(8,\)")
    yield ErrorInput(Call((x, 3)), ValueError, r"num_groups must divide the 8 channels of x, got 3")
    yield ErrorInput(Call((x, 0)), ValueError, r"num_groups must divide the 8 channels of x, got 0")
    yield ErrorInput(Call((x, 2, torch.ones(3))), ValueError, r"weight must have .* \(8,\), got \(3,\)")
    yield ErrorInput(Call((x, 2, None, torch.ones(8, 1))), ValueError, r"bias must have .* \(8,\), got \(8, 1\)")
    yield ErrorInput(Call((x, 2), {"activation": "elu"}), ValueError, r"None or one of 'relu', .*got 'elu'")


def _traffic(
    itemsize: int, *, N: int, G: int, K: int, S: int, groups: int | None = None, affine: bool = True, **_: Any
) -> Traffic:
    """x, y forward; dy, x, dx backward; the groups' statistics and the parameters once."""
    images, statistics, parameters = N * G * K * S * itemsize, 8 * N * (groups or G), 2 * affine * G * K * itemsize
    return Traffic(forward=2 * images + statistics + parameters, backward=3 * images + statistics + 2 * parameters)


_TWICE = {
    "forward": Excess(1.53, "the group does not fit into a program: x is read for its statistics, then again"),
    "backward": Excess(1.71, "the group does not fit into a program: x and dy are read for its sums, then again"),
}

GROUP_NORM = Op(
    name="group_norm",
    replaces="`F.group_norm`, then an activation",
    fn=group_norm,
    reference=reference,
    impls={"triton": _triton, "compile": _compiled},
    small=_small,
    inputs=_inputs,
    dims={"N": (0, 1, 2, 3), "G": (1, 3), "K": (1, 2, 5, 33), "S": (0, 1, 7, 33, 129, 1025, 2500, 16_385)},
    # Stable Diffusion's U-Net: its first and third stages.
    bench=({"N": 2, "G": 32, "K": 10, "S": 4096}, {"N": 2, "G": 32, "K": 40, "S": 256}),
    audit=({"N": 2, "G": 8, "K": 8, "S": 1024}, {"N": 2, "G": 32, "K": 10, "S": 4096}),
    traffic=_traffic,
    excess={(variant, which): why for variant in ("one group", "channels last") for which, why in _TWICE.items()},
    flops=lambda N, G, K, S: 11 * N * G * K * S,
    aten=_aten,
    axes="n C *, C, C -> n C *",
    errors=_errors,
    variants={
        "default": {"activation": "silu"},
        "relu": {"activation": "relu"},
        "no affine": {"affine": False},
        "one group": {"groups": 1, "activation": "leaky_relu", "negative_slope": 0.2},
        "channels last": {"channels_last": True, "activation": "hardswish"},
    },
    bench_variants=("default", "channels last"),
    modules=(GroupNorm, GroupNormAct),
    autocast_to_float32=frozenset({"cuda"}),
)
