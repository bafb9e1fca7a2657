"""The models of the zoo, each with a call that trains it: random weights, small sizes, nothing is downloaded."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

#: A model, and the arguments of its forward.
Built = tuple[nn.Module, dict[str, Any]]

LISTS = Path(__file__).parent / "names.txt"


def names() -> list[str]:
    """``family:model`` for each model of the zoo."""
    lines = (line.split("#")[0].split() for line in LISTS.read_text().splitlines())
    return [f"{words[0]}:{name}" for words in lines if words for name in words[1:]]


def build(name: str) -> Built:
    """The model called ``family:model``, in training, with nothing random left in its forward."""
    family, _, model = name.partition(":")
    torch.manual_seed(0)
    return {"timm": _timm, "torchvision": _torchvision, "own": _own}.get(
        family, functools.partial(_transformers, family)
    )(model)


def _transformers(family: str, name: str) -> Built:
    import transformers

    from .shrink import FAMILIES, tiny_config

    config = tiny_config(name)
    config._experts_implementation = "eager"  # the others have no float64
    families: dict[str, Any] = FAMILIES
    classes = families[family][name]
    model = getattr(transformers, classes if isinstance(classes, str) else classes[0])(config)
    takes = inspect.signature(model.forward).parameters
    if family == "image":
        size = getattr(config, "image_size", 64)
        return model, {"pixel_values": torch.randn(2, 3, *(size if isinstance(size, (list, tuple)) else [size] * 2))}
    tokens = torch.randint(3, 190, (2, 12))
    call = {"input_ids": tokens} | {name: tokens for name in ("decoder_input_ids", "labels") if name in takes}
    return model, call


def _timm(name: str) -> Built:
    import timm

    options: dict[str, Any] = {"num_classes": 10}
    model: Any
    try:
        model = timm.create_model(name, pretrained=False, img_size=64, **options)
    except (TypeError, AssertionError, RuntimeError):
        model = timm.create_model(name, pretrained=False, **options)
    sizes = [64, model.pretrained_cfg.get("input_size", (3, 224, 224))[-1]]
    size = next((size for size in sizes if _runs(model, size)), sizes[-1])
    return model, {"x": torch.randn(2, 3, size, size)}


def _runs(model: nn.Module, size: int) -> bool:
    """Whether the model takes images of this size: some have it built in, whatever they were told."""
    states = [module.training for module in model.modules()]
    try:
        with torch.no_grad():
            model.eval()(torch.zeros(1, 3, size, size))
        return True
    except Exception:
        return False
    finally:
        for module, training in zip(model.modules(), states, strict=True):
            module.training = training


_DETECTION = ("rcnn", "retinanet", "fcos", "ssd")
_VIDEO = ("r3d", "mc3", "r2plus1d", "s3d", "mvit", "swin3d")


def _torchvision(name: str) -> Built:
    import torchvision

    options: dict[str, Any] = {"weights": None}
    if any(word in name for word in _DETECTION):
        sizes = {} if "ssd" in name else {"min_size": 64, "max_size": 64}
        model = torchvision.models.get_model(name, weights_backbone=None, num_classes=5, **options, **sizes)
        return model, {"images": [torch.rand(3, 64, 64)] * 2, "targets": [_target(name)] * 2}
    if any(word in name for word in ("deeplab", "fcn", "lraspp")):
        model = torchvision.models.get_model(name, weights_backbone=None, num_classes=5, **options)
        return model, {next(iter(inspect.signature(model.forward).parameters)): torch.randn(2, 3, 64, 64)}
    if name.startswith("vit"):
        options["image_size"] = 32
    if name.startswith("maxvit"):
        options["input_size"] = (224, 224)
    if name in ("inception_v3", "googlenet"):
        options |= {"init_weights": False, "aux_logits": False}
    model = torchvision.models.get_model(name, num_classes=10, **options)
    size = {"inception_v3": 96, "alexnet": 80, "maxvit_t": 224}.get(name, options.get("image_size", 64))
    if any(name.startswith(word) for word in _VIDEO):
        frames, side = (16, 224) if name.startswith("mvit") else (16, 64)
        return model, {"x": torch.randn(1, 3, frames, side, side)}
    argument = next(iter(inspect.signature(model.forward).parameters))
    return model, {argument: torch.randn(2, 3, size, size)}


def _target(name: str) -> dict[str, Tensor]:
    target = {"boxes": torch.tensor([[4.0, 4.0, 40.0, 40.0]]), "labels": torch.tensor([1])}
    if "mask" in name:
        target["masks"] = torch.ones(1, 64, 64, dtype=torch.uint8)
    if "keypoint" in name:
        target["keypoints"] = torch.full((1, 17, 3), 20.0)
    return target


def _own(name: str) -> Built:
    from .diffusion import DiT, UNet

    if name == "dit":
        return DiT(), {"x": torch.randn(2, 4, 16, 16), "t": torch.rand(2, 1)}
    return UNet(), {"x": torch.randn(2, 3, 16, 16), "t": torch.rand(2, 1)}


def warm() -> None:
    """Import what every child would: a child that is forked afterwards starts in milliseconds."""
    import timm as timm
    import torchvision as torchvision
    import transformers
    from transformers.models.bart import modeling_bart as modeling_bart
    from transformers.models.llama import modeling_llama as modeling_llama
    from transformers.models.vit import modeling_vit as modeling_vit

    import braze.kernels as kernels  # noqa: F401

    transformers.logging.set_verbosity_error()
    config = transformers.LlamaConfig(
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
        vocab_size=8,
    )
    # No backward pass: autograd's threads would not be there after a fork.
    transformers.LlamaForCausalLM(config)(input_ids=torch.ones(1, 2, dtype=torch.int64))


def floating(outputs: Any) -> Iterator[Tensor]:
    """Every floating-point tensor in what a model returned."""
    from torch.utils import _pytree

    if hasattr(outputs, "to_tuple"):
        outputs = outputs.to_tuple()
    for leaf in _pytree.tree_leaves(outputs):
        if isinstance(leaf, Tensor) and leaf.is_floating_point():
            yield leaf
