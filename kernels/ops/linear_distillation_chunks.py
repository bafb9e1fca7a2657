"""Divergences of a student's logits from a teacher's, of a chunk of tokens; and their gradient, in closed form.

dx = (a − p·Σ a) / T, where a is p·∂loss/∂p, up to a multiple of p, of which nothing is left.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..compiled import compiled_call
from ..exp_sums import peak_and_exp_sum
from .head_chunks import Losses
from .head_loss import HeadLoss, as_one_node, called, ignored_tokens

DIVERGENCES = ("forward_kl", "reverse_kl", "js", "tv")


def divergences(log_p: Tensor, log_q: Tensor, p: Tensor, q: Tensor, *, divergence: str, beta: float) -> Tensor:
    """Of each row of the student's probabilities p [N, C], of which log_p is the logarithm, from the teacher's."""
    if divergence == "forward_kl":
        return _expected(q, log_q - log_p)
    if divergence == "reverse_kl":
        return _expected(p, log_p - log_q)
    if divergence == "js":
        log_mix = _log_mix(p, q, beta)
        return beta * _expected(q, log_q - log_mix) + (1.0 - beta) * _expected(p, log_p - log_mix)
    return 0.5 * (p - q).abs().sum(-1)


def _expected(p: Tensor, terms: Tensor) -> Tensor:
    """Σ p·terms. What has no probability adds nothing, not even if its term is infinite."""
    return (p * torch.where(p == 0.0, 0.0, terms)).sum(-1)


def _log_mix(p: Tensor, q: Tensor, beta: float) -> Tensor:
    """log(β·q + (1 − β)·p), and finite where both are 0, which is multiplied by 0."""
    return (beta * q + (1.0 - beta) * p).clamp(min=torch.finfo(p.dtype).tiny).log()


def _pulls(log_p: Tensor, log_q: Tensor, p: Tensor, q: Tensor, *, divergence: str, beta: float) -> Tensor:
    """a of each class."""
    if divergence == "forward_kl":
        return -q
    if divergence == "tv":
        return 0.5 * p * (p - q).sign()
    if divergence == "reverse_kl":
        return p * torch.where(p == 0.0, 0.0, log_p - log_q)
    return (1.0 - beta) * p * torch.where(p == 0.0, 0.0, log_p - _log_mix(p, q, beta))


def losses_and_statistics(x: Tensor, z: Tensor, *, temperature: float, **options: Any) -> tuple[Tensor, ...]:
    """(losses, Σ a, and the maximum and log Σ exp(· − max) of the scores of each model)."""
    statistics = (*_normalizers(x, temperature), *_normalizers(z, temperature))
    both = _probabilities(x, z, *statistics, temperature=temperature)
    return divergences(*both, **options), _pulls(*both, **options).sum(1, keepdim=True), *statistics


def replace_by_gradient(
    x: Tensor, z: Tensor, scale: Tensor, total: Tensor, *statistics: Tensor, temperature: float, **options: Any
) -> None:
    """Write the gradient of Σ scale·loss over the student's logits x [N, C]."""
    log_p, log_q, p, q = _probabilities(x, z, *statistics, temperature=temperature)
    ds = _pulls(log_p, log_q, p, q, **options) - p * total
    x.copy_(ds * (scale / temperature)[:, None])


def _scores(x: Tensor, temperature: float) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32)) / temperature


def _normalizers(x: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    peak, total = peak_and_exp_sum(_scores(x, temperature), 1)
    return peak, total.log()


def _probabilities(
    x: Tensor, z: Tensor, x_peak: Tensor, x_log_sum: Tensor, z_peak: Tensor, z_log_sum: Tensor, *, temperature: float
) -> tuple[Tensor, ...]:
    """log p, log q, p, q."""
    log_p, log_q = _scores(x, temperature) - x_peak - x_log_sum, _scores(z, temperature) - z_peak - z_log_sum
    return log_p, log_q, log_p.exp(), log_q.exp()


def _torch_chunk(call: Callable[..., Any], x: Tensor, z: Tensor, scale: Tensor | None, **options: Any) -> Tensor:
    losses, *statistics = call(losses_and_statistics, (x, z), options)
    if scale is not None:
        call(replace_by_gradient, (x, z, scale, *statistics), options)
    return losses


def _triton_chunk(x: Tensor, z: Tensor, scale: Tensor | None, **options: Any) -> Tensor:
    from ..triton import distillation as kernels

    return kernels.losses_and_gradient(x, z, scale, **options)


def _losses_of(chunk: Callable[..., Tensor], *tensors: Any, ignore_index: int, **options: Any) -> Losses:
    hidden, weight, bias = tensors[4:]
    rows = hidden.reshape(-1, hidden.shape[-1])
    return lambda logits, index, scale: chunk(logits, F.linear(rows[index], weight, bias), scale, **options)


def _divisor(hidden: Tensor, weight: Tensor, target: Tensor | None, *_: Any, ignore_index: int, **__: Any) -> Tensor:
    return counted(hidden, target, ignore_index=ignore_index)


def counted(hidden: Tensor, target: Tensor | None, *, ignore_index: int) -> Tensor:
    """How many tokens are not ignored: what "mean" divides by."""
    return (~ignored_tokens(hidden, target, ignore_index)).sum(dtype=torch.float32)


_HEAD_LOSS = HeadLoss(
    name="linear_distillation",
    impls={
        "eager": functools.partial(_torch_chunk, called),
        "compile": functools.partial(_torch_chunk, functools.partial(compiled_call, recompute=True)),
        "triton": _triton_chunk,
    },
    losses_of=_losses_of,
    divisor=_divisor,
    tensors="Tensor teacher_hidden, Tensor teacher_weight, Tensor? teacher_bias",
    options="str divergence, float beta, float temperature, SymInt ignore_index, SymInt? memory_budget",
    operands=(0, 1, 3, 4, 5, 6),
    other_head=5,
)
run = _HEAD_LOSS.run
traced = as_one_node(_HEAD_LOSS)
