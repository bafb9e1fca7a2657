"""What linear_cross_entropy promises beside its values: no logits, nothing for ignored tokens, any head, a compiler."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from hypothesis import settings
from torch import Tensor

from braze.kernels import LinearCrossEntropyLoss, linear_cross_entropy, linear_log_probs, use_backend

from .graphs import compiled_whole, shapes

every_backend = pytest.mark.parametrize("backend", ["eager", "compile", "triton"])
every_chunked_backend = pytest.mark.parametrize("backend", ["compile", "triton"])
N, D, C = 24, 16, 40

#: Memory for two tokens' logits in float32, and for the product that the CPU widens.
TWO_TOKENS = 2 * C * 4


def drawn(*shape: int, device: str, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device)


def head(device: str) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states, a weight, and targets of which every third is ignored."""
    target = torch.arange(N, device=device) % C
    target[::3] = -100
    hidden = drawn(N, D, device=device).requires_grad_()
    return hidden, drawn(C, D, device=device, seed=1).requires_grad_(), target


@every_chunked_backend
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_ignored_tokens_are_not_computed_and_chunks_keep_to_the_budget(
    backend: str, reduction: str, walked: list[list[int]], device: str
) -> None:
    hidden, weight, target = head(device)
    with use_backend(backend):
        loss = linear_cross_entropy(hidden, weight, target, reduction=reduction, memory_budget=TWO_TOKENS)
        loss.sum().backward()
    counted = (target != -100).nonzero().flatten().tolist()
    passes = 1 if reduction == "mean" else 2
    assert [place for chunk in walked for place in chunk] == counted * passes
    assert {len(chunk) for chunk in walked} == {2}
    assert hidden.grad is not None
    assert not hidden.grad[target == -100].any()


@every_chunked_backend
def test_no_gradient_is_computed_where_none_is_wanted(backend: str, device: str) -> None:
    hidden, weight, target = head(device)
    frozen = weight.detach()
    with use_backend(backend):
        loss = linear_cross_entropy(hidden, frozen, target)
        with torch.no_grad():
            assert torch.equal(linear_cross_entropy(hidden, weight, target), loss)
        (found,) = torch.autograd.grad(loss, hidden)
        (alone,) = torch.autograd.grad(linear_cross_entropy(hidden.detach(), weight, target), weight)
    wanted = torch.autograd.grad(F.cross_entropy(F.linear(hidden, weight), target), [hidden, weight])
    torch.testing.assert_close([found, alone], list(wanted))


@every_chunked_backend
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_the_second_backward_pass_on_a_retained_graph_gives_the_same_bits(
    backend: str, reduction: str, device: str
) -> None:
    hidden, weight, target = head(device)
    with use_backend(backend):
        loss = linear_cross_entropy(hidden, weight, target, reduction=reduction)
        cotangent = torch.full_like(loss, 0.3)
        first = torch.autograd.grad(loss, [hidden, weight], cotangent, retain_graph=True)
        first = [g.clone() for g in first]  # what is handed out must not be written to by the second
        second = torch.autograd.grad(loss, [hidden, weight], cotangent)
    for ours, again in zip(first, second, strict=True):
        assert torch.equal(ours, again)


@every_backend
def test_a_head_of_low_rank_learns_through_both_factors(backend: str, device: str) -> None:
    hidden, base, target = head(device)
    base.requires_grad_(False)
    a, b = (drawn(*shape, device=device, seed=2).requires_grad_() for shape in ((4, D), (C, 4)))
    with use_backend(backend):
        ours = torch.autograd.grad(linear_cross_entropy(hidden, base + b @ a, target), [hidden, a, b])
    theirs = F.cross_entropy(F.linear(hidden, base) + F.linear(F.linear(hidden, a), b), target)
    torch.testing.assert_close(ours, torch.autograd.grad(theirs, [hidden, a, b]))


@every_backend
def test_a_tied_embedding_gets_both_gradients(backend: str, device: str) -> None:
    _, weight, target = head(device)
    tokens = torch.arange(N, device=device) % C

    def loss(criterion) -> Tensor:
        return criterion(torch.tanh(F.embedding(tokens, weight)))

    with use_backend(backend):
        (ours,) = torch.autograd.grad(loss(lambda h: linear_cross_entropy(h, weight, target)), weight)
    (theirs,) = torch.autograd.grad(loss(lambda h: F.cross_entropy(F.linear(h, weight), target)), weight)
    torch.testing.assert_close(ours, theirs)


@every_backend
def test_repeating_a_token_is_weighting_it(backend: str, device: str) -> None:
    hidden, weight, target = head(device)
    times = torch.arange(N, device=device) % 3
    with use_backend(backend):
        weighted = linear_cross_entropy(hidden, weight, target, token_weight=times.float())
        repeated = linear_cross_entropy(hidden.repeat_interleave(times, 0), weight, target.repeat_interleave(times))
        found = [torch.autograd.grad(loss, [hidden, weight]) for loss in (weighted, repeated)]
    torch.testing.assert_close(weighted, repeated)
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("frozen", [False, True], ids=["learned", "frozen head"])
def test_compiles_whole_and_keeps_no_logits(reduction: str, frozen: bool, device: str) -> None:
    hidden, weight, target = head(device)
    learned = [hidden] if frozen else [hidden, weight]
    weight.requires_grad_(not frozen)

    def loss(hidden: Tensor, weight: Tensor) -> Tensor:
        return linear_cross_entropy(torch.tanh(hidden), weight, target, reduction=reduction, label_smoothing=0.1).sum()

    compiled, graphs = compiled_whole(loss)
    ours, theirs = compiled(hidden, weight), loss(hidden, weight)
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(torch.autograd.grad(ours, learned), torch.autograd.grad(theirs, learned))
    assert len(graphs) == 2
    assert (N, C) not in shapes(graphs)


def test_log_probs_are_those_of_the_tempered_logits(device: str) -> None:
    hidden, weight, target = head(device)
    bias = drawn(C, device=device, seed=3).requires_grad_()
    for dtype in (torch.float32, torch.bfloat16):
        operands = [t.detach().to(dtype).requires_grad_() for t in (hidden, weight, bias)]
        ours = linear_log_probs(operands[0], operands[1], target, operands[2], temperature=0.5)
        logits = F.linear(*(t.double() for t in operands)) / 0.5
        index = target.clamp(min=0)[:, None]
        theirs = torch.log_softmax(logits, 1).gather(1, index).squeeze(1).masked_fill(target == -100, 0.0)
        assert ours.dtype == torch.float32
        # Half a step of rounding in the target's logit and as much in the log of the sum; and the 17 additions of each.
        rounding = torch.finfo(dtype).eps * logits.abs().max().item()
        terms = F.linear(*(t.double().abs() for t in operands)) / 0.5
        summing = 17 * torch.finfo(torch.float32).eps * terms.max().item()
        torch.testing.assert_close(ours.double(), theirs, rtol=0.0, atol=rounding + summing)
    with pytest.raises(ValueError, match="temperature must be positive, got 0"):
        linear_log_probs(hidden, weight, target, temperature=0.0)


def test_the_module_is_that_of_torch(device: str) -> None:
    if not hasattr(torch.nn, "LinearCrossEntropyLoss"):
        pytest.skip("this torch has no LinearCrossEntropyLoss")
    hidden, _, target = head(device)
    weight = drawn(C, device=device, seed=4).abs()
    theirs = torch.nn.LinearCrossEntropyLoss(D, C, bias=True, weight=weight, label_smoothing=0.1, device=device)
    ours = LinearCrossEntropyLoss(
        D, C, bias=True, weight=torch.ones(C, device=device), label_smoothing=0.1, device=device
    )
    ours.load_state_dict(theirs.state_dict())
    torch.testing.assert_close(ours(hidden, target), theirs(hidden, target))
    copy.deepcopy(theirs).load_state_dict(ours.state_dict())


def test_autocast_multiplies_in_half_precision_and_loses_in_single(device: str) -> None:
    hidden, weight, target = head(device)
    with torch.autocast(device, torch.bfloat16):
        ours, theirs = linear_cross_entropy(hidden, weight, target), F.cross_entropy(F.linear(hidden, weight), target)
    assert ours.dtype == theirs.dtype == torch.float32
    torch.testing.assert_close(ours, theirs)
    gradients = [torch.autograd.grad(loss, [hidden, weight]) for loss in (ours, theirs)]
    for our, their in zip(*gradients, strict=True):
        # Sixteen tokens count, so that to divide by them is exact: half a step for ours, rounded once, and for theirs.
        step = torch.finfo(torch.bfloat16).eps * their.abs().max().item()
        torch.testing.assert_close(our, their, rtol=0.0, atol=step)


@every_backend
def test_a_scaled_loss_keeps_gradients_that_float16_alone_would_lose(backend: str, device: str) -> None:
    """As GradScaler does: the gradient of a logit is about 1 / (N·C) = 2⁻²⁶ here, below what float16 can hold."""
    if backend == "triton" and device == "cpu" and settings.get_current_profile_name() != "deep":
        pytest.skip("2²⁶ logits take Triton's interpreter minutes; HYPOTHESIS_PROFILE=deep runs it")
    tokens, classes, scale = 4096, 2**14, 2.0**14
    hidden, weight = drawn(tokens, 4, device=device) / 8, drawn(classes, 4, device=device, seed=1) / 8
    target = torch.zeros(tokens, dtype=torch.long, device=device)
    results = []
    for dtype in (torch.float16, torch.float64):
        operands = [t.to(torch.float16).to(dtype).requires_grad_() for t in (hidden, weight)]
        with use_backend(backend if dtype == torch.float16 else "eager"):
            loss = linear_cross_entropy(*operands, target, dtype=torch.promote_types(dtype, torch.float32))
        results.append([g.double() / scale for g in torch.autograd.grad(scale * loss, operands)])
    (_, ours), (_, truth) = results
    rest = slice(1, None)  # all classes but the target's, whose gradient is large
    error = (ours[rest] - truth[rest]).norm() / truth[rest].norm()
    assert error < 0.02
