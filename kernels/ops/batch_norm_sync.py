"""Batch normalization with the statistics of the batches of several processes, as in ``torch.nn.SyncBatchNorm``.

Process p finds the mean m_p and the variance v_p of its n_p elements of a channel. Then, over all processes,

    n = Σ n_p    mean = Σ (n_p / n) m_p    var = Σ (n_p / n) (v_p + (m_p − mean)²)       Chan, Golub, LeVeque (1979)
    mean(a·n) = Σ a·n / n    mean(a) = Σ a / n                                         (backward; see batch_norm_pieces)

so a pass communicates once: forward it gathers (m_p, v_p, n_p), backward it adds up Σ a·n and Σ a. In between run the
pieces of an implementation. All implementations send the same messages: processes whose batches are of different sizes
may run different ones, and would wait for each other. Inside ``torch.compile``, and for second derivatives, the sums of
the reference are sent: all processes must compile, or none.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..autograd import Gradients, fused, vjp
from .batch_norm_pieces import PLAIN, Pieces, channel_sum, parameter_gradients
from .channel_norm import per_channel
from .process_groups import added_up, shared

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


def reference(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    *_: Tensor | None,
    group: ProcessGroup,
    **options: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """y, mean, variance and the number of elements, differentiable to any order: the sums are over all processes."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    count = _total(wide.new_full((), x[:, :1].numel()), group)
    mean = _total(channel_sum(wide), group) / count
    var = _total(channel_sum((wide - per_channel(mean, wide)).square()), group) / count
    return PLAIN.normalize(x, weight, bias, residual, mean, var, **options), mean, var, count


def _total(t: Tensor, group: ProcessGroup) -> Tensor:
    """The sum over all processes. What each of them makes of it depends on t: its gradient is the sum of theirs."""
    return shared(added_up(t, group), group)


def synchronized(
    pieces: Pieces, *tensors: Tensor | None, training: bool, **options: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """y, mean, variance and the number of elements, by ``pieces``; those of an empty batch by the plain ones."""
    assert training, "given statistics are shared already"
    x, *others = tensors
    assert x is not None
    if torch.compiler.is_compiling():
        return reference(x, *others, **options)
    options["pieces"] = pieces if x.numel() else PLAIN
    return fused(_forward, _backward, vjp(_y), tensors, options, statistics=3)


def _forward(
    x: Tensor, *others: Tensor | None, pieces: Pieces, group: ProcessGroup, **options: Any
) -> tuple[Any, Sequence[Tensor | None]]:
    mean, var, count = _merged(*pieces.moments(x), x[:, :1].numel(), group)
    affine = others[:3]
    y = pieces.normalize(x, *affine, mean, var, **options)
    return (y, mean, var, count), (x, *affine, mean, var, count)


def _merged(mean: Tensor, var: Tensor, elements: int, group: ProcessGroup) -> tuple[Tensor, Tensor, Tensor]:
    """The mean, the variance and the number of elements over all processes, the same bits in each of them."""
    own = torch.cat([mean, var, mean.new_full((1,), elements)])
    if elements == 0:
        own.zero_()  # the mean of nothing is NaN, whatever its weight
    found = own.new_empty(group.size(), own.numel())
    dist.all_gather(list(found), own, group)
    means, variances, counts = found.split([len(mean), len(var), 1], 1)
    count = counts.sum()
    share = counts / count
    mean = (share * means).sum(0)
    return mean, (share * (variances + (means - mean).square())).sum(0), count


def _backward(
    grads: Sequence[Tensor],
    saved: Sequence[Tensor | None],
    needs: Sequence[bool],
    *,
    pieces: Pieces,
    group: ProcessGroup,
    **options: Any,
) -> Gradients:
    """As in torch.nn.SyncBatchNorm, the gradients of weight and bias are of this process's elements alone."""
    *tensors, count = saved
    assert count is not None
    _, weight, bias, *_ = tensors
    sums = pieces.sums(*grads, *tensors, **options)
    dweight, dbias = parameter_gradients(sums, weight, bias, needs[1:3])
    means = None
    if needs[0]:
        everywhere = sums.clone()
        dist.all_reduce(everywhere, group=group)
        means = everywhere / count
    dx, dresidual = pieces.gradients(*grads, *tensors, means, needs=(needs[0], needs[3]), **options)
    return dx, dweight, dbias, dresidual, None, None


def _y(x: Tensor, *others: Tensor | None, pieces: Pieces, **options: Any) -> Tensor:
    return reference(x, *others, **options)[0]
