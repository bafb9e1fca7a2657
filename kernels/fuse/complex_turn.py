"""Rotary embeddings in complex numbers: ``torch.view_as_real(x * turns)``, where |turns| need not be 1."""

from __future__ import annotations

import ast
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..ops.rope import rope
from .sample import Draw, Sample
from .sites import Known, Site, Unit, called, resolved
from .source import call


@dataclass(frozen=True)
class ComplexTurn(Site):
    """Pairs of neighbours, each as a complex number, times a complex table."""

    operator: ClassVar[str] = "rope"
    tables: ClassVar[int] = 1

    @classmethod
    def find(cls, module: nn.Module, unit: Unit, known: Known) -> Iterator[Site]:
        """Products of two tensors right inside ``torch.view_as_real``."""
        for number, node in enumerate(ast.walk(unit.tree)):
            call = called(node)
            if call is None or resolved(call[0], module, unit.function) is not torch.view_as_real:
                continue
            if isinstance(call[1], ast.BinOp) and isinstance(call[1].op, ast.Mult):
                yield cls(unit.name, (number,))

    def key(self, module: nn.Module) -> Hashable:
        """There is one such form."""
        return ComplexTurn

    def trial(self, module: nn.Module, root: nn.Module) -> tuple[nn.Module, nn.Module, Sample]:
        """The product, of pairs of real numbers."""
        return _Product(_product), _Product(self.fused()), Sample(module, root, None)

    def draws(self, sample: Sample) -> list[Draw]:
        """Turns shared by the heads, and by the batch; and free ones."""
        x, angles = sample.randn(2, 4, 6, 8, 2), sample.randn(2, 1, 6, 8, 1)
        turns = torch.cat([angles.cos(), angles.sin()], -1)
        return [
            Draw("an ordinary", (x, turns), tables=1),
            Draw("a free", (x, sample.randn(2, 1, 6, 8, 2))),
            Draw("a batch-shared", (x, turns[0, 0])),
        ]

    def operands(self, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """Both, in pairs of real numbers."""
        return tuple(torch.view_as_real(t) if _plain(t) else None for t in args)

    def fused(self) -> Callable[..., Any]:
        """``rope`` of the pairs, where the second factor is the table."""

        def turned(x: Any, turns: Any) -> Any:
            if (
                not (_plain(x) and _plain(turns))
                or x.dtype != turns.dtype
                or turns.requires_grad
                or not _fits(x, turns)
            ):
                return _product(x, turns)
            cos, sin = (part.repeat_interleave(2, -1) for part in (turns.real, turns.imag))
            return rope(torch.view_as_real(x).flatten(-2), cos, sin, interleaved=True).unflatten(-1, (-1, 2))

        return turned

    def edits(self, name: str) -> dict[int, Callable[[Any], ast.AST]]:
        """A call with the two factors."""

        def edit(node: ast.Call) -> ast.AST:
            product = node.args[0]
            assert isinstance(product, ast.BinOp)
            operands = [product.left, product.right]
            return call(name, *operands)

        return {self.numbers[0]: edit}


def _product(x: Any, turns: Any) -> Any:
    return torch.view_as_real(x * turns)


def _plain(x: Any) -> bool:
    return type(x) is Tensor and x.is_complex() and not x.is_conj()


def _fits(x: Tensor, turns: Tensor) -> bool:
    try:
        return turns.shape[-1] == x.shape[-1] and torch.broadcast_shapes(x.shape, turns.shape) == x.shape
    except RuntimeError:
        return False


class _Product(nn.Module):
    def __init__(self, product: Callable[..., Any]) -> None:
        super().__init__()
        self.product = product

    def forward(self, x: Tensor, turns: Tensor) -> Any:
        wide = torch.promote_types(x.dtype, torch.float32)  # there are no complex bfloat16 numbers
        return self.product(*(torch.view_as_complex(t.to(wide).contiguous()) for t in (x, turns.detach())))
