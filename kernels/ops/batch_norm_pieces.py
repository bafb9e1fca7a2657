"""Batch normalization in pieces, between which processes may share what they found; each of them in plain PyTorch.

    moments    mean and var of each channel          n = (x − mean) / √(var + ε)      z = n·weight + bias (+ residual)
    normalize  y = act(z)                            a = dy·act'(z)
    sums       Σ a·n and Σ a of each channel
    gradients  dx = (a − n·mean(a·n) − mean(a))·weight / √(var + ε), or without the means where statistics are given
               dresidual = a

What is shared, ``batch_norm_sync`` says.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .channel_norm import Activation, activated, per_channel, pulled_back


class Pieces(NamedTuple):
    """The pieces, as an implementation has them."""

    moments: Callable[..., tuple[Tensor, Tensor]]
    normalize: Callable[..., Tensor]
    sums: Callable[..., Tensor]
    gradients: Callable[..., tuple[Tensor | None, Tensor | None]]


def moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """The mean and the variance, with divisor n, of each channel.

    Of each image first, which is still in a cache when its variance is found, then of all (Chan, Golub, LeVeque, 1979).
    What is off a mean has a mean, too: the rounding error of the first. A channel of equal values, whose 1/√(var + ε)
    is large, would show it.
    """
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    images = wide.flatten(2) if x.dim() > 2 else wide.t().unsqueeze(0)
    own = images.mean(-1)
    off = images - own.unsqueeze(-1)
    error = off.mean(-1)
    means, variances = own + error, off.square().mean(-1) - error.square()
    mean = means.mean(0)
    return mean, (variances + (means - mean).square()).mean(0)


def normalize(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    mean: Tensor | None,
    var: Tensor | None,
    *,
    eps: float,
    activation: Activation,
) -> Tensor:
    """Y, in the dtype of x."""
    n, _ = _whitened(x, mean, var, eps)
    return activated(_shifted(n, weight, bias, residual), activation).to(x.dtype)


def _whitened(x: Tensor, mean: Tensor | None, var: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
    """(x − mean)/√(var + ε), and 1/√(var + ε) to be broadcast with it."""
    assert mean is not None
    assert var is not None
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    # Beside each other the compiler writes them to memory; or it would work out 1/√(…) for every few pixels.
    statistics = torch.stack([mean.to(wide.dtype), torch.rsqrt(var.to(wide.dtype) + eps)])
    centre, rstd = (per_channel(t, wide) for t in statistics.unbind())
    return (wide - centre) * rstd, rstd


def _shifted(n: Tensor, weight: Tensor | None, bias: Tensor | None, residual: Tensor | None) -> Tensor:
    if weight is not None:
        n = n * per_channel(weight, n)
    if bias is not None:
        n = n + per_channel(bias, n)
    return n if residual is None else n + residual.to(n.dtype)


def sums(dy: Tensor, x: Tensor, *others: Tensor | None, eps: float, activation: Activation) -> Tensor:
    """[2, C]: Σ a·n and Σ a of each channel."""
    weight, bias, residual, mean, var = others
    n, _ = _whitened(x, mean, var, eps)
    a = pulled_back(dy, _shifted(n, weight, bias, residual), activation)
    return torch.stack([channel_sum(a * n), channel_sum(a)])


def gradients(
    dy: Tensor, x: Tensor, *others: Tensor | None, needs: tuple[bool, bool], eps: float, activation: Activation
) -> tuple[Tensor | None, Tensor | None]:
    """Those of x and residual, from the means of a·n and a over each channel; None where the statistics are given."""
    weight, bias, residual, mean, var, means = others
    n, rstd = _whitened(x, mean, var, eps)
    a = pulled_back(dy, _shifted(n, weight, bias, residual), activation)
    dresidual = a.to(residual.dtype) if residual is not None and needs[1] else None
    if not needs[0]:
        return None, dresidual
    dx = a if means is None else a - n * per_channel(means[0], n) - per_channel(means[1], n)
    dx = dx * rstd if weight is None else dx * (rstd * per_channel(weight, n))
    return dx.to(x.dtype), dresidual


def parameter_gradients(
    sums: Tensor, weight: Tensor | None, bias: Tensor | None, needs: Sequence[bool]
) -> tuple[Tensor | None, Tensor | None]:
    """Those of weight and bias, from Σ a·n and Σ a."""
    dweight, dbias = (
        total.to(parameter.dtype) if parameter is not None and need else None
        for total, parameter, need in zip(sums, (weight, bias), needs, strict=True)
    )
    return dweight, dbias


def channel_sum(x: Tensor) -> Tensor:
    """[C]: the sum over each image, then over the batch, which halves its rounding error."""
    return (x.flatten(2).sum(-1) if x.dim() > 2 else x).sum(0)


#: In plain PyTorch.
PLAIN = Pieces(moments, normalize, sums, gradients)
