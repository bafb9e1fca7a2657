"""Activations behind a norm of images: how they are called in the source of a forward, and what they compute."""

from __future__ import annotations

import ast
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from ..ops.channel_norm import ACTIVATIONS, Activation, activated
from .sites import called, child, hooked, module_type, resolved, values
from .source import expression


def computed(act: Any) -> Activation | None:
    """The activation of the operators that ``act`` computes, by its values."""
    found = values(act)
    if found is None:
        return None
    x, y = found
    slope = -y[x == -1.0].item()
    known = [(name, slope if name == "leaky_relu" else 0.0) for name in ACTIVATIONS if name != "none"]
    alike = (one for one in known if (y - activated(x, one)).abs().max() <= 1e-6)
    return next((one for one in alike if one[1] < 1.0), None)  # with a slope of 1 it is no activation


def same_act(act: Any, act_type: type | None, activation: Activation) -> bool:
    """Whether ``act`` is still what was recognised, and nothing listens."""
    name, slope = activation
    bent = name == "leaky_relu" and getattr(act, "negative_slope", slope) != slope
    return module_type(act) is act_type and not hooked(act) and not bent


@dataclass(frozen=True)
class WithConstants:
    """A function of a tensor, with the constants that it is given."""

    function: Callable[..., Any]
    args: tuple[Any, ...]
    options: tuple[tuple[str, Any], ...]

    def __call__(self, x: Tensor) -> Any:
        """What the source does."""
        return self.function(x, *self.args, **dict(self.options))


def acting(node: ast.AST) -> tuple[ast.expr, ast.expr] | None:
    """As ``called``; also of a call with constants, ``F.leaky_relu(x, 0.2)``, whose function is then a lambda."""
    if called(node) is not None or not isinstance(node, ast.Call) or not node.args or child(node.func):
        return called(node)
    constants = [*node.args[1:], *(option.value for option in node.keywords)]
    named = all(option.arg for option in node.keywords)
    if isinstance(node.args[0], ast.Starred) or not named or not all(isinstance(c, ast.Constant) for c in constants):
        return None
    body = ast.Call(func=node.func, args=[expression("_z"), *node.args[1:]], keywords=node.keywords)
    return expression(f"lambda _z: {ast.unparse(body)}"), node.args[0]


def resolved_act(act: ast.expr, module: nn.Module, function: Any) -> Any:
    """As ``resolved``, of what ``acting`` found."""
    if not isinstance(act, ast.Lambda):
        return resolved(act, module, function)
    body: Any = act.body
    options = tuple((option.arg, option.value.value) for option in body.keywords)
    found = resolved(body.func, module, function)
    return WithConstants(found, tuple(one.value for one in body.args[1:]), options) if callable(found) else None
