"""What the normalizations of images share: the checks of [N, C, *] tensors with parameters for each channel."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from ..op import Draw
from . import checks

#: What may follow a normalization.
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda z: z,
    "relu": F.relu,
    "silu": F.silu,
}


def check(name: str, x: Tensor, **per_channel: Tensor | None) -> None:
    """Raise unless x is floating point with a dim of channels, and every named parameter has an element for each."""
    checks.floating(name, x=x)
    if x.dim() < 2:
        raise ValueError(
            f"{name}: x must have at least two dims, [N, C, ...], got {tuple(x.shape)}; unsqueeze the missing one"
        )
    for label, parameter in per_channel.items():
        if parameter is not None and tuple(parameter.shape) != (x.shape[1],):
            raise ValueError(
                f"{name}: {label} must have an element for each channel of x, ({x.shape[1]},), "
                f"got {tuple(parameter.shape)}; build the module with the model's number of channels"
            )


def activation_name(name: str, activation: str | None) -> str:
    """The key of an activation in :data:`ACTIVATIONS`; raise if there is none."""
    if activation is not None and activation not in ("relu", "silu"):
        raise ValueError(
            f"{name}: activation must be None, 'relu' or 'silu', got {activation!r}; apply others after it"
        )
    return activation or "none"


def pulled_back(dy: Tensor, z: Tensor, activation: str) -> Tensor:
    """``dy · act'(z)`` in the dtype of z."""
    dy = dy.to(z.dtype)
    if activation == "silu":
        s = torch.sigmoid(z)
        return dy * (s * (1.0 + z * (1.0 - s)))
    return dy.masked_fill(z <= 0.0, 0.0) if activation == "relu" else dy


def per_channel(parameter: Tensor, x: Tensor) -> Tensor:
    """[C] as [C, 1, ...] in the dtype of x, to be broadcast over [N, C, ...]."""
    return parameter.to(x.dtype).view(-1, *[1] * (x.dim() - 2))


def channels_last(x: Tensor) -> bool:
    """Whether the channels of a pixel lie side by side in memory, as in ``torch.channels_last``."""
    return x.stride(1) == 1 and x.dim() > 2


def dense(x: Tensor) -> Tensor:
    """x, copied only if its elements lie apart: compiled, a sum along them is added up one by one."""
    return x if x.is_contiguous() or x.movedim(1, -1).is_contiguous() else x.contiguous()


def draw_images(draw: Draw, N: int, C: int, *size: int, channels_last: bool) -> Tensor:
    """A differentiable [N, C, *size]; the drawn layout is that of [N, *size, C] for ``channels_last``."""
    if channels_last:
        return draw.tensor(N, *size, C).detach().movedim(-1, 1).requires_grad_()
    return draw.tensor(N, C, *size)
