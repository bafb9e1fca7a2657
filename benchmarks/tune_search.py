"""From the launch parameters that were reasoned out, step by step, to what measurements prefer; and what they prove.

A step doubles or halves one parameter, or a block together with the warps that work on it, so that a thread keeps its
elements. Whatever can be launched is timed beside the best so far, in turns; the quickest is the next best if the whole
interval of its ratio is under 1. The quickest of many is so by luck, too: what a walk ends with is no finding until it
has been timed again (:func:`objection`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from braze.kernels.triton.launch_table import Ask

from .timing import Ratio

#: Parameters by name, in the order of :attr:`Ask.free`.
Choice = tuple[tuple[str, int], ...]

#: How much faster than what was reasoned a choice must be shown to be, and how much slower it may be at another size.
MARGIN = 0.02
STEPS = 4
#: The most warps of a program, and programs of a multiprocessor; how many times as large or small a tile may become.
WARPS, PROGRAMS, REACH = 32, 32, 4


def label(choice: Choice) -> str:
    """A choice in a line."""
    return " ".join(f"{name}={n}" for name, n in choice)


def neighbours(ask: Ask, choice: Choice) -> list[Choice]:
    """What one step from a choice leads to, within bounds."""
    names = [name for name, _ in choice]
    moves = [{name} for name in names] + [{name, "num_warps"} for name in names if name.startswith("BLOCK")]
    stepped = (
        tuple((name, n * 2 if up else n // 2) if name in move else (name, n) for name, n in choice)
        for move in moves
        for up in (True, False)
    )
    return [found for found in stepped if _within_bounds(ask, found)]


def _within_bounds(ask: Ask, choice: Choice) -> bool:
    grown = _elements(choice) / _elements(ask.free)
    return (
        all(n >= 1 for _, n in choice)
        and dict(choice)["num_warps"] <= WARPS
        and dict(choice).get("programs", 1) <= PROGRAMS
        and 1 / REACH <= grown <= REACH
    )


def _elements(choice: Choice) -> int:
    return math.prod(n for name, n in choice if name.startswith("BLOCK"))


class Walk(NamedTuple):
    """Where a search ended, how many choices it timed, and why it refused others."""

    best: Choice
    timed: int
    refused: Mapping[Choice, str]


def walk(
    ask: Ask,
    refusal: Callable[[Choice], str | None],
    ratios: Callable[[Choice, Sequence[Choice]], Sequence[Ratio]],
    steps: int = STEPS,
) -> Walk:
    """Search from what was reasoned.

    Args:
        refusal: why a choice is none, however fast: it does not run, its results are wrong; None if it is one.
        ratios: the times of choices over that of the first, all taken in turns.
    """
    best: Choice = ask.free
    seen, refused, timed = {best}, {}, 0
    for _ in range(steps):
        fresh = [choice for choice in neighbours(ask, best) if choice not in seen]
        seen.update(fresh)
        refused.update({choice: why for choice in fresh if (why := refusal(choice))})
        able = [choice for choice in fresh if choice not in refused]
        if not able:
            break
        timed += len(able)
        quickest, ratio = min(zip(able, ratios(best, able), strict=True), key=lambda pair: pair[1].value)
        if ratio.high >= 1:
            break
        best = quickest
    return Walk(best, timed, refused)


class Proof(NamedTuple):
    """The time of a choice over that of what was reasoned, on one shape, with warm and with cold caches."""

    warm: Ratio
    cold: Ratio


def objection(proofs: Sequence[Proof]) -> str | None:
    """Why a choice is not proposed, by its times on every shape of its class; None if it is."""
    if any(proof.warm.high > 1 + MARGIN or proof.cold.low > 1 for proof in proofs):
        return f"not shown to be less than {MARGIN:.0%} slower on every shape"
    if not any(proof.warm.high < 1 - MARGIN for proof in proofs):
        return f"not shown to be more than {MARGIN:.0%} faster on any shape"
    return None


def mean_ratio(proofs: Sequence[Proof]) -> float:
    """The geometric mean over the shapes."""
    return math.exp(sum(math.log(proof.warm.value) for proof in proofs) / len(proofs))
