"""What every plugin does to a model: swap, memory format, compile; in place, as often as it is asked to."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import TypeGuard

import torch
from torch.nn import Module, ModuleDict, ModuleList

from braze.kernels import fuse as fuse_model
from braze.layouts import FormatRecord, FormatReport, channels_last

from . import fp8
from .packages import LightningModule, rank_zero_info
from .prefetch import PrefetchCallback
from .recipe import Recipe
from .recompiles import RegionReport
from .start_report import Report, reports


def apply(module: Module, recipe: Recipe, title: str) -> Report:
    """Do what the recipe says to ``module``, in place; parts that are done already stay as they are.

    Swaps change classes, so hooks, ties, ``state_dict``, optimizers, DTensors and wrappers of strategies stay right.
    Compiling is in place, too: keys get no ``_orig_mod``.

    Args:
        module: a LightningModule, whose children are what a training step calls, or any other module, called itself.
        recipe: what to do.
        title: of the report, which is printed on rank zero if there is something new in it.

    Raises:
        ValueError: if a memory format or float8 is wanted of parameters that are sharded; nothing is changed
            then.
    """
    if recipe.memory_format is not None:
        _check_unsharded(module, recipe)
    if recipe.fp8 is not None:
        fp8.check_unsharded(recipe.owner, module, recipe.fp8, recipe.skip)
    fusion = fuse_model(module, skip=recipe.skip) if recipe.fuse == "auto" else None
    formats = _channels_last(module) if recipe.memory_format == "channels_last" else None
    converted = None if recipe.fp8 is None else fp8.convert(module, recipe.fp8, recipe.skip)
    precision = str(module.trainer.precision) if _attached(module) else None
    report = Report(title, fusion, recipe.skip, _compile(module, recipe), formats, precision, converted)
    known = reports.get(module)
    if known is not None and not (fusion and fusion.fused):
        if known.title == title:
            return known
        # Swapped before by another, such as prepare_for_sharding, that compiled nothing.
        report = dataclasses.replace(report, fusion=known.fusion, fp8=known.fp8)
    reports[module] = report
    # PrefetchCallback prints it, once the loaders are known, in one table with them.
    if not (_attached(module) and any(isinstance(one, PrefetchCallback) for one in module.trainer.callbacks)):  # type: ignore[attr-defined]
        rank_zero_info(str(report))
    return report


def _attached(module: Module) -> TypeGuard[LightningModule]:
    return isinstance(module, LightningModule) and module._trainer is not None


def _check_unsharded(module: Module, recipe: Recipe) -> None:
    from torch.distributed.tensor import DTensor

    sharded = next((name for name, p in module.named_parameters() if isinstance(p, DTensor)), None)
    if sharded is not None:
        raise ValueError(
            f"{recipe.owner}: memory_format must be None for parameters sharded by fully_shard, which takes contiguous "
            f"ones only, got {recipe.memory_format!r} and {sharded!r} sharded; use DDPStrategy for it"
        )


def called(module: Module, path: str = "") -> Iterator[tuple[str, Module]]:
    """The parts of a model that a training step calls: not a LightningModule itself, and no container."""
    if not isinstance(module, (LightningModule, ModuleList, ModuleDict)):
        yield path, module
        return
    for name, child in module.named_children():
        yield from called(child, f"{path}.{name}" if path else name)


def _channels_last(module: Module) -> FormatReport:
    records: list[FormatRecord] = []
    for path, part in called(module):
        found = channels_last(part)
        records += [dataclasses.replace(one, path=f"{path}.{one.path}".strip(".")) for one in found]
    return FormatReport(records)


def _compile(module: Module, recipe: Recipe) -> RegionReport | list[tuple[str, str]] | None:
    if recipe.compile == "off":
        return None
    if recipe.compile == "regional":
        from .regional import compile_regions

        return compile_regions(module, **recipe.compile_kwargs)
    done = []
    for path, part in called(module):
        if next(part.parameters(), None) is None:
            continue  # losses, which fuse has seen to, and metrics, which break the graph
        if part._compiled_call_impl is None and not isinstance(part, torch._dynamo.OptimizedModule):
            part.compile(**recipe.compile_kwargs)
            done.append((path or "(the model)", "compiled in place"))
        else:
            done.append((path or "(the model)", "left: it is compiled already"))
    return done
