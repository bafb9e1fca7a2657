"""Linear layers that multiply in float8: torchao's, in the place of plain ones."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from braze.kernels.fuse.choices import matches
from braze.kernels.fuse.sites import hooked

RecipeName = Literal["tensorwise", "rowwise", "rowwise_with_gw_hp"]
#: torchao's recipes: one scale for a tensor; one for each row; rows, with gradients of weights in bfloat16.
RECIPES = (None, "tensorwise", "rowwise", "rowwise_with_gw_hp")
#: The float8 matrix product takes no other sizes.
MULTIPLE = 16


def check(owner: str, recipe: str | None) -> None:
    """See that products in float8 can be had here.

    Raises:
        ValueError: if there is no such recipe.
        RuntimeError: if the hardware has none.
        ModuleNotFoundError: if torchao is missing.
    """
    if recipe not in RECIPES:
        raise ValueError(f"{owner}: fp8 must be {' or '.join(map(repr, RECIPES))}, got {recipe!r}")
    if recipe is None:
        return
    lacking = lacking_hardware()
    if lacking:
        raise RuntimeError(f"{owner}: fp8 must be None here, got {recipe!r}: {lacking}; use precision='bf16-mixed'")
    if importlib.util.find_spec("torchao") is None:
        raise ModuleNotFoundError(f"{owner}: fp8={recipe!r} needs torchao, which is not installed: pip install torchao")


def lacking_hardware() -> str | None:
    """Why this machine cannot multiply in float8; None if it can."""
    if not torch.cuda.is_available():
        return "this machine has no CUDA GPU"
    if torch.version.hip is None and torch.cuda.get_device_capability() < (8, 9):
        major, minor = torch.cuda.get_device_capability()
        return f"this GPU has compute capability {major}.{minor}, and float8 matrix products need 8.9"
    return None


def config(recipe: RecipeName) -> Any:
    """torchao's configuration of that name."""
    from torchao.float8 import Float8LinearConfig

    return Float8LinearConfig.from_recipe_name(recipe)


def check_unsharded(owner: str, module: nn.Module, recipe: RecipeName, skip: Sequence[str]) -> None:
    """See that no layer would be replaced whose parameters fully_shard has taken in hand.

    Raises:
        ValueError: if one would.
    """
    for path, layer in _linear_layers(module).items():
        if isinstance(layer.weight, DTensor) and _reason(path, layer, skip) is None:
            raise ValueError(
                f"{owner}: fp8 must be None for parameters that are sharded already, got {recipe!r} and {path!r} "
                "sharded; call prepare_for_sharding(self) in configure_model, before fully_shard"
            )


def convert(module: nn.Module, recipe: RecipeName, skip: Sequence[str]) -> list[tuple[str, str]]:
    """Put torchao's layers in the place of plain linear ones; parameters stay the same objects, keys the same names.

    Returns:
        (path, what was done) of each linear layer.
    """
    from torchao.float8 import convert_to_float8_training

    layers = _linear_layers(module)
    left = {path: _reason(path, layer, skip) for path, layer in layers.items()}
    wanted = {id(layer): layer.training for path, layer in layers.items() if left[path] is None}
    if wanted:
        convert_to_float8_training(module, module_filter_fn=lambda layer, _: id(layer) in wanted, config=config(recipe))
    for path, reason in left.items():
        if reason is None:
            module.get_submodule(path).train(layers[path].training)  # torchao's are new, and so in training
    return [(path, reason or f"Linear → Float8Linear ({recipe})") for path, reason in left.items()]


def _linear_layers(module: nn.Module) -> dict[str, nn.Linear]:
    return {path: layer for path, layer in module.named_modules() if isinstance(layer, nn.Linear)}


def _reason(path: str, layer: nn.Linear, skip: Sequence[str]) -> str | None:
    """Why a layer stays as it is; None if it does not."""
    if any(matches(choice, path, layer, "fp8") for choice in skip):
        return "left, as skip says"
    if type(layer) is not nn.Linear:
        return f"left: it is a {type(layer).__name__}, no plain linear layer"
    if not path:
        return "left: it is the whole model, which cannot be replaced in place"
    if layer.in_features % MULTIPLE or layer.out_features % MULTIPLE:
        return f"left: {layer.in_features} → {layer.out_features} features are not both multiples of {MULTIPLE}"
    if hooked(layer) or layer._state_dict_hooks or layer._load_state_dict_pre_hooks:
        return "left: it has hooks, which the new layer would lack"
    return None
