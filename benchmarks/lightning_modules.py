"""What the demo trains: ordinary Lightning modules around ordinary networks, with nothing in them about braze."""

from __future__ import annotations

from typing import Any

import lightning as L
import torch
from torch import Tensor, nn


class Classifier(L.LightningModule):
    """Trains ``network`` to name the class of an image."""

    def __init__(self, network: nn.Module, learning_rate: float) -> None:
        super().__init__()
        self.network = network
        self.loss = nn.CrossEntropyLoss()
        self.learning_rate = learning_rate

    def compute_loss(self, batch: Any) -> Tensor:
        """Mean cross-entropy of one batch of (images, labels)."""
        images, labels = batch
        return self.loss(self.network(images), labels)

    def training_step(self, batch: Any, index: int) -> Tensor:
        """The loss to descend."""
        loss = self.compute_loss(batch)
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch: Any, index: int) -> None:
        """The loss to report."""
        self.log("validation_loss", self.compute_loss(batch))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """AdamW over everything."""
        return torch.optim.AdamW(self.parameters(), lr=self.learning_rate)


class LanguageModel(Classifier):
    """Trains a causal language model to name the next byte."""

    def compute_loss(self, batch: Tensor) -> Tensor:
        """Mean cross-entropy of every byte of [B, S] after the first."""
        logits = self.network(input_ids=batch, use_cache=False).logits  # [B, S, 256]
        return self.loss(logits[:, :-1].flatten(0, 1), batch[:, 1:].flatten())
