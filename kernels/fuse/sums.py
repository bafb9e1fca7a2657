"""Residual sums in the source of a forward, with the steps that one of the two summands ends with.

Steps may stand in the sum itself (``x + self.drop(self.ls(y))``), or in the statements right before it (``y =
self.drop(y)``), where they become their own argument, and the fused sum does them.
"""

from __future__ import annotations

import ast
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from torch import nn

from .sites import Known, Unit, called, child
from .source import blocks, expression
from .steps import INNER, Step, Wrapped, wrapped

#: What may not stand around a part of a statement: the part would not run, or not once.
BRANCHES = (ast.IfExp, ast.BoolOp, ast.Compare, ast.Lambda, ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)


class Sum(NamedTuple):
    """``a + b``, or ``a += b`` (or any other node), in a statement of a block."""

    node: Any
    block: list[Any]
    place: int


class Branch(NamedTuple):
    """Of a sum: the steps, the outermost first; in its ``first`` summand or the second."""

    steps: tuple[Step, ...]
    first: bool
    #: How to get from the summand to what the steps are applied to; and the nodes on the way.
    inline: tuple[str, ...]
    inside: tuple[int, ...]
    #: The nodes of other statements that become what they are applied to, and where in the node that is.
    moved: tuple[tuple[int, str], ...]


@functools.lru_cache(maxsize=4096)
def placed(tree: ast.FunctionDef) -> tuple[Sum, ...]:
    """Every node of a plain statement, from the outside in."""
    found = []
    for block in blocks(tree):
        for place, statement in enumerate(block):
            if isinstance(statement, (ast.Assign, ast.Return, ast.Expr, ast.AugAssign)):
                found += [Sum(node, block, place) for node in ast.walk(statement)]
    return tuple(found)


@functools.lru_cache(maxsize=4096)
def sums(tree: ast.FunctionDef) -> tuple[Sum, ...]:
    """Every sum of two in a plain statement."""
    binary = (one for one in placed(tree) if isinstance(one.node, (ast.BinOp, ast.AugAssign)))
    return tuple(one for one in binary if isinstance(one.node.op, ast.Add))


def skipped(tree: ast.FunctionDef, module: nn.Module) -> set[int]:
    """The ids of the blocks that a flag of the module turns off: of ``if self.flag:`` one of two."""
    found = set()
    for node in ast.walk(tree):
        flag = getattr(module, child(node.test) or "", None) if isinstance(node, ast.If) else None
        if isinstance(node, ast.If) and isinstance(flag, bool):
            found.add(id(node.orelse if flag else node.body))
    return found


def branch(
    found: Sum,
    numbers: Mapping[int, int],
    module: nn.Module,
    unit: Unit,
    known: Known,
    suits: Callable[[Sequence[Step]], bool],
) -> Branch | None:
    """The summand with steps: as many of the last ones as ``suits`` takes together."""
    node = found.node
    sides = ((node.target, node.value),) if isinstance(node, ast.AugAssign) else ((node.left, node.right),) * 2
    for first, operands in zip((True, False), sides, strict=False):
        inner, other = operands if first else operands[::-1]
        if isinstance(other, ast.BinOp) and isinstance(other.op, ast.Mult):
            continue  # a turn, or an average, and no residual
        steps, inline, inside = list[Step](), list[str](), list[int]()
        while (one := wrapped(inner, module, unit, known)) is not None and suits([*steps, one.step]):
            steps.append(one.step)
            inline.append(one.where)
            inside.append(numbers[id(inner)])
            inner = one.inner
        moved = []
        for before, step_node in _before(found, inner, other, module, unit, known):
            if not suits([*steps, before.step]):
                break
            steps.append(before.step)
            moved.append((numbers[id(step_node)], before.where))
        if any(step.how != "idle" for step in steps):
            return Branch(tuple(steps), first, tuple(inline), tuple(inside), tuple(moved))
    return None


def unwrapped(node: Any, places: Sequence[str]) -> Any:
    """What the steps of an expression are applied to."""
    for where in places:
        node = INNER[where](node)
    return node


def given(steps: Sequence[Step]) -> list[ast.expr]:
    """What the fused function is given for these steps."""
    return [expression(step.source) for step in steps]


def evaluated(node: ast.AST) -> Iterator[ast.AST]:
    """What is inside a node, and then the node, as they are evaluated."""
    for inner in ast.iter_child_nodes(node):
        yield from evaluated(inner)
    yield node


def target(statement: Any) -> str | None:
    """The name that a statement assigns to."""
    one = isinstance(statement, ast.Assign) and len(statement.targets) == 1
    return statement.targets[0].id if one and isinstance(statement.targets[0], ast.Name) else None


def moves(moved: Sequence[tuple[int, str]]) -> dict[int, Callable[[Any], ast.AST]]:
    """The edits that leave of nodes, by their numbers, what they are applied to."""
    return {number: functools.partial(unwrapped, places=(where,)) for number, where in moved}


def alone(found: Sum, name: str, tree: ast.FunctionDef) -> bool:
    """Whether the statement is the last that sees this value of the name, sees it once, and whatever happens."""
    statement = found.block[found.place]
    if any(isinstance(node, BRANCHES) for node in ast.walk(statement)):
        return False
    mentions = sum(isinstance(node, ast.Name) and node.id == name for node in ast.walk(statement))
    if isinstance(statement, ast.AugAssign):
        return statement is found.node and mentions == 1
    if target(statement) == name:
        return mentions == 2
    return mentions == 1 and (isinstance(statement, ast.Return) or not _seen_later(statement, name, tree))


def _seen_later(statement: Any, name: str, tree: ast.FunctionDef) -> bool:
    """Whether the value may be read behind the statement: by a later line, a loop's next turn, or a closure."""
    end = statement.end_lineno, statement.end_col_offset
    for node in ast.walk(tree):
        if isinstance(node, (ast.For, ast.While)) and any(one is statement for one in ast.walk(node)):
            return True
        if node is not tree and isinstance(node, (ast.FunctionDef, ast.Lambda, ast.GeneratorExp)):
            return True
        if isinstance(node, ast.Name) and node.id == name and (node.lineno, node.col_offset) > end:
            return True
    return False


# ---- Steps in the statements before.


def _before(
    found: Sum, inner: ast.expr, other: ast.expr, module: nn.Module, unit: Unit, known: Known
) -> Iterator[tuple[Wrapped, ast.AST]]:
    """The steps that made the summand, and their nodes, the last first, if nothing else sees what is between."""
    if not isinstance(inner, ast.Name) or not alone(found, inner.id, unit.tree) or not _simple(other):
        return
    for statement in reversed(found.block[: found.place]):
        absent = _guard(statement, module)
        one = statement.body[0] if absent else statement
        if target(one) != inner.id:
            return
        step = wrapped(one.value, module, unit, known)
        again = step is not None and isinstance(step.inner, ast.Name) and step.inner.id == inner.id
        if step is None or (absent and not again):
            return
        if absent:  # what is guarded against None may become None
            step = step._replace(step=step.step._replace(source=f"{step.step.source} if {absent} else None"))
        if absent and step.step.owner is not None:
            return
        yield step, one.value
        if not again:
            return


def _simple(other: ast.expr) -> bool:
    """Names and attributes, or a module of one of them: nothing that could change what is computed later now."""
    call = called(other)
    if call is not None and child(call[0]) is not None:
        other = call[1]
    return not any(isinstance(node, (ast.Call, ast.NamedExpr, ast.Await)) for node in ast.walk(other))


def _guard(statement: ast.stmt, module: nn.Module) -> str:
    """The test of ``if self.name is not None:`` over one statement, where it is not None now."""
    if not isinstance(statement, ast.If) or statement.orelse or len(statement.body) != 1:
        return ""
    test = statement.test
    if not isinstance(test, ast.Compare) or len(test.ops) != 1 or not isinstance(test.ops[0], ast.IsNot):
        return ""
    none = isinstance(test.comparators[0], ast.Constant) and test.comparators[0].value is None
    name = child(test.left)
    return ast.unparse(test) if none and name and getattr(module, name, None) is not None else ""
