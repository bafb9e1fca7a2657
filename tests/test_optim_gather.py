"""What an optimizer remembers of its last step is not used where something was changed since."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable

import pytest
import torch
from torch import nn

from braze.kernels import optim

Change = Callable[[torch.optim.Optimizer, list[nn.Parameter]], None]


def _replaced_state(optimizer: torch.optim.Optimizer, params: list[nn.Parameter]) -> None:
    optimizer.state[params[1]]["exp_avg"] = torch.ones_like(params[1])


def _loaded(optimizer: torch.optim.Optimizer, params: list[nn.Parameter]) -> None:
    saved = copy.deepcopy(optimizer.state_dict())
    for state in saved["state"].values():
        state["exp_avg"].add_(1.0)
    optimizer.load_state_dict(saved)


def _forgotten(optimizer: torch.optim.Optimizer, params: list[nn.Parameter]) -> None:
    optimizer.state.clear()


def _turned(optimizer: torch.optim.Optimizer, params: list[nn.Parameter]) -> None:
    optimizer.param_groups[0]["maximize"] = True


def _other_learning_rate(optimizer: torch.optim.Optimizer, params: list[nn.Parameter]) -> None:
    optimizer.param_groups[0]["lr"] = 0.5


def _laid_out_otherwise(optimizer: torch.optim.Optimizer, params: list[nn.Parameter]) -> None:
    params[1].data = params[1].data.t().contiguous().t()


def _swapped(optimizer: torch.optim.Optimizer, params: list[nn.Parameter]) -> None:
    params[0] = optimizer.param_groups[0]["params"][0] = nn.Parameter(torch.ones(3, 5))


def _grown(optimizer: torch.optim.Optimizer, params: list[nn.Parameter]) -> None:
    params.append(nn.Parameter(torch.ones(7)))
    optimizer.add_param_group({"params": params[-1:], "lr": 0.3})


def _without_gradient(optimizer: torch.optim.Optimizer, params: list[nn.Parameter]) -> None:
    params[1].grad = None


def _with_gradient_laid_out_otherwise(optimizer: torch.optim.Optimizer, params: list[nn.Parameter]) -> None:
    assert params[1].grad is not None
    params[1].grad = params[1].grad.t().contiguous().t()


BEFORE_BACKWARD = (_replaced_state, _loaded, _forgotten, _turned, _other_learning_rate, _laid_out_otherwise, _swapped,
                   _grown)  # fmt: skip
AFTER_BACKWARD = (_without_gradient, _with_gradient_laid_out_otherwise)


def _trained(make: Callable[..., torch.optim.Optimizer], change: Change) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    params = [nn.Parameter(torch.randn(3, 5, generator=generator)) for _ in range(3)]
    optimizer = make(params, lr=0.1)
    for step in range(6):
        if step == 3 and change in BEFORE_BACKWARD:
            change(optimizer, params)
        for p in params:
            p.grad = torch.empty_like(p).copy_(torch.randn(p.shape, generator=generator))
        if step == 3 and change in AFTER_BACKWARD:
            change(optimizer, params)
        optimizer.step()
        if step == 2 and isinstance(optimizer, optim.FusedStep):
            assert optimizer.gathered is not None
    return [p.detach() for p in params]


@pytest.mark.parametrize("change", BEFORE_BACKWARD + AFTER_BACKWARD)
def test_a_change_between_two_steps_counts(change: Change) -> None:
    # Not fused=True: on the CPU that pairs elements of tensors that lie in memory in different ways.
    theirs = _trained(lambda params, lr: torch.optim.Adam(params, lr, foreach=False), change)
    torch.testing.assert_close(_trained(optim.Adam, change), theirs)


def test_gradients_are_not_kept() -> None:
    p = nn.Parameter(torch.ones(3))
    optimizer = optim.SGD([p], lr=0.1, momentum=0.9)
    for _ in range(3):
        p.grad = torch.ones(3)
        optimizer.step()
    gradient = weakref.ref(p.grad)
    p.grad = None
    assert gradient() is None
