"""Gates: ``act(gate) · up`` in the source of a forward, on either side, whatever is around it.

Mixtures of experts, gated attention, MLPs with dropout, a residual or an adapter: what the linear layers are, and what
happens between, does not count.
"""

from __future__ import annotations

import ast
import copy
import re
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from ..ops.glu import glu
from .joint import takes
from .sample import Draw, Sample
from .sites import Known, Site, Unit, activation, called, hooked, identity, module_type, resolved, units
from .source import call, expression


@dataclass(frozen=True)
class Gate(Site):
    """The activation, as the source names it, and what it computes; ``first`` if it is the left factor."""

    operator: ClassVar[str] = "glu"
    act: str
    act_type: type | None
    activation: str
    first: bool

    @classmethod
    def find(cls, module: nn.Module, unit: Unit, known: Known) -> Iterator[Site]:
        """Products one of whose factors is an activation of something; not of a mean, which has another shape."""
        if _pools(unit.tree):
            return
        for number, node in enumerate(ast.walk(unit.tree)):
            if not isinstance(node, ast.BinOp) or not isinstance(node.op, ast.Mult):
                continue
            for first, factor in ((True, node.left), (False, node.right)):
                call = called(factor)
                if call is None:
                    continue
                act = resolved(call[0], module, unit.function)
                name = None if act is None else activation(act)
                if name is not None:
                    yield cls(unit.name, (number,), ast.unparse(call[0]), module_type(act), name, first)
                    break

    def key(self, module: nn.Module) -> Hashable:
        """The activation itself."""
        return Gate, self.first, identity(self._act(module))

    def trial(self, module: nn.Module, root: nn.Module) -> tuple[nn.Module, nn.Module, Sample]:
        """The product alone."""
        act = copy.deepcopy(self._act(module))
        return _Product(act, self.first, None), _Product(act, self.first, self.fused()), Sample(module, root, None)

    def draws(self, sample: Sample) -> list[Draw]:
        """Scales on both sides of the activation's bend."""
        return [
            Draw("an ordinary", (sample.randn(2, 5, 32), sample.randn(2, 5, 32))),
            Draw("a large", (20.0 * sample.randn(2, 5, 32), sample.randn(2, 5, 32))),
            Draw("a broadcast", (sample.randn(2, 5, 1), sample.randn(2, 5, 32))),
        ]

    def operands(self, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """The gate, and what it multiplies."""
        return args[1:] if self.first else (args[2], args[0])

    def fused(self) -> Callable[..., Any]:
        """``glu`` of two ordinary tensors of one shape and dtype."""
        act_type, name = self.act_type, self.activation

        def gated(act: Any, gate: Any, up: Any) -> Any:
            if not _alike(gate, up) or module_type(act) is not act_type or hooked(act):
                return act(gate) * up
            return glu(gate, up, activation=name)

        def gating(up: Any, act: Any, gate: Any) -> Any:
            if not _alike(gate, up) or module_type(act) is not act_type or hooked(act):
                return up * act(gate)
            return glu(gate, up, activation=name)

        return gated if self.first else gating

    def edits(self, name: str) -> dict[int, Callable[[Any], ast.AST]]:
        """A call with the operands in the order in which they were evaluated."""

        def edit(node: ast.BinOp) -> ast.AST:
            act, other = (node.left, node.right) if self.first else (node.right, node.left)
            assert isinstance(act, ast.Call)
            operands = [act.func, act.args[0], other] if self.first else [other, act.func, act.args[0]]
            return call(name, *operands)

        return {self.numbers[0]: edit}

    def _act(self, module: nn.Module) -> Any:
        function = units(type(module))[self.unit].function
        return resolved(expression(self.act), module, function)


def _pools(tree: ast.FunctionDef) -> bool:
    """Whether a squeeze-and-excitation is likely: its gate has one element for a channel."""
    return any(isinstance(node, ast.Attribute) and re.search("mean$|pool", node.attr) for node in ast.walk(tree))


def _alike(gate: Any, up: Any) -> bool:
    return takes(gate) and takes(up) and gate.shape == up.shape and gate.dtype == up.dtype


class _Product(nn.Module):
    def __init__(self, act: Any, first: bool, fused: Callable[..., Any] | None) -> None:
        super().__init__()
        self.act, self.first, self.fused = act, first, fused

    def forward(self, gate: Tensor, up: Tensor) -> Any:
        if self.fused is not None:
            return self.fused(self.act, gate, up) if self.first else self.fused(up, self.act, gate)
        return self.act(gate) * up if self.first else up * self.act(gate)
