"""What surrounds a step of an optimizer: clipping, scaling, averages, and the rounding of bfloat16 parameters."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from braze.kernels import optim, use_backend

from .test_optim import BACKENDS, differentiate, parameters, running


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("max_norm", [0.5, 1e6], ids=["clipped", "not clipped"])
def test_clipping_is_that_of_torch(max_norm: float, backend: str | None, device: str) -> None:
    params, other = parameters(torch.float32, device), parameters(torch.float32, device)
    ours, theirs = optim.SGD(params, lr=1.0, max_norm=max_norm), torch.optim.SGD(other, lr=1.0)
    differentiate(params, 0)
    differentiate(other, 0)
    with running(backend):
        ours.step()
    norm = nn.utils.clip_grad_norm_(other, max_norm)
    theirs.step()
    torch.testing.assert_close(ours.gradient_norm, norm)
    torch.testing.assert_close(params, other)


def _everything(params: list[nn.Parameter], optimizer: torch.optim.Optimizer) -> Any:
    return copy.deepcopy([[p.detach() for p in params], optimizer.state_dict()["state"]])


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_gradient_scaler_leaves_unscaling_to_the_step(backend: str | None, device: str) -> None:
    scaler = torch.amp.GradScaler(device, init_scale=1024.0)
    params, other = parameters(torch.float32, device), parameters(torch.float32, device)
    optimizer, plain = optim.AdamW(params, max_norm=1.0), torch.optim.AdamW(other)
    scaler.scale(torch.zeros((), device=device))
    with running(backend):
        for step, broken in enumerate((True, False, True, False)):
            differentiate(params, step, scale=scaler.get_scale())
            if broken:
                params[1].grad[0, 0] = torch.inf
                before = _everything(params, optimizer)
            scaler.step(optimizer)
            scaler.update()
            if broken:
                torch.testing.assert_close(_everything(params, optimizer), before, rtol=0, atol=0)
            else:
                differentiate(other, step)
                nn.utils.clip_grad_norm_(other, 1.0)
                plain.step()
    torch.testing.assert_close(params, other)


@pytest.mark.parametrize("backend", BACKENDS)
def test_running_averages_and_cleared_gradients(backend: str | None, device: str) -> None:
    params = parameters(torch.float32, device)
    optimizer = optim.SGD(params, lr=0.1, ema_decay=0.75, clear_gradients=True)
    expected = [p.detach().clone() for p in params]
    with running(backend):
        for step in range(4):
            differentiate(params, step)
            optimizer.step()
            expected = [0.75 * a + 0.25 * p.detach() for a, p in zip(expected, params, strict=True)]
            assert not any(p.grad.any() for p in params)
    own = [p.detach().clone() for p in params]
    with optimizer.averaged():
        torch.testing.assert_close([p.detach() for p in params], expected)
    torch.testing.assert_close([p.detach() for p in params], own, rtol=0, atol=0)


def test_what_is_not_averaged_is_refused() -> None:
    with (
        pytest.raises(RuntimeError, match="give the optimizer an ema_decay"),
        optim.SGD([nn.Parameter(torch.ones(1))]).averaged(),
    ):
        pass


# ------------------------------------------------------------------------------ bfloat16


def rounded_once(value: float, backend: str, seed: int, device: str, elements: int = 2**17) -> Tensor:
    """Bfloat16 zeros that become −value in a step, each rounded for itself."""
    p = nn.Parameter(torch.zeros(elements, dtype=torch.bfloat16, device=device))
    p.grad = torch.ones_like(p)
    with use_backend(backend):
        optim.SGD([p], lr=value, rounding="stochastic", seed=seed).step()
    return p.detach()


@pytest.mark.parametrize("backend", ["eager", "compile", "triton"])
@given(part=st.floats(0.01, 0.99), seed=st.integers(0, 2**31 - 1))
def test_stochastic_rounding_is_right_on_average(backend: str, part: float, seed: int) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    low, step = 1.0, torch.finfo(torch.bfloat16).eps
    found = rounded_once(low + part * step, backend, seed, device)
    assert set(found.unique().tolist()) <= {-low, -(low + step)}
    mean = (-found.double().mean().item() - low) / step
    # Five standard deviations of a mean of 2¹⁷ draws, and the 2⁻¹⁶ that 16 random bits resolve.
    assert abs(mean - part) < 5 * (part * (1 - part) / len(found)) ** 0.5 + 2**-16


def test_stochastic_rounding_depends_on_seed_step_and_parameter_alone(device: str) -> None:
    value = 1.0 + 0.4 * torch.finfo(torch.bfloat16).eps
    one = rounded_once(value, "eager", 1, device)
    for backend in ("eager", "compile", "triton"):
        torch.testing.assert_close(rounded_once(value, backend, 1, device), one, rtol=0, atol=0)
    assert (rounded_once(value, "triton", 2, device) != one).float().mean() > 0.4  # 2·0.4·0.6 if independent
    params = [nn.Parameter(torch.zeros(4096, dtype=torch.bfloat16, device=device)) for _ in range(2)]
    optimizer = optim.SGD(params, lr=value, rounding="stochastic", seed=1)
    draws = []
    for _ in range(2):
        for p in params:
            p.data.zero_()
            p.grad = torch.ones_like(p)
        optimizer.step()
        draws += [p.detach().clone() for p in params]
    torch.testing.assert_close(draws[0], one[:4096], rtol=0, atol=0)
    for other in draws[1:]:
        assert (draws[0] != other).float().mean() > 0.4


@pytest.mark.parametrize("backend", ["eager", "compile", "triton"])
def test_stochastic_rounding_leaves_what_needs_none(backend: str, device: str) -> None:
    exact = torch.tensor([0.0, 1.0, -2.5, torch.inf, -torch.inf, torch.nan], dtype=torch.bfloat16).repeat(4000)
    p = nn.Parameter(exact.to(device, copy=True))
    p.grad = torch.zeros_like(p)
    with use_backend(backend):
        optim.SGD([p], lr=1.0, rounding="stochastic").step()
    torch.testing.assert_close(p.detach().cpu(), exact, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("backend", ["eager", "compile", "triton"])
@pytest.mark.parametrize("rounding", ["stochastic", "kahan", "nearest"])
def test_small_steps_add_up(rounding: str, backend: str, device: str) -> None:
    """A hundred steps of a fiftieth of bfloat16's resolution: to nearest, nothing ever moves."""
    p = nn.Parameter(torch.ones(20_000, dtype=torch.bfloat16, device=device))
    resolution = torch.finfo(torch.bfloat16).eps
    with use_backend(backend):
        optimizer = optim.SGD([p], lr=resolution / 50, maximize=True, rounding=rounding)
        for _ in range(100):
            p.grad = torch.ones_like(p)
            optimizer.step()
    moved = (p.double().mean().item() - 1.0) / resolution
    if rounding == "nearest":
        assert moved == 0.0
    else:
        # Stochastic: five standard deviations, √(100·0.02·0.98 / 20,000) each. Kahan: exactly 2.
        assert abs(moved - 2.0) < 0.05


@pytest.mark.parametrize("backend", ["eager", "triton"])
def test_compensated_weights_follow_a_float32_copy(backend: str, device: str) -> None:
    """Weights and compensation together; every step is a quarter of what bfloat16 resolves, or less."""
    draw = torch.Generator().manual_seed(0)
    start = ((1 + torch.rand(1000, generator=draw)) * torch.randn(1000, generator=draw).sign()).bfloat16()
    p, copied = nn.Parameter(start.to(device, copy=True)), nn.Parameter(start.to(device).float())
    optimizer, plain = (
        optim.AdamW([p], lr=2**-10, rounding="kahan"),
        torch.optim.AdamW([copied], lr=2**-10),
    )
    steps = 20
    for _ in range(steps):
        copied.grad = (torch.randn(1000, generator=draw) + start.float()).bfloat16().to(device).float()
        p.grad = copied.grad.bfloat16()
        with use_backend(backend):
            optimizer.step()
        plain.step()
    assert ((copied - start.to(device)).abs() > steps * 2**-12).float().mean() > 0.5  # they moved
    # What is lost is 2⁻⁸ of the binade at most, and it is known to 2⁻⁹ of itself: 2⁻¹⁷ a step; float32 adds less.
    lost = p.double() + optimizer.state[p]["compensation"].double() - copied.double()
    assert lost.abs().max() <= steps * 2**-16 * copied.abs().max()
    torch.testing.assert_close(p.float(), copied, rtol=2**-8, atol=0)


@pytest.mark.parametrize("rounding", ["stochastic", "kahan"])
def test_states_are_float32_unless_asked_otherwise(rounding: str, device: str) -> None:
    for asked, got in ((None, torch.float32), (torch.bfloat16, torch.bfloat16)):
        params = parameters(torch.bfloat16, device)
        optimizer = optim.AdamW(params, rounding=rounding, state_dtype=asked)
        differentiate(params, 0)
        optimizer.step()
        assert {optimizer.state[p]["exp_avg_sq"].dtype for p in params} == {got}
