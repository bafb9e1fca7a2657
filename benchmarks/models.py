"""What the demo trains: ordinary Lightning modules around ordinary networks, with nothing in them about braze."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from . import data


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


@dataclass(frozen=True)
class Task:
    """A network, its data, and how long to train it."""

    title: str
    build: Callable[[], Classifier]
    data: Callable[[], tuple[Dataset[Any], Dataset[Any]]]
    batch: int
    steps: int
    #: What one element of a batch counts for in the throughput, and what that is called.
    items: int
    unit: str


def llama() -> Classifier:
    """The Llama architecture over bytes, 3.3 million parameters."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=256,
        hidden_size=256,
        intermediate_size=688,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        bos_token_id=None,
        eos_token_id=None,
    )
    return LanguageModel(LlamaForCausalLM(config), learning_rate=2e-3)


def resnet() -> Classifier:
    """torchvision's ResNet-18, ten classes."""
    from torchvision.models import resnet18

    return Classifier(resnet18(num_classes=10), learning_rate=1e-3)


def vit() -> Classifier:
    """timm's VisionTransformer on 64 patches, 0.8 million parameters."""
    from timm.models.vision_transformer import VisionTransformer

    network = VisionTransformer(
        img_size=16, patch_size=2, embed_dim=128, depth=4, num_heads=4, num_classes=10, class_token=False, global_pool="avg"
    )
    return Classifier(network, learning_rate=1e-3)


TASKS = {
    "llama": Task("Llama, bytes of source text", llama, lambda: data.source_text(256), 4, 120, 256, "tokens"),
    "resnet": Task("ResNet-18, digits", resnet, lambda: data.digits(32), 64, 80, 1, "images"),
    "vit": Task("ViT, digits", vit, lambda: data.digits(16), 64, 80, 1, "images"),
}
