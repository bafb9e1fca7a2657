"""Between the branches of a diffusion transformer: a residual sum, gated or not, and the modulated norm of it.

The norm must stand in the statement behind the sum, or behind an ``if self.flag:`` that is off; and its rows must be
names or views of names, because they are looked at before the sum is known.
"""

from __future__ import annotations

import ast
import copy
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from ..ops.add_modulated_norm import add_modulated_layer_norm, add_modulated_rms_norm
from .joint import fused_class, takes
from .modulated import Modulated, fits, ordered, plain
from .norms import original_type
from .sample import Draw, Sample
from .savings import Counted, Measure
from .sites import Known, Site, Unit, called, child, hooked
from .source import call, expression, numbered
from .steps import Step, intact
from .sums import BRANCHES, Branch, Sum, branch, evaluated, given, moves, placed, sums, target, unwrapped
from .tail import GatedAdd, is_rows


@dataclass(frozen=True)
class AddModulated(Site):
    """The modulated norm, its rows as the source names them, and the gate of a summand, if there is one.

    The first node is the sum, the second its statement, then those of the modulated norm.
    """

    modulated: Modulated
    rows: tuple[str, ...]
    branch: Branch | None
    flags: tuple[str, ...]

    @property
    def operator(self) -> str:  # type: ignore[override]
        """The name of the fused operator."""
        return f"add_{self.modulated.operator}"

    @classmethod
    def find(cls, module: nn.Module, unit: Unit, known: Known) -> Iterator[Site]:
        """Every modulated norm of what the statement before it adds up."""
        numbers, nodes = numbered(unit.tree), list(ast.walk(unit.tree))
        places = {id(one.node): one for one in placed(unit.tree)}
        totals = {id(one.node): one for one in sums(unit.tree)}
        for site in Modulated.find(module, unit, known):
            assert isinstance(site, Modulated)
            whole, norm = (nodes[number] for number in site.numbers)
            total, flags = _added(places[id(norm)], totals, module)
            _, *rows = site.parts(whole)
            if total is None or not all(
                _view(row, (target(total.block[total.place]), _name(whole, site))) for row in rows
            ):
                continue
            found = branch(total, numbers, module, unit, known, GatedAdd.suits)
            moved = () if found is None else (*found.inside, *(number for number, _ in found.moved))
            own = (numbers[id(total.node)], numbers[id(total.block[total.place])])
            yield cls(unit.name, (*own, *site.numbers, *moved), site, tuple(map(ast.unparse, rows)), found, flags)

    @property
    def _steps(self) -> tuple[Step, ...]:
        return () if self.branch is None else self.branch.steps

    @property
    def _first(self) -> bool:
        return self.branch is None or self.branch.first

    def key(self, module: nn.Module) -> Hashable:
        """The modulated norm, and whether there is a gate."""
        return AddModulated, self.modulated.key(module), self.branch is None, self._first

    def trial(self, module: nn.Module, root: nn.Module) -> tuple[nn.Module, nn.Module, Sample]:
        """Sum, norm and modulation."""
        *_, sample = self.modulated.trial(module, root)
        original, fused = (_Trial(copy.deepcopy(sample.module), self, f) for f in (None, self.fused()))
        return original, fused, sample

    def draws(self, sample: Sample) -> list[Draw]:
        """Those of the modulated norm, with another to add to them, and gates."""
        found = []
        for label, (x, *rows), _ in self.modulated.draws(sample):
            gate = [] if self.branch is None else [rows[0].flip(0).view(x.shape[0], -1, x.shape[-1])]
            found.append(Draw(label, (x, x.flip(0) + 0.3 * x, *gate, *rows)))
        return found

    def alive(self, counted: Counted) -> Counted:
        """Against a norm fused alone, which has a saving of its own."""
        found: Any = copy.deepcopy(counted.original)
        found.norm.__class__ = fused_class(self.modulated.norm_type, self.modulated.joint)
        return counted._replace(original=found)

    def operands(self, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """The branch, what it is added to, the gate, and the rows."""
        _, _, left, right, *others = args
        gates, rows = _gates(self._steps, others), others[len(self._steps) :]
        return (*((left, right) if self._first else (right, left)), *gates, *rows)

    def measure(self, module: nn.Module) -> Measure:
        """That of the norm."""
        return self.modulated.measure(module)

    def fused(self) -> Callable[..., Any]:
        """(sum, [modulated norm of it]): in a list, so that nothing holds it longer than the original does.

        Where a flag is on now, something may stand between the two: the list is empty, and the norm runs in its place.
        """
        steps, first, site = self._steps, self._first, self.modulated
        joint, norm_type, helper = site.joint, site.norm_type, site.helper
        gated = None if self.branch is None else GatedAdd(self.unit, self.numbers, self.branch, False).fused()
        alone = site.fused()

        def add_modulated(norm: Any, flags: Any, left: Any, right: Any, *others: Any) -> Any:
            given, rows = others[: len(steps)], others[len(steps) :]
            weight = None if joint.weight is None else getattr(norm, joint.weight, None)
            y, x = (left, right) if first else (right, left)
            gate, (scale, shift) = next(iter(_gates(steps, given)), None), ordered(helper, rows)
            own = original_type(norm) is norm_type and not hooked(norm) and all(map(intact, steps, given))
            if not own or any(flags) or not _like(y, x, gate, scale) or not fits(y, weight, scale, shift):
                return left + right if gated is None else gated(left, right, *given), []
            eps: Any = getattr(norm, joint.eps) if isinstance(joint.eps, str) else joint.eps
            if joint.center:
                bias = None if joint.bias is None else getattr(norm, joint.bias)
                normed, total = add_modulated_layer_norm(y, x, gate, scale, shift, weight, bias, eps=eps)
            else:
                normed, total = add_modulated_rms_norm(y, x, gate, scale, shift, weight, eps=eps)
            return total, [normed]

        def taken(normed: list[Any], norm: Any, x: Any, *rows: Any) -> Any:
            return normed.pop() if normed else alone(norm, x, *rows)

        add_modulated.taken = taken  # type: ignore[attr-defined]
        return add_modulated

    def edits(self, name: str) -> dict[int, Callable[[Any], ast.AST]]:
        """The sum becomes a call that returns the modulated norm, too, which is taken from there."""
        found, (_, statement, whole, inner, *_) = self.branch, self.numbers
        norm, moved = expression(f"self.{self.modulated.norm}"), self.modulated.moved

        def summed(node: ast.Assign) -> ast.AST:
            assert isinstance(node.value, ast.BinOp)
            left, right = node.value.left, node.value.right
            if found is not None:
                left = unwrapped(left, found.inline) if found.first else left
                right = right if found.first else unwrapped(right, found.inline)
            flags = ast.Tuple(elts=[expression(f"self.{flag}") for flag in self.flags], ctx=ast.Load())
            operands = (norm, flags, left, right, *given(self._steps))
            targets = [*node.targets, ast.Name(id=f"{name}_normed", ctx=ast.Store())]
            value = call(name, *operands, *map(expression, self.rows))
            return ast.Assign(targets=[ast.Tuple(elts=targets, ctx=ast.Store())], value=value)

        def taken(node: Any) -> ast.AST:
            x, *rows = self.modulated.parts(node)
            return call(f"{name}.taken", expression(f"{name}_normed"), norm, x if moved else x.args[0], *rows)

        before = moves(((inner, "argument"),)) if moved else {}
        steps = {} if found is None else moves(found.moved)
        return {statement: summed, whole: taken} | before | steps


def _added(norm: Sum, totals: dict[int, Sum], module: nn.Module) -> tuple[Sum | None, tuple[str, ...]]:
    """The sum that the norm is of, if nothing is computed in between; and the flags that are off for that."""
    statement, argument = norm.block[norm.place], called(norm.node)
    place, flags = norm.place - 1, list[str]()
    while place >= 0 and (flag := _off(norm.block[place], module)):
        flags.append(flag)
        place -= 1
    before: Any = norm.block[place] if place >= 0 else None
    if argument is None or not isinstance(argument[1], ast.Name) or target(before) != argument[1].id:
        return None, ()
    nodes = list(evaluated(statement))
    ahead = nodes[: next(i for i, node in enumerate(nodes) if node is norm.node)]
    if any(isinstance(node, (*BRANCHES, ast.Await, ast.NamedExpr)) for node in nodes):
        return None, ()
    if any(isinstance(node, ast.Call) and not _view(node, ()) for node in ahead):
        return None, ()
    return totals.get(id(before.value)), tuple(flags)


def _off(statement: ast.stmt, module: nn.Module) -> str | None:
    """The flag of ``if self.flag:``, where that is off."""
    flag = child(statement.test) if isinstance(statement, ast.If) and not statement.orelse else None
    return flag if flag and getattr(module, flag, None) is False else None


_VIEWS = ("unsqueeze", "view", "reshape", "squeeze")
_PLAIN = (ast.Name, ast.Attribute, ast.Subscript, ast.Constant, ast.Slice, ast.Tuple, ast.UnaryOp, ast.USub, ast.Load)


def _view(node: ast.expr, changed: Sequence[str | None]) -> bool:
    """Whether it is a name, or a view of one, that none of these names is in: it may be looked at earlier."""
    for one in ast.walk(node):
        method = isinstance(one, ast.Call) and isinstance(one.func, ast.Attribute) and one.func.attr in _VIEWS
        if not method and not isinstance(one, _PLAIN):
            return False
        if isinstance(one, ast.Name) and one.id in changed:
            return False
    return True


def _name(whole: Any, site: Modulated) -> str | None:
    """The name of what the norm gives, if it has one."""
    normed = site.parts(whole)[0]
    return normed.id if isinstance(normed, ast.Name) else None


def _gates(steps: Sequence[Step], given: Sequence[Any]) -> list[Any]:
    return [operand for step, operand in zip(steps, given, strict=False) if step.how == "gate"]


def _like(y: Any, x: Any, gate: Any, scale: Any) -> bool:
    """Whether the operator takes the sum: of one shape and dtype, with a gate like the scale."""
    if not takes(y) or not takes(x) or y.shape != x.shape or y.dtype != x.dtype:
        return False
    return gate is None or (is_rows(gate, y) and gate.dtype == y.dtype and gate.shape == scale.shape)


class _Trial(nn.Module):
    def __init__(self, norm: nn.Module, site: AddModulated, fused: Callable[..., Any] | None) -> None:
        super().__init__()
        self.norm, self.site = norm, site
        self.fused: Any = fused

    def forward(self, y: Tensor, x: Tensor, *others: Tensor) -> Any:
        gated, first = self.site.branch is not None, self.site._first
        gates, rows = others[:gated], others[gated:]
        if self.fused is not None:
            given = [next(iter(gates)) if step.how == "gate" else nn.Identity() for step in self.site._steps]
            total, normed = self.fused(self.norm, (), *((y, x) if first else (x, y)), *given, *rows)
            return total, self.fused.taken(normed, self.norm, total, *rows)
        y = y * gates[0] if gated else y
        total = y + x if first else x + y
        return total, plain(self.site.modulated.helper, self.norm(total), rows)
