"""A residual sum and the norm of it: ``h = a + b``, ``y = norm(h)``, in one pass that returns both.

The norm may stand in the next statement, alone or inside other calls (``h + mlp(norm(h))``), behind assignments that
only give the sum another name, or around the sum itself (``norm(a + b)``).
"""

from __future__ import annotations

import ast
import copy
import functools
from collections.abc import Callable, Hashable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..ops.layer_norm import add_layer_norm
from ..ops.rms_norm import add_rms_norm
from .joint import fused_class, takes
from .norms import Norm, original_type, recognised
from .sample import Draw, Sample, kind
from .savings import Counted, Measure
from .sites import Known, Site, Unit, called, child, hooked
from .source import blocks, call, expression, numbered
from .step_trial import Operands, count_dropped, dropping, operands, step_key
from .steps import Step, intact, live, probability
from .sums import BRANCHES, Branch, Sum, branch, evaluated, given, moves, sums, target, unwrapped
from .tail import OTHER_NUMBERS, DropoutAdd


@dataclass(frozen=True)
class AddNorm(Site):
    """The norm by its name, its class and what it computes, and the dropout of a summand, if there is one.

    The first node is the sum; of a norm ``around`` it, the second is the norm, else the statement and the norm.
    """

    norm: str
    norm_type: type[nn.Module]
    joint: Norm
    around: bool
    branch: Branch | None

    @property
    def operator(self) -> str:  # type: ignore[override]
        """The name of the fused operator."""
        return f"add_{self.joint.operator}"

    @property
    def note(self) -> str:
        """What differs where something is dropped."""
        return "" if self.branch is None else OTHER_NUMBERS

    @classmethod
    def find(cls, module: nn.Module, unit: Unit, known: Known) -> Iterator[Site]:
        """In every block of statements, and every call."""
        make = functools.partial(cls._made, module, unit, known)
        numbers, places = numbered(unit.tree), {id(one.node): one for one in sums(unit.tree)}
        for node in ast.walk(unit.tree):
            around = called(node)
            if around is not None and isinstance(around[1], ast.BinOp) and isinstance(around[1].op, ast.Add):
                total = places.get(id(around[1]), Sum(around[1], [], 0))
                yield from make(numbers, around[0], total, (numbers[id(node)],), True)
        for block in blocks(unit.tree):
            for statement, norm in _pairs(block):
                nodes = (numbers[id(statement)], numbers[id(norm)])
                yield from make(numbers, norm.func, places[id(statement.value)], nodes, False)

    @classmethod
    def _made(
        cls,
        module: nn.Module,
        unit: Unit,
        known: Known,
        numbers: Mapping[int, int],
        function: ast.expr,
        total: Sum,
        nodes: tuple[int, ...],
        around: bool,
    ) -> Iterator[Site]:
        name = child(function)
        norm = None if name is None else getattr(module, name, None)
        if name is None or not isinstance(norm, nn.Module) or hooked(norm):
            return
        joint = recognised(norm, known)
        if joint is None or joint.channels_first:
            return
        found = branch(total, numbers, module, unit, known, DropoutAdd.suits) if total.block else None
        if found is not None and not any(live(step, module, unit) for step in found.steps):
            found = None
        moved = () if found is None else (*found.inside, *(number for number, _ in found.moved))
        yield cls(unit.name, (numbers[id(total.node)], *nodes, *moved), name, original_type(norm), joint, around, found)

    def key(self, module: nn.Module) -> Hashable:
        """The norm, and the dropout."""
        steps = tuple(step_key(step, module, self.unit) for step in self._steps)
        return AddNorm, kind(getattr(module, self.norm)), self.joint, steps, self.branch is None or self.branch.first

    @property
    def _steps(self) -> tuple[Step, ...]:
        return () if self.branch is None else self.branch.steps

    def trial(self, module: nn.Module, root: nn.Module) -> tuple[nn.Module, nn.Module, Sample]:
        """Sum and norm."""
        sample, steps = Sample(getattr(module, self.norm), root, {}), operands(self._steps, module, self.unit)
        self.joint.exact(sample.module)
        first = self.branch is None or self.branch.first

        def made(steps: Operands, function: Callable[..., Any] | None) -> nn.Module:
            return _Sum(sample.module, copy.deepcopy(steps), first, function)

        def run(dropping: Operands, y: Tensor) -> Any:
            return made(dropping, self.fused()).train(dropping.training)(y, torch.zeros_like(y))[0]

        count_dropped(run, steps, self.draws(sample)[0].inputs[0])
        return made(steps, None), made(steps, self.fused()), sample

    def draws(self, sample: Sample) -> list[Draw]:
        """Those of the norm, and others to add to them."""
        return [Draw(label, (x, x.flip(0) + 0.3 * x)) for label, (x,), _ in self.joint.draws(sample)]

    def alive(self, counted: Counted) -> Counted:
        """With the probabilities of the module; against a norm fused alone, which has a saving of its own."""
        original: Any = counted.original
        norm = copy.deepcopy(original.norm)
        norm.__class__ = fused_class(self.norm_type, self.joint)
        return dropping(counted._replace(original=_Sum(norm, original.steps, original.first, None)))

    def operands(self, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """The branch, and what it is added to."""
        return args[1:3] if self.branch is None or self.branch.first else args[2:0:-1]

    def measure(self, module: nn.Module) -> Measure:
        """That of the norm."""
        return self.joint.measure(getattr(module, self.norm))

    def fused(self) -> Callable[..., Any]:
        """(sum, [norm of it]): in a list, so that nothing holds it longer than the original does."""
        joint, norm_type, steps = self.joint, self.norm_type, self._steps
        first = self.branch is None or self.branch.first
        dropped = None if self.branch is None else DropoutAdd(self.unit, self.numbers, self.branch, False).fused()

        def add_norm(norm: Any, left: Any, right: Any, *given: Any) -> Any:
            weight = None if joint.weight is None else getattr(norm, joint.weight, None)
            y, x = (left, right) if first else (right, left)
            plain = original_type(norm) is norm_type and not hooked(norm) and all(map(intact, steps, given))
            if not plain or not _suits(y, x, weight):
                total = left + right if dropped is None else dropped(left, right, *given)
                return total, [norm(total)]
            p = next((probability(s, one) for s, one in zip(steps, given, strict=True) if s.how == "dropout"), 0.0)
            eps: Any = getattr(norm, joint.eps) if isinstance(joint.eps, str) else joint.eps
            if joint.center:
                bias = None if joint.bias is None else getattr(norm, joint.bias)
                normed, total = add_layer_norm(y, x, weight, bias, eps=eps, p=p)
            else:
                normed, total = add_rms_norm(y, x, weight, eps=eps, weight_offset=joint.weight_offset, p=p)
            return total, [normed]

        return add_norm

    def edits(self, name: str) -> dict[int, Callable[[Any], ast.AST]]:
        """The sum becomes a call that returns the norm, too, and the norm takes it from there."""
        found = self.branch

        def both(total: ast.BinOp) -> ast.expr:
            left, right = total.left, total.right
            if found is not None:
                left = unwrapped(left, found.inline) if found.first else left
                right = right if found.first else unwrapped(right, found.inline)
            return call(name, expression(f"self.{self.norm}"), left, right, *given(self._steps))

        def around(node: ast.Call) -> ast.AST:
            assert isinstance(node.args[0], ast.BinOp)
            normed = ast.Subscript(value=both(node.args[0]), slice=ast.Constant(1), ctx=ast.Load())
            return ast.Call(func=ast.Attribute(value=normed, attr="pop", ctx=ast.Load()), args=[], keywords=[])

        def summed(node: ast.Assign) -> ast.AST:
            assert isinstance(node.value, ast.BinOp)
            targets = [*node.targets, ast.Name(id=f"{name}_normed", ctx=ast.Store())]
            return ast.Assign(targets=[ast.Tuple(elts=targets, ctx=ast.Store())], value=both(node.value))

        moved = {} if found is None else moves(found.moved)
        if self.around:
            return {self.numbers[1]: around} | moved
        return {self.numbers[1]: summed, self.numbers[2]: lambda _: call(f"{name}_normed.pop")} | moved


def _pairs(statements: list[Any]) -> Iterator[tuple[ast.Assign, ast.Call]]:
    """Each ``h = a + b`` with the call of one argument, h, that is the first call behind it."""
    for start, total in enumerate(statements):
        name = target(total)
        if name is None or not isinstance(total.value, ast.BinOp) or not isinstance(total.value.op, ast.Add):
            continue
        names = {name}
        for statement in statements[start + 1 :]:
            alias = target(statement)
            if alias is None or not isinstance(statement.value, ast.Name) or statement.value.id not in names:
                first = _first_call(statement)
                argument = None if first is None else called(first)
                if argument is not None and isinstance(argument[1], ast.Name) and argument[1].id in names:
                    yield total, first
                break
            names.add(alias)


def _first_call(statement: ast.stmt) -> Any:
    """The call in it that returns first, if all that is in it runs once."""
    if not isinstance(statement, (ast.Assign, ast.Return, ast.Expr)):
        return None
    nodes = list(evaluated(statement))
    if any(isinstance(node, (*BRANCHES, ast.Await, ast.NamedExpr)) for node in nodes):
        return None
    return next((node for node in nodes if isinstance(node, ast.Call)), None)


def _suits(branch: Any, residual: Any, weight: Tensor | None) -> bool:
    """Same shape, same dtype, no autocast: where dtypes differ, the original widens what the operator would not."""
    if not takes(branch) or not takes(residual) or torch.is_autocast_enabled(branch.device.type):
        return False
    if weight is not None and (weight.dtype != branch.dtype or weight.shape != branch.shape[-1:]):
        return False
    return bool(branch.shape == residual.shape and branch.dtype == residual.dtype)


class _Sum(nn.Module):
    def __init__(self, norm: nn.Module, steps: Operands, first: bool, fused: Callable[..., Any] | None) -> None:
        super().__init__()
        self.norm, self.steps, self.first, self.fused = norm, steps, first, fused

    def forward(self, branch: Tensor, residual: Tensor) -> Any:
        if self.fused is None:
            branch = self.steps(branch)
            total = branch + residual if self.first else residual + branch
            return total, self.norm(total)
        pair = (branch, residual) if self.first else (residual, branch)
        total, normed = self.fused(self.norm, *pair, *self.steps.given())
        return total, *normed
