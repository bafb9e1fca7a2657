"""What the tests of the Lightning plugins train, and what a curve is held to."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.plugins import Precision
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from braze.lightning_ext import FusedPrecision, fp8

PRECISIONS = ("32-true", "bf16-mixed", "bf16-true")
WARNINGS = [
    # Lightning's class for advice: add workers, define no unused loop, set a log interval.
    pytest.mark.filterwarnings("ignore::lightning.fabric.utilities.warnings.PossibleUserWarning"),
    # Lightning 2.6 builds a class of torch.utils._pytree that later versions of torch deprecate.
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*is deprecated:FutureWarning"),
    # Dynamo looks at the gradient of what flows into a compiled block.
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"),
    # torch's own RMSNorm says that it is slow under autocast, in the vanilla run.
    pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight:UserWarning"),
]
QUIET = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}


class Block(nn.Module):
    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, eps)
        self.up = nn.Linear(width, width)
        self.second = nn.RMSNorm(width, eps)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.second(nn.functional.silu(self.up(self.norm(x))))


class Net(L.LightningModule):
    def __init__(self, eps: float = 1e-5) -> None:
        super().__init__()
        self.body = nn.Sequential(Block(16, eps), Block(16, eps), nn.Linear(16, 4))
        self.loss = nn.CrossEntropyLoss()
        self.losses: list[float] = []

    def training_step(self, batch: list[Tensor], index: int) -> Tensor:
        x, y = batch
        loss = self.loss(self.body(x), y)
        self.losses.append(loss.item())
        return loss

    def validation_step(self, batch: list[Tensor], index: int) -> None:
        x, y = batch
        self.log("loss", self.loss(self.body(x), y))

    def predict_step(self, batch: list[Tensor], index: int) -> Tensor:
        return self.body(batch[0])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=3e-3)


class SaveInTheMiddle(L.Callback):
    """After four batches of the first epoch."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_batch_end(self, trainer: L.Trainer, model: Net, outputs: Any, batch: Any, batch_idx: int) -> None:
        if trainer.current_epoch == 0 and batch_idx == 3:
            trainer.save_checkpoint(self.path)


def batches(size: int = 8, part: slice = slice(None)) -> DataLoader:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(96, 16, generator=generator)
    return DataLoader(TensorDataset(x[part], x[part, :4].argmax(1)), batch_size=size)


def make_trainer(precision: str, fused: bool | Precision, **options: Any) -> L.Trainer:
    """With Lightning's own plugin of a precision, with braze's, or with the one that is passed."""
    plugin = FusedPrecision(precision) if fused is True else fused
    chosen = {"plugins": [plugin]} if plugin else {"precision": precision}
    return L.Trainer(accelerator="cpu", **{"devices": 1, "max_epochs": 2, **QUIET, **chosen, **options})


def train(precision: str, fused: bool | Precision, model: Callable[[], Net] = Net, **options: Any) -> Net:
    torch.manual_seed(0)
    net = model()
    make_trainer(precision, fused, **options).fit(net, batches())
    return net


def emulate_float8(replace: Callable[[Any, str, Any], None]) -> None:
    """Products in float8 as torchao emulates them, for machines that have none."""
    recipe = fp8.config
    replace(fp8, "config", lambda name: dataclasses.replace(recipe(name), emulate=True))
    replace(fp8, "lacking_hardware", lambda: None)


def distance(a: list[float], b: list[float]) -> float:
    assert len(a) == len(b) > 0
    return max(abs(x - y) for x, y in zip(a, b, strict=True))


def assert_same_curve(fused: list[float], vanilla: list[float], exact: list[float]) -> None:
    """The operators' own contract, for a whole run: at most twice as far from the float64 run as vanilla is."""
    assert fused[-1] < fused[0], "nothing was learned, so the curves say nothing"
    assert distance(fused, exact) <= 2 * distance(vanilla, exact)
