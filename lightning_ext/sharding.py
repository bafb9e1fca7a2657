"""Swaps before a model is sharded."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from torch.nn import Module

from .engine import apply
from .packages import LightningModule
from .recipe import Recipe
from .start_report import Report


def prepare_for_sharding(module: Module, *, skip: Sequence[str] = ()) -> Report:
    """Swap what has a fused form, before ``fully_shard`` or ``parallelize_module`` cuts the parameters up.

    To be called in ``configure_model``. Without it the plugin swaps sharded modules, which is as right: classes change,
    DTensors stay. What it compares beforehand it then has to gather. Formats and compilation are left to the plugin.

    Args:
        module: a LightningModule, for which its Trainer's plugin says what to swap, or any other module.
        skip: what else to leave alone.

    Returns:
        what was done.
    """
    recipe = Recipe("prepare_for_sharding")
    if isinstance(module, LightningModule) and module._trainer is not None:
        recipe = getattr(module.trainer.precision_plugin, "recipe", recipe)
    recipe = dataclasses.replace(
        recipe, skip=(*recipe.skip, *skip), memory_format=None, compile="off", compile_kwargs={}
    )
    return apply(module, recipe, "prepare_for_sharding")
