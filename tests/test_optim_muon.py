"""Muon: that of torch for matrices, AdamW for the rest."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from braze.kernels import optim, use_backend

from .budget import excess
from .test_optim import BACKENDS, differentiate, running

#: Two of one shape, a wide one, a tall one that is a transposed view.
MATRICES = ((8, 8), (8, 8), (5, 40), (20, 30))


def matrices(dtype: torch.dtype) -> list[nn.Parameter]:
    draw = torch.Generator().manual_seed(0)
    made = [torch.randn(shape, generator=draw).to(dtype) for shape in MATRICES]
    made[3] = made[3].mT
    return [nn.Parameter(t) for t in made]


def train(make: Callable[[list[nn.Parameter]], Any], params: list[nn.Parameter], steps: int = 4) -> list[Tensor]:
    optimizer = make(params)
    for step in range(steps):
        differentiate(params, step)
        optimizer.step()
    return [p.detach() for p in params]


def exact(lr: float, momentum: float, weight_decay: float, nesterov: bool) -> list[Tensor]:
    """The same formulas in float64."""
    params = [p.detach().double() for p in matrices(torch.float32)]
    momenta = [torch.zeros_like(p) for p in params]
    for step in range(4):
        leaves = matrices(torch.float32)
        differentiate(leaves, step)
        for p, b, leaf in zip(params, momenta, leaves, strict=True):
            assert leaf.grad is not None
            g = leaf.grad.double()
            b.lerp_(g, 1 - momentum)
            x = g.lerp(b, momentum) if nesterov else b.clone()
            p.mul_(1 - lr * weight_decay).sub_(lr * direction(x))
    return params


def direction(x: Tensor) -> Tensor:
    """r·X of a matrix in float64."""
    m, n = x.shape
    x = (x.mT if m > n else x) / x.norm()
    for _ in range(5):
        gram = x @ x.mT
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return max(1, m / n) ** 0.5 * (x.mT if m > n else x)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("nesterov", [True, False], ids=["Nesterov", "plain"])
def test_steps_are_those_of_torch(nesterov: bool, backend: str | None) -> None:
    arguments: dict[str, Any] = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.3, "nesterov": nesterov}
    plain = train(lambda params: torch.optim.Muon(params, **arguments), matrices(torch.float32))
    with running(backend):
        ours = train(lambda params: optim.Muon(params, **arguments), matrices(torch.float32))
    assert excess(ours, plain, exact(**arguments)) <= 1


@pytest.mark.parametrize(
    ("adjust", "r"),
    [
        ("match_rms_adamw", lambda m, n: 0.2 * max(m, n) ** 0.5),
        ("spectral_unclamped", lambda m, n: (m / n) ** 0.5),  # newer than the oldest torch
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_the_shape_of_a_matrix_scales_its_step(adjust: str, r: Callable[[int, int], float]) -> None:
    """A first step without decay is r·X: its size against the original one is the ratio of the two r."""

    def first(adjust_lr_fn: str) -> list[Tensor]:
        params = matrices(torch.float32)
        before = [p.detach().clone() for p in params]
        after = train(lambda p: optim.Muon(p, lr=1.0, weight_decay=0.0, adjust_lr_fn=adjust_lr_fn), params, steps=1)
        return [(b - a).norm() for b, a in zip(before, after, strict=True)]

    expected = [r(*p.shape) / max(1, p.shape[0] / p.shape[1]) ** 0.5 for p in matrices(torch.float32)]
    found = [one / other for one, other in zip(first(adjust), first("original"), strict=True)]
    torch.testing.assert_close(torch.stack(found), torch.tensor(expected))


def test_singular_values_come_near_one() -> None:
    drawn = torch.randn(3, 12, 30, generator=torch.Generator().manual_seed(0))
    x = optim.muon.orthogonal(drawn, (3.4445, -4.7750, 2.0315), 5, 1e-7)
    values = torch.linalg.svdvals(x.float())
    assert values.min() > 0.3  # the coefficients keep to about 0.5 … 1.5, for values that are not tiny at the start
    assert values.max() < 1.5


def test_what_is_no_matrix_or_not_for_muon_gets_adamw() -> None:
    def params() -> list[nn.Parameter]:
        draw = torch.Generator().manual_seed(0)
        return [nn.Parameter(torch.randn(shape, generator=draw)) for shape in ((7,), (3, 4, 2), (6, 5))]

    ours = train(
        lambda p: optim.Muon(
            [{"params": p[:2]}, {"params": p[2:], "algorithm": "adamw"}], adamw_lr=0.01, betas=(0.8, 0.9)
        ),
        params(),
    )
    theirs = train(lambda p: torch.optim.AdamW(p, 0.01, betas=(0.8, 0.9), weight_decay=0.1, fused=True), params())
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


@pytest.mark.parametrize("first", ["torch", "braze"])
def test_a_checkpoint_resumes_in_the_other(first: str) -> None:
    types = {"torch": torch.optim.Muon, "braze": optim.Muon}
    second = {"torch": "braze", "braze": "torch"}[first]
    params = matrices(torch.float32)
    one = types[first](params, lr=0.1)
    for step in range(2):
        differentiate(params, step)
        one.step()
    other = copy.deepcopy(params)
    two = types[second](other, lr=0.5)
    two.load_state_dict(copy.deepcopy(one.state_dict()))
    assert two.param_groups[0]["lr"] == 0.1
    before = [p.detach().double() for p in params]
    for each, optimizer in ((params, one), (other, two)):
        differentiate(each, 2)
        optimizer.step()
    wanted = []
    for p, q, old in zip(params, other, before, strict=True):
        torch.testing.assert_close(two.state[q]["momentum_buffer"], one.state[p]["momentum_buffer"])
        momentum = two.state[q]["momentum_buffer"].double()
        wanted.append(old * (1 - 0.1 * 0.1) - 0.1 * direction(q.grad.double().lerp(momentum, 0.95)))
    ours, theirs = (params, other) if first == "braze" else (other, params)
    assert excess([p.detach() for p in ours], [p.detach() for p in theirs], wanted) <= 1


def test_bfloat16_rounds_stochastically_and_gradients_are_cleared() -> None:
    p = nn.Parameter(torch.zeros(64, 64, dtype=torch.bfloat16))
    with use_backend("triton"):
        optimizer = optim.Muon([p], rounding="stochastic", clear_gradients=True, max_norm=1.0)
        p.grad = torch.randn_like(p)
        optimizer.step()
    assert optimizer.gradient_norm is not None
    assert not p.grad.any()
    assert optimizer.state[p]["momentum_buffer"].dtype == torch.float32
    assert p.detach().any()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"lr": -1.0}, "lr must not be negative, got -1.0"),
        ({"momentum": 1.0}, r"momentum and betas must lie in \[0, 1\), got 1.0"),
        ({"adjust_lr_fn": "none"}, "adjust_lr_fn must be one of original, .*got 'none'"),
        ({"algorithm": "sgd"}, "algorithm of a group must be 'muon' or 'adamw', got 'sgd'"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_arguments_out_of_range(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        optim.Muon([nn.Parameter(torch.ones(2, 2))], **arguments)
