"""What the normalizations of images share: the checks of [N, C, *] tensors with parameters for each channel."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from ..op import Draw
from . import activations, checks

#: The name of an activation, and the slope of ``leaky_relu`` below zero.
Activation = tuple[str, float]


def _relu6(z: Tensor) -> Tensor:
    # Of NaN the gradient of F.relu6 is 0 or 1, as its place in the tensor has it.
    return torch.where(z >= 6.0, 6.0, F.relu(z))


def _hardswish(z: Tensor) -> Tensor:
    return z * (_relu6(z + 3.0) / 6.0)


#: What may follow a normalization, by the name of the activation; of z and the slope.
ACTIVATIONS: dict[str, Callable[[Tensor, float], Tensor]] = {
    "none": lambda z, _: z,
    "relu": lambda z, _: F.relu(z),
    "silu": lambda z, _: F.silu(z),
    "gelu": lambda z, _: activations.ACTIVATIONS["gelu"](z),
    "hardswish": lambda z, _: _hardswish(z),
    "relu6": lambda z, _: _relu6(z),
    "leaky_relu": F.leaky_relu,
}


def check(name: str, x: Tensor, **per_channel: Tensor | None) -> None:
    """Raise unless x is floating point with a dim of channels, and every named parameter has an element for each."""
    checks.floating(name, x=x)
    if x.dim() < 2:
        raise ValueError(
            f"{name}: x must have at least two dims, [N, C, ...], got {tuple(x.shape)}; unsqueeze the missing one"
        )
    channels = x.shape[1:2]
    for label, parameter in per_channel.items():
        if parameter is not None and parameter.shape != channels:
            raise ValueError(
                f"{name}: {label} must have an element for each channel of x, {tuple(channels)}, "
                f"got {tuple(parameter.shape)}; build the module with the model's number of channels"
            )


def checked_activation(name: str, activation: str | None, negative_slope: float) -> Activation:
    """An activation as the implementations take it; raise if there is none of this name."""
    if activation is not None and (activation == "none" or activation not in ACTIVATIONS):
        known = ", ".join(repr(one) for one in ACTIVATIONS if one != "none")
        raise ValueError(
            f"{name}: activation must be None or one of {known}, got {activation!r}; apply others after it"
        )
    return activation or "none", float(negative_slope) if activation == "leaky_relu" else 0.0


def activated(z: Tensor, activation: Activation, *, inplace: bool = False) -> Tensor:
    """``act(z)``; ``inplace``: in the memory of z if there is such a form of it."""
    name, slope = activation
    if inplace and name in ("relu", "silu"):
        return torch.relu_(z) if name == "relu" else F.silu(z, inplace=True)
    return ACTIVATIONS[name](z, slope)


def pulled_back(dy: Tensor, z: Tensor, activation: Activation) -> Tensor:
    """``dy · act'(z)`` in the dtype of z."""
    dy = dy.to(z.dtype)
    name, slope = activation
    if name == "silu":
        s = torch.sigmoid(z)
        return dy * (s * (1.0 + z * (1.0 - s)))
    if name in ("none", "relu"):
        return torch.where(z <= 0.0, 0.0, dy) if name == "relu" else dy
    (dz,) = torch.func.vjp(lambda z: ACTIVATIONS[name](z, slope), z)[1](dy)
    return dz


def per_channel(parameter: Tensor, x: Tensor) -> Tensor:
    """[C] as [C, 1, ...] in the dtype of x, to be broadcast over [N, C, ...]."""
    return parameter.to(x.dtype).view(-1, *[1] * (x.dim() - 2))


def channels_last(x: Tensor) -> bool:
    """Whether the channels of a pixel lie side by side in memory, as in ``torch.channels_last``."""
    return x.dim() > 2 and x.stride(1) == 1


def dense(x: Tensor) -> Tensor:
    """x, copied only if its elements lie apart: compiled, a sum along them is added up one by one."""
    return x if x.is_contiguous() or x.movedim(1, -1).is_contiguous() else x.contiguous()


def draw_images(draw: Draw, N: int, C: int, *size: int, channels_last: bool) -> Tensor:
    """A differentiable [N, C, *size]; the drawn layout is that of [N, *size, C] for ``channels_last``."""
    if channels_last:
        return draw.tensor(N, *size, C).detach().movedim(-1, 1).requires_grad_()
    return draw.tensor(N, C, *size)
