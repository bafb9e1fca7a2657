"""Joints on what a model gives them when it runs on an example: verified again, counted, and timed."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any, NamedTuple

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

    Activations of every place are verified. Counted and timed is once for all places of one kind and shape; timed is a
    training step where the model is in training, else a forward pass.

    Raises:
        ValueError: if the model does not run on the example.
    """
    with quiet(model):
        given = reached(model, example, places)
        trials = [_trial(model, place, given.get(n)) for n, place in enumerate(places)]
        found = [_verified(trial, NOT_REACHED if n not in given else OTHER_CALL) for n, trial in enumerate(trials)]
        savings: dict[Hashable, Saving] = {}
        for n, trial in enumerate(trials):
            if trial is not None and not found[n].left:
                if trial.key not in savings:
                    savings[trial.key] = saving_of_batch(trial.counted, trial.sample.dtype)
                found[n] = found[n]._replace(saving=savings[trial.key])
    if tune:
        with quiet(model, eager=False):
            _time(trials, found, model.training)
    return found


class _Trial(NamedTuple):
    key: Hashable
    counted: Counted
    sample: Sample
    joint: Joint | Site


def _trial(model: nn.Module, place: Place, inputs: tuple[Tensor, ...] | None) -> _Trial | None:
    if inputs is None:
        return None
    module, joint = place
    with as_original(module):  # of a forward that was rewritten before, the source is in that
        key = (type(joint), joint.key(module), *((t.shape, t.dtype, t.stride()) for t in inputs))
        if isinstance(joint, Site):
            original, fused, sample = joint.trial(module, model)
            return _Trial(key, joint.given(original, fused, inputs), sample, joint)
        sample = Sample(module, model, {} if joint.copied else None)
        return _Trial(key, joint.given(sample, inputs), sample, joint)


def _verified(trial: _Trial | None, why_not: str) -> Refined:
    if trial is None:
        return Refined(note=why_not)
    counted, joint = trial.counted, trial.joint
    prepare = joint.exact if isinstance(joint, Joint) else lambda module: module
    wide = counted.draw._replace(inputs=tuple(t.double() if t.is_floating_point() else t for t in counted.draw.inputs))
    try:
        original, fused = counted.original.double(), counted.fused.double()
        check = verify(original, fused, lambda: [wide], trial.sample.dtype, prepare, joint.slack)
    except Refused as refused:
        return Refined(left=f"on the example: {refused}")
    return Refined(check=check)


def _time(trials: Sequence[_Trial | None], found: list[Refined], training: bool) -> None:
    timings: dict[Hashable, Timing] = {}
    for n, trial in enumerate(trials):
        if trial is None or found[n].left:
            continue
        if trial.key not in timings:
            original, fused, draw, *_ = trial.counted
            timings[trial.key] = timed(original, fused, draw, trial.sample.dtype, training)
        timing, saved = timings[trial.key], found[n].saving
        # Less than half of what comes in are statistics of rows or channels.
        saves = training and saved is not None and 2 * saved.activations >= trial.counted.draw.inputs[0].nbytes
        found[n] = found[n]._replace(timing=timing, left=verdict(timing, saves))
