"""An activation right behind a batch or a group norm: ``act(norm(x))``, in a forward or in an ``nn.Sequential``.

The norm's statistics move, and its counter counts, as they would.
"""

from __future__ import annotations

import ast
import functools
import itertools
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..ops.batch_norm import batch_norm_act
from ..ops.channel_norm import Activation
from ..ops.group_norm import group_norm
from .acts import acting, computed, resolved_act, same_act
from .joint import takes
from .sample import Draw, Sample, kind
from .savings import Counted, Measure
from .sites import Known, Site, Unit, called, child, hooked, module_type, units
from .source import blocks, call, expression, numbered
from .sums import target

#: On the CPU ATen sums over a channel in float64 (its ``acc_type`` there); the fused operators sum in float32.
SLACK = 4.0

_OPTIONS = ("eps", "momentum", "affine", "track_running_stats")

OPERATORS = {"batch": "batch_norm_act", "group": "group_norm"}


def family(norm: Any) -> str | None:
    """ "batch" or "group", for a module that computes what torch's own of that name does."""
    forward = getattr(type(norm), "forward", None)
    if isinstance(norm, _BatchNorm) and forward is _BatchNorm.forward:
        return "batch"
    return "group" if isinstance(norm, nn.GroupNorm) and forward is nn.GroupNorm.forward else None


def normalized(norm: Any, x: Tensor, act: Activation | None, residual: Tensor | None = None) -> Tensor:
    """``act(norm(x) + residual)`` by the fused operator, with the module's own bookkeeping; no residual of groups."""
    name, slope = act or (None, 0.0)
    if isinstance(norm, nn.GroupNorm):
        return group_norm(
            x, norm.num_groups, norm.weight, norm.bias, eps=norm.eps, activation=name, negative_slope=slope
        )
    momentum = norm.momentum
    if norm.training and norm.num_batches_tracked is not None:
        norm.num_batches_tracked.add_(1)
        momentum = 1.0 / float(norm.num_batches_tracked) if momentum is None else momentum
    moves = not norm.training or norm.track_running_stats
    return batch_norm_act(
        x,
        norm.running_mean if moves else None,
        norm.running_var if moves else None,
        norm.weight,
        norm.bias,
        residual,
        training=norm.training or norm.running_mean is None,
        momentum=momentum or 0.0,
        eps=norm.eps,
        activation=name,
        negative_slope=slope,
    )


def suits(norm: Any, x: Any, own: str | None = None) -> bool:
    """Whether the fused operator takes x, and the norm is nothing but its forward, or one of the family ``own``."""
    if not takes(x) or x.dim() < 2 or hooked(norm) or (own or family(norm)) is None:
        return False
    if isinstance(norm, nn.GroupNorm):
        return bool(x.shape[1] == norm.num_channels)
    dims = {nn.BatchNorm1d: (2, 3), nn.BatchNorm2d: (4,), nn.BatchNorm3d: (5,)}
    allowed = next((n for base, n in dims.items() if isinstance(norm, base)), ())
    return bool(x.shape[1] == norm.num_features and x.dim() in allowed and x.numel() > x.shape[1])


def fused(act_type: type | None, activation: Activation) -> Callable[..., Any]:
    """``act(norm(x))`` as a function of (act, norm, x), and of modules between that do nothing."""

    def norm_act(act: Any, norm: Any, x: Any, *between: Any) -> Any:
        idle = all(type(module) is nn.Identity and not hooked(module) for module in between)
        if not same_act(act, act_type, activation) or not suits(norm, x) or not idle:
            y = norm(x)
            for module in between:
                y = module(y)
            return act(y)
        return normalized(norm, x, activation)

    return norm_act


def followed(norm: Any, act: Any) -> Activation | str | None:
    """The activation, or why the operator cannot do it; None for what is no activation, or no norm."""
    own = family(norm)
    if own is None or act is None:
        return None
    if isinstance(act, nn.PReLU):
        return f"{OPERATORS[own]} has no such activation as the one behind it, which is learned"
    known = type(act).__module__ == "torch.nn.modules.activation" and not isinstance(act, nn.MultiheadAttention)
    missing = f"{OPERATORS[own]} has no such activation as the one behind it"
    return computed(act) or (missing if known else None)


@dataclass(frozen=True)
class NormAct(Site):
    """The norm's name, and the activation as the source names it: one nested in the other, or one after the other."""

    slack: ClassVar[float] = SLACK
    norm: str
    norm_family: str
    act: str
    act_type: type | None
    activation: Activation | str
    between: tuple[str, ...] = ()

    @property
    def operator(self) -> str:  # type: ignore[override]
        """The name of the fused operator."""
        return OPERATORS[self.norm_family]

    @property
    def part(self) -> str:
        """The norm."""
        return self.norm

    @property
    def refusal(self) -> str:
        """There are more activations than the operators have."""
        return self.activation if isinstance(self.activation, str) else ""

    @classmethod
    def find(cls, module: nn.Module, unit: Unit, known: Known) -> Iterator[Site]:
        """``act(self.norm(x))``; and ``y = self.norm(x)``, ``y = act(y)``."""
        numbers = numbered(unit.tree)
        for node in ast.walk(unit.tree):
            outer = acting(node)
            inner = None if outer is None else called(outer[1])
            if outer is not None and inner is not None:
                yield from cls._made(module, unit, outer[0], inner[0], (numbers[id(node)],))
        for row in itertools.chain.from_iterable(map(_rows, blocks(unit.tree))):
            norm, *between, act = map(step, row)
            if norm is not None and act is not None and all(_idle(module, f) for f in between if f):
                places = tuple(numbers[id(statement)] for statement in row)
                idle = tuple(ast.unparse(f) for f in between if f)
                yield from cls._made(module, unit, act, norm, places, idle)

    @classmethod
    def _made(
        cls,
        module: nn.Module,
        unit: Unit,
        act: ast.expr,
        norm: ast.expr,
        numbers: tuple[int, ...],
        between: tuple[str, ...] = (),
    ) -> Iterator[Site]:
        name = child(norm)
        if name is None or family(getattr(module, name, None)) is None:
            return
        found = resolved_act(act, module, unit.function)
        what = followed(getattr(module, name), found)
        if what is not None:
            own = family(getattr(module, name)) or ""
            yield cls(unit.name, numbers, name, own, ast.unparse(act), module_type(found), what, between)

    def key(self, module: nn.Module) -> Hashable:
        """Both modules, whatever the number of channels: the norm is torch's own."""
        norm, act = getattr(module, self.norm), self._act(module)
        options = tuple((name, getattr(norm, name, None)) for name in _OPTIONS)
        first = next(itertools.chain(norm.parameters(), norm.buffers()), None)
        tensors = None if first is None else (first.dtype, first.device.type, norm.weight is None)
        return NormAct, type(norm), options, tensors, kind(act) if isinstance(act, nn.Module) else act

    def trial(self, module: nn.Module, root: nn.Module) -> tuple[nn.Module, nn.Module, Sample]:
        """The two alone, each on a norm of its own."""
        act = self._act(module)
        samples = [Sample(getattr(module, self.norm), root, {}) for _ in range(2)]
        original = _Both(samples[0].module, act, None)
        return original, _Both(samples[1].module, act, self.fused()), samples[0]

    def draws(self, sample: Sample) -> list[Draw]:
        """Images with other means and scales."""
        return draws(sample)

    def operands(self, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """The input of the norm."""
        return args[2:3]

    def counted(self, original: nn.Module, fused: nn.Module, sample: Sample) -> Counted:
        """Twice the pixels, and not the images."""
        return of_pixels(super().counted(original, fused, sample))

    def measure(self, module: nn.Module) -> Measure:
        """The channels of a pixel."""
        return measure(getattr(module, self.norm))

    def fused(self) -> Callable[..., Any]:
        """The operator, where the norm is torch's own and nothing listens."""
        assert not isinstance(self.activation, str)
        return fused(self.act_type, self.activation)

    def edits(self, name: str) -> dict[int, Callable[[Any], ast.AST]]:
        """One call; of two statements, the second goes, or returns what the first has made."""

        def nested(node: ast.Call) -> ast.AST:
            outer, inner = acting(node), node.args[0]
            assert outer is not None
            assert isinstance(inner, ast.Call)
            return call(name, outer[0], inner.func, inner.args[0])

        def one_after_the_other(node: ast.Assign) -> ast.AST:
            assert isinstance(node.value, ast.Call)
            act, *between = map(expression, (self.act, *self.between))
            value = call(name, act, node.value.func, node.value.args[0], *between)
            return ast.Assign(targets=node.targets, value=value)

        if len(self.numbers) == 1:
            return {self.numbers[0]: nested}

        def goes(node: Any) -> ast.AST:
            argument = node.value.args[0]
            return ast.Return(value=argument) if isinstance(node, ast.Return) else ast.Pass()

        first, *later = self.numbers
        return {first: one_after_the_other} | dict.fromkeys(later, goes)

    def _act(self, module: nn.Module) -> Any:
        name = self.act.removeprefix("self.")
        if hasattr(module, name):
            return getattr(module, name)
        function = units(type(module))[self.unit].function
        return resolved_act(expression(self.act), module, function)


def _rows(block: list[ast.stmt]) -> Iterator[list[ast.stmt]]:
    """Two or three statements ``y = f(x)``, ``y = g(y)``, ``y = h(y)``, one after the other; the last may return."""
    for start, first in enumerate(block):
        row = [first]
        for statement in block[start + 1 : start + 3]:
            if isinstance(row[-1], ast.Return) or not _continues(first, statement):
                break
            row.append(statement)
            yield list(row)


def _continues(first: Any, then: Any) -> bool:
    if target(first) is None or step(first) is None or step(then) is None:
        return False
    argument = then.value.args[0]
    same = isinstance(argument, ast.Name) and argument.id == target(first)
    return same and (isinstance(then, ast.Return) or target(then) == target(first))


def step(statement: ast.stmt) -> ast.expr | None:
    """The function f of ``name = f(x)`` or ``return f(x)``."""
    if target(statement) is None and not isinstance(statement, ast.Return):
        return None
    value: Any = statement.value  # type: ignore[attr-defined]
    found = None if value is None else acting(value)
    return None if found is None else found[0]


def _idle(module: nn.Module, function: ast.expr) -> bool:
    name = child(function)
    return name is not None and type(getattr(module, name, None)) is nn.Identity


def draws(sample: Sample) -> list[Draw]:
    """Images, or rows, with other means and scales."""
    norm: Any = sample.module
    channels = norm.num_channels if isinstance(norm, nn.GroupNorm) else norm.num_features
    size = {nn.BatchNorm1d: (), nn.BatchNorm3d: (1, 2, 3)}
    shape = next((n for base, n in size.items() if isinstance(norm, base)), (2, 3))
    return [
        Draw("an ordinary", (sample.randn(4, channels, *shape),)),
        Draw("a shifted", (0.5 * sample.randn(4, channels, *shape) + 2.0,)),
        Draw("a large", (300.0 * sample.randn(4, channels, *shape),)),
    ]


def of_pixels(counted: Counted) -> Counted:
    """A group norm keeps statistics of an image, however large."""
    return counted._replace(dim=-1 if counted.draw.inputs[0].dim() > 2 else 0)


def measure(norm: Any) -> Measure:
    """The channels of a pixel, or of a row."""
    channels = norm.num_channels if isinstance(norm, nn.GroupNorm) else norm.num_features
    return Measure("token" if isinstance(norm, nn.BatchNorm1d) else "pixel", channels)


class _Both(nn.Module):
    def __init__(self, norm: nn.Module, act: Any, fused: Callable[..., Any] | None) -> None:
        super().__init__()
        self.norm, self.act, self.fused = norm, act, fused

    def forward(self, x: Tensor) -> Any:
        return self.act(self.norm(x)) if self.fused is None else self.fused(self.act, self.norm, x)


@dataclass(frozen=True)
class InSequence(NormAct):
    """The same of two neighbours in an ``nn.Sequential``; the number is the norm's place."""

    own_forward: bool = False

    @classmethod
    def find(cls, module: nn.Module, unit: Unit | None = None, known: Known | None = None) -> Iterator[Site]:
        """Of a Sequential that runs its modules in a row."""
        if isinstance(module, nn.Sequential) and type(module).forward is nn.Sequential.forward:
            yield from cls._pairs(module)

    @classmethod
    def _pairs(cls, module: nn.Module) -> Iterator[InSequence]:
        for index, ((name, norm), (act_name, act)) in enumerate(itertools.pairwise(module.named_children())):
            what = followed(norm, act)
            if what is not None:
                yield cls("forward", (index,), name, family(norm) or "", f"self.{act_name}", module_type(act), what)

    @classmethod
    def passed_over(cls, module: nn.Module) -> Iterator[Site]:
        """Of a Sequential that has a forward of its own, in which nothing was found."""
        if isinstance(module, nn.Sequential) and type(module).forward is not nn.Sequential.forward:
            for one in cls._pairs(module):
                yield replace(one, own_forward=True)

    @property
    def refusal(self) -> str:
        """What such a forward does between the two is not known."""
        return "its nn.Sequential has a forward of its own" if self.own_forward else super().refusal

    def edits(self, name: str) -> dict[int, Callable[[Any], ast.AST]]:
        """There is no source to edit."""
        return {}


def in_sequence(places: Sequence[InSequence], watch: Callable[..., Any]) -> Callable[..., Any]:
    """The forward of an ``nn.Sequential`` with these places, each ``watch(place, its function)``."""
    functions = {place.numbers[0]: watch(place, place.fused()) for place in places}

    @functools.wraps(nn.Sequential.forward)
    def forward(self: nn.Sequential, input: Any) -> Any:
        modules = list(self)
        index = 0
        while index < len(modules):
            joint = functions.get(index)
            if joint is None or index + 1 == len(modules):
                input = modules[index](input)
                index += 1
            else:
                input = joint(modules[index + 1], modules[index], input)
                index += 2
        return input

    return forward
