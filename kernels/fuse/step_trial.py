"""The steps of a branch by themselves, to be compared on numbers: with nothing dropped unless told.

Stochastic depth and dropout draw other random numbers than the original does, with the same distribution. So a trial
compares with nothing dropped, and what the fused form drops is counted.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .sample import Refused, Sample, kind
from .savings import Counted
from .sites import resolved, units
from .source import expression
from .steps import DEVIATIONS, Step, applied, factor, view

#: The probability at which what is dropped is counted, and of how many samples.
HALF, SAMPLES = 0.5, 256

#: Features of a trial, where no module tells them.
WIDTH = 24

RANDOM = ("path", "dropout")


class Operands(nn.Module):
    """What the steps need: copies of modules, factors, probabilities. The gates are operands of the trial itself."""

    def __init__(self, steps: Sequence[Step], parts: nn.Module, rates: Sequence[float]) -> None:
        super().__init__()
        self.steps, self.parts, self.rates = tuple(steps), parts, tuple(rates)
        self.drop([0.0] * len(rates))

    def drop(self, rates: Sequence[float]) -> None:
        """Drop with these probabilities, of each step its own."""
        self.now = tuple(rates)
        for i, step in enumerate(self.steps):
            if step.how in RANDOM and step.owner is not None:
                setattr(getattr(self.parts, str(i)), step.name, rates[i])

    def width(self) -> int:
        """Features: those of a factor, if there is one."""
        found = (factor(s, getattr(self.parts, str(i))) for i, s in enumerate(self.steps) if s.how == "scale")
        value = next(found, None)
        return WIDTH if value is None else value.numel()

    def given(self, gates: Sequence[Tensor] = ()) -> list[Any]:
        """What the fused function is given for the steps."""
        remaining, found = list(gates), list[Any]()
        for i, step in enumerate(self.steps):
            if step.how == "gate":
                found.append(remaining.pop(0))
            elif step.how == "dropout" and step.owner is None:
                found.append((self.now[i], self.training))
            else:
                found.append(getattr(self.parts, str(i)))
        return found

    def forward(self, y: Tensor, *gates: Tensor) -> Any:
        """The steps as the source has them."""
        for step, operand in zip(reversed(self.steps), reversed(self.given(gates)), strict=True):
            y = applied(step, operand, y)
        return y


def operands(steps: Sequence[Step], module: nn.Module, unit: str) -> Operands:
    """Float64 copies of what the steps at a module need, with drawn parameters."""
    parts = nn.Module()
    for i, step in enumerate(steps):
        found = here(step, module, unit)
        if isinstance(found, Tensor):
            found = _narrow(found)
        if found is not None:
            setattr(parts, str(i), found)
    return Operands(steps, Sample(parts, parts, {}).module, [rate(step, module, unit) for step in steps])


def _narrow(factor: Tensor) -> nn.Parameter:
    """What a factor does to its channels does not depend on how many there are."""
    shape = [WIDTH if n == factor.numel() else n for n in factor.shape]
    return nn.Parameter(factor.detach().new_empty(shape))


def here(step: Step, module: nn.Module, unit: str) -> Any:
    """The module or the factor; nothing for what only a call can tell."""
    if step.how == "gate" or (step.how == "dropout" and step.owner is None):
        return None
    if step.owner is None:
        return view(step.source, module)
    return resolved(expression(step.source), module, units(type(module))[unit].function)


def rate(step: Step, module: nn.Module, unit: str) -> float:
    """The probability of dropping something in training; a half where only a call can tell."""
    if step.how not in RANDOM:
        return 0.0
    if step.owner is not None:
        return float(getattr(here(step, module, unit), step.name))
    pair: Any = expression(step.source)
    p = resolved(pair.elts[0], module, units(type(module))[unit].function)
    return float(p) if isinstance(p, (int, float)) else HALF


def step_key(step: Step, module: nn.Module, unit: str) -> Hashable:
    """Of a module its kind, of a factor its shape, of a probability whether there is one."""
    found = here(step, module, unit)
    if step.how in RANDOM:
        return step.how, step.owner, step.by_keep, rate(step, module, unit) > 0.0
    if step.how != "scale":
        return step.how
    value = getattr(found, step.name) if isinstance(found, nn.Module) else found
    own = kind(found) if isinstance(found, nn.Module) else found.dim()
    return step.how, step.channels, own, value.dtype, value.device.type


def dropping(counted: Counted) -> Counted:
    """Trials whose ``steps`` drop as the module does."""
    pair: list[Any] = [copy.deepcopy(one) for one in counted[:2]]
    for trial in pair:
        trial.steps.drop(trial.steps.rates)
    return counted._replace(original=pair[0], fused=pair[1])


def count_dropped(run: Callable[[Operands, Tensor], Tensor], fused: Operands, like: Tensor) -> None:
    """The fused form drops as often as it should, and scales the others as it should.

    Args:
        run: the fused form of a branch like ``like``, with a residual of zeros.
        fused: the steps; where none of them drops anything, nothing is counted.
        like: a branch, of which one sample is used.

    Raises:
        Refused: if it does something else.
    """
    if not any(fused.rates):
        return
    dropping = copy.deepcopy(fused).train()
    dropping.drop([HALF] * len(fused.rates))
    last = like.is_contiguous()
    one = (like if last else like.movedim(1, -1))[0]
    y = torch.ones(SAMPLES, *one.shape, dtype=one.dtype, device=one.device)
    y = y if last else y.movedim(-1, 1)
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)  # torch.manual_seed would seed GPUs too, which are not forked
        dropped, whole = run(dropping, y), run(copy.deepcopy(fused).eval(), y)
    kept, path = dropped != 0.0, any(step.how == "path" for step in fused.steps)
    flags = kept.flatten(1)[:, :1] if path else kept.flatten(1)
    off = abs(flags.sum().item() - HALF * flags.numel()) / (flags.numel() * HALF * (1.0 - HALF)) ** 0.5
    factor = 1.0 / (1.0 - HALF) if all(step.by_keep for step in fused.steps) else 1.0
    if off > DEVIATIONS or not torch.allclose(dropped[kept], factor * whole[kept]):
        raise Refused("the fused form drops something else")
    if path and not torch.equal(kept.flatten(1), flags.expand(SAMPLES, one.numel())):
        raise Refused("the fused form drops parts of samples")
