"""Preference and policy losses against their definitions, and at the edges where definitions alone would overflow."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from braze.kernels import (
    cpo_loss,
    dpo_loss,
    grpo_loss,
    ipo_loss,
    kto_loss,
    orpo_loss,
    sequence_log_probs,
    simpo_loss,
)

BETA = 0.3


def log_probs(count: int = 4, seed: int = 0) -> list[Tensor]:
    """Log-probabilities of six pairs, between −4 and 0."""
    drawn = torch.rand(count, 6, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return [row.requires_grad_() for row in (-4.0 * drawn - 1e-3)]


def sigmoid(x: float) -> float:
    return 1.0 / (1.0 + math.exp(-x))


def odds(log_prob: float) -> float:
    return math.exp(log_prob) / (1.0 - math.exp(log_prob))


#: The losses of four log-probabilities, and, from the papers' own formulas, of four numbers.
DEFINITIONS = {
    "dpo": (
        lambda c, r, c0, r0: dpo_loss(c, r, c0, r0, beta=BETA),
        lambda c, r, c0, r0: -math.log(sigmoid(BETA * math.log(math.exp(c - c0) / math.exp(r - r0)))),
    ),
    "dpo, some labels wrong": (
        lambda c, r, c0, r0: dpo_loss(c, r, c0, r0, beta=BETA, label_smoothing=0.2),
        lambda c, r, c0, r0: (
            -(0.8 * math.log(sigmoid(BETA * (c - c0 - r + r0))) + 0.2 * math.log(sigmoid(BETA * (r - r0 - c + c0))))
        ),
    ),
    "ipo": (
        lambda c, r, c0, r0: ipo_loss(c, r, c0, r0, beta=BETA),
        lambda c, r, c0, r0: (math.log(math.exp(c - c0) / math.exp(r - r0)) - 1.0 / (2.0 * BETA)) ** 2,
    ),
    "cpo": (
        lambda c, r, mean, _: cpo_loss(c, r, mean, beta=BETA, weight=0.5),
        lambda c, r, mean, _: -math.log(sigmoid(BETA * (c - r))) - 0.5 * mean,
    ),
    "simpo": (
        lambda c, r, *_: simpo_loss(c, r, beta=BETA, gamma=0.7),
        lambda c, r, *_: -math.log(sigmoid(BETA * c - BETA * r - 0.7)),
    ),
    "orpo": (
        lambda c, r, *_: orpo_loss(c, r, weight=0.5),
        lambda c, r, *_: -c - 0.5 * math.log(sigmoid(math.log(odds(c) / odds(r)))),
    ),
    "kto": (
        lambda s, s0, *_: kto_loss(s, s0, s > s0, 0.4, beta=BETA, desirable_weight=1.5),
        lambda s, s0, *_: (
            1.5 * (1.0 - sigmoid(BETA * (s - s0 - 0.4))) if s > s0 else 1.0 - sigmoid(BETA * (0.4 - (s - s0)))
        ),
    ),
    "grpo": (
        lambda p, old, reference, _: grpo_loss(
            p, ADVANTAGES, old=old, reference=reference, beta=BETA, epsilon=0.2, epsilon_high=0.3
        ),
        None,
    ),
}
ADVANTAGES = torch.tensor([1.0, -1.0, 2.0, -2.0, 0.5, 0.0], dtype=torch.float64)


@pytest.mark.parametrize("name", [name for name, (_, definition) in DEFINITIONS.items() if definition])
def test_losses_are_those_of_the_papers(name: str) -> None:
    loss, definition = DEFINITIONS[name]
    rows = log_probs()
    wanted = [definition(*numbers) for numbers in zip(*(row.tolist() for row in rows), strict=True)]
    torch.testing.assert_close(loss(*rows), torch.tensor(wanted, dtype=torch.float64))


def test_grpo_is_the_clipped_surrogate_with_the_divergence() -> None:
    p, old, reference, _ = log_probs()
    found = DEFINITIONS["grpo"][0](p, old, reference, None)
    for n, advantage in enumerate(ADVANTAGES.tolist()):
        ratio = math.exp(p[n].item() - old[n].item())
        surrogate = min(ratio * advantage, min(max(ratio, 0.8), 1.3) * advantage)
        other = math.exp(reference[n].item() - p[n].item())
        assert found[n].item() == pytest.approx(-surrogate + BETA * (other - math.log(other) - 1.0))


@pytest.mark.parametrize("name", DEFINITIONS)
def test_gradients_are_those_of_the_values(name: str) -> None:
    loss, _ = DEFINITIONS[name]
    first, *constants = log_probs(seed=1)
    constants = [t.detach() for t in constants]
    assert torch.autograd.gradcheck(lambda x: loss(x, *constants), first)


def test_the_first_step_of_grpo_is_the_policy_gradient() -> None:
    p, *_ = log_probs()
    (gradient,) = torch.autograd.grad(grpo_loss(p, ADVANTAGES).sum(), p)
    torch.testing.assert_close(gradient, -ADVANTAGES)


def test_a_ratio_beyond_its_bound_learns_only_to_come_back() -> None:
    p = torch.tensor([1.0, 1.0, -1.0, -1.0], dtype=torch.float64, requires_grad=True)
    advantages = torch.tensor([1.0, -1.0, 1.0, -1.0], dtype=torch.float64)
    (gradient,) = torch.autograd.grad(grpo_loss(p, advantages, old=torch.zeros_like(p)).sum(), p)
    assert (gradient != 0).tolist() == [False, True, True, False]


def test_odds_stay_finite_where_a_probability_is_nearly_one_or_zero() -> None:
    for chosen in (-1e-30, -1e-8, -700.0, -1e4):
        pair = [torch.tensor([chosen]).requires_grad_(), torch.tensor([-1.0]).requires_grad_()]
        loss = orpo_loss(*pair)
        assert torch.isfinite(loss).all()
        assert all(torch.isfinite(g).all() for g in torch.autograd.grad(loss, pair))


def test_a_divergence_below_zero_counts_as_none_and_learns_nothing() -> None:
    s, s0, *_ = log_probs()
    z = torch.tensor(-3.0, dtype=torch.float64, requires_grad=True)
    desirable = torch.ones(6, dtype=torch.bool)
    loss = kto_loss(s, s0, desirable, z)
    torch.testing.assert_close(loss, kto_loss(s, s0, desirable, 0.0))
    assert torch.autograd.grad(loss.sum(), z, allow_unused=True) == (None,)


def test_a_sequence_is_the_sum_or_the_mean_of_its_tokens() -> None:
    generator = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(2, 5, 8, generator=generator), torch.randn(11, 8, generator=generator)
    target = torch.randint(11, (2, 5), generator=generator)
    target[0, :3] = -100
    tokens = torch.log_softmax(F.linear(hidden, weight), -1).gather(-1, target.clamp(min=0)[..., None])[..., 0]
    tokens = tokens.masked_fill(target == -100, 0.0)
    torch.testing.assert_close(sequence_log_probs(hidden, weight, target), tokens.sum(-1))
    averages = sequence_log_probs(hidden, weight, target, average=True)
    torch.testing.assert_close(averages, tokens.sum(-1) / torch.tensor([2.0, 5.0]))


def test_errors_teach() -> None:
    c, r, c0, r0 = (t.detach() for t in log_probs())
    with pytest.raises(ValueError, match=r"dpo_loss: beta must be positive, got 0\.0"):
        dpo_loss(c, r, c0, r0, beta=0.0)
    with pytest.raises(ValueError, match=r"rejected must have the shape of chosen, \(6,\), got \(5,\)"):
        dpo_loss(c, r[1:], c0, r0)
    with pytest.raises(ValueError, match=r"label_smoothing must be in \[0, 0.5\), got 0.5"):
        dpo_loss(c, r, c0, r0, label_smoothing=0.5)
    with pytest.raises(ValueError, match=r"desirable must be boolean .* of torch.float64"):
        kto_loss(c, r, c0, 0.0)
    with pytest.raises(ValueError, match=r"epsilon must be in \[0, 1\), got 1.5"):
        grpo_loss(c, r, epsilon=1.5)
    with pytest.raises(ValueError, match=r"reference must have the shape of log_probs, \(6,\), got \(1,\)"):
        grpo_loss(c, r, reference=c[:1])
    with pytest.raises(ValueError, match="target must have at least one dimension"):
        sequence_log_probs(torch.zeros(4), torch.zeros(3, 4), torch.tensor(0))
