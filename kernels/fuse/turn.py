"""Rotary embeddings written out: ``x · cos + rotate(x) · sin``, in a forward or in a function that it calls."""

from __future__ import annotations

import ast
import itertools
import types
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..ops.rope import rope, rotate
from .joint import takes
from .sample import Draw, Sample
from .sites import Known, Site, Unit, called, resolved, units
from .source import call, expression


@dataclass(frozen=True)
class Turn(Site):
    """The function that rotates, as the source names it, and which pairs it forms."""

    operator: ClassVar[str] = "rope"
    tables: ClassVar[int] = 2
    rotate: str
    interleaved: bool

    @classmethod
    def find(cls, module: nn.Module, unit: Unit, known: Known) -> Iterator[Site]:
        """Sums of two products, of which one has a rotated factor."""
        for number, node in enumerate(ast.walk(unit.tree)):
            parts = _parts(node)
            if parts is None:
                continue
            function = resolved(parts[0], module, unit.function)
            interleaved = _pairs(function)
            if interleaved is not None:
                yield cls(unit.name, (number,), ast.unparse(parts[0]), interleaved)

    def key(self, module: nn.Module) -> Hashable:
        """The function that rotates."""
        return Turn, self._rotate(module), self.interleaved

    def trial(self, module: nn.Module, root: nn.Module) -> tuple[nn.Module, nn.Module, Sample]:
        """The sum alone."""
        function = self._rotate(module)
        return _Sum(function, None), _Sum(function, self.fused()), Sample(module, root, None)

    def draws(self, sample: Sample) -> list[Draw]:
        """Angles shared by the heads, and by the batch; and free ones."""
        x, angles = sample.randn(2, 4, 6, 16), sample.randn(2, 1, 6, 8)
        pairs = angles.repeat_interleave(2, -1) if self.interleaved else angles.repeat(1, 1, 1, 2)
        free = sample.randn(2, 1, 6, 16)
        return [
            Draw("an ordinary", (x, pairs.cos(), pairs.sin()), tables=2),
            Draw("an unpaired", (x, free, free.flip(-1))),
            Draw("a batch-shared", (x, pairs[0, 0].cos(), pairs[0, 0].sin())),
            Draw("a large", (1e3 * x, pairs.cos(), pairs.sin())),
        ]

    def operands(self, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """All but the function that rotates."""
        return args[1:]

    def fused(self) -> Callable[..., Any]:
        """``rope`` of ordinary tensors, in the dtype that the sum has."""
        interleaved = self.interleaved

        def turned(rotate: Any, x: Any, cos: Any, sin: Any) -> Any:
            if not all(map(takes, (x, cos, sin))) or not _fits(x, cos, sin):
                return x * cos + rotate(x) * sin
            return rope(x.to(torch.promote_types(x.dtype, cos.dtype)), cos, sin, interleaved=interleaved)

        return turned

    def edits(self, name: str) -> dict[int, Callable[[Any], ast.AST]]:
        """A call with the function that rotates, what turns, and the tables."""

        def edit(node: ast.BinOp) -> ast.AST:
            parts = _parts(node)
            assert parts is not None
            return call(name, *parts)

        return {self.numbers[0]: edit}

    def _rotate(self, module: nn.Module) -> Any:
        function = units(type(module))[self.unit].function
        return resolved(expression(self.rotate), module, function)


def _parts(node: ast.AST) -> tuple[ast.expr, ast.expr, ast.expr, ast.expr] | None:
    """(rotate, x, cos, sin) of ``x * cos + rotate(x) * sin``, the factors of each product in either order."""
    if not isinstance(node, ast.BinOp) or not isinstance(node.op, ast.Add):
        return None
    factors = [
        (side.left, side.right) if isinstance(side, ast.BinOp) and isinstance(side.op, ast.Mult) else None
        for side in (node.left, node.right)
    ]
    if factors[0] is None or factors[1] is None:
        return None
    for plain, turned in ((factors[0], factors[1]), (factors[1], factors[0])):
        for call_at, x_at in itertools.product((0, 1), repeat=2):
            call, x = called(_widened(turned[call_at])), plain[x_at]
            if call is not None and _plain(_widened(x)) and ast.dump(_widened(call[1])) == ast.dump(_widened(x)):
                return call[0], x, plain[1 - x_at], turned[1 - call_at]
    return None


def _plain(node: ast.expr) -> bool:
    """Whether evaluating it once in the place of twice is the same."""
    while isinstance(node, ast.Attribute):
        node = node.value
    return isinstance(node, ast.Name)


def _widened(node: ast.expr) -> ast.expr:
    """What is in ``node.float()``: it may be widened before or after it is rotated."""
    wide = isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "float"
    return node.func.value if wide and not node.args and not node.keywords else node  # type: ignore[attr-defined]


def _pairs(function: Any) -> bool | None:
    """Whether the function rotates neighbours (True) or halves (False); None if it does neither."""
    if not isinstance(function, (types.FunctionType, types.BuiltinFunctionType)):
        return None
    x = torch.arange(1.0, 17.0, dtype=torch.float64).view(1, 1, 2, 8)
    try:
        y = function(x.clone())
    except Exception:
        return None
    if not isinstance(y, Tensor) or y.shape != x.shape:
        return None
    return next((pairs for pairs in (False, True) if torch.equal(y, rotate(x, pairs))), None)


def _fits(x: Tensor, cos: Tensor, sin: Tensor) -> bool:
    """Whether the sum has x's shape, and the tables are alike."""
    if cos.dtype != sin.dtype or cos.shape[-1:] != x.shape[-1:] or sin.shape[-1:] != x.shape[-1:] or x.dim() < 2:
        return False
    try:
        return x.shape[-1] % 2 == 0 and torch.broadcast_shapes(x.shape, cos.shape, sin.shape) == x.shape
    except RuntimeError:
        return False


class _Sum(nn.Module):
    def __init__(self, rotate: Callable[[Tensor], Tensor], fused: Callable[..., Any] | None) -> None:
        super().__init__()
        self.rotate, self.fused = rotate, fused

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Any:
        if self.fused is not None:
            return self.fused(self.rotate, x, cos, sin)
        return x * cos + self.rotate(x) * sin
