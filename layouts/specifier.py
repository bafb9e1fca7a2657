"""Models by name: ``torchvision:resnet50``, ``timm:mobilevitv2_050``, ``package.module:function``."""

from __future__ import annotations

import difflib
import importlib
import importlib.util
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

FORMS = "torchvision:NAME, timm:NAME or package.module:function"


def build(specifier: str) -> nn.Module:
    """The model that ``specifier`` names, with random weights.

    A function of a module is called with no arguments and must return the model.

    Raises:
        ValueError: if there is no such model, or if it is not a module, with what there is instead.
    """
    library, colon, name = specifier.partition(":")
    if not (library and colon and name):
        raise ValueError(f"a model is named {FORMS}, got {specifier!r}")
    if library == "timm":
        timm = _library("timm")
        if name not in timm.list_models() and not timm.is_model(name):
            raise ValueError(_unknown("timm", name, timm.list_models()))
        return timm.create_model(name)
    if library == "torchvision":
        models = _library("torchvision.models")
        if name not in models.list_models():
            raise ValueError(_unknown("torchvision", name, models.list_models()))
        backbone = {"weights_backbone": None} if _has_backbone(models, name) else {}
        return models.get_model(name, weights=None, **backbone)
    return _call(library, name)


def image_size(model: nn.Module, wanted: int | None) -> int:
    """``wanted``, or the size that the model was configured for (timm), or 224."""
    configured = getattr(model, "pretrained_cfg", None) or {}
    fixed = configured.get("input_size", (3, 224, 224))[-1]
    return fixed if wanted is None or configured.get("fixed_input_size") else wanted


def example(model: nn.Module, batch: int, size: int | None) -> Tensor:
    """Random images [batch, C, size, size]; C is what the first convolution of the model takes."""
    first = next((m for m in model.modules() if isinstance(m, nn.Conv2d)), None)
    channels = first.in_channels if first is not None else 3
    side = image_size(model, size)
    return torch.randn(batch, channels, side, side)


def _library(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise ValueError(f"{name} is not installed: pip install 'braze[vision]'") from error


def _unknown(library: str, name: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(name, known, n=3)
    return f"{library} has no model {name!r}" + (f"; did you mean {', '.join(near)}?" if near else "")


def _has_backbone(models: Any, name: str) -> bool:
    import inspect

    return "weights_backbone" in inspect.signature(models.get_model_builder(name)).parameters


def _call(module_name: str, function_name: str) -> nn.Module:
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        raise ValueError(f"there is no module {error.name!r}; a model is named {FORMS}") from error
    function = getattr(module, function_name, None)
    if not callable(function):
        raise ValueError(f"{module_name} has no function {function_name!r}; a model is named {FORMS}")
    model = function()
    if not isinstance(model, nn.Module):
        raise ValueError(f"{module_name}:{function_name} must return a torch.nn.Module, got {type(model).__name__}")
    return model
