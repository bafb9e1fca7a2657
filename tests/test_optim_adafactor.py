"""Adafactor: that of torch, which fails on empty parameters, and ours, which does not."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from braze.kernels import optim

from .budget import excess
from .test_optim import BACKENDS, differentiate, parameters, running

CASES: dict[str, dict[str, Any]] = {
    "plain": {"lr": 0.1, "eps": (1e-6, 1e-3)},
    "decayed": {"lr": 0.1, "eps": (1e-6, 1e-3), "weight_decay": 0.1, "beta2_decay": -0.5},
    "maximized, clipped later": {"lr": 0.5, "eps": (1e-6, 1e-2), "d": 2.0, "maximize": True},
}


def train(
    of: type, dtype: torch.dtype, device: str, drawn: torch.dtype, arguments: dict[str, Any]
) -> list[torch.Tensor]:
    params = [p for p in parameters(dtype, device, drawn) if p.numel()]
    optimizer = of(params, **arguments)
    for step in range(4):
        differentiate(params, step, drawn=drawn)
        optimizer.step()
    return [p.detach() for p in params]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("case", CASES)
def test_steps_are_those_of_torch(case: str, dtype: torch.dtype, backend: str | None, device: str) -> None:
    exact = train(torch.optim.Adafactor, torch.float64, device, dtype, CASES[case])
    plain = train(torch.optim.Adafactor, dtype, device, dtype, CASES[case])
    with running(backend):
        ours = train(optim.Adafactor, dtype, device, dtype, CASES[case])
    assert excess(ours, plain, exact) <= 1


@pytest.mark.parametrize("first", ["torch", "braze"])
def test_a_checkpoint_resumes_in_the_other(first: str) -> None:
    types = {"torch": torch.optim.Adafactor, "braze": optim.Adafactor}
    second = {"torch": "braze", "braze": "torch"}[first]
    params = [p for p in parameters(torch.float32, "cpu") if p.numel()]
    one = types[first](params, lr=0.1)
    differentiate(params, 0)
    one.step()
    other = copy.deepcopy(params)
    two = types[second](other, lr=0.5)
    two.load_state_dict(copy.deepcopy(one.state_dict()))
    for each, optimizer in ((params, one), (other, two)):
        differentiate(each, 1)
        optimizer.step()
    torch.testing.assert_close(other, params)
    torch.testing.assert_close(two.state_dict(), one.state_dict())


def test_an_empty_parameter_is_no_trouble() -> None:
    p = nn.Parameter(torch.zeros(0, 3))
    p.grad = torch.zeros(0, 3)
    optim.Adafactor([p]).step()
