"""``skip=`` and ``only=``: paths, module classes or operators."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable

from torch import nn

Choice = str | type[nn.Module]


def checked(caller: str, name: str, choices: Iterable[Choice]) -> tuple[Choice, ...]:
    """The choices as a tuple.

    Raises:
        TypeError: if one is neither a string nor a module class.
    """
    found = (choices,) if isinstance(choices, (str, type)) else tuple(choices)
    for choice in found:
        if not isinstance(choice, str) and not (isinstance(choice, type) and issubclass(choice, nn.Module)):
            raise TypeError(
                f"{caller}: {name} must hold paths, operator names or module classes, got {choice!r}; "
                'e.g. skip=["model.layers.0.*", "rope", nn.LayerNorm]'
            )
    return found


def matches(choice: Choice, path: str, module: nn.Module, operator: str | None) -> bool:
    """Whether the module at ``path``, or the operator in its place, is chosen."""
    if isinstance(choice, type):
        return isinstance(module, choice)
    return choice == operator or fnmatch.fnmatchcase(path, choice) or fnmatch.fnmatchcase(path, choice + ".*")
