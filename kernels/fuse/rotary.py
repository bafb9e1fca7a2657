"""Rotary position embedding: an attention whose forward calls a helper ``f(q, k, cos, sin)`` by a global name.

The helper is recognised by what it computes. The fused class gets a copy of the forward whose globals name the fused
helper instead: the module that defines the attention is not touched. The copy sees the other globals as they are when
the class is made.
"""

from __future__ import annotations

import functools
import inspect
import itertools
import types
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..ops.rope import rope
from .joint import Joint, takes, unwatched
from .sample import Draw, Refused, Sample
from .savings import Counted


@dataclass(frozen=True)
class Rotary(Joint):
    """How the helper is called: so many tensors first, then cos and sin, then perhaps the dim that both get.

    With ``half`` cos and sin have a column for each pair of elements, and not for each element.
    """

    hint: ClassVar[str] = "rotary"
    operator: ClassVar[str] = "rope"  # type: ignore[misc]
    tables: ClassVar[int] = 2
    copied: ClassVar[bool] = False
    helper: str
    tensors: int
    cos: int
    sin: int
    interleaved: bool
    half: bool
    unsqueeze: str | None
    unsqueeze_dim: int | None
    promotes: bool

    @classmethod
    def suits(cls, module: nn.Module) -> bool:
        """Whether the forward calls a global function that takes a cos and a sin."""
        return bool(_helpers(type(module)))

    @classmethod
    def key(cls, module: nn.Module) -> Hashable:
        """The helper belongs to the class."""
        return id(type(module))

    @classmethod
    def sizes(cls, module: nn.Module) -> Sequence[dict[int, int] | None]:
        """Only the helper is run."""
        return (None,)

    @classmethod
    def recognise(cls, sample: Sample) -> Rotary | None:
        """Call the helper with drawn tensors."""
        helpers = _helpers(type(sample.source))
        if len(helpers) != 1:
            raise Refused(f"its forward calls several rotary helpers: {', '.join(helpers)}")
        ((name, helper),) = helpers.items()
        form = _form(helper)
        if form is None:
            raise Refused(f"{name} does not take (tensors, cos, sin)")
        x, *tables = (sample.randn(*shape) for shape in ((2, 4, 6, 16), (2, 6, 16), (2, 6, 16)))
        failure = ""
        for half, interleaved in itertools.product((False, True), repeat=2):
            joint = cls(name, *form, interleaved, half, None, None, False)
            cos, sin = (t[..., :8] if half else t for t in tables)
            for candidate in joint._placements(helper):
                arguments = candidate._arguments([x] * form[0], cos, sin)
                try:
                    y = helper(*arguments)
                    expected = candidate.fused(helper)(*arguments)
                except Exception as error:
                    failure = failure or str(error)
                    continue
                if all(
                    a.shape == b.shape and torch.allclose(a, b)
                    for a, b in zip(_tuple(y), _tuple(expected), strict=True)
                ):
                    narrow = helper(*(t.bfloat16() if t is x else t.float() for t in arguments))
                    promotes = _tuple(narrow)[0].dtype == torch.float32
                    return cls(**{**vars(candidate), "promotes": promotes})
        raise Refused(f"{name} is no rotary embedding that is known here" + (f": {failure}" if failure else ""))

    def members(self, original: type, watch: Callable[..., Any] = unwatched) -> dict[str, Any]:
        """The forward, with the fused helper in the place of the original one."""
        own = original.forward  # type: ignore[attr-defined]
        helper = _globals_of(own)[self.helper]
        return {"forward": _with_global(own, self.helper, watch(self, self.fused(helper)))}

    def fused(self, helper: Callable[..., Any]) -> Callable[..., Any]:
        """The fused form of the helper; what it does not take goes to the helper itself."""
        count, cos_at, sin_at, interleaved, promotes = self.tensors, self.cos, self.sin, self.interleaved, self.promotes
        unsqueeze, default, several, half = self.unsqueeze, self.unsqueeze_dim, self.tensors > 1, self.half

        @functools.wraps(helper)
        def rotary(*args: Any, **kwargs: Any) -> Any:
            if len(args) != count + 2 or any(name != unsqueeze for name in kwargs) or not all(map(takes, args)):
                return helper(*args, **kwargs)
            cos, sin = args[cos_at], args[sin_at]
            if cos.shape[-1] * (1 + half) != args[0].shape[-1] or cos.dtype != sin.dtype:
                return helper(*args, **kwargs)
            if half:
                cos, sin = (t.repeat_interleave(2, -1) if interleaved else torch.cat((t, t), -1) for t in (cos, sin))
            if unsqueeze is not None:
                dim = kwargs.get(unsqueeze, default)
                cos, sin = cos.unsqueeze(dim), sin.unsqueeze(dim)
            if promotes:
                wide = torch.promote_types(args[0].dtype, cos.dtype)
                rotated = tuple(rope(x.to(wide), cos, sin, interleaved=interleaved) for x in args[:count])
            else:
                rotated = tuple(rope(x, cos, sin, interleaved=interleaved) for x in args[:count])
            return rotated if several else rotated[0]

        return rotary

    def trial(self, sample: Sample) -> tuple[nn.Module, nn.Module]:
        """The helper and its fused form."""
        helper = _helpers(type(sample.source))[self.helper]
        return Function(helper), Function(self.fused(helper))

    def draws(self, sample: Sample) -> list[Draw]:
        """Grouped heads; angles shared by the batch, and of each sequence its own."""
        query, key = sample.randn(2, 4, 6, 16), sample.randn(2, 2, 6, 16)
        heads = [query, key][: self.tensors]
        angles = sample.randn(2, 6, 8).repeat(1, 1, 1 if self.half else 2)
        free = sample.randn(*angles.shape)
        return [
            Draw("an ordinary", self._arguments(heads, angles.cos(), angles.sin()), tables=2),
            Draw("an unpaired", self._arguments(heads, free, free.flip(-1))),
            Draw("a batch-shared", self._arguments(heads, angles[:1].cos(), angles[:1].sin())),
            Draw("a large", self._arguments([1e3 * h for h in heads], angles.cos(), angles.sin())),
        ]

    def counted(self, sample: Sample) -> Counted:
        """An element of any of the tensors."""
        counted = super().counted(sample)
        return counted._replace(elements=sum(t.numel() for t in counted.draw.inputs[: self.tensors]))

    def _arguments(self, heads: list[Tensor], cos: Tensor, sin: Tensor) -> tuple[Tensor, ...]:
        if self.unsqueeze is None:
            cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
        return (*heads, cos, sin) if self.cos < self.sin else (*heads, sin, cos)

    def _placements(self, helper: Callable[..., Any]) -> Iterable[Rotary]:
        """cos and sin broadcast as they come, or after an unsqueeze at the dim that an argument names."""
        for name, parameter in inspect.signature(helper).parameters.items():
            if type(parameter.default) is int:
                yield Rotary(**{**vars(self), "unsqueeze": name, "unsqueeze_dim": parameter.default})
        yield self


class Function(nn.Module):
    """A function as a module, for verification."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *args: Any) -> Any:
        """What the function returns."""
        return self.function(*args)


def _helpers(cls: type) -> dict[str, Callable[..., Any]]:
    """Global functions that the forward names and that take something called cos and something called sin."""
    forward = cls.forward  # type: ignore[attr-defined]
    found: dict[str, Callable[..., Any]] = {}
    namespace = _globals_of(forward)
    for name in _names(forward):
        function = namespace.get(name)
        if isinstance(function, types.FunctionType):
            parameters = list(inspect.signature(function).parameters)
            if all(sum(word in p for p in parameters) == 1 for word in ("cos", "sin")):
                found[name] = function
    return found


def _form(helper: Callable[..., Any]) -> tuple[int, int, int] | None:
    """(number of tensors, index of cos, index of sin), if cos and sin follow one or two required arguments."""
    required = [n for n, p in inspect.signature(helper).parameters.items() if p.default is p.empty and p.kind <= 1]
    cos, sin = (next((i for i, n in enumerate(required) if word in n), -1) for word in ("cos", "sin"))
    tensors = len(required) - 2
    if tensors not in (1, 2) or {cos, sin} != {tensors, tensors + 1}:
        return None
    return tensors, cos, sin


def _tuple(outputs: Any) -> tuple[Tensor, ...]:
    return tuple(outputs) if isinstance(outputs, (tuple, list)) else (outputs,)


def _globals_of(function: Callable[..., Any]) -> dict[str, Any]:
    found: dict[str, Any] = getattr(inspect.unwrap(function), "__globals__", {})
    return found


def _names(function: Callable[..., Any]) -> tuple[str, ...]:
    code = getattr(inspect.unwrap(function), "__code__", None)
    return code.co_names if code else ()


def _with_global(function: Any, name: str, value: Any) -> Any:
    """A copy of ``function`` in whose globals ``name`` is ``value``; decorators around it are copied with it."""
    inner = getattr(function, "__wrapped__", None)
    if inner is None:
        namespace = {**function.__globals__, name: value}
        # By this name Dynamo (torch 2.11) would look the helper up in the module, where it is not the fused one.
        namespace.pop("__name__", None)
        return _copy(function, namespace, function.__closure__)
    replaced = _with_global(inner, name, value)
    cells = function.__closure__ or ()
    if not any(cell.cell_contents is inner for cell in cells):
        raise Refused(f"its forward is decorated by {function.__name__}, which cannot be copied")
    closure = tuple(types.CellType(replaced) if cell.cell_contents is inner else cell for cell in cells)
    wrapper = _copy(function, function.__globals__, closure)
    wrapper.__wrapped__ = replaced
    return wrapper


def _copy(function: types.FunctionType, namespace: dict[str, Any], closure: Any) -> Any:
    copied = types.FunctionType(function.__code__, namespace, function.__name__, function.__defaults__, closure)
    copied.__kwdefaults__ = function.__kwdefaults__
    for name in ("__module__", "__qualname__", "__doc__", "__annotations__"):
        setattr(copied, name, getattr(function, name))
    copied.__dict__.update(function.__dict__)
    return copied
