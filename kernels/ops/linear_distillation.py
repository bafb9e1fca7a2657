"""Divergence of a student's next-token distribution from a teacher's, with no logits of either in memory.

    p = softmax((h·Wᵀ + b) / T)          q = softmax((h'·W'ᵀ + b') / T)          ' is the teacher's

    forward_kl  KL(q ‖ p) = Σ q·(log q − log p)              as Hinton et al., Distilling the Knowledge (2015)
    reverse_kl  KL(p ‖ q)                                    as Gu et al., MiniLLM (2024)
    js          β·KL(q ‖ m) + (1 − β)·KL(p ‖ m)              m = β·q + (1 − β)·p: Agarwal et al., GKD (2024)
    tv          ½·Σ |p − q|                                  as Wen et al., f-Divergence Minimization (2023)

The logits exist for some tokens at a time (``head_chunks.py``), where the gradient takes the place of the student's; an
ignored token costs nothing.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import dispatch, sharding
from ..autograd import vjp
from ..op import Call, Draw, ErrorInput, Excess, Op, Traffic
from . import checks
from . import linear_distillation_chunks as chunks
from .head_loss import ignored_tokens
from .linear_distillation_chunks import DIVERGENCES, counted


def reference(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor | None,
    bias: Tensor | None,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    teacher_bias: Tensor | None,
    *,
    divergence: str,
    beta: float,
    temperature: float,
    ignore_index: int,
    reduction: str,
    memory_budget: int | None,
) -> Tensor:
    """Both linear layers and the divergence in plain PyTorch: products in the operands' dtype, the rest in float32."""
    ignored = ignored_tokens(hidden, target, ignore_index)
    log_p = _log_probs(hidden, weight, bias, ignored, temperature)
    log_q = _log_probs(teacher_hidden, teacher_weight, teacher_bias, ignored, temperature)
    losses = chunks.divergences(log_p, log_q, log_p.exp(), log_q.exp(), divergence=divergence, beta=beta)
    losses = losses.masked_fill(ignored, 0.0)
    losses = losses.to(torch.promote_types(hidden.dtype, torch.float32))
    if reduction == "none":
        return losses.view(hidden.shape[:-1])
    total = losses.sum()
    return total / counted(hidden, target, ignore_index=ignore_index) if reduction == "mean" else total


def _log_probs(hidden: Tensor, weight: Tensor, bias: Tensor | None, ignored: Tensor, temperature: float) -> Tensor:
    """[N, C]; those of ignored tokens have no history."""
    h = hidden.reshape(-1, hidden.shape[-1]).masked_fill(ignored[:, None], 0.0)
    x = F.linear(h, weight, bias).masked_fill(ignored[:, None], 0.0)
    return torch.log_softmax(x.to(torch.promote_types(x.dtype, torch.float32)) / temperature, 1)


def linear_distillation_loss(
    hidden: Tensor,
    weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    *,
    divergence: str = "forward_kl",
    beta: float = 0.5,
    temperature: float = 1.0,
    bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    target: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    memory_budget: int | None = None,
) -> Tensor:
    """Divergence of a student's distribution over classes from a teacher's, with no logits of either in memory.

    It is not multiplied by T², as it is not in TRL and Liger: its gradient falls as 1 / T², and ``temperature**2 *
    loss`` undoes that, as Hinton et al. do. Add :func:`linear_cross_entropy` of the same ``hidden`` for hard labels.

    As in :func:`linear_cross_entropy`, with "mean" and "sum" the gradients are computed on the way forward; with
    "none", and for a second backward pass on a retained graph, the logits are computed again. Under
    ``create_graph=True`` they are in memory. Under autocast the products run in its dtype.

    Args:
        hidden: the student's, a floating-point tensor [..., D].
        weight: of the student's head, [C, D].
        teacher_hidden: [..., E]; no gradient flows to it, nor to what follows of the teacher's. Its dtype may be
            another than the student's.
        teacher_weight: [C, E]; the classes are those of the student.
        divergence: "forward_kl", "reverse_kl", "js" (generalized Jensen-Shannon) or "tv" (total variation).
        beta: β of "js", the part of the teacher in the mixture, between 0 and 1. At either end that divergence is 0;
            divided by β, its limit is forward KL at 0, and divided by 1 − β, reverse KL at 1. Where TRL and Liger take
            0 and 1 for these, name them instead.
        temperature: T, positive, of both.
        bias: of the student's head, [C], or None for none.
        teacher_bias: [C], or None for none.
        target: integers or booleans, [...]: a token is left out where it is ``ignore_index``, and its class is not
            looked at. Labels, or a mask with ``ignore_index=0``. None counts all tokens.
        ignore_index: likewise.
        reduction: "none", "mean" (over the tokens that count: "batchmean" of ``F.kl_div`` on rows of tokens) or "sum".
        memory_budget: bytes that the logits of a chunk of tokens, of both models, and their gradient may take
            together. None is half as much as both weights take, at least 64 MiB.

    Returns:
        The divergences [...], 0 where left out, or their mean or sum, a scalar: in float32 or wider, because what is
        left of it late in training is small.

    Raises:
        TypeError: if a tensor is not floating point, or those of a model differ in dtype without autocast; or if the
            target is of neither integers nor booleans.
        ValueError: if shapes do not fit, an option is out of range, or a tensor of the teacher requires a gradient.
    """
    name = "linear_distillation_loss"
    checks.linear_operands(name, hidden=(hidden, "D"), weight=(weight, "CD"), bias=(bias, "C"))
    checks.linear_operands(
        name,
        teacher_hidden=(teacher_hidden, "D"),
        teacher_weight=(teacher_weight, "CD"),
        teacher_bias=(teacher_bias, "C"),
    )
    checks.loss_options(
        name, reduction, teacher_hidden=teacher_hidden, teacher_weight=teacher_weight, teacher_bias=teacher_bias
    )
    checks.memory_budget(name, memory_budget)
    _check_options(name, divergence, beta, temperature)
    _check_tensors(name, hidden, weight, teacher_hidden, teacher_weight, target)
    tensors = (hidden, weight, target, bias, teacher_hidden, teacher_weight, teacher_bias)
    options = {
        "divergence": divergence,
        "beta": float(beta),
        "temperature": float(temperature),
        "ignore_index": int(ignore_index),
        "memory_budget": memory_budget,
    }
    if reduction == "mean" and sharding.is_sharded(hidden):
        # The mean over all shards is not the mean of their means.
        count = functools.partial(counted, ignore_index=int(ignore_index))
        whole = sharding.run(name, count, "... D, ... -> ", (hidden, target))
        return dispatch.run(LINEAR_DISTILLATION, *tensors, reduction="sum", **options) / whole
    return dispatch.run(LINEAR_DISTILLATION, *tensors, reduction=reduction, **options)


class LinearDistillationLoss(torch.nn.Module):
    """The options of :func:`linear_distillation_loss`, which it runs; the heads stay in their models.

    Args:
        divergence: as in :func:`linear_distillation_loss`, and so are the others.
        beta: likewise.
        temperature: likewise.
        ignore_index: likewise.
        reduction: likewise.
        memory_budget: likewise.
    """

    def __init__(
        self,
        *,
        divergence: str = "forward_kl",
        beta: float = 0.5,
        temperature: float = 1.0,
        ignore_index: int = -100,
        reduction: str = "mean",
        memory_budget: int | None = None,
    ) -> None:
        super().__init__()
        checks.loss_options("LinearDistillationLoss", reduction)
        _check_options("LinearDistillationLoss", divergence, beta, temperature)
        self.divergence, self.beta, self.temperature = divergence, beta, temperature
        self.ignore_index, self.reduction, self.memory_budget = ignore_index, reduction, memory_budget

    def forward(
        self,
        hidden: Tensor,
        weight: Tensor,
        teacher_hidden: Tensor,
        teacher_weight: Tensor,
        target: Tensor | None = None,
        *,
        bias: Tensor | None = None,
        teacher_bias: Tensor | None = None,
    ) -> Tensor:
        """Hidden states and heads of student and teacher → the loss."""
        return linear_distillation_loss(
            hidden,
            weight,
            teacher_hidden,
            teacher_weight,
            divergence=self.divergence,
            beta=self.beta,
            temperature=self.temperature,
            bias=bias,
            teacher_bias=teacher_bias,
            target=target,
            ignore_index=self.ignore_index,
            reduction=self.reduction,
            memory_budget=self.memory_budget,
        )

    def extra_repr(self) -> str:
        """What it computes."""
        beta = f", beta={self.beta}" if self.divergence == "js" else ""
        return f"{self.divergence!r}{beta}, temperature={self.temperature}, reduction={self.reduction!r}"


def _check_options(name: str, divergence: str, beta: float, temperature: float) -> None:
    if divergence not in DIVERGENCES:
        raise ValueError(f"{name}: divergence must be one of {', '.join(DIVERGENCES)}, got {divergence!r}")
    if divergence == "js" and not 0.0 < beta < 1.0:
        raise ValueError(
            f"{name}: beta must be between 0 and 1, and neither, got {beta}; the divergence is 0 there: use "
            "'forward_kl' for what it tends to at 0, 'reverse_kl' at 1"
        )
    if not 0.0 < temperature < math.inf:
        raise ValueError(f"{name}: temperature must be positive and finite, got {temperature}")


def _check_tensors(
    name: str,
    hidden: Tensor,
    weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    target: Tensor | None,
) -> None:
    if len(teacher_weight) != len(weight):
        raise ValueError(
            f"{name}: weight and teacher_weight must have the same classes, got {len(weight)} and "
            f"{len(teacher_weight)}; cut off what pads the larger vocabulary, e.g. teacher_weight[:{len(weight)}]"
        )
    if teacher_hidden.shape[:-1] != hidden.shape[:-1]:
        raise ValueError(
            f"{name}: teacher_hidden must have the tokens of hidden {tuple(hidden.shape)}, got "
            f"{tuple(teacher_hidden.shape)}; run both models on the same batch"
        )
    if target is not None and (target.is_floating_point() or target.is_complex()):
        raise TypeError(
            f"{name}: target must be integers or booleans, got {target.dtype}; convert it, e.g. target.long()"
        )
    checks.each_token(name, hidden, target=target)


def _implementation(backend: str) -> Any:
    return functools.partial(chunks.run, backend, vjp(reference))


def _aten(
    hidden: Tensor,
    weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    *,
    divergence: str = "forward_kl",
    beta: float = 0.5,
    temperature: float = 1.0,
    bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    target: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    memory_budget: int | None = None,
) -> Tensor:
    log_p = torch.log_softmax(F.linear(hidden, weight, bias).float() / temperature, -1)
    log_q = torch.log_softmax(F.linear(teacher_hidden, teacher_weight, teacher_bias).float() / temperature, -1)
    if divergence == "tv":
        terms = 0.5 * (log_p.exp() - log_q.exp()).abs()
    elif divergence == "js":
        log_mix = torch.logaddexp(log_q + math.log(beta), log_p + math.log1p(-beta))
        to_q, to_p = (F.kl_div(log_mix, one, reduction="none", log_target=True) for one in (log_q, log_p))
        terms = beta * to_q + (1.0 - beta) * to_p
    else:
        pair = (log_p, log_q) if divergence == "forward_kl" else (log_q, log_p)
        terms = F.kl_div(*pair, reduction="none", log_target=True)
    losses = terms.sum(-1)
    if target is not None:
        losses = losses.masked_fill(target == ignore_index, 0.0)
    if reduction == "none":
        return losses
    return losses.sum() / counted(hidden, target, ignore_index=ignore_index) if reduction == "mean" else losses.sum()


def _inputs(
    draw: Draw,
    *,
    N: int,
    D: int,
    C: int,
    biases: bool = False,
    masked: bool = False,
    sequences: bool = False,
    **options: Any,
) -> Call:
    shape = (N, 3) if sequences else (N,)
    positions = math.prod(shape)
    if masked:
        options["target"] = draw.permutation(positions).view(shape) >= _ignored(positions)
        options["ignore_index"] = 0

    # Twice as wide as the student, of a dtype of its own, and never nearly equal: with a divergence near 0, the
    # difference of numbers near 1, the error of one implementation would say nothing about another.
    def teacher(*shape: int) -> Tensor:
        return draw.constant(*shape).to(draw.weight_dtype)

    if biases:
        options |= {"bias": draw.tensor(C), "teacher_bias": teacher(C)}
    return Call((draw.tensor(*shape, D), draw.tensor(C, D), teacher(*shape, 2 * D), teacher(C, 2 * D)), options)


def _ignored(positions: int) -> int:
    """How many positions of a drawn call are ignored."""
    return positions // 5


def _errors() -> Iterator[ErrorInput]:
    h, w, g, v = torch.zeros(2, 8), torch.zeros(16, 8), torch.zeros(2, 4), torch.zeros(16, 4)
    learned = v.clone().requires_grad_()
    yield ErrorInput(Call((h.long(), w, g, v)), TypeError, r"hidden must be a floating-point.*int64")
    yield ErrorInput(Call((h, w.half(), g, v)), TypeError, r"weight must have the dtype of hidden.*got torch.float16")
    yield ErrorInput(Call((h, w, g, v.half())), TypeError, r"teacher_weight must have the dtype of teacher_hidden")
    yield ErrorInput(Call((h, w.mT, g, v)), ValueError, r"weight must be \[C=8, D=8\], got \(8, 16\)")
    yield ErrorInput(Call((h, w, g, w)), ValueError, r"teacher_weight must be \[C=16, D=4\], got \(16, 8\)")
    yield ErrorInput(Call((h, w, g, v), {"bias": h[0]}), ValueError, r"bias must be \[C=16\], got \(8,\)")
    yield ErrorInput(Call((h, w, g, v[:12])), ValueError, r"same classes, got 16 and 12; cut off what pads")
    yield ErrorInput(Call((h, w, g[:1], v)), ValueError, r"teacher_hidden must have the tokens of hidden.*got \(1, 4\)")
    yield ErrorInput(Call((h, w, g, learned)), ValueError, r"pass teacher_weight.detach\(\)")
    yield ErrorInput(Call((h, w, g, v), {"target": h}), TypeError, "target must be integers or booleans")
    yield ErrorInput(Call((h, w, g, v), {"target": torch.ones(3) > 0}), ValueError, r"one element.*\(2,\), got \(3,\)")
    yield ErrorInput(Call((h, w, g, v), {"reduction": "avg"}), ValueError, "reduction must be one of.*got 'avg'")
    yield ErrorInput(Call((h, w, g, v), {"divergence": "kl"}), ValueError, "divergence must be one of.*got 'kl'")
    yield ErrorInput(
        Call((h, w, g, v), {"divergence": "js", "beta": 0.0}), ValueError, r"got 0.0; the divergence is 0 there"
    )
    yield ErrorInput(Call((h, w, g, v), {"temperature": 0.0}), ValueError, "temperature must be positive.*got 0.0")
    yield ErrorInput(Call((h, w, g, v), {"memory_budget": 0}), ValueError, "memory_budget must be positive.*got 0")


def _traffic(itemsize: int, *, N: int, D: int, C: int, biases: bool = False, **options: Any) -> Traffic:
    """Operands and results of each product, and both logits to the loss and back; the gradients, to be scaled."""
    counted = (3 if options.get("sequences") else 1) * N
    counted -= _ignored(counted) if options.get("masked") else 0
    product, of_teacher = counted * D + C * D + counted * C, counted * 2 * D + C * 2 * D + counted * C
    forward, gradient = product + of_teacher + 2 * counted * C, 2 * product + counted * C
    if options.get("reduction") == "none":
        return Traffic(forward=forward * itemsize, backward=(forward + gradient) * itemsize)
    return Traffic(forward=(forward + gradient) * itemsize, backward=2 * (N * D + C * D + biases * C) * itemsize)


_AGAIN = "the gradient reads both logits again; the CPU widens half precision for the gradient of the weight"
_CHUNKED = "a chunk is of few tokens here, and each reads both weights, and the sum of the gradient, again"

LINEAR_DISTILLATION = Op(
    name="linear_distillation",
    replaces="`F.kl_div(log_softmax(linear(h)), softmax(linear(h_teacher)))`, without the logits",
    fn=linear_distillation_loss,
    reference=reference,
    impls={"triton": _implementation("triton"), "compile": _implementation("compile")},
    traced=chunks.traced,
    inputs=_inputs,
    dims={"N": (0, 1, 2, 33, 129), "D": (1, 8, 31), "C": (1, 2, 33, 129, 1025, 9001)},
    # Students of the size of GPT-2 124M.
    bench=({"N": 512, "D": 768, "C": 50_304},),
    audit=({"N": 16, "D": 128, "C": 512}, {"N": 4, "D": 8, "C": 262_144}),
    traffic=_traffic,
    excess={
        ("default", "forward"): Excess(2.0, _AGAIN),
        ("reverse KL", "forward"): Excess(2.1, _AGAIN),
        ("Jensen-Shannon, chunks", "forward"): Excess(15, _CHUNKED),
        ("total variation, token by token", "forward"): Excess(20, _CHUNKED),
        ("total variation, token by token", "backward"): Excess(28, _CHUNKED),
    },
    flops=lambda N, D, C: 2 * N * (D + 2 * D) * C,
    aten=_aten,
    axes=lambda *_, reduction, **__: "... D, C D, ..., C, ... E, C E, C -> " + ("..." if reduction == "none" else ""),
    errors=_errors,
    variants={
        "default": {},
        "reverse KL": {"divergence": "reverse_kl", "temperature": 3.0, "biases": True, "reduction": "sum"},
        "Jensen-Shannon, chunks": {"divergence": "js", "beta": 0.25, "masked": True, "memory_budget": 16_384},
        "total variation, token by token": {
            "divergence": "tv",
            "temperature": 0.7,
            "reduction": "none",
            "sequences": True,
            "masked": True,
            "memory_budget": 16_384,
        },
    },
    modules=(LinearDistillationLoss,),
)
