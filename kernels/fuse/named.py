"""A model by its name, for a plan from the shell. No weights are downloaded."""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import nn

FORMS = "torchvision:resnet50, timm:convnext_tiny, transformers:Qwen3Config or package.module:function"


def named(name: str) -> nn.Module:
    """The model that ``name`` stands for.

    Args:
        name: ``torchvision:NAME`` or ``timm:NAME``, a model of that registry; ``transformers:CLASS``, the causal
            language model, or else the model, of a config class with its default sizes, on the meta device;
            ``package.module:function``, what that function returns.

    Raises:
        ValueError: if there is no such model.
    """
    source, separator, what = name.partition(":")
    if not separator or not source or not what:
        raise ValueError(f"plan: MODEL must be {FORMS}, got {name!r}")
    try:
        module: Any = importlib.import_module(source)
    except ModuleNotFoundError as error:
        raise ValueError(f"plan: {source} must be a package that is installed, got {name!r}: {error}") from error
    if source == "torchvision":
        return _checked(name, module.models.get_model(what, weights=None))
    if source == "timm":
        return _checked(name, module.create_model(what, pretrained=False))
    found = getattr(module, what, None)
    if found is None:
        raise ValueError(f"plan: there is no {what} in {source}; MODEL must be {FORMS}")
    return _checked(name, _from_config(module, found) if source == "transformers" else found())


def _from_config(transformers: Any, config_class: Any) -> Any:
    config = config_class()
    causal = type(config) in transformers.AutoModelForCausalLM._model_mapping
    with torch.device("meta"):
        return (transformers.AutoModelForCausalLM if causal else transformers.AutoModel).from_config(config)


def _checked(name: str, model: Any) -> nn.Module:
    if not isinstance(model, nn.Module):
        raise ValueError(f"plan: {name} must give a torch.nn.Module, got {type(model).__name__}")
    return model
