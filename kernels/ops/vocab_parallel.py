"""Cross-entropy over classes of which every process of a group holds a part: the output of a tensor-parallel head.

Process r holds the logits of C_r classes, in the order of the processes; C = Σ C_r. Positions and targets are the same
everywhere, and so is the loss. With s, w and ε as in ``cross_entropy`` each process finds, of its own classes,

    m_r = max s        Σ exp(s − m_r)        Σ w_c·(m_r − s_c)  where there is smoothing

Two messages then serve all positions: the maximum m of the m_r, and, of what is relative to m, the sums

    Σ exp(s − m) = exp(lse − m)        m − s_t and w_t, from the process that holds t        Σ w_c·(m − s_c)

Their size does not depend on C. How many classes each process holds, and the sum of their weights, goes with the first.
Backward nothing is sent: the gradient of a logit is its process's own affair once lse is known,

    ds = (p − [c = t])·pull + p·lift − each·w_c        with p = exp(s − lse) and g, the gradient of the position's loss:
    pull = g·(1 − ε)·w_t        each = g·ε / C        lift = each·Σ w_c + g·2·z_loss·w_t·lse

All implementations send the same messages: processes may run different ones.

Source: Shoeybi et al., Megatron-LM (2019).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from ..autograd import Gradients, fused, vjp
from ..compiled import compiled_call
from ..exp_sums import finite, peak_and_exp_sum
from . import checks, process_groups
from .cross_entropy_pieces import as_rows, reduced, scores
from .loss_weights import or_zero, own_index

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

#: The place of the target of a position that is ignored. One past the own classes: another process holds it.
IGNORED = -1


class Pieces(NamedTuple):
    """What an implementation brings: what it finds of its own classes, and their gradient, over the logits or not."""

    statistics: Callable[..., tuple[Tensor, Tensor, Tensor | None]]
    gradient: Callable[..., Tensor]
    replace: Callable[..., None]


class Known(NamedTuple):
    """What every process knows of N positions after both messages; ``place`` is where it holds the target itself."""

    place: Tensor
    base: Tensor
    log_sum: Tensor
    #: w_t: 0 where ignored, NaN where the target is no class.
    weights: Tensor
    #: C, and Σ w_c over all classes.
    classes: Tensor
    weight_sum: Tensor


def statistics(
    x: Tensor, target: Tensor, weight: Tensor | None, *, ignore_index: int, softcap: float | None, smoothed: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """(max s, Σ exp(s − max s), Σ w_c·(max s − s_c) if smoothed) of logits [N, V]; a maximum of −∞ counts as 0."""
    s = scores(x, target == ignore_index, softcap)
    peak, total = peak_and_exp_sum(s, 1) if x.shape[1] else (s.new_full((len(s), 1), -math.inf), s.sum(1, keepdim=True))
    gap = None
    if smoothed:
        below = finite(peak) - s
        gap = (below if weight is None else below * weight.to(s.dtype)).sum(1)
    return peak.squeeze(1), total.squeeze(1), gap


def gradient(
    x: Tensor,
    index: Tensor,
    weight: Tensor | None,
    base: Tensor,
    log_sum: Tensor,
    pull: Tensor,
    lift: Tensor | None,
    each: Tensor | None,
    *,
    softcap: float | None,
) -> Tensor:
    """The gradient of logits [N, V], 0 where ignored."""
    ignored = index == IGNORED
    s = scores(x, ignored, softcap)
    p = (s - base[:, None] - log_sum[:, None]).exp()
    own = torch.arange(x.shape[1], device=x.device)
    ds = torch.where(own == index[:, None], p - 1.0, p) * pull[:, None]
    if lift is not None:
        ds = ds + p * lift[:, None]
    if each is not None:
        ds = ds - (each[:, None] if weight is None else each[:, None] * weight.to(s.dtype))
    if softcap is not None:
        ds = ds * (1.0 - (s / softcap).square())
    return ds.masked_fill(ignored[:, None], 0.0).to(x.dtype)


def replace(x: Tensor, *others: Any, softcap: float | None) -> None:
    """Write the gradient over the logits."""
    x.copy_(gradient(x, *others, softcap=softcap))


PLAIN = Pieces(statistics, gradient, replace)


def pieces(backend: str) -> Pieces:
    """Those of a backend."""
    if backend == "triton":
        from ..triton import vocab_parallel as kernels

        return Pieces(kernels.statistics, kernels.gradient, kernels.replace)
    return _COMPILED if backend == "compile" else PLAIN


def _compiled(piece: Callable[..., Any], *tensors: Tensor | None, **options: Any) -> Any:
    return compiled_call(piece, tensors, options)


_COMPILED = Pieces(*(functools.partial(_compiled, piece) for piece in PLAIN))


def losses(
    find: Callable[..., Any],
    x: Tensor,
    target: Tensor,
    weight: Tensor | None,
    *,
    group: ProcessGroup,
    ignore_index: int,
    label_smoothing: float,
    softcap: float | None,
    z_loss: float,
) -> tuple[Tensor, Known]:
    """The losses of logits [N, V], in float32 or wider, by the statistics that ``find`` finds; differentiable as it."""
    ignored = target == ignore_index
    options: dict[str, Any] = {"ignore_index": ignore_index, "softcap": softcap, "smoothed": label_smoothing != 0.0}
    # Nothing has no maximum; its sums are differentiable, so that every process has a graph.
    peak, total, gap = (find if x.shape[1] else statistics)(x, target, weight, **options)
    own_weight = x.shape[1] if weight is None else weight.sum(dtype=peak.dtype)
    base, sizes, weight_sum = _first_message(peak, x.shape[1], own_weight, group)
    place = own_index(target.long() - sizes[: group.rank()].sum(), x.shape[1]).masked_fill(ignored, IGNORED)
    s_t = x.gather(1, place.clamp(0, x.shape[1] - 1)[:, None])[:, 0].to(peak.dtype) if x.shape[1] else peak
    if softcap is not None:
        s_t = softcap * torch.tanh(s_t / softcap)
    mine = ~ignored & (place < x.shape[1])
    parts = [total * (peak - base).exp(), torch.where(mine, base - s_t, 0.0)]
    if weight is not None:
        parts.append(or_zero(weight, place.masked_fill(ignored, x.shape[1])).to(peak.dtype))
    if gap is not None:
        parts.append(gap + (base - finite(peak)) * own_weight)
    total, distance, *rest = process_groups.added_up(torch.stack(parts), group).unbind()
    w = rest.pop(0) if weight is not None else torch.ones_like(total)
    w = w.masked_fill(ignored, 0.0).masked_fill(~ignored & ((target < 0) | (target >= sizes.sum())), float("nan"))
    log_sum = total.log()
    found = (1.0 - label_smoothing) * w * (distance + log_sum)
    if rest:
        found = found + label_smoothing * (rest[0] + log_sum * weight_sum) / sizes.sum()
    if z_loss:
        found = found + z_loss * w * (base + log_sum).square()
    known = Known(place, base, log_sum.detach(), w, sizes.sum(), weight_sum)
    return found.masked_fill(ignored, 0.0), known


def _first_message(
    peak: Tensor, classes: int, own_weight: Tensor | int, group: ProcessGroup
) -> tuple[Tensor, Tensor, Tensor]:
    """The maximum of the peaks, how many classes each process holds, and the sum of all their weights.

    On a GPU nobody waits for the sizes: they stay there.
    """
    table = peak.new_full((group.size(), 2), float("-inf"))
    table[group.rank(), 0] = classes
    table[group.rank(), 1] = own_weight
    found = process_groups.all_reduce(torch.cat([peak, table.flatten()]), "max", group)
    base, table = found[: len(peak)], found[len(peak) :].view_as(table)
    return finite(base), table[:, 0].long(), table[:, 1].sum()


def logits_gradient(
    write: Callable[..., Any],
    grad: Tensor,
    x: Tensor,
    weight: Tensor | None,
    known: Known,
    *,
    label_smoothing: float,
    softcap: float | None,
    z_loss: float,
) -> Any:
    """What ``write`` makes of logits [N, V], where ``grad`` is that of each loss [N], or of their sum."""
    place, base, log_sum, w, classes, weight_sum = known
    pull = grad * (1.0 - label_smoothing) * w
    lift = each = None
    if label_smoothing:
        each = (grad * label_smoothing / classes).expand_as(w).contiguous()
        lift = each * weight_sum
    if z_loss:
        of_z = grad * 2.0 * z_loss * w * (base + log_sum)
        lift = of_z if lift is None else lift + of_z
    return write(x, place, weight if label_smoothing else None, base, log_sum, pull, lift, each, softcap=softcap)


def reference(
    x: Tensor,
    target: Tensor,
    weight: Tensor | None,
    *,
    reduction: str,
    ignore_index: int,
    softcap: float | None,
    backend: str = "eager",
    **options: Any,
) -> Tensor:
    """The loss of logits [N, C_r, d1, …] or [C_r], differentiable to any order: each process by its own logits."""
    s = scores(x, target == ignore_index, softcap)
    found, known = losses(
        statistics, as_rows(s), target.flatten(), weight, ignore_index=ignore_index, softcap=None, **options
    )
    checks.class_indices("cross_entropy", target, known.classes, ignore_index)
    found = found.view(target.shape) if reduction == "none" else reduced(found, known.weights, reduction)
    return found.to(x.dtype)


def run(backend: str, x: Tensor, target: Tensor, weight: Tensor | None, **options: Any) -> Tensor:
    """The same by a backend's pieces."""
    tensors = (as_rows(x), target.flatten(), weight)
    loss = fused(_forward, _backward, vjp(reference), tensors, {"backend": backend, **options})
    return loss.view(target.shape) if options["reduction"] == "none" else loss


def _forward(
    x: Tensor, target: Tensor, weight: Tensor | None, *, backend: str, reduction: str, **options: Any
) -> tuple[Tensor, Sequence[Tensor | None]]:
    found, known = losses(pieces(backend).statistics, x, target, weight, **options)
    checks.class_indices("cross_entropy", target, known.classes, options["ignore_index"])
    return reduced(found, known.weights, reduction).to(x.dtype), (x, target, weight, *known)


def _backward(
    grads: Sequence[Tensor],
    saved: Sequence[Any],
    needs: Sequence[bool],
    *,
    backend: str,
    reduction: str,
    group: ProcessGroup,
    ignore_index: int,
    **options: Any,
) -> Gradients:
    x, _, weight, *others = saved
    known = Known(*others)
    grad = grads[0].to(known.base.dtype)
    if reduction == "mean":
        grad = grad / known.weights.sum()
    return logits_gradient(pieces(backend).gradient, grad, x, weight, known, **options), None, None


def chunk(
    backend: str,
    logits: Tensor,
    target: Tensor,
    class_weight: Tensor | None,
    scale: Tensor | None,
    *,
    group: ProcessGroup,
    ignore_index: int,
    **options: Any,
) -> Tensor:
    """As one of ``head_chunks.Losses``."""
    by = pieces(backend)
    found, known = losses(
        by.statistics, logits, target, class_weight, group=group, ignore_index=ignore_index, **options
    )
    if scale is not None:
        logits_gradient(by.replace, scale, logits, class_weight, known, **options)
    return found


def agreed_classes(name: str, hidden: Tensor, weight: Tensor, group: ProcessGroup) -> list[int]:
    """How many classes each process has in its part of a head [C_r, D].

    Raises:
        ValueError: unless all processes have as many tokens, of the same width: they would wait for each other.
    """
    own = torch.tensor([len(weight), hidden.shape[:-1].numel(), hidden.shape[-1]], device=hidden.device)
    table = process_groups.gathered(own, group).tolist()
    if any(row[1:] != table[0][1:] for row in table):
        tokens = ", ".join(f"[{N}, {D}]" for _, N, D in table)
        raise ValueError(
            f"{name}: hidden must be the same in all processes of group, got {tokens}; "
            "split the classes between them, and not the tokens"
        )
    return [classes for classes, _, _ in table]
