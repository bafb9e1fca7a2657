"""Losses of preference and policy optimization, from log-probabilities of :func:`linear_log_probs`.

Written c and r for the log-probabilities of a chosen and a rejected sequence, c₀ and r₀ for those of the reference
model, c̄ and r̄ for means over tokens instead of sums, and σ for the logistic function:

    dpo     −(1 − ε)·log σ(m) − ε·log σ(−m)         m = β·((c − c₀) − (r − r₀))        Rafailov et al. (2023)
    ipo     ((c − c₀) − (r − r₀) − 1 / 2β)²                                            Azar et al. (2023)
    cpo     −log σ(β·(c − r)) − λ·c̄                                                    Xu et al. (2024)
    simpo   −log σ(β·(c̄ − r̄) − γ)                                                      Meng et al. (2024)
    orpo    −c̄ − λ·log σ(odds(c̄) − odds(r̄))         odds(p) = p − log(1 − eᵖ)          Hong et al. (2024)
    kto     w·(1 − σ(±β·((s − s₀) − z)))            + desirable, − undesirable s       Ethayarajh et al. (2024)
    grpo    −min(ρ·A, clip(ρ, 1 − ε, 1 + ε')·A) + β·(eᵈ − d − 1)                       Shao et al. (2024)
            ρ = exp(p − p_old), d = p_ref − p, of each token

All of it is arithmetic on a number for each sequence or token, which autograd differentiates; the work is in the
log-probabilities.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from .linear_log_probs import linear_log_probs


def sequence_log_probs(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None = None,
    *,
    average: bool = False,
    temperature: float = 1.0,
    ignore_index: int = -100,
    softcap: float | None = None,
    memory_budget: int | None = None,
) -> Tensor:
    """The log-probability of each sequence: the sum over its tokens, or their mean.

    Args:
        hidden: floating-point tensor [..., S, D].
        weight: of the linear layer, [C, D].
        target: integer class indices in [0, C), or ``ignore_index`` for prompts and padding, [..., S].
        bias: of the linear layer, [C], or None for none.
        average: whether to divide by the number of tokens that count; a sequence with none is NaN then.
        temperature: as in :func:`linear_log_probs`, and so are the others.
        ignore_index: likewise.
        softcap: likewise.
        memory_budget: likewise.

    Returns:
        [...] in float32 or wider.

    Raises:
        TypeError: as :func:`linear_log_probs`.
        ValueError: if there is no dimension of tokens; and as :func:`linear_log_probs`.
        IndexError: as :func:`linear_log_probs`.
    """
    if target.dim() == 0:
        raise ValueError("sequence_log_probs: target must have at least one dimension, its tokens, got a scalar")
    log_probs = linear_log_probs(
        hidden,
        weight,
        target,
        bias,
        temperature=temperature,
        ignore_index=ignore_index,
        softcap=softcap,
        memory_budget=memory_budget,
    )
    total = log_probs.sum(-1)
    return total / (target != ignore_index).sum(-1) if average else total


def dpo_loss(
    chosen: Tensor,
    rejected: Tensor,
    reference_chosen: Tensor,
    reference_rejected: Tensor,
    *,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
) -> Tensor:
    """Direct preference optimization, of each pair; ``label_smoothing`` ε is the part of labels that are wrong."""
    _check("dpo_loss", beta=beta, chosen=chosen, rejected=rejected,
           reference_chosen=reference_chosen, reference_rejected=reference_rejected)  # fmt: skip
    if not 0.0 <= label_smoothing < 0.5:
        raise ValueError(f"dpo_loss: label_smoothing must be in [0, 0.5), got {label_smoothing}")
    margin = beta * ((chosen - reference_chosen) - (rejected - reference_rejected))
    return -(1.0 - label_smoothing) * F.logsigmoid(margin) - label_smoothing * F.logsigmoid(-margin)


def ipo_loss(
    chosen: Tensor, rejected: Tensor, reference_chosen: Tensor, reference_rejected: Tensor, *, beta: float = 0.1
) -> Tensor:
    """Identity preference optimization, of each pair."""
    _check("ipo_loss", beta=beta, chosen=chosen, rejected=rejected,
           reference_chosen=reference_chosen, reference_rejected=reference_rejected)  # fmt: skip
    return ((chosen - reference_chosen) - (rejected - reference_rejected) - 1.0 / (2.0 * beta)).square()


def cpo_loss(
    chosen: Tensor, rejected: Tensor, mean_chosen: Tensor, *, beta: float = 0.1, weight: float = 1.0
) -> Tensor:
    """Contrastive preference optimization, of each pair: no reference model, and λ = ``weight`` times the likelihood.

    ``chosen`` and ``rejected`` are sums over tokens, ``mean_chosen`` is a mean.
    """
    _check("cpo_loss", beta=beta, chosen=chosen, rejected=rejected, mean_chosen=mean_chosen)
    return -F.logsigmoid(beta * (chosen - rejected)) - weight * mean_chosen


def simpo_loss(mean_chosen: Tensor, mean_rejected: Tensor, *, beta: float = 2.0, gamma: float = 1.0) -> Tensor:
    """Simple preference optimization, of each pair: of means over tokens, with a margin ``gamma``."""
    _check("simpo_loss", beta=beta, mean_chosen=mean_chosen, mean_rejected=mean_rejected)
    return -F.logsigmoid(beta * (mean_chosen - mean_rejected) - gamma)


def orpo_loss(mean_chosen: Tensor, mean_rejected: Tensor, *, weight: float = 0.1) -> Tensor:
    """Odds-ratio preference optimization, of each pair: the likelihood, and λ = ``weight`` times the odds ratio."""
    _check("orpo_loss", mean_chosen=mean_chosen, mean_rejected=mean_rejected)
    return -mean_chosen - weight * F.logsigmoid(_log_odds(mean_chosen) - _log_odds(mean_rejected))


def kto_loss(
    log_probs: Tensor,
    reference: Tensor,
    desirable: Tensor,
    divergence: Tensor | float,
    *,
    beta: float = 0.1,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> Tensor:
    """Kahneman-Tversky optimization, of each sequence.

    Args:
        log_probs: of each sequence, [...].
        reference: of the same under the reference model, [...].
        desirable: boolean, [...].
        divergence: z, an estimate of KL(policy ‖ reference) over the batch; no gradient flows to it, and it is clamped
            at 0.
        beta: positive.
        desirable_weight: w of the desirable sequences.
        undesirable_weight: w of the others.
    """
    _check("kto_loss", beta=beta, log_probs=log_probs, reference=reference)
    if desirable.dtype != torch.bool or desirable.shape != log_probs.shape:
        raise ValueError(
            f"kto_loss: desirable must be boolean and like log_probs {tuple(log_probs.shape)}, "
            f"got {tuple(desirable.shape)} of {desirable.dtype}"
        )
    z = torch.as_tensor(divergence, dtype=log_probs.dtype, device=log_probs.device).detach().clamp(min=0.0)
    margin = beta * (log_probs - reference - z)
    w = torch.where(desirable, desirable_weight, undesirable_weight)
    return w * (1.0 - torch.sigmoid(torch.where(desirable, margin, -margin)))


def grpo_loss(
    log_probs: Tensor,
    advantages: Tensor,
    *,
    old: Tensor | None = None,
    reference: Tensor | None = None,
    beta: float = 0.04,
    epsilon: float = 0.2,
    epsilon_high: float | None = None,
) -> Tensor:
    """Group-relative policy optimization, of each token; its mean over what counts is the loss.

    Args:
        log_probs: of each token under the policy, [...].
        advantages: of each token, or broadcast to them, such as [B, 1] for [B, S].
        old: log-probabilities under the policy that drew the tokens; None takes ``log_probs`` itself, as in the first
            step after drawing.
        reference: log-probabilities under the reference model; None leaves the divergence out.
        beta: factor of the divergence.
        epsilon: how far the ratio may fall below 1 before it counts as constant.
        epsilon_high: how far above; None is ``epsilon``.
    """
    _check("grpo_loss", log_probs=log_probs, old=old, reference=reference)
    if not 0.0 <= epsilon < 1.0:
        raise ValueError(f"grpo_loss: epsilon must be in [0, 1), got {epsilon}")
    ratio = torch.exp(log_probs - (log_probs if old is None else old).detach())
    bounded = ratio.clamp(1.0 - epsilon, 1.0 + (epsilon if epsilon_high is None else epsilon_high))
    loss = -torch.minimum(ratio * advantages, bounded * advantages)
    if reference is not None and beta:
        apart = reference.detach() - log_probs
        loss = loss + beta * (torch.expm1(apart) - apart)
    return loss


def _log_odds(log_prob: Tensor) -> Tensor:
    """log(p / (1 − p)) of log p; where p is nearly 1 or nearly 0, 1 − p is computed without cancellation."""
    near_one = log_prob > -math.log(2.0)
    # Each branch sees only what it is made for: the other's infinite slope would make NaN of a gradient of 0.
    close = torch.log(-torch.expm1(torch.where(near_one, log_prob, -1.0)))
    far = torch.log1p(-torch.exp(torch.where(near_one, -1.0, log_prob)))
    return log_prob - torch.where(near_one, close, far)


def _check(name: str, *, beta: float | None = None, **log_probs: Tensor | None) -> None:
    """Raise unless beta is positive, and all log-probabilities that are there have the shape of the first."""
    if beta is not None and not beta > 0.0:
        raise ValueError(f"{name}: beta must be positive, got {beta}")
    (first, wanted), *others = ((label, t) for label, t in log_probs.items() if t is not None)
    for label, t in others:
        if t.shape != wanted.shape:
            raise ValueError(
                f"{name}: {label} must have the shape of {first}, {tuple(wanted.shape)}, got {tuple(t.shape)}; "
                "one number for each sequence (each token, for grpo_loss)"
            )
