"""What every plugin does to a model: swap, memory format, compile; in place, as often as it is asked to."""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Iterator
from typing import Any

import torch
from torch.nn import Module, ModuleDict, ModuleList

from braze.kernels import FusionReport
from braze.kernels import fuse as fuse_model
from braze.layouts import FormatRecord, FormatReport, channels_last

from .packages import LightningModule, rank_zero_info
from .recipe import Recipe


@dataclasses.dataclass(frozen=True)
class Report:
    """What was done to a model; print it.

    Attributes:
        fusion: the report of ``braze.kernels.fuse``, if it ran.
        formats: that of ``braze.layouts.channels_last``, likewise.
        compiled: a line for each part that was compiled or left, or the report of regional compilation.
    """

    fusion: FusionReport | None
    formats: FormatReport | None
    compiled: Any

    def __str__(self) -> str:
        parts = [self.fusion, self.formats, self.compiled]
        return "\n".join(str(part) for part in parts if part is not None) or "nothing was asked for"


# Lightning converts a model again for every fit, validate and test: what it then says is what the first time said.
_reports: weakref.WeakKeyDictionary[Module, Report] = weakref.WeakKeyDictionary()


def apply(module: Module, recipe: Recipe, title: str) -> Report:
    """Do what the recipe says to ``module``, in place; parts that are done already stay as they are.

    Swaps change classes, so hooks, ties, ``state_dict``, optimizers, DTensors and wrappers of strategies stay right.
    Compiling is in place, too: keys get no ``_orig_mod``.

    Args:
        module: a LightningModule, whose children are what a training step calls, or any other module, called itself.
        recipe: what to do.
        title: of the report, which is printed on rank zero if there is something new in it.

    Raises:
        ValueError: if a memory format is wanted of parameters that are sharded; nothing is changed then.
    """
    if recipe.memory_format is not None:
        _check_unsharded(module, recipe)
    fusion = fuse_model(module, skip=recipe.skip) if recipe.fuse == "auto" else None
    formats = _channels_last(module) if recipe.memory_format == "channels_last" else None
    report = Report(fusion, formats, _compile(module, recipe))
    known = _reports.get(module)
    if known is not None and not (fusion and fusion.fused):
        return known
    _reports[module] = report
    rank_zero_info(f"{title}:\n{report}")
    return report


def _check_unsharded(module: Module, recipe: Recipe) -> None:
    from torch.distributed.tensor import DTensor

    sharded = next((name for name, p in module.named_parameters() if isinstance(p, DTensor)), None)
    if sharded is not None:
        raise ValueError(
            f"{recipe.owner}: memory_format must be None for parameters sharded by fully_shard, which takes contiguous "
            f"ones only, got {recipe.memory_format!r} and {sharded!r} sharded; use DDPStrategy for it"
        )


def _called(module: Module, path: str = "") -> Iterator[tuple[str, Module]]:
    """The parts of a model that a training step calls: not a LightningModule itself, and no container."""
    if not isinstance(module, (LightningModule, ModuleList, ModuleDict)):
        yield path, module
        return
    for name, child in module.named_children():
        yield from _called(child, f"{path}.{name}" if path else name)


def _channels_last(module: Module) -> FormatReport:
    records: list[FormatRecord] = []
    for path, part in _called(module):
        found = channels_last(part)
        records += [dataclasses.replace(one, path=f"{path}.{one.path}".strip(".")) for one in found]
    return FormatReport(records)


def _compile(module: Module, recipe: Recipe) -> Any:
    if recipe.compile == "off":
        return None
    if recipe.compile == "regional":
        from .regional import compile_regions

        return compile_regions(module, **recipe.compile_kwargs)
    lines = []
    for path, part in _called(module):
        if next(part.parameters(), None) is None:
            continue  # losses, which fuse has seen to, and metrics, which break the graph
        if part._compiled_call_impl is None and not isinstance(part, torch._dynamo.OptimizedModule):
            part.compile(**recipe.compile_kwargs)
            lines.append(f"compiled in place: {path or '(the model)'}")
        else:
            lines.append(f"left: {path or '(the model)'}, which is compiled already")
    return "\n".join(lines)
