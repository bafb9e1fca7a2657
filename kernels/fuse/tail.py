"""The end of a residual block: ``x + drop_path(gamma · y)``, ``x + gate · y`` or ``x + dropout(y)``, in one pass.

Where something is dropped, the random numbers are not the original's, but have the same distribution.
"""

from __future__ import annotations

import ast
import copy
from abc import abstractmethod
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..ops.dropout_add import dropout_add
from ..ops.gated_add import gated_add
from ..ops.scale_add import scale_add
from .joint import takes
from .sample import Draw, Sample
from .savings import ELEMENT, Counted, Measure
from .sites import Known, Site, Unit
from .source import call, expression, numbered
from .step_trial import RANDOM, Operands, count_dropped, dropping, here, operands, step_key
from .steps import Step, applied, factor, intact, live, per_channel, probability
from .sums import Branch, branch, given, moves, skipped, sums, unwrapped

OTHER_NUMBERS = "drops as often, by random numbers of its own"
CHANNELS_LAST = "where images are in channels_last"


@dataclass(frozen=True)
class Tail(Site):
    """The branch of the sum, and whether the sum is made in place (``y += x``)."""

    branch: Branch
    in_place: bool

    @property
    def note(self) -> str:
        """What differs where something is dropped, and which images it is for."""
        images = CHANNELS_LAST if any(step.channels for step in self.branch.steps) else ""
        random = OTHER_NUMBERS if any(step.how in RANDOM for step in self.branch.steps) else ""
        return "; ".join(filter(None, (random, images)))

    @classmethod
    @abstractmethod
    def suits(cls, steps: Sequence[Step]) -> bool:
        """Whether the operator does all these steps."""

    @classmethod
    def find(cls, module: nn.Module, unit: Unit, known: Known) -> Iterator[Site]:
        """Sums whose branch has a step that does something."""
        numbers, off = numbered(unit.tree), skipped(unit.tree, module)
        for one in sums(unit.tree):
            if id(one.block) in off:
                continue
            found = branch(one, numbers, module, unit, known, cls.suits)
            if found is not None and any(live(step, module, unit) for step in found.steps):
                nodes = (numbers[id(one.node)], *found.inside, *(number for number, _ in found.moved))
                yield cls(unit.name, nodes, found, isinstance(one.node, ast.AugAssign))

    def key(self, module: nn.Module) -> Hashable:
        """The steps, and the order of the sum."""
        steps = tuple(step_key(step, module, self.unit) for step in self.branch.steps)
        return type(self), self.branch.first, self.in_place, steps

    def trial(self, module: nn.Module, root: nn.Module) -> tuple[nn.Module, nn.Module, Sample]:
        """Steps and sum."""
        sample, steps = Sample(module, root, None), operands(self.branch.steps, module, self.unit)
        # The branch of a trial is nobody's result, and cannot be added to in place.
        function = replace(self, in_place=False).fused()
        original, fused = (_Trial(copy.deepcopy(steps), self.branch.first, f) for f in (None, function))
        sample.module = original
        like, *others = self.draws(sample)[0].inputs

        def run(dropping: Operands, y: Tensor) -> Any:
            gates = [gate.new_ones(1).expand(len(y), *gate.shape[1:]).contiguous() for gate in others[1:]]
            return _Trial(dropping, self.branch.first, function).train(dropping.training)(
                y, torch.zeros_like(y), *gates
            )

        count_dropped(run, fused.steps, like)
        return original, fused, sample

    def draws(self, sample: Sample) -> list[Draw]:
        """Branches of a few scales, tokens or images, and the residual; gates for a sample, and for a token."""
        trial: Any = sample.module
        channels, width = any(step.channels for step in self.branch.steps), trial.steps.width()
        shapes = [(3, 4, 5, width)] if channels else [(3, 5, width), (3, width)]
        result = []
        for label, scale in (("an ordinary", 1.0), ("a small", 0.05), ("a large", 30.0)):
            for shape in shapes[: 1 if scale != 1.0 else None]:
                y, x = scale * sample.randn(*shape), sample.randn(*shape)
                pair = (y.movedim(-1, 1), x.movedim(-1, 1)) if channels else (y, x)
                result.append(Draw(label, (*pair, *self._gates(sample, shape))))
        return result

    def _gates(self, sample: Sample, shape: tuple[int, ...]) -> list[Tensor]:
        count = sum(step.how == "gate" for step in self.branch.steps)
        return [sample.randn(shape[0], *[1] * (len(shape) - 2), shape[-1]) for _ in range(count)]

    def alive(self, counted: Counted) -> Counted:
        """With the probabilities of the module."""
        return dropping(counted)

    def operands(self, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """Branch, residual and gates."""
        gates = [one for one, step in zip(args[2:], self.branch.steps, strict=True) if step.how == "gate"]
        return (*(args[:2] if self.branch.first else args[1::-1]), *gates)

    def measure(self, module: nn.Module) -> Measure:
        """The channels of a token, where a factor tells them."""
        for step in self.branch.steps:
            value = factor(step, here(step, module, self.unit)) if step.how == "scale" else None
            if value is not None:
                return Measure("pixel" if step.channels else "token", value.numel())
        return ELEMENT

    def fused(self) -> Callable[..., Any]:
        """A function of both summands and of what the steps need."""
        steps, first, in_place, run = self.branch.steps, self.branch.first, self.in_place, type(self).run

        def tail(left: Any, right: Any, *given: Any) -> Any:
            y, x = (left, right) if first else (right, left)
            fits = takes(y) and takes(x) and y.shape == x.shape and y.dim() > 1
            if fits and all(map(intact, steps, given)):
                result = run(y, x, list(zip(steps, given, strict=True)), in_place)
                if result is not None:
                    return result
            for step, operand in zip(reversed(steps), reversed(given), strict=True):
                y = applied(step, operand, y)
            if in_place:
                y += x
                return y
            return y + x if first else x + y

        return tail

    @staticmethod
    @abstractmethod
    def run(y: Tensor, x: Tensor, steps: list[tuple[Step, Any]], in_place: bool) -> Tensor | None:
        """The sum by the operator; None where there is nothing to gain, or it would have another dtype."""

    def edits(self, name: str) -> dict[int, Callable[[Any], ast.AST]]:
        """The sum becomes a call, and the steps in other statements what they were applied to."""
        found = self.branch

        def summed(node: Any) -> ast.AST:
            if isinstance(node, ast.AugAssign):
                target: Any = node.target
                value = call(name, expression(target.id), node.value, *given(found.steps))
                return ast.Assign(targets=[target], value=value)
            left, right = node.left, node.right
            if found.first:
                left = unwrapped(left, found.inline)
            else:
                right = unwrapped(right, found.inline)
            return call(name, left, right, *given(found.steps))

        return {self.numbers[0]: summed} | moves(found.moved)


class ScaleAdd(Tail):
    """LayerScale and stochastic depth, each at most once."""

    operator: ClassVar[str] = "scale_add"

    @classmethod
    def suits(cls, steps: Sequence[Step]) -> bool:
        """One of each."""
        hows = [step.how for step in steps if step.how != "idle"]
        return set(hows) <= {"scale", "path"} and len(set(hows)) == len(hows)

    @staticmethod
    def run(y: Tensor, x: Tensor, steps: list[tuple[Step, Any]], in_place: bool) -> Tensor | None:
        """``scale_add``, over the last dim or over the channels of images that are laid out so."""
        value, p, by_keep = None, 0.0, True
        for step, operand in steps:
            if step.how == "scale":
                value = factor(step, operand)
            elif step.how == "path":
                p, by_keep = probability(step, operand), step.by_keep
        if (value is None and p == 0.0) or not _same_dtype(y, x, value, in_place):
            return None
        found = None if value is None else per_channel(value, y)
        if value is not None and found is None:
            return None
        scale, channels = found or (None, not y.is_contiguous())
        if channels:
            y, x = y.movedim(1, -1), x.movedim(1, -1)
        if not y.is_contiguous() or not x.is_contiguous():
            return None
        total = scale_add(y, x, scale, drop_path=p, scale_by_keep=by_keep)
        return total.movedim(-1, 1) if channels else total


class GatedAdd(Tail):
    """A gate, with a row for each sample or token."""

    operator: ClassVar[str] = "gated_add"

    @classmethod
    def suits(cls, steps: Sequence[Step]) -> bool:
        """One gate."""
        return [step.how for step in steps if step.how != "idle"] in ([], ["gate"])

    @staticmethod
    def run(y: Tensor, x: Tensor, steps: list[tuple[Step, Any]], in_place: bool) -> Tensor | None:
        """``gated_add``."""
        gate: Any = next((operand for step, operand in steps if step.how == "gate"), None)
        if not is_rows(gate, y) or not _same_dtype(y, x, gate, in_place):
            return None
        return gated_add(x, y, gate) if y.is_contiguous() and x.is_contiguous() else None


class DropoutAdd(Tail):
    """Dropout."""

    operator: ClassVar[str] = "dropout_add"

    @classmethod
    def suits(cls, steps: Sequence[Step]) -> bool:
        """One dropout."""
        return [step.how for step in steps if step.how != "idle"] in ([], ["dropout"])

    @staticmethod
    def run(y: Tensor, x: Tensor, steps: list[tuple[Step, Any]], in_place: bool) -> Tensor | None:
        """``dropout_add``, where something is dropped."""
        p = next((probability(step, operand) for step, operand in steps if step.how == "dropout"), 0.0)
        if p == 0.0 or not _same_dtype(y, x, None, in_place) or not y.is_contiguous() or not x.is_contiguous():
            return None
        return dropout_add(y, x, p=p)


def is_rows(rows: Any, x: Tensor) -> bool:
    """Whether ``rows`` has the dims of x, of which the last before the features may be 1."""
    if not takes(rows) or rows.dim() != x.dim() or rows.shape[-1] != x.shape[-1]:
        return False
    own = next((i for i, (m, n) in enumerate(zip(rows.shape, x.shape, strict=True)) if m != n), x.dim())
    return all(m == 1 for m in rows.shape[own:-1])


def _same_dtype(y: Tensor, x: Tensor, value: Tensor | None, in_place: bool) -> bool:
    """Whether the operator's dtype, which that of the factor has no part in, is that of the original."""
    result = torch.promote_types(y.dtype, x.dtype)
    branch = y.dtype if value is None else torch.promote_types(y.dtype, value.dtype)
    return torch.promote_types(branch, x.dtype) == result and (not in_place or branch == result)


class _Trial(nn.Module):
    def __init__(self, steps: Operands, first: bool, fused: Callable[..., Any] | None) -> None:
        super().__init__()
        self.steps, self.first, self.fused = steps, first, fused

    def forward(self, y: Tensor, x: Tensor, *gates: Tensor) -> Any:
        if self.fused is not None:
            return self.fused(*((y, x) if self.first else (x, y)), *self.steps.given(gates))
        y = self.steps(y, *gates)
        return y + x if self.first else x + y
