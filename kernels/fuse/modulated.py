"""Modulated norms of diffusion transformers: ``norm(x)·(1 + scale) + shift``, with rows that come from a condition.

In one expression, in two statements (``h = self.norm(x)``, ``h = h * (1 + scale) + shift``), or by a helper of three
arguments, which is told by what it does to drawn ones.
"""

from __future__ import annotations

import ast
import copy
import types
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..ops.modulated_norm import modulated_layer_norm, modulated_rms_norm
from .joint import fused_class, takes
from .norms import Norm, original_type, recognised
from .sample import Draw, Sample, kind
from .savings import Counted, Measure
from .sites import Known, Site, Unit, called, child, hooked, resolved
from .source import call, expression, numbered
from .sums import Sum, alone, moves, placed, target
from .tail import is_rows


class Helper(NamedTuple):
    """How a function modulates: the first argument is the norm's, and of the others one is the scale."""

    function: types.FunctionType
    scale_first: bool
    #: Whether it takes rows [B, D], and makes [B, 1, D] of them.
    lifts: bool


@dataclass(frozen=True)
class Modulated(Site):
    """The norm, and what stands around it: an expression with a shift or without, or a helper.

    The first node is the whole, the second the norm; if that stands in the statement before, it is ``moved``.
    """

    norm: str
    norm_type: type[nn.Module]
    joint: Norm
    shifts: bool
    helper: Helper | None
    moved: bool

    @property
    def operator(self) -> str:  # type: ignore[override]
        """The name of the fused operator."""
        return f"modulated_{self.joint.operator}"

    @classmethod
    def find(cls, module: nn.Module, unit: Unit, known: Known) -> Iterator[Site]:
        """Every modulation of what a norm gives."""
        numbers, taken = numbered(unit.tree), set[int]()
        for one in placed(unit.tree):
            parts, helper = _parts(one.node), None
            if parts is None and isinstance(one.node, ast.Call):
                helper = _helper(one.node, module, unit, known)
                parts = None if helper is None else (one.node.args[0], one.node.args[1], one.node.args[2])
            if parts is None or id(one.node) in taken:
                continue
            taken |= {id(node) for node in ast.walk(one.node)}  # not the product inside the sum as well
            norm, moved = _normed(one, parts[0], unit)
            name = None if norm is None else child(norm.func)
            joint = None if name is None else _suitable(getattr(module, name, None), known)
            if norm is not None and name is not None and joint is not None:
                own = original_type(getattr(module, name))
                nodes = (numbers[id(one.node)], numbers[id(norm)])
                yield cls(unit.name, nodes, name, own, joint, parts[2] is not None, helper, moved)

    def key(self, module: nn.Module) -> Hashable:
        """The norm, and what stands around it."""
        return Modulated, kind(getattr(module, self.norm)), self.joint, self.shifts, self.helper

    def trial(self, module: nn.Module, root: nn.Module) -> tuple[nn.Module, nn.Module, Sample]:
        """Norm and modulation."""
        sample = Sample(getattr(module, self.norm), root, {})
        self.joint.exact(sample.module)
        original, fused = (_Trial(copy.deepcopy(sample.module), self.helper, f) for f in (None, self.fused()))
        return original, fused, sample

    def draws(self, sample: Sample) -> list[Draw]:
        """Those of the norm, with rows for each sample and for each token."""
        found = []
        for label, (x,), _ in self.joint.draws(sample):
            shapes = [(x.shape[0], 1, x.shape[-1]), tuple(x.shape)] if x.dim() == 3 else []
            for shape in shapes[: 1 if self.helper or label != "an ordinary" else 2]:
                rows = [0.5 * sample.randn(*shape) for _ in range(1 + self.shifts)]
                if self.helper is not None and self.helper.lifts:
                    rows = [r.squeeze(1) for r in rows]
                found.append(Draw(label, (x, *rows)))
        return found

    def alive(self, counted: Counted) -> Counted:
        """Against a norm fused alone, which has a saving of its own."""
        found: Any = copy.deepcopy(counted.original)
        found.norm.__class__ = fused_class(self.norm_type, self.joint)
        return counted._replace(original=found)

    def operands(self, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """The input of the norm, and the rows as they stand in the source."""
        return args[1:]

    def measure(self, module: nn.Module) -> Measure:
        """That of the norm."""
        return self.joint.measure(getattr(module, self.norm))

    def fused(self) -> Callable[..., Any]:
        """A function of the norm, its input and the rows."""
        joint, norm_type, helper = self.joint, self.norm_type, self.helper

        def modulated(norm: Any, x: Any, *rows: Any) -> Any:
            weight = None if joint.weight is None else getattr(norm, joint.weight, None)
            own = original_type(norm) is norm_type and not hooked(norm)
            scale, shift = ordered(helper, rows)
            if not own or not fits(x, weight, scale, shift):
                return plain(helper, norm(x), rows)
            eps: Any = getattr(norm, joint.eps) if isinstance(joint.eps, str) else joint.eps
            if joint.center:
                bias = None if joint.bias is None else getattr(norm, joint.bias)
                return modulated_layer_norm(x, scale, shift, weight, bias, eps=eps)
            return modulated_rms_norm(x, scale, shift, weight, eps=eps)

        return modulated

    def parts(self, node: Any) -> list[Any]:
        """Of the whole: what the norm gives, and the rows as they stand there."""
        found: Any = _parts(node) if self.helper is None else node.args
        return [part for part in found if part is not None]

    def edits(self, name: str) -> dict[int, Callable[[Any], ast.AST]]:
        """The whole becomes a call; a norm in the statement before its own argument."""
        norm = expression(f"self.{self.norm}")

        def whole(node: Any) -> ast.AST:
            x, *rows = self.parts(node)
            return call(name, norm, x if self.moved else x.args[0], *rows)

        return {self.numbers[0]: whole} | (moves(((self.numbers[1], "argument"),)) if self.moved else {})


#: (normed, scale, shift): parts of an expression.
Parts = tuple[ast.expr, ast.expr, ast.expr | None]


def _parts(node: ast.AST) -> Parts | None:
    """Of ``h * (1 + scale) + shift``, or ``h * (1 + scale)``, in any order."""
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        for product, shift in ((node.left, node.right), (node.right, node.left)):
            found = _product(product)
            if found is not None:
                return *found, shift
        return None
    found = _product(node)
    return None if found is None else (*found, None)


def _product(node: ast.AST) -> tuple[ast.expr, ast.expr] | None:
    if not isinstance(node, ast.BinOp) or not isinstance(node.op, ast.Mult):
        return None
    for h, factor in ((node.left, node.right), (node.right, node.left)):
        scale = _scale(factor)
        if scale is not None:
            return h, scale
    return None


def _scale(node: ast.expr) -> ast.expr | None:
    """The scale of ``1 + scale``, or of ``(1 + scale)[:, None]``, with that around it."""
    if isinstance(node, ast.Subscript):
        inner = _scale(node.value)
        return None if inner is None else ast.Subscript(value=inner, slice=node.slice, ctx=ast.Load())
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "unsqueeze":
        inner = _scale(node.func.value)
        if inner is None:
            return None
        return ast.Call(func=ast.Attribute(value=inner, attr="unsqueeze", ctx=ast.Load()), args=node.args, keywords=[])
    if not isinstance(node, ast.BinOp) or not isinstance(node.op, ast.Add):
        return None
    sides = ((node.left, node.right), (node.right, node.left))
    return next((scale for one, scale in sides if isinstance(one, ast.Constant) and one.value == 1), None)


def _normed(one: Sum, normed: ast.expr, unit: Unit) -> tuple[ast.Call | None, bool]:
    """The call of the norm, and whether it stands in the statement before."""
    if isinstance(normed, ast.Name):
        before: Any = one.block[one.place - 1] if one.place else None
        if target(before) != normed.id or not alone(one, normed.id, unit.tree) or called(before.value) is None:
            return None, True
        return before.value, True
    return (normed, False) if isinstance(normed, ast.Call) and called(normed) is not None else (None, False)


def _suitable(norm: Any, known: Known) -> Norm | None:
    """A norm that the operator has: of rows, with no offset of its own."""
    if not isinstance(norm, nn.Module) or hooked(norm):
        return None
    joint = recognised(norm, known)
    return None if joint is None or joint.channels_first or joint.weight_offset else joint


# ---- Helpers.


def _helper(node: ast.Call, module: nn.Module, unit: Unit, known: Known) -> Helper | None:
    if len(node.args) != 3 or node.keywords or called(node.args[0]) is None:
        return None
    function = resolved(node.func, module, unit.function)
    if not isinstance(function, types.FunctionType):
        return None
    found: Helper | None = known.once((Helper, function), lambda: _probed(function))
    return found


def _probed(function: types.FunctionType) -> Helper | None:
    generator = torch.Generator().manual_seed(4)
    x, *rows = (torch.randn(*shape, dtype=torch.float64, generator=generator) for shape in ((2, 5, 8), (2, 8), (2, 8)))
    for lifts in (True, False):
        given = rows if lifts else [r.unsqueeze(1) for r in rows]
        try:
            with torch.no_grad():
                y = function(x.clone(), *(r.clone() for r in given))
        except Exception:
            continue
        for scale_first in (True, False):
            helper = Helper(function, scale_first, lifts)
            scale, shift = ordered(helper, given)
            expected = x * (1 + scale) + shift
            if isinstance(y, Tensor) and y.shape == x.shape and torch.allclose(y, expected, rtol=1e-9):
                return helper
    return None


def ordered(helper: Helper | None, rows: Any) -> tuple[Any, Any]:
    """(scale, shift) as rows that broadcast to [B, S, D]."""
    if helper is None:
        return rows[0], rows[1] if len(rows) > 1 else None
    scale, shift = rows if helper.scale_first else rows[::-1]
    if helper.lifts and takes(scale) and takes(shift) and scale.dim() == shift.dim() == 2:
        return scale.unsqueeze(1), shift.unsqueeze(1)
    return (None, None) if helper.lifts else (scale, shift)


# ---- When the model runs.


def fits(x: Any, weight: Any, scale: Any, shift: Any) -> bool:
    """One dtype, and no autocast: where dtypes differ, the original widens what the operator would not."""
    if not takes(x) or not is_rows(scale, x) or torch.is_autocast_enabled(x.device.type):
        return False
    others = [one for one in (scale, shift, weight) if one is not None]
    if any(not takes(one) or one.dtype != x.dtype for one in others):
        return False
    return (shift is None or shift.shape == scale.shape) and (weight is None or weight.shape == x.shape[-1:])


def plain(helper: Helper | None, normed: Any, rows: Any) -> Any:
    """What the source does."""
    if helper is not None:
        return helper.function(normed, *rows)
    y = normed * (1 + rows[0])
    return y + rows[1] if len(rows) > 1 else y


class _Trial(nn.Module):
    def __init__(self, norm: nn.Module, helper: Helper | None, fused: Callable[..., Any] | None) -> None:
        super().__init__()
        self.norm, self.helper, self.fused = norm, helper, fused

    def forward(self, x: Tensor, *rows: Tensor) -> Any:
        if self.fused is not None:
            return self.fused(self.norm, x, *rows)
        return plain(self.helper, self.norm(x), rows)
