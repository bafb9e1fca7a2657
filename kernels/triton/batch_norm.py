"""Batch normalization, a residual add and the activation behind them: one group for each channel of the whole batch.

    forward   z = (x − μ)/√(σ² + ε)·w + b (+ residual)      y = act(z)      μ, σ² of each channel, or given
    backward  a = dy·act'(z)    g = a·w    dx = (g − n·mean(g·n) − mean(g))/√(σ² + ε), or g/√(σ² + ε) where given
              dw = Σ a·n        db = Σ a   dresidual = a

A channel's elements are spread over the batch and never fit into a program, so training reads x twice forward, and dy,
x and the residual twice backward; evaluation reads all of them once. The kernels are those of ``channel_norm``. They
are launched by ``forward`` and ``backward``, or one by one where several processes share their statistics in between.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import channel_norm
from .channel_norm import Activation, View


def forward(x, weight, bias, residual, mean, var, *, training: bool, eps: float, activation: Activation):
    """Return y, in training also the batch's mean and variance, and what the backward pass needs."""
    view = _view(x)
    laid, added = _laid_out(view, x, residual)
    if x.numel() == 0:
        y = torch.empty_like(laid)
        mean, var = (torch.zeros(view.C, dtype=torch.float32, device=x.device) if training else t for t in (mean, var))
        return ((y, mean, var) if training else y), (x, weight, bias, residual, mean, var)
    if training:
        mean, var = (t.view(-1) for t in channel_norm.moments(laid, view))
    y = channel_norm.normalize(laid, added, weight, bias, mean, var, view, eps=eps, activation=activation)
    return ((y, mean, var) if training else y), (x, weight, bias, residual, mean, var)


def backward(grads, saved, needs, *, training: bool, eps: float, activation: Activation):
    """Return the gradients of x, weight, bias and residual; none of the given statistics."""
    x, weight, bias, residual, mean, var = saved
    if x.numel() == 0:
        return *(t if t is None else torch.zeros_like(t) for t in (x, weight, bias, residual)), None, None
    view = _view(x)
    dy, laid, added = _laid_out(view, grads[0], x, residual)
    tensors = (dy, laid, added, weight, bias, mean, var)
    options: dict[str, Any] = {"eps": eps, "activation": activation}
    dweight = dbias = means = None
    if training or needs[1] or needs[2]:
        found = channel_norm.sums(*tensors, view, **options)
        dweight, dbias = channel_norm.parameter_gradients(found, weight, bias, view, needs[1:3])
        if training:
            means = channel_norm.group_means(found, weight, view, view.R * view.S)
    dx, dresidual = channel_norm.gradient(*tensors, means, view, (needs[0], needs[3]), **options)
    return dx, dweight, dbias, dresidual, None, None


def moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """The mean and the variance of each channel, as forward in training finds them."""
    view = _view(x)
    mean, var = channel_norm.moments(channel_norm.laid_out(x, view.last), view)
    return mean.view(-1), var.view(-1)


def normalize(x, weight, bias, residual, mean, var, **options: Any) -> Tensor:
    """y, with given statistics."""
    return forward(x, weight, bias, residual, mean, var, training=False, **options)[0]


def sums(dy, x, weight, bias, residual, mean, var, **options: Any) -> Tensor:
    """Σ a·n and Σ a of each channel: float32 [2, C]."""
    view = _view(x)
    dy, laid, added = _laid_out(view, dy, x, residual)
    return channel_norm.channel_sums(channel_norm.sums(dy, laid, added, weight, bias, mean, var, view, **options), view)


def gradients(dy, x, weight, bias, residual, mean, var, means, *, needs, **options: Any):
    """The gradients of x and residual, from the means of a·n and a over each channel."""
    view = _view(x)
    dy, laid, added = _laid_out(view, dy, x, residual)
    if means is not None and weight is not None:
        means = means * weight
    return channel_norm.gradient(dy, laid, added, weight, bias, mean, var, means, view, needs, **options)


def _view(x: Tensor) -> View:
    N, C = x.shape[:2]
    S = x.shape[2:].numel()
    last = x.stride(1) == 1
    return View(1, 1 if last else N, C, N * S if last else S, 1, last)


def _laid_out(view: View, *tensors: Tensor | None) -> list[Any]:
    return [t if t is None else channel_norm.laid_out(t, view.last) for t in tensors]
