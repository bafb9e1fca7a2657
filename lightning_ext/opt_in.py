"""Callbacks for every Trainer and Fabric of a program that is not changed: an environment variable asks for them.

Lightning calls these functions whenever a Trainer or a Fabric is made, by the entry points in ``pyproject.toml``.
``BRAZE_LIGHTNING=1`` swaps modules for their fused forms; a list such as ``fuse,regional,prefetch,meters`` says what to
do. Unset, empty or 0, it is not asked for, and nothing is imported.
"""

from __future__ import annotations

import os
from typing import Any

VARIABLE = "BRAZE_LIGHTNING"
#: What a model can get, and the callbacks of a Trainer beside it.
FOR_MODELS = ("fuse", "channels_last", "regional")
FOR_TRAINERS = ("prefetch", "meters")


def trainer_callbacks() -> list[Any]:
    """The callbacks that the variable asks for, in one.

    Raises:
        ValueError: if it names something else.
    """
    wanted = _wanted()
    if not wanted:
        return []
    from . import MetersCallback, PrefetchCallback
    from .opted_in import OptedIn

    callbacks = _for_models(wanted)
    if "prefetch" in wanted:
        callbacks.append(PrefetchCallback(memory_format="channels_last" if "channels_last" in wanted else None))
    if "meters" in wanted:
        callbacks.append(MetersCallback())
    return [OptedIn(callbacks)]


def fabric_callbacks() -> list[Any]:
    """Those of them that a Fabric can call.

    Raises:
        ValueError: if the variable names something that neither has.
    """
    callbacks = _for_models(_wanted())
    if not callbacks:
        return []
    from .opted_in import OptedIn

    return [OptedIn(callbacks)]


def _wanted() -> list[str]:
    value = os.environ.get(VARIABLE, "").strip()
    if value in ("", "0"):
        return []
    wanted = ["fuse"] if value == "1" else [name.strip() for name in value.split(",")]
    known = (*FOR_MODELS, *FOR_TRAINERS)
    unknown = [name for name in wanted if name not in known]
    if unknown:
        raise ValueError(
            f"{VARIABLE} must be 0, 1 (which is fuse) or a list of {', '.join(known)}, got {unknown[0]!r} in {value!r}"
        )
    return wanted


def _for_models(wanted: list[str]) -> list[Any]:
    if not set(wanted) & set(FOR_MODELS):
        return []
    from . import FusedCallback

    return [
        FusedCallback(
            fuse="auto" if "fuse" in wanted else "off",
            memory_format="channels_last" if "channels_last" in wanted else None,
            compile="regional" if "regional" in wanted else "off",
        )
    ]
