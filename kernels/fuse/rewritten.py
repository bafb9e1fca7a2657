"""A class whose forward has sites: which there are, and the fused class with all of them."""

from __future__ import annotations

import ast
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

from torch import nn

from .add_modulated import AddModulated
from .add_norm import AddNorm
from .complex_turn import ComplexTurn
from .gate import Gate
from .joint import Joint, unwatched
from .modulated import Modulated
from .norm_act import InSequence, NormAct, in_sequence
from .norm_add_act import NormAddAct
from .rotary import Rotary
from .sample import Draw, Refused, Sample
from .savings import Saving, saving
from .sites import Known, Site, Unit, units
from .source import rewritten
from .tail import DropoutAdd, GatedAdd, ScaleAdd
from .turn import Turn
from .verify import Check, verify

#: Of two that want the same place the first has it, so the one that saves more stands first. Before a sum and the norm
#: of it: a modulation, a factor or stochastic depth, which are passes of their own; behind it: dropout, which it does,
#: too.
KINDS: tuple[type[Site], ...] = (
    *(Turn, ComplexTurn, Gate, NormAddAct, NormAct),
    *(AddModulated, Modulated, ScaleAdd, GatedAdd, AddNorm, DropoutAdd),
)


@dataclass(frozen=True)
class Rewritten(Joint):
    """Methods of a class with fused operators in the place of sites; a rotary helper may be replaced, too."""

    hint: ClassVar[str] = ""
    operator: ClassVar[str] = ""  # type: ignore[misc]
    sites: tuple[Site, ...]
    rotary: Rotary | None = None

    @classmethod
    def recognise(cls, sample: Sample) -> None:
        """Made of what was recognised one by one."""

    def members(self, original: type, watch: Callable[..., Any] = unwatched) -> dict[str, Any]:
        """The methods, edited."""
        places = [site for site in self.sites if isinstance(site, InSequence)]
        if places:
            return {"forward": in_sequence(places, watch)}
        found = {} if self.rotary is None else self.rotary.members(original, watch)
        parts = units(original)
        made: dict[str, Any] = {}  # the functions with sites, fused, by the names of their units
        for name in _callees_first(parts):
            mine = [(number, site) for number, site in enumerate(self.sites) if site.unit == name]
            edits: dict[int, Callable[[Any], ast.AST]] = {}
            names = {called: made[unit] for called, unit in parts[name].calls.items() if unit in made}
            for number, site in mine:
                edits |= site.edits(f"_braze_{number}")
                names[f"_braze_{number}"] = watch(site, site.fused())
            if not names:
                continue
            if "." in name:
                made[name] = rewritten(parts[name].function, edits, names)
            else:
                found[name] = rewritten(found.get(name, getattr(original, name)), edits, names)
        return found

    def parts(self) -> list[tuple[str, str]]:
        """Of each site its own."""
        rotary = [] if self.rotary is None else self.rotary.parts()
        return rotary + [(site.operator, site.part) for site in self.sites]

    def draws(self, sample: Sample) -> list[Draw]:
        """Of each site its own."""
        return []


def joined(joint: Joint) -> list[Joint | Site]:
    """The joints of a rewritten forward one by one; of a joint that is a module as a whole, none."""
    if isinstance(joint, Rewritten):
        return [*([] if joint.rotary is None else [joint.rotary]), *joint.sites]
    return [joint] if isinstance(joint, Rotary) else []


def together(joints: Sequence[Joint | Site]) -> Joint:
    """One joint of all those at a module."""
    whole = next((one for one in joints if isinstance(one, Joint)), None)
    made = rewriting(joints)
    return made if made.sites or whole is None else whole


def rewriting(joints: Sequence[Joint | Site]) -> Rewritten:
    """The forward with all these, in whatever order they were found."""
    places = sorted((one for one in joints if isinstance(one, Site)), key=lambda site: (site.unit, site.numbers))
    return Rewritten(tuple(places), next((one for one in joints if isinstance(one, Rotary)), None))


def _callees_first(parts: dict[str, Unit]) -> list[str]:
    order: list[str] = []

    def visit(name: str, above: tuple[str, ...]) -> None:
        if name not in order and name not in above and name in parts:
            for callee in parts[name].calls.values():
                visit(callee, (*above, name))
            order.append(name)

    for name in parts:
        visit(name, ())
    return order


def sites(module: nn.Module, known: Known) -> list[Site]:
    """The places in ``module``, none inside another."""
    found: list[Site] = list(InSequence.find(module))
    for unit in units(type(module)).values():
        taken: set[int] = set()
        for site_type in KINDS:
            for site in site_type.find(module, unit, known):
                if taken.isdisjoint(site.numbers):
                    taken |= set(site.numbers)
                    found.append(site)
    return found or list(InSequence.passed_over(module))


class Verdict(NamedTuple):
    """Of a site that is as good as the original: the check, and what an element saves."""

    check: Check
    saving: Saving


def examine(site: Site, module: nn.Module, root: nn.Module, known: dict[Hashable, Verdict | str]) -> Verdict | str:
    """What verification found, or why the site is left; sites with equal keys are verified once."""
    if site.refusal:
        return site.refusal
    key = site.key(module)
    if key not in known:
        try:
            original, fused, sample = site.trial(module, root)
            check = verify(original, fused, lambda: site.draws(sample), sample.dtype, slack=site.slack)
            known[key] = Verdict(check, saving(site.alive(site.counted(original, fused, sample)), sample.dtype))
        except Refused as refused:
            known[key] = str(refused)
    return known[key]
