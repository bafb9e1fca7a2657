"""Regional compilation: each kind of repeated block is compiled once, in place."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable
from inspect import signature
from types import FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch._dynamo.utils import guard_failures

from .recompiles import Region, RegionReport
from .repeated import Block, repeated_blocks, replaced_forward

_numbers = itertools.count()


def compile_regions(
    module: nn.Module, *, budget: int = 4, dynamic_batch: bool = False, **compile_kwargs: Any
) -> RegionReport:
    """Find the blocks that repeat in ``module``, and compile each kind of them once, in place.

    Blocks are told by structure: class, names and shapes of parameters and buffers, and the same of all submodules. It
    does not matter whether a ModuleList, a Sequential, stages or numbered attributes hold them. Only the ``forward`` of
    a block is compiled: hooks (those of FSDP2, too), ``training_step`` and what it logs stay outside; no name gains
    ``_orig_mod``; parameters, ``state_dict``, classes and ``copy.deepcopy`` stay as they were. A pickled model is read
    back without regions. Equal blocks share code: at most two graphs for a way of running them (training, validation),
    the second because integer attributes such as ``layer_idx`` become dynamic when they first differ. The replicas of
    ``nn.DataParallel`` would run the original's blocks: use DistributedDataParallel.

    A second call finds the same regions and compiles nothing anew.

    Args:
        module: the model, before or after ``fully_shard``; before it is wrapped by FSDP1.
        budget: how many graphs a kind may need before a warning says what made it recompile and what to change.
        dynamic_batch: whether dimension 0 of tensors that enter a block has no fixed size, so that a last batch that is
            not full needs no graph of its own. Kernels for unknown sizes may be slower.
        compile_kwargs: passed to ``torch.compile``. Its ``recompile_limit``, from where on torch runs new variants
            eagerly, is twice the number of a kind's blocks and at least 8, so that blocks which differ in a dropout
            rate are all compiled. Versions of torch without it stop at ``torch._dynamo.config.recompile_limit``.

    Returns:
        A live report: print it at any time to see how many graphs each kind has, and why.

    Raises:
        TypeError: if module is no module.
        ValueError: if budget is less than 1, a parameter has no shape yet, or the module's regions were compiled
            with other arguments.
    """
    if not isinstance(module, nn.Module):
        raise TypeError(
            f"compile_regions: module must be a torch.nn.Module, got {type(module).__name__}; pass the model itself"
        )
    if budget < 1:
        raise ValueError(f"compile_regions: budget must be at least 1, got {budget}; every kind needs one graph")
    groups, left = repeated_blocks(module)
    chosen = {"budget": budget, "dynamic_batch": dynamic_batch, **compile_kwargs}
    made = [(group, _region(group, chosen, compile_kwargs)) for group in groups]
    for group, forward in made:  # only now: if something was wrong above, nothing has changed
        for block in group:
            block.module.forward = MethodType(forward, block.module)
    return RegionReport([forward.region for _, forward in made], left)  # type: ignore[attr-defined]


def uncompile_regions(module: nn.Module) -> None:
    """Give the blocks that :func:`compile_regions` compiled their own ``forward`` back; also those of a copy."""
    for part in module.modules():
        if hasattr(replaced_forward(part), "region"):
            del part.forward


def _region(group: list[Block], chosen: dict[str, Any], compile_kwargs: dict[str, Any]) -> Callable[..., Any]:
    """The forward that the blocks of a group get; the one that some of them have, if any."""
    for block in group:
        own = replaced_forward(block.module)
        if own is not None:
            if own.region.chosen != chosen:
                raise ValueError(
                    f"compile_regions: arguments must be those with which the regions of {block.path} were compiled, "
                    f"{own.region.chosen}, got {chosen}; call uncompile_regions(module) first"
                )
            own.region.paths = [block.path for block in group]
            return own.__func__
    kind = type(group[0].module)
    body = _own_code(f"{kind.__name__}_{next(_numbers)}")
    # torch.compile takes entries out of the dict that it is passed as options.
    options: dict[str, Any] = {
        name: dict(value) if isinstance(value, dict) else value for name, value in compile_kwargs.items()
    }
    if "recompile_limit" in signature(torch.compile).parameters:
        options.setdefault("recompile_limit", max(torch._dynamo.config.recompile_limit, 2 * len(group)))
    region = Region(kind.__name__, [block.path for block in group], body.__code__, chosen)
    return _watched(torch.compile(body, **options), region)


def _own_code(name: str) -> FunctionType:
    """A function whose code is no other's: torch keeps graphs, their limit and guard failures for each code object.

    The forward is called, not compiled itself: of classes of torch.nn, such as Sequential, torch would compile nothing.
    """

    def run(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        # Seen while tracing, and only here: a call later on does not touch the configuration.
        with torch._dynamo.patch_dynamo_config(allow_unspec_int_on_nn_module=True):
            return type(module).forward(module, *args, **kwargs)

    return FunctionType(run.__code__.replace(co_name=name), run.__globals__, name)


def _watched(compiled: Callable[..., Any], region: Region) -> Callable[..., Any]:
    failures = guard_failures[region.code]
    mark = region.chosen["dynamic_batch"]
    seen = 0

    # Its name is what pickle looks up on the other side.
    def forward(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():  # the user compiles something larger
            return type(module).forward(module, *args, **kwargs)
        if mark:
            _mark_batch(args, kwargs)
        result = compiled(module, *args, **kwargs)
        nonlocal seen
        if len(failures) != seen:
            seen = len(failures)
            _warn(region)
        return result

    forward.region = region  # type: ignore[attr-defined]
    return forward


def _mark_batch(args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    for value in (*args, *kwargs.values()):
        if isinstance(value, Tensor) and value.dim() > 0:
            torch._dynamo.maybe_mark_dynamic(value, 0)


def _warn(region: Region) -> None:
    distributed = torch.distributed
    if distributed.is_available() and distributed.is_initialized() and distributed.get_rank() > 0:
        return
    for message in region.news():
        warnings.warn(message, stacklevel=2)
