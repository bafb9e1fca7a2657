"""The end of a residual block: ``y = norm(conv(…))``, other statements, ``y += shortcut``, then ``act(y)``.

The norm waits for the shortcut. What it is given is fresh from a convolution, so nothing can change it meanwhile; where
the operator does not fit, the norm does not wait, and where the shortcut does not fit, it runs then.
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from .acts import acting, same_act
from .joint import takes
from .norm_act import NormAct, family, normalized, step, suits
from .sample import Draw, Sample
from .savings import Counted
from .sites import Known, Site, Unit, child
from .source import blocks, call, expression, numbered
from .sums import target


@dataclass(frozen=True)
class NormAddAct(NormAct):
    """As NormAct, with a sum between; ``absent`` are children that would come between, and are None."""

    absent: tuple[str, ...] = ()

    @classmethod
    def find(cls, module: nn.Module, unit: Unit, known: Known) -> Iterator[Site]:
        """In every block of statements."""
        numbers = numbered(unit.tree)
        for statements in blocks(unit.tree):
            for start in range(1, len(statements)):
                found = _tail(module, statements, start)
                if found is not None:
                    norm, added, act, absent = found
                    places = tuple(numbers[id(s)] for s in (statements[start], added, statements[act]))
                    yield from cls._with(module, unit, norm, step(statements[act]), places, absent)

    @classmethod
    def _with(
        cls, module: nn.Module, unit: Unit, norm: ast.expr, act: Any, places: tuple[int, ...], absent: tuple[str, ...]
    ) -> Iterator[Site]:
        for site in cls._made(module, unit, act, norm, places):
            if isinstance(site, NormAddAct) and site.norm_family == "batch" and not site.refusal:
                yield replace(site, absent=absent)

    def key(self, module: nn.Module) -> Hashable:
        """As of NormAct, apart from it."""
        return NormAddAct, super().key(module)

    def trial(self, module: nn.Module, root: nn.Module) -> tuple[nn.Module, nn.Module, Sample]:
        """Norm, sum and activation."""
        samples = [Sample(getattr(module, self.norm), root, {}) for _ in range(2)]
        act = self._act(module)
        return _Tail(samples[0].module, act, None), _Tail(samples[1].module, act, self.fused()), samples[0]

    def draws(self, sample: Sample) -> list[Draw]:
        """Images, and shortcuts like them."""
        return [Draw(label, (x, x.flip(0) + 0.3 * x)) for label, (x,), _ in super().draws(sample)]

    def given(self, original: nn.Module, fused: nn.Module, inputs: tuple[Tensor, ...]) -> Counted:
        """Only the input of the norm is seen: with another image's for a shortcut."""
        return super().given(original, fused, (inputs[0], inputs[0].flip(0)))

    def operands(self, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """The input of the norm."""
        return args[1:2]

    def fused(self) -> Callable[..., Any]:
        """A function that makes the norm wait, with what is done to its result as attributes."""
        act_type, activation = self.act_type, self.activation
        assert not isinstance(activation, str)

        def wait(norm: Any, x: Any, *absent: Any) -> Any:
            fits = suits(norm, x) and all(one is None for one in absent)
            return _Waiting(norm, x) if fits else norm(x)

        def add(y: Any, shortcut: Any) -> Any:
            if not isinstance(y, _Waiting):
                y += shortcut
                return y
            x = y.x
            if takes(shortcut) and shortcut.shape == x.shape and shortcut.dtype == x.dtype:
                y.shortcut = shortcut
                return y
            y = y.norm(x)
            y += shortcut
            return y

        def act(function: Any, y: Any) -> Any:
            if not isinstance(y, _Waiting):
                return function(y)
            if not same_act(function, act_type, activation):
                return function(y.norm(y.x) + y.shortcut)
            return normalized(y.norm, y.x, activation, y.shortcut)

        wait.add, wait.act = add, act  # type: ignore[attr-defined]
        return wait

    def edits(self, name: str) -> dict[int, Callable[[Any], ast.AST]]:
        """Each of the three statements becomes a call."""

        def waits(node: ast.Assign) -> ast.AST:
            assert isinstance(node.value, ast.Call)
            absent = [expression(f"self.{one}") for one in self.absent]
            return ast.Assign(targets=node.targets, value=call(name, node.value.func, node.value.args[0], *absent))

        def adds(node: ast.AugAssign) -> ast.AST:
            target = node.target
            assert isinstance(target, ast.Name)
            return ast.Assign(targets=[target], value=call(f"{name}.add", expression(target.id), node.value))

        def acts(node: Any) -> Any:
            found = acting(node.value)
            assert found is not None
            node.value = call(f"{name}.act", *found)
            return node

        return dict(zip(self.numbers, (waits, adds, acts), strict=True))


class _Waiting:
    """A norm that has not run yet."""

    def __init__(self, norm: Any, x: Tensor) -> None:
        self.norm, self.x = norm, x
        self.shortcut: Any = None


def _tail(
    module: nn.Module, statements: list[Any], start: int
) -> tuple[ast.expr, ast.AugAssign, int, tuple[str, ...]] | None:
    """(norm, sum, index of the activation, absent children) of the tail whose norm is at ``start``."""
    norm = step(statements[start]) if target(statements[start]) else None
    if norm is None or child(norm) is None or family(getattr(module, child(norm) or "", None)) != "batch":
        return None
    name = target(statements[start])
    before, argument = statements[start - 1], statements[start].value.args[0]
    producer = step(before)
    fresh = producer is not None and isinstance(getattr(module, child(producer) or "", None), _ConvNd)
    if not fresh or target(before) != name or not isinstance(argument, ast.Name) or argument.id != name:
        return None
    absent: list[str] = []
    for index in range(start + 1, len(statements) - 1):
        statement, then = statements[index], statements[index + 1]
        if isinstance(statement, ast.AugAssign):
            closes = _adds_to(statement, name) and step(then) is not None and target(then) in (name, None)
            whole = closes and _names(then.value.args[0]) == {name}
            return (norm, statement, index + 1, tuple(absent)) if whole else None
        gone = _absent(module, statement)
        if gone:
            absent.append(gone)
        elif name in _names(statement) or any(isinstance(n, _LEAVES) for n in ast.walk(statement)):
            return None
    return None


_LEAVES = (ast.Return, ast.Raise, ast.Yield, ast.YieldFrom, ast.Break, ast.Continue, ast.Try)


def _adds_to(statement: ast.AugAssign, name: str) -> bool:
    """Whether it is ``name += other``."""
    target, value = statement.target, statement.value
    named = isinstance(target, ast.Name) and target.id == name and isinstance(value, ast.Name) and value.id != name
    return named and isinstance(statement.op, ast.Add)


def _absent(module: nn.Module, statement: ast.stmt) -> str | None:
    """The name in ``if self.name is not None:``, where it is None."""
    if not isinstance(statement, ast.If) or statement.orelse or not isinstance(statement.test, ast.Compare):
        return None
    test = statement.test
    negated = len(test.ops) == 1 and isinstance(test.ops[0], ast.IsNot)
    none = isinstance(test.comparators[0], ast.Constant) and test.comparators[0].value is None
    name = child(test.left)
    return name if negated and none and name and getattr(module, name, ...) is None else None


def _names(node: ast.AST) -> set[str]:
    return {n.id for n in ast.walk(node) if isinstance(n, ast.Name)}


class _Tail(nn.Module):
    def __init__(self, norm: nn.Module, act: Any, fused: Any) -> None:
        super().__init__()
        self.norm, self.act, self.fused = norm, act, fused

    def forward(self, x: Tensor, shortcut: Tensor) -> Any:
        if self.fused is None:
            return self.act(self.norm(x) + shortcut)
        return self.fused.act(self.act, self.fused.add(self.fused(self.norm, x), shortcut))
