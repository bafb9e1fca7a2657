"""The models of ``python -m braze.benchmarks models``: random weights and random batches, nothing is downloaded.

Each is the published architecture on a GPU, and the same code with fewer and narrower blocks on the CPU and for
``--quick``. Dropout and DropPath are off, so that two runs are the same.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Scale = Literal["quick", "cpu", "cuda"]
Size = Mapping[str, Any]
#: The arguments of a model's forward, and what the loss needs besides.
Batch = dict[str, Tensor]

CLASSES = 1000


@dataclass(frozen=True)
class Workload:
    """A model, what it is fed, what it descends on, and what it is asked for when it is trained."""

    build: Callable[[Size], nn.Module]
    #: ``batch(size, generator)``
    batch: Callable[[Size, torch.Generator], Batch]
    loss: Callable[[nn.Module, Batch], Tensor]
    #: The forward of a trained model, and its answer.
    infer: Callable[[nn.Module, Batch], Tensor]
    sizes: Mapping[Scale, Size]
    unit: Literal["tokens", "images"]

    def items(self, size: Size) -> int:
        """Tokens or images in a batch."""
        return size["batch"] * (size["tokens"] if self.unit == "tokens" else 1)


def shape(size: Size) -> str:
    """Such as "batch=4 width=256"."""
    return " ".join(f"{name}={_word(value)}" for name, value in size.items())


def _word(value: Any) -> str:
    return "-".join(map(str, value)) if isinstance(value, Sequence) else str(value)


def _llama(size: Size) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=size["vocabulary"],
            hidden_size=size["width"],
            intermediate_size=size["middle"],
            num_hidden_layers=size["depth"],
            num_attention_heads=size["heads"],
            num_key_value_heads=size["kv_heads"],
            max_position_embeddings=size["tokens"],
            tie_word_embeddings=size["vocabulary"] > 100_000,  # as Llama 3.2 1B
            bos_token_id=None,
            eos_token_id=None,
            use_cache=False,
        )
    )


def _gpt2(size: Size) -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=size["vocabulary"],
            n_embd=size["width"],
            n_layer=size["depth"],
            n_head=size["heads"],
            n_positions=size["tokens"],
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            bos_token_id=None,
            eos_token_id=None,
            use_cache=False,
        )
    )


def _vit(size: Size) -> nn.Module:
    from timm.models.vision_transformer import VisionTransformer

    return VisionTransformer(
        img_size=size["side"],
        patch_size=size["patch"],
        embed_dim=size["width"],
        depth=size["depth"],
        num_heads=size["heads"],
        num_classes=CLASSES,
    )


def _convnext(size: Size) -> nn.Module:
    from timm.models.convnext import ConvNeXt

    return ConvNeXt(depths=size["depths"], dims=size["widths"], num_classes=CLASSES)


def _resnet(size: Size) -> nn.Module:
    from torchvision.models.resnet import Bottleneck, ResNet

    return ResNet(Bottleneck, list(size["depths"]), num_classes=CLASSES)


def _dit(size: Size) -> nn.Module:
    from .zoo.diffusion import DiT

    return DiT(size["width"], size["depth"], size["heads"])


def _unet(size: Size) -> nn.Module:
    from .zoo.diffusion import UNet

    return UNet(size["width"])


def _text(size: Size, generator: torch.Generator) -> Batch:
    return {"input_ids": torch.randint(size["vocabulary"], (size["batch"], size["tokens"]), generator=generator)}


def _images(size: Size, generator: torch.Generator) -> Batch:
    images = torch.randn(size["batch"], 3, size["side"], size["side"], generator=generator)
    return {"x": images, "labels": torch.randint(CLASSES, (size["batch"],), generator=generator)}


def _noisy(channels: int) -> Callable[[Size, torch.Generator], Batch]:
    def batch(size: Size, generator: torch.Generator) -> Batch:
        x, noise = torch.randn(2, size["batch"], channels, size["side"], size["side"], generator=generator)
        return {"x": x, "t": torch.rand(size["batch"], 1, generator=generator), "noise": noise}

    return batch


def _text_loss(model: nn.Module, batch: Batch) -> Tensor:
    loss: Tensor = model(input_ids=batch["input_ids"], labels=batch["input_ids"]).loss
    return loss


def _likeliest(model: nn.Module, batch: Batch) -> Tensor:
    """The largest logit of every token; it needs all of them, where a slice of deferred logits would not."""
    logits: Tensor = model(input_ids=batch["input_ids"]).logits
    return logits.amax(-1)


def _image_loss(model: nn.Module, batch: Batch) -> Tensor:
    return F.cross_entropy(model(batch["x"]), batch["labels"])


def _image_logits(model: nn.Module, batch: Batch) -> Tensor:
    logits: Tensor = model(batch["x"])
    return logits


def _noise_loss(model: nn.Module, batch: Batch) -> Tensor:
    """As Ho, Jain and Abbeel 2020: the model names the noise in its input."""
    return F.mse_loss(model(batch["x"] + batch["noise"], batch["t"]), batch["noise"])


def _noise(model: nn.Module, batch: Batch) -> Tensor:
    answer: Tensor = model(batch["x"], batch["t"])
    return answer


def _language(build: Callable[[Size], nn.Module], **sizes: Size) -> Workload:
    return Workload(build, _text, _text_loss, _likeliest, sizes, "tokens")  # type: ignore[arg-type]


def _vision(build: Callable[[Size], nn.Module], **sizes: Size) -> Workload:
    return Workload(build, _images, _image_loss, _image_logits, sizes, "images")  # type: ignore[arg-type]


def _diffusion(build: Callable[[Size], nn.Module], channels: int, **sizes: Size) -> Workload:
    return Workload(build, _noisy(channels), _noise_loss, _noise, sizes, "images")  # type: ignore[arg-type]


# The logits of the CPU's language models are 32 MiB: fuse defers from 16 on.
WORKLOADS: dict[str, Workload] = {
    "llama-tiny": _language(
        _llama,
        quick={
            "batch": 2,
            "tokens": 24,
            "width": 64,
            "middle": 176,
            "depth": 2,
            "heads": 4,
            "kv_heads": 2,
            "vocabulary": 256,
        },
        cpu={
            "batch": 4,
            "tokens": 256,
            "width": 256,
            "middle": 688,
            "depth": 2,
            "heads": 4,
            "kv_heads": 2,
            "vocabulary": 8192,
        },
    ),
    "llama-0.2B": _language(
        _llama,
        cuda={
            "batch": 8,
            "tokens": 1024,
            "width": 1024,
            "middle": 2816,
            "depth": 12,
            "heads": 16,
            "kv_heads": 8,
            "vocabulary": 32_000,
        },
    ),
    "llama-1B": _language(
        _llama,
        cuda={
            "batch": 1,
            "tokens": 2048,
            "width": 2048,
            "middle": 8192,
            "depth": 16,
            "heads": 32,
            "kv_heads": 8,
            "vocabulary": 128_256,
        },
    ),
    "gpt2": _language(
        _gpt2,
        quick={"batch": 2, "tokens": 24, "width": 64, "depth": 2, "heads": 4, "vocabulary": 256},
        cpu={"batch": 4, "tokens": 256, "width": 256, "depth": 2, "heads": 4, "vocabulary": 8192},
        cuda={"batch": 8, "tokens": 1024, "width": 768, "depth": 12, "heads": 12, "vocabulary": 50_257},
    ),
    "vit-b": _vision(
        _vit,
        quick={"batch": 2, "side": 32, "patch": 8, "width": 64, "depth": 2, "heads": 4},
        cpu={"batch": 16, "side": 112, "patch": 16, "width": 256, "depth": 2, "heads": 4},
        cuda={"batch": 64, "side": 224, "patch": 16, "width": 768, "depth": 12, "heads": 12},
    ),
    "convnext-t": _vision(
        _convnext,
        quick={"batch": 2, "side": 32, "depths": (1, 1, 1, 1), "widths": (16, 32, 64, 128)},
        cpu={"batch": 8, "side": 64, "depths": (1, 1, 1, 1), "widths": (64, 128, 256, 512)},
        cuda={"batch": 64, "side": 224, "depths": (3, 3, 9, 3), "widths": (96, 192, 384, 768)},
    ),
    "resnet-50": _vision(
        _resnet,
        quick={"batch": 8, "side": 16, "depths": (1, 1, 1, 1)},
        cpu={"batch": 8, "side": 64, "depths": (1, 1, 1, 1)},
        cuda={"batch": 64, "side": 224, "depths": (3, 4, 6, 3)},
    ),
    "dit": _diffusion(
        _dit,
        4,
        quick={"batch": 2, "side": 8, "width": 64, "depth": 2, "heads": 4},
        cpu={"batch": 4, "side": 32, "width": 256, "depth": 2, "heads": 4},
        cuda={"batch": 32, "side": 32, "width": 768, "depth": 12, "heads": 12},
    ),
    "unet": _diffusion(
        _unet,
        3,
        quick={"batch": 2, "side": 8, "width": 16},
        cpu={"batch": 4, "side": 32, "width": 64},
        cuda={"batch": 32, "side": 64, "width": 128},
    ),
}
