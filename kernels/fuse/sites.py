"""Joints in the source of a forward: expressions that one fused operator can stand for.

A site is one such place. Its fused form is a function that takes what the expression takes, runs the operator where
that is the same, and else the expression. The fused class gets a copy of the forward, and of the methods that it calls,
in which sites are calls of these functions (``source.py``). Global functions that these call may have sites, too: the
fused class calls a copy.
"""

from __future__ import annotations

import ast
import copy
import functools
import types
from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from ..ops.activations import ACTIVATIONS
from .sample import Draw, Exactly, Sample, kind
from .savings import ELEMENT, Counted, Measure
from .source import innermost, parsed


@dataclass(frozen=True)
class Site(ABC):
    """A place in a unit of a class: the nodes that are edited, by their numbers in a walk through the tree."""

    unit: str
    numbers: tuple[int, ...]
    operator: ClassVar[str]
    #: As of :class:`Joint`.
    slack: ClassVar[float] = 2.0
    tables: ClassVar[int] = 0

    @property
    def part(self) -> str:
        """The child that the report names as the joint; nothing for the module itself."""
        return ""

    @property
    def note(self) -> str:
        """What the report adds where the place was fused."""
        return ""

    @property
    def refusal(self) -> str:
        """Why the place is left, where that is clear without a trial."""
        return ""

    @classmethod
    @abstractmethod
    def find(cls, module: nn.Module, unit: Unit, known: Known) -> Iterator[Site]:
        """Every such place in the unit."""

    @abstractmethod
    def key(self, module: nn.Module) -> Hashable:
        """Sites with equal keys are verified once."""

    @abstractmethod
    def trial(self, module: nn.Module, root: nn.Module) -> tuple[nn.Module, nn.Module, Sample]:
        """(original, fused, sample): modules that compute the place alone, to be compared on numbers."""

    @abstractmethod
    def draws(self, sample: Sample) -> list[Draw]:
        """Inputs to compare them on."""

    def counted(self, original: nn.Module, fused: nn.Module, sample: Sample) -> Counted:
        """As of :class:`Joint`, of a trial."""
        draw = self.draws(sample)[0]
        return Counted(original, fused, draw, draw.inputs[0].numel())

    def alive(self, counted: Counted) -> Counted:
        """To be counted and timed: with what verification has to switch off, as dropout; against what fuses anyway."""
        return counted

    @abstractmethod
    def operands(self, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """What of the arguments of the fused function the trial takes."""

    def given(self, original: nn.Module, fused: nn.Module, inputs: tuple[Tensor, ...]) -> Counted:
        """A trial on operands that a model gave it."""
        return Counted(original, fused, Draw("the example's", inputs, self.tables), inputs[0].numel())

    def measure(self, module: nn.Module) -> Measure:
        """As of :class:`Joint`."""
        return ELEMENT

    @abstractmethod
    def fused(self) -> Callable[..., Any]:
        """The function that the place calls in the fused class."""

    @abstractmethod
    def edits(self, name: str) -> dict[int, Callable[[Any], ast.AST]]:
        """What becomes of the nodes, where the fused function goes by ``name``."""


class Known:
    """What probing told of the parts of a model; parts of one kind are probed once."""

    def __init__(self) -> None:
        self.found: dict[Hashable, Any] = {}

    def once(self, key: Hashable, probe: Callable[[], Any]) -> Any:
        """What probing gave for this key."""
        if key not in self.found:
            self.found[key] = probe()
        return self.found[key]


class Unit(NamedTuple):
    """A function of a class in which there may be sites: a method, or a global function that one of them calls."""

    name: str
    #: A plain function.
    function: Any
    tree: ast.FunctionDef
    #: The units that it calls, by the names by which it does.
    calls: dict[str, str]


def units(cls: type) -> dict[str, Unit]:
    """The forward, the methods that it calls, and the plain functions that any of them calls, by name."""
    return _units(cls)


@functools.lru_cache(maxsize=4096)
def _units(cls: type) -> dict[str, Unit]:
    found: dict[str, Unit] = {}
    waiting: list[tuple[str, Any]] = [("forward", _method(cls, "forward"))]
    while waiting:
        name, function = waiting.pop(0)
        tree = None if function is None or name in found else parsed(function.__code__)
        if tree is None:
            continue
        calls = {}
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and _own(node.func):
                waiting.append((node.func.attr, _method(cls, node.func.attr)))
            elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                called = _global(function, node.func.id)
                if isinstance(called, types.FunctionType) and not (called.__module__ or "").startswith("torch"):
                    calls[node.func.id] = f"{called.__module__}.{called.__qualname__}"
                    waiting.append((calls[node.func.id], called))
        found[name] = Unit(name, function, tree, calls)
    return found


def _method(cls: type, name: str) -> types.FunctionType | None:
    """The function inside the method of that name, if it is not one of torch's."""
    method = next((vars(base)[name] for base in cls.__mro__ if name in vars(base)), None)
    # Not by the class that holds it: fully_shard's own holds the method of the user's.
    if not isinstance(method, types.FunctionType) or (method.__module__ or "").startswith("torch."):
        return None
    return innermost(method)


def _global(function: types.FunctionType, name: str) -> Any:
    """What a function's global name stands for; None for its own variables."""
    code = function.__code__
    local = name in code.co_varnames or name in code.co_cellvars or name in code.co_freevars
    return None if local else function.__globals__.get(name)


def _own(node: ast.expr) -> bool:
    return isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "self"


def child(node: ast.expr) -> str | None:
    """The name of ``self.name``."""
    return node.attr if isinstance(node, ast.Attribute) and _own(node) else None


def called(node: ast.AST) -> tuple[ast.expr, ast.expr] | None:
    """(function, argument) of a call with one argument."""
    if not isinstance(node, ast.Call) or len(node.args) != 1 or node.keywords or isinstance(node.args[0], ast.Starred):
        return None
    return node.func, node.args[0]


def resolved(node: ast.expr, module: nn.Module, function: types.FunctionType) -> Any:
    """What ``self.name``, or a dotted global name, stands for in a function; None if it is neither."""
    name = child(node)
    if name is not None:
        return getattr(module, name, None) if function.__code__.co_varnames[:1] == ("self",) else None
    if isinstance(node, ast.Name):
        return _global(function, node.id)
    return getattr(resolved(node.value, module, function), node.attr, None) if isinstance(node, ast.Attribute) else None


def activation(act: Any) -> str | None:
    """The name of the activation that ``act`` computes, by its values; None if it is none that is known here."""
    found = values(act)
    if found is None:
        return None
    x, y = found
    return next((name for name, f in ACTIVATIONS.items() if (y - f(x)).abs().max() <= 1e-6), None)


def values(act: Any) -> tuple[Tensor, Tensor] | None:
    """Numbers, and what ``act`` makes of each; None if it is no function of one element, or has parameters."""
    if isinstance(act, nn.Module):
        parts = any(any(True for _ in found()) for found in (act.parameters, act.buffers, act.children))
        if parts or "forward" in vars(act):
            return None
    elif not callable(act) or isinstance(act, type):
        return None
    x = torch.linspace(-12.0, 12.0, 97, dtype=torch.float64)  # as far as ReLU6 bends
    try:
        with torch.no_grad(), Exactly():
            y = copy.deepcopy(act).forward(x.clone()) if isinstance(act, nn.Module) else act(x.clone())
    except Exception:
        return None
    return (x, y) if isinstance(y, Tensor) and y.shape == x.shape else None


def identity(act: Any) -> Hashable:
    """What two activations have in common that do the same."""
    return kind(act) if isinstance(act, nn.Module) else act


def module_type(act: Any) -> type | None:
    """The class of a module; None for a function, which stands for itself."""
    return type(act) if isinstance(act, nn.Module) else None


def hooked(module: Any) -> bool:
    """Whether calling ``module`` does more than running its forward."""
    if not isinstance(module, nn.Module):
        return False
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return any(map(bool, hooks)) or "forward" in vars(module)
