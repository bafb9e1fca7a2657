"""A residual sum and the norm of it: ``h = a + b``, ``y = norm(h)``, in one pass that returns both.

The norm may stand in the next statement, alone or inside other calls (``h + mlp(norm(h))``), behind assignments that
only give the sum another name, or around the sum itself (``norm(a + b)``).
"""

from __future__ import annotations

import ast
import copy
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..ops.layer_norm import add_layer_norm
from ..ops.rms_norm import add_rms_norm
from .joint import fused_class, fusion, takes
from .norms import Norm
from .sample import Draw, Refused, Sample, kind
from .savings import Counted, Measure
from .sites import Site, Unit, called, child, hooked
from .source import blocks, call, expression, numbered

#: What may not stand around the norm: it would not run, or not once.
_BRANCHES = (ast.IfExp, ast.BoolOp, ast.Compare, ast.Lambda, ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)


@dataclass(frozen=True)
class AddNorm(Site):
    """The norm by its name, its class and what it computes; the nodes are the sum's and the norm's, or one for both."""

    norm: str
    norm_type: type[nn.Module]
    joint: Norm

    @property
    def operator(self) -> str:  # type: ignore[override]
        """The name of the fused operator."""
        return f"add_{self.joint.operator}"

    @classmethod
    def find(cls, module: nn.Module, unit: Unit) -> Iterator[Site]:
        """In every block of statements, and every call."""
        numbers = numbered(unit.tree)
        for node in ast.walk(unit.tree):
            around = called(node)
            if around is not None and isinstance(around[1], ast.BinOp) and isinstance(around[1].op, ast.Add):
                yield from cls._made(module, unit, around[0], (numbers[id(node)],))
        for block in blocks(unit.tree):
            for total, norm in _pairs(block):
                yield from cls._made(module, unit, norm.func, (numbers[id(total)], numbers[id(norm)]))

    @classmethod
    def _made(cls, module: nn.Module, unit: Unit, function: ast.expr, numbers: tuple[int, ...]) -> Iterator[Site]:
        name = child(function)
        norm = None if name is None else getattr(module, name, None)
        if name is None or not isinstance(norm, nn.Module) or hooked(norm):
            return
        joint = _recognised(norm)
        if joint is not None and not joint.channels_first:
            yield cls(unit.name, numbers, name, _original(norm), joint)

    def key(self, module: nn.Module) -> Hashable:
        """The norm."""
        return AddNorm, kind(getattr(module, self.norm)), self.joint

    def trial(self, module: nn.Module, root: nn.Module) -> tuple[nn.Module, nn.Module, Sample]:
        """Sum and norm."""
        sample = Sample(getattr(module, self.norm), root, {})
        self.joint.exact(sample.module)
        return _Sum(sample.module, None), _Sum(sample.module, self.fused()), sample

    def draws(self, sample: Sample) -> list[Draw]:
        """Those of the norm, and others to add to them."""
        return [Draw(label, (x, x.flip(0) + 0.3 * x)) for label, (x,), _ in self.joint.draws(sample)]

    def counted(self, original: nn.Module, fused: nn.Module, sample: Sample) -> Counted:
        """Against a sum and the norm fused alone, which has a saving of its own."""
        return super().counted(self._alone(original), fused, sample)

    def given(self, original: nn.Module, fused: nn.Module, inputs: tuple[Tensor, ...]) -> Counted:
        """Likewise."""
        return super().given(self._alone(original), fused, inputs)

    def _alone(self, original: Any) -> nn.Module:
        norm = copy.deepcopy(original.norm)
        norm.__class__ = fused_class(self.norm_type, self.joint)
        return _Sum(norm, None)

    def operands(self, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """What is added."""
        return args[1:3]

    def measure(self, module: nn.Module) -> Measure:
        """That of the norm."""
        return self.joint.measure(getattr(module, self.norm))

    def fused(self) -> Callable[..., Any]:
        """(sum, [norm of it]): in a list, so that nothing holds it longer than the original does."""
        joint, norm_type = self.joint, self.norm_type

        def add_norm(norm: Any, branch: Any, residual: Any) -> Any:
            weight = None if joint.weight is None else getattr(norm, joint.weight, None)
            if _original(norm) is not norm_type or hooked(norm) or not _suits(branch, residual, weight):
                total = branch + residual
                return total, [norm(total)]
            eps: Any = getattr(norm, joint.eps) if isinstance(joint.eps, str) else joint.eps
            if joint.center:
                bias = None if joint.bias is None else getattr(norm, joint.bias)
                normed, total = add_layer_norm(branch, residual, weight, bias, eps=eps)
            else:
                normed, total = add_rms_norm(branch, residual, weight, eps=eps, weight_offset=joint.weight_offset)
            return total, [normed]

        return add_norm

    def edits(self, name: str) -> dict[int, Callable[[Any], ast.AST]]:
        """The sum becomes a call that returns the norm, too, and the norm takes it from there."""

        def both(total: ast.BinOp) -> ast.expr:
            return call(name, expression(f"self.{self.norm}"), total.left, total.right)

        def around(node: ast.Call) -> ast.AST:
            assert isinstance(node.args[0], ast.BinOp)
            normed = ast.Subscript(value=both(node.args[0]), slice=ast.Constant(1), ctx=ast.Load())
            return ast.Call(func=ast.Attribute(value=normed, attr="pop", ctx=ast.Load()), args=[], keywords=[])

        def sums(node: ast.Assign) -> ast.AST:
            assert isinstance(node.value, ast.BinOp)
            targets = [*node.targets, ast.Name(id=f"{name}_normed", ctx=ast.Store())]
            return ast.Assign(targets=[ast.Tuple(elts=targets, ctx=ast.Store())], value=both(node.value))

        if len(self.numbers) == 1:
            return {self.numbers[0]: around}
        return {self.numbers[0]: sums, self.numbers[1]: lambda _: call(f"{name}_normed.pop")}


def _pairs(statements: list[Any]) -> Iterator[tuple[ast.Assign, ast.Call]]:
    """Each ``h = a + b`` with the call of one argument, h, that is the first call behind it."""
    for start, total in enumerate(statements):
        name = _target(total)
        if name is None or not isinstance(total.value, ast.BinOp) or not isinstance(total.value.op, ast.Add):
            continue
        names = {name}
        for statement in statements[start + 1 :]:
            alias = _target(statement)
            if alias is None or not isinstance(statement.value, ast.Name) or statement.value.id not in names:
                first = _first_call(statement)
                argument = None if first is None else called(first)
                if argument is not None and isinstance(argument[1], ast.Name) and argument[1].id in names:
                    yield total, first
                break
            names.add(alias)


def _target(statement: Any) -> str | None:
    one = isinstance(statement, ast.Assign) and len(statement.targets) == 1
    return statement.targets[0].id if one and isinstance(statement.targets[0], ast.Name) else None


def _first_call(statement: ast.stmt) -> Any:
    """The call in it that returns first, if all that is in it runs once."""
    if not isinstance(statement, (ast.Assign, ast.Return, ast.Expr)):
        return None
    nodes = list(_evaluated(statement))
    if any(isinstance(node, (*_BRANCHES, ast.Await, ast.NamedExpr)) for node in nodes):
        return None
    return next((node for node in nodes if isinstance(node, ast.Call)), None)


def _evaluated(node: ast.AST) -> Iterator[ast.AST]:
    """What is inside a node, and then the node, as they are evaluated."""
    for inner in ast.iter_child_nodes(node):
        yield from _evaluated(inner)
    yield node


def _original(norm: Any) -> type[nn.Module]:
    made = fusion(norm)
    return type(norm) if made is None else made.original


def _recognised(norm: nn.Module) -> Norm | None:
    made = fusion(norm)
    if made is not None:
        return made.joint if isinstance(made.joint, Norm) else None
    if not Norm.suits(norm):
        return None
    try:
        return Norm.recognise(Sample(norm, norm, {}))
    except Refused:
        return None


def _suits(branch: Any, residual: Any, weight: Tensor | None) -> bool:
    """Same shape, same dtype, no autocast: where dtypes differ, the original widens what the operator would not."""
    if not takes(branch) or not takes(residual) or torch.is_autocast_enabled(branch.device.type):
        return False
    if weight is not None and (weight.dtype != branch.dtype or weight.shape != branch.shape[-1:]):
        return False
    return bool(branch.shape == residual.shape and branch.dtype == residual.dtype)


class _Sum(nn.Module):
    def __init__(self, norm: nn.Module, fused: Callable[..., Any] | None) -> None:
        super().__init__()
        self.norm, self.fused = norm, fused

    def forward(self, branch: Tensor, residual: Tensor) -> Any:
        if self.fused is None:
            total = branch + residual
            return total, self.norm(total)
        total, normed = self.fused(self.norm, branch, residual)
        return total, *normed
