"""``fuse``, ``plan`` and ``unfuse``: walk a model, swap classes, undo."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

from torch import nn

from .choices import Choice, checked, matches
from .example import Place
from .joint import fused_class, fusion
from .refine import Refined, refine
from .report import FusionReport, Record
from .rewritten import joined, together
from .sample import quiet
from .search import Found, Search


def fuse(
    model: nn.Module,
    *,
    skip: Iterable[Choice] = (),
    only: Iterable[Choice] | None = None,
    example: Any = None,
    tune: bool = False,
) -> FusionReport:
    """Find the joints of ``model`` that a fused operator can stand for, verify each, and swap, in place.

    A swap changes the class of a module to a subclass of its own class: parameters, buffers, ``state_dict``, hooks,
    ``isinstance``, ``copy.deepcopy`` and pickling stay as they were, and no other model is touched. A joint is swapped
    only if its fused form, on drawn inputs, has at most twice the original's own error (and one rounding step) against
    float64, in outputs and gradients; else it is left, and the report says why. If anything fails, nothing is changed.

    Args:
        model: any module; also one whose parts are fused already, on any device (also meta).
        skip: what to leave alone: paths as in ``model.named_modules()``, with wildcards (a path means all below it
            too), module classes, or operators ("rms_norm", "layer_norm", "glu", "rope", "cross_entropy", "softmax",
            "linear_cross_entropy", "scale_add", "dropout_add", and so on: those that the report names).
        only: the same; if given, nothing else is touched. What costs arithmetic for the memory that it saves ("mlp") is
            offered in the report, and swapped only if its operator is named here, or ``tune`` keeps it.
        example: what the model takes: a tensor, a tuple or list of its arguments, or a mapping of them by name. The
            model runs on it once, without gradients, in the mode that it is in; its hooks run, its buffers stay. Joints
            are then verified on the activations that reach them too (copies of all of them are kept until then), and
            savings are told for this batch.
        tune: time every kind of swap on the example's shapes on this device, original and fused in turns (a training
            step of the joint where the model is in training, else a forward pass), and keep what is faster, or as fast
            (within a 97 % interval) with less memory kept for the backward pass. On the CPU it waits for the compiler.

    Returns:
        A report with one record for each joint; print it.

    Raises:
        TypeError: if model is no module, or an entry of skip or only is neither a string nor a module class.
        ValueError: if the model does not run on the example, or tune comes without one.
    """
    records, swaps = _search("fuse", model, skip, only, example, tune)
    _swap(swaps)
    return FusionReport(records)


def plan(
    model: nn.Module,
    *,
    skip: Iterable[Choice] = (),
    only: Iterable[Choice] | None = None,
    example: Any = None,
    tune: bool = False,
) -> FusionReport:
    """What :func:`fuse` would do with the same arguments, verified in the same way; nothing is changed.

    Args:
        model: as in :func:`fuse`; on the meta device no weights are needed.
        skip: as in :func:`fuse`.
        only: as in :func:`fuse`.
        example: as in :func:`fuse`.
        tune: as in :func:`fuse`.

    Returns:
        The report of :func:`fuse`, whose joints are "planned" and not "fused".

    Raises:
        TypeError: as :func:`fuse`.
        ValueError: as :func:`fuse`.
    """
    records, _ = _search("plan", model, skip, only, example, tune)
    planned = [dataclasses.replace(one, status="planned") if one.status == "fused" else one for one in records]
    return FusionReport(planned, "planned")


class _Place(NamedTuple):
    path: str
    was: str
    module: nn.Module
    found: Found


def _search(
    caller: str,
    model: nn.Module,
    skip: Iterable[Choice],
    only: Iterable[Choice] | None,
    example: Any,
    tune: bool,
) -> tuple[list[Record], list[tuple[nn.Module, type]]]:
    """A record for each joint, and the modules to swap, with the classes they get."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"{caller}: model must be a torch.nn.Module, got {type(model).__name__}; pass the model itself")
    skip = checked(caller, "skip", skip)
    only = None if only is None else checked(caller, "only", only)
    if tune and example is None:
        raise ValueError(f"{caller}: tune=True must come with an example, got None; pass example=batch to time on")
    places = _places(model, skip, only)
    refined = _refined(model, example, places, tune) if example is not None else {}
    records, chosen = [], dict[int, list[_Place]]()
    for number, place in enumerate(places):
        record = _record(place, refined.get(number), place.found.operator in (only or ()))
        records.append(record)
        if record.status == "fused":
            chosen.setdefault(id(place.module), []).append(place)
    swaps = [(all_[0].module, _fused(all_)) for all_ in chosen.values()]
    return records, swaps


def _places(model: nn.Module, skip: tuple[Choice, ...], only: tuple[Choice, ...] | None) -> list[_Place]:
    places: list[_Place] = []
    taken: set[int] = set()
    with quiet(model):
        search = Search(model)
        for path, module in model.named_modules():
            if id(module) in taken or any(matches(choice, path, module, None) for choice in skip):
                continue
            for found in search.joints(module):
                part = module.get_submodule(found.part)
                where = f"{path}.{found.part}".strip(".") if found.part else path
                place = _Place(where, type(part).__name__, module, found)
                if _chosen(place, skip) or (only is not None and not _chosen(place, only)):
                    continue
                places.append(place)
                if found.part and found.status != "left":
                    taken.add(id(part))
    return places


def _chosen(place: _Place, choices: tuple[Choice, ...]) -> bool:
    """By the class of the module, or of the child that the joint is about."""
    modules = (place.module, place.module.get_submodule(place.found.part))
    return any(matches(choice, place.path, one, place.found.operator) for choice in choices for one in modules)


def _refined(model: nn.Module, example: Any, places: list[_Place], tune: bool) -> dict[int, Refined]:
    found = {n: Place(one.module, one.found.joint) for n, one in enumerate(places) if one.found.joint is not None}
    return dict(zip(found, refine(model, example, list(found.values()), tune), strict=True))


def _record(place: _Place, refined: Refined | None, asked: bool) -> Record:
    """``asked``: what is only offered is wanted, as it is where it was timed."""
    path, was, _, found = place
    if found.status == "offered" and (asked or (refined is not None and refined.timing is not None)):
        found = found._replace(status="fused", reason="")
    if refined is None:
        return Record(path, was, found.operator, found.status, found.reason, found.check, found.saving)
    saving = refined.saving or found.saving
    if refined.left:
        return Record(path, was, "", "left", refined.left, refined.check, None, refined.timing)
    check = max((c for c in (found.check, refined.check) if c), key=lambda c: c.error / c.budget, default=None)
    reason = "; ".join(filter(None, (found.reason, refined.note)))
    return Record(path, was, found.operator, found.status, reason, check, saving, refined.timing)


def _fused(places: list[_Place]) -> type:
    """The class for all these places at one module, and for those of an earlier call."""
    module = places[0].module
    joints = [place.found.joint for place in places if place.found.joint is not None]
    made = fusion(module)
    if made is None:
        return fused_class(type(module), together(joints))
    return fused_class(made.original, together([*joined(made.joint), *joints]))


@contextmanager
def fused(
    model: nn.Module,
    *,
    skip: Iterable[Choice] = (),
    only: Iterable[Choice] | None = None,
    example: Any = None,
    tune: bool = False,
) -> Iterator[FusionReport]:
    """``with fused(model) as report:`` swaps as :func:`fuse` does, and undoes what it swapped when the block ends.

    What was fused before stays fused; blocks may be nested.

    Args:
        model: as in :func:`fuse`.
        skip: as in :func:`fuse`.
        only: as in :func:`fuse`.
        example: as in :func:`fuse`.
        tune: as in :func:`fuse`.

    Yields:
        The report of :func:`fuse`.

    Raises:
        RuntimeError: at the end of the block, if a class that it gave has been changed again; nothing is undone then.
        TypeError: as :func:`fuse`.
        ValueError: as :func:`fuse`.
    """
    records, swaps = _search("fused", model, skip, only, example, tune)
    before = [(module, type(module)) for module, _ in swaps]
    _swap(swaps)
    try:
        yield FusionReport(records)
    finally:
        undo = []
        for (module, cls), (_, own) in zip(swaps, before, strict=True):
            if type(module) not in (cls, own):
                raise RuntimeError(
                    f"fused: the class of a {own.__name__} must be the one that fused gave it when the block ends, but "
                    "was changed since; undo that change inside the block"
                )
            undo.append((module, own))
        _swap(undo)


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
