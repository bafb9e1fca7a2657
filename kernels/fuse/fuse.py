"""``fuse`` and ``unfuse``: walk a model, verify each kind of joint once, swap classes, undo."""

from __future__ import annotations

import fnmatch
import functools
from collections.abc import Hashable, Iterable, Set
from typing import NamedTuple

import torch
from torch import nn
from torch.nn.utils import parametrize

from .gated_mlp import GatedMLP
from .heads import OutputHead
from .joint import Joint, fused_class, fusion
from .losses import CausalLoss, CrossEntropy, SoftmaxModule
from .norms import Norm
from .report import FusionReport, Record
from .rewritten import Rewritten, examine, sites
from .rotary import Rotary
from .sample import Refused, Sample, quiet
from .sites import Site
from .verify import Check, verify

JOINTS: tuple[type[Joint], ...] = (Norm, GatedMLP, Rotary, CrossEntropy, SoftmaxModule, CausalLoss, OutputHead)

Choice = str | type[nn.Module]

_PACKAGE = __name__.removesuffix(".fuse.fuse")


class Outcome(NamedTuple):
    """What examining one kind of module gave: a joint with its note and check, or a reason to leave it, or neither."""

    joint: Joint | None
    reason: str = ""
    check: Check | None = None


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
    if not isinstance(model, nn.Module):
        raise TypeError(f"fuse: model must be a torch.nn.Module, got {type(model).__name__}; pass the model itself")
    skip, only = _choices("skip", skip), None if only is None else _choices("only", only)
    records: list[Record] = []
    swaps: list[tuple[nn.Module, type]] = []
    known: dict[Hashable, Outcome] = {}
    checked: dict[Hashable, Check | str] = {}
    candidates = {joint_type: joint_type.candidates(model) for joint_type in JOINTS}
    taken: set[int] = set()
    with quiet(model):
        for path, module in model.named_modules():
            if id(module) in taken or any(_matches(choice, path, module, None) for choice in skip):
                continue
            chosen: list[Joint | Site] = []
            for found in _look(module, model, candidates, known, checked):
                where = f"{path}.{found.part}".strip(".") if found.part else path
                if any(_matches(choice, where, module, found.operator) for choice in skip):
                    continue
                if only is not None and not any(_matches(choice, where, module, found.operator) for choice in only):
                    continue
                was = type(module.get_submodule(found.part)).__name__
                records.append(Record(where, was, found.operator, found.status, found.reason, found.check))
                if found.part and found.status != "left":
                    taken.add(id(module.get_submodule(found.part)))
                if found.joint is not None:
                    chosen.append(found.joint)
            if chosen:
                swaps.append((module, fused_class(type(module), _together(chosen))))
    _swap(swaps)
    return FusionReport(records)


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


class Found(NamedTuple):
    """A joint at a module: what becomes of it, and why; ``part`` is the child that it is about."""

    status: str
    operator: str
    reason: str = ""
    check: Check | None = None
    joint: Joint | Site | None = None
    part: str = ""


def _look(
    module: nn.Module,
    root: nn.Module,
    candidates: dict[type[Joint], Set[int]],
    known: dict[Hashable, Outcome],
    checked: dict[Hashable, Check | str],
) -> list[Found]:
    """The joints at ``module``: one that it is as a whole, or those in its source."""
    made = fusion(module)
    if made is not None:
        return [Found("already fused", operator, part=part) for operator, part in made.joint.parts()]
    if type(module).__module__.startswith(_PACKAGE + ".ops."):
        return [Found("already fused", "", "a braze module")]
    whole = _as_a_whole(module, root, candidates, known)
    if whole is not None and whole.joint is not None and not isinstance(whole.joint, Rotary):
        return [whole]
    inside = _inside(module, root, checked)
    if whole is not None and whole.joint is not None:
        inside = [found for found in inside if found.operator != whole.operator]
    if any(found.joint is not None for found in inside) and (whole is None or whole.joint is None):
        return inside
    return ([] if whole is None else [whole]) + inside


def _as_a_whole(
    module: nn.Module, root: nn.Module, candidates: dict[type[Joint], Set[int]], known: dict[Hashable, Outcome]
) -> Found | None:
    for joint_type in JOINTS:
        if id(module) not in candidates[joint_type]:
            continue
        barrier = _barrier(module)
        if barrier:
            if _named_like(module, joint_type):
                return Found("left", "", barrier)
            continue
        key = joint_type, joint_type.key(module)
        if key not in known:
            known[key] = _examine(joint_type, module, root)
        outcome = known[key]
        if outcome.joint is not None:
            return Found("fused", outcome.joint.operator, outcome.reason, outcome.check, outcome.joint)
        if outcome.reason:
            return Found("left", "", outcome.reason)
    return None


def _inside(module: nn.Module, root: nn.Module, checked: dict[Hashable, Check | str]) -> list[Found]:
    found: list[Found] = []
    # What a Hugging Face model records is decided by the classes of its inner models.
    if hasattr(module, "from_pretrained") or _barrier(module, own=True):
        return found
    for site in sites(module):
        verdict = examine(site, module, root, checked)
        if isinstance(verdict, str):
            found.append(Found("left", "", verdict, part=site.part))
        else:
            found.append(Found("fused", site.operator, "", verdict, site, site.part))
    return found


def _together(chosen: list[Joint | Site]) -> Joint:
    """One joint of all that was chosen at a module."""
    places = tuple(one for one in chosen if isinstance(one, Site))
    joints = [one for one in chosen if isinstance(one, Joint)]
    if not places:
        return joints[0]
    return Rewritten(places, next((one for one in joints if isinstance(one, Rotary)), None))


def _examine(joint_type: type[Joint], module: nn.Module, root: nn.Module) -> Outcome:
    outcome = Outcome(None)
    for sizes in joint_type.sizes(module):
        outcome = _attempt(joint_type, module, root, sizes)
        if outcome.joint is not None:
            break
    return outcome


def _attempt(joint_type: type[Joint], module: nn.Module, root: nn.Module, sizes: dict[int, int] | None) -> Outcome:
    joint = None
    try:
        sample = Sample(module, root, sizes)
        joint = joint_type.recognise(sample)
        if joint is None:
            return Outcome(None, "it computes something else" if _named_like(module, joint_type) else "")
        original, fused = joint.trial(sample)
        check = verify(original, fused, functools.partial(joint.draws, sample), sample.dtype, joint.exact)
        return Outcome(joint, joint.note, check)
    except Refused as refused:
        close = joint is not None or _named_like(module, joint_type)
        return Outcome(None, str(refused) if close else "")


def _barrier(module: nn.Module, own: bool = False) -> str:
    """Why this module must not be touched, or nothing. Its ``own`` parameters alone may count."""
    if "forward" in vars(module):
        return "the instance has a forward of its own"
    if parametrize.is_parametrized(module):
        return "it is parametrized"
    if isinstance(module, torch.jit.ScriptModule):
        return "it is scripted"
    if type(module).__reduce__ is not object.__reduce__ or type(module).__reduce_ex__ is not object.__reduce_ex__:
        return "its class pickles itself in a way of its own"
    for name, parameter in module.named_parameters(recurse=not own):
        if type(parameter) is not nn.Parameter and type(parameter).__name__ != "DTensor":
            return f"{name} is a {type(parameter).__name__}"
        if not parameter.is_floating_point():
            return f"{name} is {parameter.dtype}"
    return ""


def _named_like(module: nn.Module, joint_type: type[Joint]) -> bool:
    """Only for the report: whether a user would expect to read why this module was left."""
    return joint_type is not Norm or any(Norm.hint in base.__name__.lower() for base in type(module).__mro__)


def _choices(name: str, choices: Iterable[Choice]) -> tuple[Choice, ...]:
    found = (choices,) if isinstance(choices, (str, type)) else tuple(choices)
    for choice in found:
        if not isinstance(choice, str) and not (isinstance(choice, type) and issubclass(choice, nn.Module)):
            raise TypeError(
                f"fuse: {name} must hold paths, operator names or module classes, got {choice!r}; "
                'e.g. skip=["model.layers.0.*", "rope", nn.LayerNorm]'
            )
    return found


def _matches(choice: Choice, path: str, module: nn.Module, operator: str | None) -> bool:
    if isinstance(choice, type):
        return isinstance(module, choice)
    return choice == operator or fnmatch.fnmatchcase(path, choice) or fnmatch.fnmatchcase(path, choice + ".*")
