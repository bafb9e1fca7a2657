"""Gradients of the step before are gone before the forward pass, and nobody can tell but the memory."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("lightning", reason="needs the extra braze[lightning]")
import lightning as L
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from braze.benchmarks import memory
from braze.lightning_ext import FusedPrecision

from .lightning_net import WARNINGS, Net, batches, make_trainer

pytestmark = WARNINGS


class Watched(Net):
    """Records, in each forward pass, the bytes of gradients that are alive."""

    def __init__(self) -> None:
        super().__init__()
        self.alive: list[int] = []

    def training_step(self, batch: list[Tensor], index: int) -> Any:
        self.alive.append(sum(p.grad.nbytes for p in self.parameters() if p.grad is not None))
        return super().training_step(batch, index)


class LooksAtOld(Watched):
    def on_before_zero_grad(self, optimizer: torch.optim.Optimizer) -> None:
        self.alive.append(sum(p.grad.nbytes for p in self.parameters() if p.grad is not None))


class Callback(L.Callback):
    def on_before_zero_grad(self, trainer: L.Trainer, model: Net, optimizer: torch.optim.Optimizer) -> None:
        pass


def fit(early: bool, model: type[Watched] = Watched, **options: Any) -> Watched:
    torch.manual_seed(0)
    net = model()
    plugin = FusedPrecision(early_zero_grad=early)
    make_trainer("32-true", plugin, **options).fit(net, batches())
    return net


@pytest.mark.parametrize("every", [1, 5])
def test_old_gradients_are_released_before_the_forward_pass(every: int) -> None:
    early, late = (fit(flag, accumulate_grad_batches=every) for flag in (True, False))
    assert early.losses == late.losses
    total = sum(p.nbytes for p in early.parameters())
    fresh = [index % every == 0 for _ in range(2) for index in range(12)]
    assert early.alive == [0 if first else total for first in fresh]
    assert late.alive == [0] + [total] * 23


def test_user_hooks_around_zero_grad_see_the_gradients() -> None:
    assert any(fit(True, LooksAtOld).alive[2::2])
    assert all(fit(True, callbacks=[Callback()]).alive[1:])


def test_lbfgs_evaluates_again_and_again() -> None:
    class Second(Watched):
        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.LBFGS(self.parameters(), lr=0.1, max_iter=3)

    early, late = fit(True, Second, max_epochs=1), fit(False, Second, max_epochs=1)
    assert early.losses == late.losses
    assert not any(early.alive)


class Wide(L.LightningModule):
    """Sixteen layers with as many weights as activations behind them."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(*(nn.Sequential(nn.Linear(256, 256), nn.Tanh()) for _ in range(16)))

    def training_step(self, batch: list[Tensor], index: int) -> Tensor:
        return self.body(batch[0]).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def test_peak_memory_is_lower_by_the_gradients() -> None:
    """Released late, the peak is at the end of the forward pass: all activations and all gradients of the step before.

    Released early, a layer's activations go as its gradients come, so that there is no more than one kind of them, and
    what the backward pass of a layer has in its hands: the gradients of its weight, output and input, and before tanh.
    """
    loader = DataLoader(TensorDataset(torch.zeros(256 * 3, 256)), batch_size=256)
    peaks = []
    for early in (True, False):
        plugin = FusedPrecision(early_zero_grad=early)
        trainer = make_trainer("32-true", plugin, max_epochs=1)
        peaks.append(memory.peak(lambda trainer=trainer: trainer.fit(Wide(), loader), torch.device("cpu")))
    gradients = sum(p.nbytes for p in Wide().parameters())
    assert peaks[1] - peaks[0] >= gradients * (1 - 4 / 16)
