"""Joints on what a model gives them when it runs on an example: verified again, counted, and timed."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .example import Place, reached
from .joint import Joint, as_original
from .sample import Refused, Sample, quiet
from .savings import Counted, Saving, saving_of_batch
from .sites import Site
from .tune import Timing, timed, verdict
from .verify import Check, verify

NOT_REACHED = "the example does not reach it"
OTHER_CALL = "the example calls it in a way that is not examined"


class Refined(NamedTuple):
    """What the example says of a joint: a reason to leave it, or a note, and the figures."""

    left: str = ""
    note: str = ""
    check: Check | None = None
    saving: Saving | None = None
    timing: Timing | None = None


def refine(model: nn.Module, example: Any, places: Sequence[Place], tune: bool) -> list[Refined]:
    """For each place what the example says of it.

    Activations of every place are verified, and a copy of each is kept until then. Counted and timed is once for all
    places of one kind and shape; timed is a training step where the model is in training, else a forward pass.

    Raises:
        ValueError: if the model does not run on the example.
    """
    with quiet(model):
        given = reached(model, example, places)
    figures: dict[Hashable, tuple[Saving, Timing | None]] = {}
    found = []
    for n, place in enumerate(_shown(places) if tune else places):
        why_not = OTHER_CALL if n in given else NOT_REACHED
        inputs = given.pop(n, None)
        found.append(Refined(note=why_not) if inputs is None else _refined(model, place, inputs, figures, tune))
    return found


def _shown(places: Sequence[Place]) -> Iterable[Place]:
    """The places, with a progress bar where there is a terminal, and rich to draw on it: compilers take minutes."""
    try:
        from rich.console import Console
        from rich.progress import track
    except ImportError:
        return places
    console = Console(stderr=True)
    return track(places, "timing joints", console=console, transient=True, disable=not console.is_terminal)


class _Trial(NamedTuple):
    key: Hashable
    counted: Counted
    alive: Counted
    dtype: torch.dtype


def _refined(
    model: nn.Module,
    place: Place,
    inputs: tuple[Tensor, ...],
    figures: dict[Hashable, tuple[Saving, Timing | None]],
    tune: bool,
) -> Refined:
    with quiet(model):
        trial = _trial(model, place, inputs)
        try:
            check = _verified(trial, place.joint)
        except Refused as refused:
            return Refined(left=f"on the example: {refused}")
        if trial.key not in figures:
            figures[trial.key] = saving_of_batch(trial.alive, trial.dtype), None
    saving, timing = figures[trial.key]
    if not tune:
        return Refined(check=check, saving=saving)
    original, fused, draw, *_ = trial.alive
    if timing is None:
        with quiet(model, eager=False):
            timing = timed(original, fused, draw, trial.dtype, model.training)
        figures[trial.key] = saving, timing
    # Less than half of what comes in are statistics of rows or channels.
    saves = model.training and 2 * saving.activations >= draw.inputs[0].nbytes
    return Refined(verdict(timing, saves), "", check, saving, timing)


def _trial(model: nn.Module, place: Place, inputs: tuple[Tensor, ...]) -> _Trial:
    module, joint = place
    with as_original(module):  # of a forward that was rewritten before, the source is in that
        key = (type(joint), joint.key(module), *((t.shape, t.dtype, t.stride()) for t in inputs))
        if isinstance(joint, Site):
            original, fused, sample = joint.trial(module, model)
            counted = joint.given(original, fused, inputs)
            return _Trial(key, counted, joint.alive(counted), sample.dtype)
        sample = Sample(module, model, {} if joint.copied else None)
        counted = joint.given(sample, inputs)
        return _Trial(key, counted, counted, sample.dtype)


def _verified(trial: _Trial, joint: Joint | Site) -> Check:
    counted = trial.counted
    prepare = joint.exact if isinstance(joint, Joint) else lambda module: module
    wide = counted.draw._replace(inputs=tuple(t.double() if t.is_floating_point() else t for t in counted.draw.inputs))
    original, fused = counted.original.double(), counted.fused.double()
    return verify(original, fused, lambda: [wide], trial.dtype, prepare, joint.slack)
