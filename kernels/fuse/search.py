"""What joints there are at a module: every kind is tried, and verified once for all modules alike."""

from __future__ import annotations

import functools
from collections.abc import Hashable
from typing import NamedTuple

from torch import nn

from .barrier import barrier
from .channel_norms import ChannelNorm
from .folded import fold_of
from .gated_mlp import GatedMLP
from .heads import OutputHead
from .joint import Fusion, Joint, as_original, fused_class, fusion
from .losses import BinaryCrossEntropy, CausalLoss, CrossEntropy, SoftmaxModule
from .norms import Norm
from .plain_mlp import PlainMLP
from .rewritten import Verdict, examine, joined, sites
from .rotary import Rotary
from .sample import Refused, Sample
from .savings import Measure, Saving, saving
from .sites import Known, Site
from .verify import Check, verify

JOINTS: tuple[type[Joint], ...] = (
    Norm,
    ChannelNorm,
    GatedMLP,
    PlainMLP,
    Rotary,
    CrossEntropy,
    BinaryCrossEntropy,
    SoftmaxModule,
    CausalLoss,
    OutputHead,
)

_PACKAGE = __name__.removesuffix(".fuse.search")


class Outcome(NamedTuple):
    """What examining one kind of module gave: a joint with its note and check, or a reason to leave it, or neither."""

    joint: Joint | None
    reason: str = ""
    check: Check | None = None
    saving: Saving | None = None  #: of an element


class Found(NamedTuple):
    """A joint at a module: what becomes of it, and why; ``part`` is the child that it is about."""

    status: str
    operator: str
    reason: str = ""
    check: Check | None = None
    joint: Joint | Site | None = None
    part: str = ""
    saving: Saving | None = None


class Search:
    """What is known of the joints of one model; each kind of joint is examined once."""

    def __init__(self, root: nn.Module) -> None:
        self.root = root
        self.candidates = {joint_type: joint_type.candidates(root) for joint_type in JOINTS}
        self.widths = {getattr(module, "in_features", None) for module in root.modules()}
        self.known: dict[Hashable, Outcome] = {}
        self.examined: dict[Hashable, Verdict | str] = {}
        self.probed = Known()

    def joints(self, module: nn.Module) -> list[Found]:
        """The joints at ``module``: one that it is as a whole, or those in its source."""
        if fold_of(module) is not None:
            return []
        made = fusion(module)
        if made is not None:
            done = [Found("already fused", operator, part=part) for operator, part in made.joint.parts()]
            return done + self._remaining(module, made)
        if type(module).__module__.startswith(_PACKAGE + ".ops."):
            return [Found("already fused", "", "a braze module")]
        whole = self._as_a_whole(module)
        if whole is None:
            return self._inside(module)
        if whole.joint is None:
            inside = [] if barrier(module) else self._inside(module)
            return inside if any(found.joint is not None for found in inside) else [whole, *inside]
        if not isinstance(whole.joint, Rotary):
            return [whole]
        # The helper that is replaced as a whole holds what would be sites otherwise.
        return [whole, *(found for found in self._inside(module) if found.operator != whole.operator)]

    def _remaining(self, module: nn.Module, made: Fusion) -> list[Found]:
        """What an earlier call was told to leave, in a forward that it has rewritten."""
        places = joined(made.joint)
        if not places or type(module) is not fused_class(*made):
            return []
        with as_original(module):
            return [found for found in self.joints(module) if found.joint is not None and found.joint not in places]

    def _as_a_whole(self, module: nn.Module) -> Found | None:
        left = None
        for joint_type in JOINTS:
            if id(module) not in self.candidates[joint_type]:
                continue
            reason = barrier(module)
            if reason:
                if _named_like(module, joint_type):
                    return Found("left", "", reason)
                continue
            key = joint_type, joint_type.key(module)
            if key not in self.known:
                self.known[key] = _examine(joint_type, module, self.root)
            outcome = self.known[key]
            if outcome.joint is not None:
                joint, saved = outcome.joint, outcome.saving
                saved = None if saved is None else saved.of(self._measure(joint, module))
                status, reason = ("offered", joint.offer) if joint.offer else ("fused", outcome.reason)
                return Found(status, joint.operator, reason, outcome.check, joint, saving=saved)
            if outcome.reason:
                left = Found("left", "", outcome.reason)
        return left

    def _measure(self, joint: Joint, module: nn.Module) -> Measure:
        """A norm of a width that no linear layer takes normalizes parts of a token: the rows of its heads."""
        measure = joint.measure(module)
        part = isinstance(joint, Norm) and measure.unit == "token" and measure.elements not in self.widths
        return measure._replace(unit="row") if part else measure

    def _inside(self, module: nn.Module) -> list[Found]:
        # What a Hugging Face model records is decided by the classes of its inner models.
        if hasattr(module, "from_pretrained") or barrier(module, own=True):
            return []
        found = []
        for site in sites(module, self.probed):
            verdict = examine(site, module, self.root, self.examined)
            if isinstance(verdict, str):
                found.append(Found("left", "", verdict, part=site.part))
            else:
                saved = verdict.saving.of(site.measure(module))
                found.append(Found("fused", site.operator, site.note, verdict.check, site, site.part, saved))
        return found


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
        check = verify(original, fused, functools.partial(joint.draws, sample), sample.dtype, joint.exact, joint.slack)
        return Outcome(joint, joint.note, check, saving(joint.counted(sample), sample.dtype))
    except Refused as refused:
        close = joint is not None or _named_like(module, joint_type)
        return Outcome(None, str(refused) if close else "")


def _named_like(module: nn.Module, joint_type: type[Joint]) -> bool:
    """Only for the report: whether a user would expect to read why this module was left."""
    named = any(joint_type.hint in base.__name__.lower() for base in type(module).__mro__)
    return named or not joint_type.common
