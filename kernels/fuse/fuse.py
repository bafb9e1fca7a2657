"""``fuse``, ``plan`` and ``unfuse``: walk a model, swap classes, undo."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

from torch import nn

from .choices import Choice, checked, matches
from .joint import Joint, fused_class, fusion
from .report import FusionReport, Record
from .rewritten import Rewritten
from .rotary import Rotary
from .sample import quiet
from .search import Search
from .sites import Site


def fuse(model: nn.Module, *, skip: Iterable[Choice] = (), only: Iterable[Choice] | None = None) -> FusionReport:
    """Find the joints of ``model`` that a fused operator can stand for, verify each, and swap, in place.

    A swap changes the class of a module to a subclass of its own class: parameters, buffers, ``state_dict``, hooks,
    ``isinstance``, ``copy.deepcopy`` and pickling stay as they were, and no other model is touched. A joint is swapped
    only if its fused form, on drawn inputs, has at most twice the original's own error (and one rounding step) against
    float64, in outputs and gradients; else it is left, and the report says why. If anything fails, nothing is changed.

    Args:
        model: any module; also one whose parts are fused already, on any device (also meta).
        skip: what to leave alone: paths as in ``model.named_modules()``, with wildcards (a path means all below it
            too), module classes, or operators ("rms_norm", "layer_norm", "glu", "rope", "cross_entropy", "softmax",
            "linear_cross_entropy").
        only: the same; if given, nothing else is touched.

    Returns:
        A report with one record for each joint; print it.

    Raises:
        TypeError: if model is no module, or an entry of skip or only is neither a string nor a module class.
    """
    records, swaps = _search("fuse", model, skip, only)
    _swap(swaps)
    return FusionReport(records)


def plan(model: nn.Module, *, skip: Iterable[Choice] = (), only: Iterable[Choice] | None = None) -> FusionReport:
    """What :func:`fuse` would do with the same arguments, verified in the same way; nothing is changed.

    Args:
        model: as in :func:`fuse`; on the meta device no weights are needed.
        skip: as in :func:`fuse`.
        only: as in :func:`fuse`.

    Returns:
        The report of :func:`fuse`, whose joints are "planned" and not "fused".

    Raises:
        TypeError: as :func:`fuse`.
    """
    records, _ = _search("plan", model, skip, only)
    return FusionReport(
        [dataclasses.replace(one, status="planned") if one.status == "fused" else one for one in records]
    )


def _search(
    caller: str, model: nn.Module, skip: Iterable[Choice], only: Iterable[Choice] | None
) -> tuple[list[Record], list[tuple[nn.Module, type]]]:
    """A record for each joint, and the modules to swap, with the classes they get."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"{caller}: model must be a torch.nn.Module, got {type(model).__name__}; pass the model itself")
    skip = checked(caller, "skip", skip)
    only = None if only is None else checked(caller, "only", only)
    search = Search(model)
    records: list[Record] = []
    swaps: list[tuple[nn.Module, type]] = []
    taken: set[int] = set()
    with quiet(model):
        for path, module in model.named_modules():
            if id(module) in taken or any(matches(choice, path, module, None) for choice in skip):
                continue
            chosen: list[Joint | Site] = []
            for found in search.joints(module):
                where = f"{path}.{found.part}".strip(".") if found.part else path
                if any(matches(choice, where, module, found.operator) for choice in skip):
                    continue
                if only is not None and not any(matches(choice, where, module, found.operator) for choice in only):
                    continue
                part = module.get_submodule(found.part)
                was = type(part).__name__
                records.append(
                    Record(where, was, found.operator, found.status, found.reason, found.check, found.saving)
                )
                if found.part and found.status != "left":
                    taken.add(id(part))
                if found.joint is not None:
                    chosen.append(found.joint)
            if chosen:
                swaps.append((module, fused_class(type(module), _together(chosen))))
    return records, swaps


def unfuse(model: nn.Module) -> None:
    """Give every module that :func:`fuse` swapped its own class back.

    Raises:
        RuntimeError: if a fused module's class has been changed again since (as FSDP does); nothing is changed then.
    """
    swaps: list[tuple[nn.Module, type]] = []
    for path, module in model.named_modules():
        made = fusion(module)
        if made is None:
            continue
        unchanged = type(module) is fused_class(*made)
        if not unchanged:
            raise RuntimeError(
                f"unfuse: the class of {path or 'the model'} must be the one that fuse gave it, got "
                f"{type(module).__name__}, made from it; undo that change first"
            )
        swaps.append((module, made.original))
    _swap(swaps)


def _together(chosen: list[Joint | Site]) -> Joint:
    """One joint of all that was chosen at a module."""
    places = tuple(one for one in chosen if isinstance(one, Site))
    joints = [one for one in chosen if isinstance(one, Joint)]
    if not places:
        return joints[0]
    return Rewritten(places, next((one for one in joints if isinstance(one, Rotary)), None))


def _swap(swaps: list[tuple[nn.Module, type]]) -> None:
    done: list[tuple[nn.Module, type]] = []
    try:
        for module, cls in swaps:
            before = type(module)
            module.__class__ = cls
            done.append((module, before))
    except BaseException:
        for module, before in reversed(done):
            module.__class__ = before
        raise
