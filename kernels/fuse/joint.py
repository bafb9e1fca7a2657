"""What a joint is, and how a module's class becomes a fused one.

A joint is a place in a model where one fused operator can stand for several plain ones. It is found by probing a
sample of the module, and then says all that the fused class needs: names of attributes and small constants, nothing
that belongs to one instance. So a fused class follows from (original class, joint), in any process.
"""

from __future__ import annotations

import copy
import copyreg
import types
from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Iterator, Sequence, Set
from contextlib import contextmanager
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from .sample import Draw, Sample, kind
from .savings import ELEMENT, Counted, Measure


class Joint(ABC):
    """One recognised joint. Subclasses are frozen dataclasses, because equal joints share a fused class."""

    #: The word in a class's name that makes a refusal worth reporting even where nothing like the joint was found.
    hint: ClassVar[str]
    operator: str
    #: Allowed error in units of the original's own. Raising it needs a reason beside it.
    slack: ClassVar[float] = 2.0
    #: How many of the operands are tables, as of :class:`Draw`.
    tables: ClassVar[int] = 0
    #: Whether a trial runs a copy of the module.
    copied: ClassVar[bool] = True
    #: What the report adds where such a joint was fused.
    note: ClassVar[str] = ""
    #: Whether so many modules look like it that a refusal is worth reporting only with the hint in a class's name.
    common: ClassVar[bool] = False
    #: Why such a joint is swapped only where it is asked for by the operator's name, or was timed; nothing if always.
    offer: ClassVar[str] = ""

    @classmethod
    def suits(cls, module: nn.Module) -> bool:
        """Whether the outside of ``module`` looks like such a joint; cheap, and runs none of its code."""
        return False

    @classmethod
    def candidates(cls, root: nn.Module) -> Set[int]:
        """The ids of the modules to look at. What they are to the rest of the model may count, too."""
        return {id(module) for module in root.modules() if cls.suits(module)}

    @classmethod
    def key(cls, module: nn.Module) -> Hashable:
        """Modules with equal keys are probed and verified once."""
        return kind(module)

    @classmethod
    def sizes(cls, module: nn.Module) -> Sequence[dict[int, int] | None]:
        """Attempts at a sample: the feature counts to shrink, or None where the module itself need not be copied."""
        return ({},)

    @classmethod
    @abstractmethod
    def recognise(cls, sample: Sample) -> Joint | None:
        """The joint that the sample behaves as, or None. Raises Refused to say more."""

    @abstractmethod
    def members(self, original: type) -> dict[str, Any]:
        """What the fused subclass of ``original`` overrides."""

    def parts(self) -> list[tuple[str, str]]:
        """What the report says of it: operator, and child that it is about."""
        return [(self.operator, "")]

    def trial(self, sample: Sample) -> tuple[nn.Module, nn.Module]:
        """(original, fused), with equal parameters, to be compared on numbers."""
        fused = copy.deepcopy(sample.module)
        fused.__class__ = fused_class(type(fused), self)
        return sample.module, fused

    @abstractmethod
    def draws(self, sample: Sample) -> list[Draw]:
        """Inputs to compare them on."""

    def counted(self, sample: Sample) -> Counted:
        """What to count a saving on; of so many elements as ``measure`` speaks of."""
        draw = self.draws(sample)[0]
        return Counted(*self.trial(sample), draw, draw.inputs[0].numel())

    def operands(self, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        """What of the arguments of a call the trial takes; None for nothing."""
        return args

    def given(self, sample: Sample, inputs: tuple[Tensor, ...]) -> Counted:
        """The trial, on operands that a model gave it; of a sample that was not shrunk."""
        return Counted(*self.trial(sample), Draw("the example's", inputs, self.tables), inputs[0].numel())

    def measure(self, module: nn.Module) -> Measure:
        """What the report tells the saving at ``module`` for."""
        return ELEMENT

    def exact(self, original: nn.Module) -> nn.Module:
        """Prepare the float64 copy of the original: what it takes from the dtype of its input has to be fixed."""
        return original


def unwatched(joint: Any, function: Callable[..., Any]) -> Callable[..., Any]:
    """The function of a joint as it is; ``example.py`` puts one in its place that also notes what it is given."""
    return function


class Fusion(NamedTuple):
    """What a fused class was made from."""

    original: type
    joint: Joint


def fusion(module: nn.Module) -> Fusion | None:
    """What the class of ``module`` was fused from; None if it is not fused."""
    found: Fusion | None = getattr(type(module), "_braze_fusion", None)
    return found


@contextmanager
def as_original(module: nn.Module) -> Iterator[type]:
    """The module has its own class for a while; yields that."""
    cls, made = type(module), fusion(module)
    original = cls if made is None else made.original
    module.__class__ = original
    try:
        yield original
    finally:
        module.__class__ = cls


_made: dict[tuple[type, Joint], type] = {}


def fused_class(original: type, joint: Joint) -> type:
    """The subclass of ``original`` that runs the fused operator; the same one each time."""
    if (original, joint) in _made:
        return _made[original, joint]

    def __reduce_ex__(self: nn.Module, protocol: int) -> Any:
        make, arguments, *rest = super(fused, self).__reduce_ex__(max(protocol, 2))  # type: ignore[arg-type]
        if make is copyreg.__newobj__ and arguments == (fused,):  # type: ignore[attr-defined]
            return (_rebuild, (original, joint), *rest)
        return (make, arguments, *rest)

    names = {name: getattr(original, name) for name in ("__module__", "__qualname__", "__doc__")}
    extra = {"_braze_fusion": Fusion(original, joint), "__reduce_ex__": __reduce_ex__}
    fused = types.new_class(
        original.__name__, (original,), exec_body=lambda space: space.update(names | extra | joint.members(original))
    )
    return _made.setdefault((original, joint), fused)


def _rebuild(original: type, joint: Joint) -> nn.Module:
    fused = fused_class(original, joint)
    module: nn.Module = object.__new__(fused)
    return module


def takes(x: Any) -> bool:
    """Whether a fused operator takes x as the original would: an ordinary floating-point tensor."""
    return (type(x) is Tensor or type(x) is nn.Parameter) and not x.is_nested and torch.is_floating_point(x)


def own_forward(module: nn.Module) -> Callable[..., Any]:
    """The forward of the module's class, as a plain function."""
    forward: Callable[..., Any] = type(module).forward
    return forward
