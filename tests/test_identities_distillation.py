"""What distillation promises beside its values: divergences are what they are, and no logits, of either model."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from braze.kernels import LinearDistillationLoss, linear_distillation_loss, use_backend
from braze.kernels.ops import head_chunks
from braze.kernels.ops.linear_distillation_chunks import DIVERGENCES

from .graphs import compiled_whole, shapes

every_backend = pytest.mark.parametrize("backend", ["eager", "compile", "triton"])
every_chunked_backend = pytest.mark.parametrize("backend", ["compile", "triton"])
every_divergence = pytest.mark.parametrize("divergence", DIVERGENCES)
N, D, E, C = 24, 16, 12, 40
EPS = torch.finfo(torch.float32).eps


def drawn(*shape: int, device: str, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(device, dtype)


def models(device: str, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Hidden states and a weight of a student, which learn, and of a teacher."""
    sizes = ((N, D), (C, D), (N, E), (C, E))
    tensors = [drawn(*size, device=device, seed=seed, dtype=dtype) for seed, size in enumerate(sizes)]
    return [t.requires_grad_(i < 2) for i, t in enumerate(tensors)]


def of_logits(x: Tensor, z: Tensor, **options: Any) -> Tensor:
    """The divergence of logits: heads that are the identity."""
    one = torch.eye(x.shape[-1], dtype=x.dtype, device=x.device)
    return linear_distillation_loss(x, one, z, one, **options)


def by_definition(x: Tensor, z: Tensor, divergence: str, beta: float = 0.5) -> Tensor:
    """Of each row of logits, with what PyTorch has for it."""
    log_p, log_q = F.log_softmax(x, -1), F.log_softmax(z, -1)
    if divergence == "tv":
        return 0.5 * torch.linalg.vector_norm(log_p.exp() - log_q.exp(), ord=1, dim=-1)
    log_m = torch.logsumexp(torch.stack([log_q + math.log(beta), log_p + math.log1p(-beta)]), 0)
    pairs = {"forward_kl": [(1.0, log_p, log_q)], "reverse_kl": [(1.0, log_q, log_p)]}
    terms = pairs.get(divergence, [(beta, log_m, log_q), (1.0 - beta, log_m, log_p)])
    return sum(w * F.kl_div(a, b, reduction="none", log_target=True).sum(-1) for w, a, b in terms)  # type: ignore[return-value]


@every_divergence
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_values_and_gradients_are_those_of_kl_div(divergence: str, reduction: str, device: str) -> None:
    hidden, weight, teacher_hidden, teacher_weight = models(device, torch.float64)
    bias, teacher_bias = (drawn(C, device=device, seed=s, dtype=torch.float64) for s in (4, 5))
    learned = [hidden, weight, bias.requires_grad_()]
    ours = linear_distillation_loss(
        hidden, weight, teacher_hidden, teacher_weight, divergence=divergence, beta=0.3, temperature=2.0,
        bias=bias, teacher_bias=teacher_bias, reduction=reduction,
    )  # fmt: skip
    x, z = F.linear(hidden, weight, bias), F.linear(teacher_hidden, teacher_weight, teacher_bias)
    losses = by_definition(x / 2.0, z / 2.0, divergence, 0.3)
    theirs = {"none": losses, "mean": losses.mean(), "sum": losses.sum()}[reduction]
    torch.testing.assert_close(ours, theirs)
    cotangent = torch.linspace(0.5, 1.0, ours.numel(), dtype=torch.float64, device=device).view(ours.shape)
    gradients = [torch.autograd.grad(loss, learned, cotangent) for loss in (ours, theirs)]
    torch.testing.assert_close(*gradients)


def test_the_mean_is_batchmean(device: str) -> None:
    x, z = (drawn(N, C, device=device, seed=s, dtype=torch.float64) for s in (0, 1))
    theirs = F.kl_div(F.log_softmax(x, -1), F.softmax(z, -1), reduction="batchmean")
    torch.testing.assert_close(of_logits(x, z), theirs)


@every_backend
@every_divergence
def test_equal_models_do_not_diverge(backend: str, divergence: str, device: str) -> None:
    hidden, weight, *_ = models(device)
    with use_backend(backend):
        losses = linear_distillation_loss(
            hidden, weight, hidden.detach(), weight.detach(), divergence=divergence, reduction="none"
        )
        dh, dw = torch.autograd.grad(losses.sum(), [hidden, weight])
    log_p = F.log_softmax(F.linear(hidden, weight), -1)
    # The mixture and its logarithm: a few roundings of 1, and as many of each log-probability.
    rounding = 4 * EPS * (1.0 + log_p.abs().max().item())
    assert losses.abs().max() <= rounding
    # dx is p times what is at most twice that, and both products sum up what is at most so large.
    assert dh.abs().max() <= 2 * rounding * weight.abs().max()
    assert dw.abs().max() <= 2 * rounding * (log_p.exp().T @ hidden.abs()).max()


@every_backend
def test_jensen_shannon_is_symmetric_and_bounded(backend: str, device: str) -> None:
    x, z = (3.0 * drawn(N, C, device=device, seed=s) for s in (0, 1))
    far = torch.full((1, C), -1e4, device=device)
    options = {"divergence": "js", "reduction": "none"}
    with use_backend(backend):
        torch.testing.assert_close(of_logits(x, z, **options), of_logits(z, x, **options))
        torch.testing.assert_close(of_logits(x, z, beta=0.2, **options), of_logits(z, x, beta=0.8, **options))
        losses = of_logits(x, z, **options)
        apart = of_logits(far.index_fill(1, _at(0, device), 0.0), far.index_fill(1, _at(1, device), 0.0), **options)
    assert (losses > 0.0).all()
    assert (losses < math.log(2.0)).all()
    torch.testing.assert_close(apart, torch.full_like(apart, math.log(2.0)))


@every_backend
def test_total_variation_is_between_0_and_1(backend: str, device: str) -> None:
    x, z = (3.0 * drawn(N, C, device=device, seed=s) for s in (0, 1))
    far = torch.full((1, C), -1e4, device=device)
    options = {"divergence": "tv", "reduction": "none"}
    with use_backend(backend):
        losses = of_logits(x, z, **options)
        apart = of_logits(far.index_fill(1, _at(0, device), 0.0), far.index_fill(1, _at(1, device), 0.0), **options)
    assert (losses > 0.0).all()
    assert (losses < 1.0).all()
    assert apart.item() == 1.0


@pytest.mark.parametrize(("end", "limit"), [(0.0, "forward_kl"), (1.0, "reverse_kl")])
def test_jensen_shannon_tends_to_a_kl_divergence(end: float, limit: str, device: str) -> None:
    x, z = (drawn(N, C, device=device, seed=s, dtype=torch.float64) for s in (0, 1))
    wanted = of_logits(x, z, divergence=limit)
    beta = abs(end - 1e-6)
    # The next term of the series in β is about as large as the divergence, times β.
    torch.testing.assert_close(of_logits(x, z, divergence="js", beta=beta) / 1e-6, wanted, rtol=1e-4, atol=0.0)


@every_backend
def test_a_teacher_that_is_sure_is_a_label(backend: str, device: str) -> None:
    hidden, weight, *_ = models(device)
    target = torch.arange(N, device=device) % C
    sure = 1e4 * F.one_hot(target, C).float()
    with use_backend(backend):
        ours = linear_distillation_loss(hidden, weight, sure, torch.eye(C, device=device))
        gradients = torch.autograd.grad(ours, [hidden, weight])
    theirs = F.cross_entropy(F.linear(hidden, weight), target)
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(gradients, torch.autograd.grad(theirs, [hidden, weight]))


@every_backend
@every_divergence
def test_a_gradient_sums_to_zero_over_the_classes(backend: str, divergence: str, device: str) -> None:
    """A constant added to all logits changes nothing."""
    hidden, weight, *teacher = models(device)
    bias = torch.zeros(C, device=device, requires_grad=True)
    with use_backend(backend):
        loss = linear_distillation_loss(hidden, weight, *teacher, bias=bias, divergence=divergence, reduction="sum")
        (db,) = torch.autograd.grad(loss, bias)
    log_p = F.log_softmax(F.linear(hidden, weight), -1).abs().max().item()
    # In each of N rows Σ p and Σ a are off by C roundings and by those of the log-probabilities.
    terms = N * max(1.0, log_p + F.log_softmax(F.linear(*teacher), -1).abs().max().item())
    assert db.sum().abs() <= EPS * (C + 4 * log_p) * terms
    assert db.abs().max() > 1e-2


@every_backend
@every_divergence
def test_a_temperature_divides_the_logits(backend: str, divergence: str, device: str) -> None:
    hidden, weight, teacher_hidden, teacher_weight = models(device)
    options = {"divergence": divergence, "reduction": "sum"}
    with use_backend(backend):
        warm = linear_distillation_loss(hidden, weight, teacher_hidden, teacher_weight, temperature=4.0, **options)
        plain = linear_distillation_loss(hidden / 4.0, weight, teacher_hidden / 4.0, teacher_weight, **options)
        # A power of 2 divides exactly.
        assert torch.equal(warm, plain)
        ours, theirs = (torch.autograd.grad(loss, [hidden, weight]) for loss in (warm, plain))
    torch.testing.assert_close(ours, theirs)


@every_chunked_backend
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_ignored_tokens_are_not_computed_and_spoil_nothing(
    backend: str, reduction: str, walked: list[list[int]], device: str
) -> None:
    hidden, weight, teacher_hidden, teacher_weight = models(device)
    target = torch.arange(N, device=device) % C
    target[::3] = -100
    counts = target != -100
    spoiled, spoiled_teacher = (
        t.detach().masked_fill(~counts[:, None], float("nan")) for t in (hidden, teacher_hidden)
    )
    spoiled.requires_grad_()
    # Two tokens' logits in float32, of either model, and the product that the CPU widens.
    options = {"reduction": reduction, "divergence": "js", "memory_budget": 2 * 2 * C * 4}
    with use_backend(backend):
        ours = linear_distillation_loss(spoiled, weight, spoiled_teacher, teacher_weight, target=target, **options)
        gradients = torch.autograd.grad(ours.sum(), [spoiled, weight])
        passes = 1 if reduction == "mean" else 2
        assert [place for chunk in walked for place in chunk] == counts.nonzero().flatten().tolist() * passes
        assert {len(chunk) for chunk in walked} == {2}
        masked = linear_distillation_loss(
            spoiled, weight, spoiled_teacher, teacher_weight, target=counts, ignore_index=0, **options
        )
        theirs = linear_distillation_loss(hidden[counts], weight, teacher_hidden[counts], teacher_weight, **options)
        wanted = torch.autograd.grad(theirs.sum(), [hidden, weight])
    assert torch.equal(masked, ours)
    torch.testing.assert_close(ours if reduction == "mean" else ours[counts], theirs)
    torch.testing.assert_close(gradients, wanted)
    assert reduction == "mean" or not ours[~counts].any()


@every_chunked_backend
def test_no_gradient_is_computed_where_none_is_wanted(
    backend: str, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    hidden, weight, *teacher = models(device)
    wanted = torch.autograd.grad(linear_distillation_loss(hidden, weight, *teacher), hidden)

    def refuse(*_: Any) -> None:
        raise AssertionError("a product for the gradient of a frozen weight")

    monkeypatch.setattr(head_chunks, "_product", refuse)
    with use_backend(backend):
        loss = linear_distillation_loss(hidden, weight.detach(), *teacher)
        torch.testing.assert_close(torch.autograd.grad(loss, hidden), wanted)
        with torch.no_grad():
            assert torch.equal(linear_distillation_loss(hidden, weight, *teacher), loss)


@every_backend
@every_divergence
@pytest.mark.parametrize("alone", ["student", "teacher"])
def test_impossible_classes_are_no_nan(backend: str, divergence: str, alone: str, device: str) -> None:
    """Of a masked vocabulary: both models rule out class 1, and one of them class 0 as well."""
    hidden, weight, *teacher = models(device)
    far = torch.zeros(2, C, device=device, dtype=torch.float64)  # as good as −∞ in float64, and without NaN
    far[:, 1] = far[("student", "teacher").index(alone), 0] = -1e4
    bias, teacher_bias = far.float().masked_fill(far < 0.0, float("-inf"))
    bias.requires_grad_()

    def found(backend: str) -> tuple[Tensor, ...]:
        with use_backend(backend):
            losses = linear_distillation_loss(
                hidden, weight, *teacher, bias=bias, teacher_bias=teacher_bias, divergence=divergence, reduction="none"
            )
            return losses, *torch.autograd.grad(losses.sum(), [hidden, weight, bias])

    losses, *gradients = found(backend)
    if (divergence, alone) in (("forward_kl", "student"), ("reverse_kl", "teacher")):
        assert (losses == float("inf")).all()
        return
    wide = [t.detach().double().requires_grad_() for t in (hidden, weight)] + [far[0].requires_grad_()]
    x, z = F.linear(*wide), F.linear(*(t.double() for t in teacher), far[1].detach())
    wanted = by_definition(x, z, divergence)
    truth = wanted, *torch.autograd.grad(wanted.sum(), wide)
    for ours, plain, exact in zip((losses, *gradients), found("eager"), truth, strict=True):
        error, own = ((t.double() - exact).abs().max() for t in (ours, plain))
        assert error <= 2.0 * (own + torch.finfo(ours.dtype).eps * exact.abs().max())
    assert gradients[2][1] == 0.0


@every_backend
@every_divergence
def test_extreme_logits_are_no_nan(backend: str, divergence: str, device: str) -> None:
    x, z = (1e4 * drawn(N, C, device=device, seed=s) for s in (0, 1))
    z[: N // 2] = x[: N // 2]
    with use_backend(backend):
        losses = of_logits(x.requires_grad_(), z, divergence=divergence, temperature=1e-2, reduction="none")
        (dx,) = torch.autograd.grad(losses.sum(), x)
    assert losses.isfinite().all()
    assert dx.isfinite().all()
    assert not losses[: N // 2].any()
    assert not dx[: N // 2].any()
    assert (losses[N // 2 :] > 0.1).any()


@every_chunked_backend
def test_a_teacher_has_a_dtype_of_its_own(backend: str, device: str) -> None:
    hidden, weight, *teacher = models(device)
    half = [t.bfloat16() for t in teacher]
    with use_backend(backend):
        loss = linear_distillation_loss(hidden, weight, *half)
        gradients = torch.autograd.grad(loss, [hidden, weight])
    theirs = by_definition(F.linear(hidden, weight), F.linear(*half).float(), "forward_kl").mean()
    torch.testing.assert_close(loss, theirs)
    torch.testing.assert_close(gradients, torch.autograd.grad(theirs, [hidden, weight]))


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_compiles_whole_and_keeps_no_logits(reduction: str, device: str) -> None:
    hidden, weight, *teacher = models(device)

    def loss(hidden: Tensor, weight: Tensor) -> Tensor:
        return linear_distillation_loss(torch.tanh(hidden), weight, *teacher, reduction=reduction).sum()

    compiled, graphs = compiled_whole(loss)
    ours, theirs = compiled(hidden, weight), loss(hidden, weight)
    torch.testing.assert_close(ours, theirs)
    learned = [hidden, weight]
    torch.testing.assert_close(torch.autograd.grad(ours, learned), torch.autograd.grad(theirs, learned))
    assert len(graphs) == 2
    assert (N, C) not in shapes(graphs)


def test_the_module_is_the_function(device: str) -> None:
    tensors = models(device)
    target = torch.arange(N, device=device) % 2
    options = {"divergence": "js", "beta": 0.1, "temperature": 2.0, "ignore_index": 1, "reduction": "sum"}
    module = LinearDistillationLoss(**options)  # type: ignore[arg-type]
    assert torch.equal(module(*tensors, target), linear_distillation_loss(*tensors, target=target, **options))  # type: ignore[arg-type]
    assert repr(module) == "LinearDistillationLoss('js', beta=0.1, temperature=2.0, reduction='sum')"
    with pytest.raises(ValueError, match="LinearDistillationLoss: beta must be between 0 and 1"):
        LinearDistillationLoss(divergence="js", beta=1.0)


def _at(index: int, device: str) -> Tensor:
    return torch.tensor([index], device=device)
