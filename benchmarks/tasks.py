"""What the demo trains, on what, and for how long. Lightning, which takes ten seconds to import, is imported on use."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch.utils.data import Dataset

from . import data

if TYPE_CHECKING:
    from .lightning_modules import Classifier


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

    from .lightning_modules import LanguageModel

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

    from .lightning_modules import Classifier

    return Classifier(resnet18(num_classes=10), learning_rate=1e-3)


def vit() -> Classifier:
    """timm's VisionTransformer on 64 patches, 0.8 million parameters."""
    from timm.models.vision_transformer import VisionTransformer

    from .lightning_modules import Classifier

    network = VisionTransformer(
        img_size=16,
        patch_size=2,
        embed_dim=128,
        depth=4,
        num_heads=4,
        num_classes=10,
        class_token=False,
        global_pool="avg",
    )
    return Classifier(network, learning_rate=1e-3)


TASKS = {
    "llama": Task("Llama, bytes of source text", llama, lambda: data.source_text(256), 4, 120, 256, "tokens"),
    "resnet": Task("ResNet-18, digits", resnet, lambda: data.digits(32), 64, 80, 1, "images"),
    "vit": Task("ViT, digits", vit, lambda: data.digits(16), 64, 120, 1, "images"),
}
