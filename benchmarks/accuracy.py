"""How far an implementation is from the truth: the reference in float64, on the same inputs and cotangents.

Errors are max |got − truth| / max |truth|, for each output and each gradient. The budget is that of the contract tests:

    slack · (the error of the plain reference in the dtype under test + one rounding step)

The plain reference's error is the largest of a few runs on rescaled inputs and cotangents: on a scalar it can be zero
by luck.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from braze.kernels import use_backend
from braze.kernels.op import Call, Op

#: Operands in float64 that the truth holds at once, in units of what the pass that moves less moves.
TRUTH_COPIES = 6
RESCALED = (1.0, 0.9, 1.1, 1.3)


class Errors(NamedTuple):
    """The largest error of an output, the largest of a gradient (None: not looked at), and what was over the budget."""

    outputs: float
    gradients: float | None
    over: tuple[str, ...]

    @property
    def wrong(self) -> str | None:
        """What was over the budget, in words; None if nothing was."""
        return "; ".join(self.over) or None

    def of_outputs(self) -> Errors:
        """What a forward pass is judged by."""
        return Errors(self.outputs, None, tuple(one for one in self.over if one.startswith("output")))


class Judge:
    """Knows the truth about one call of one operator."""

    def __init__(self, op: Op, call: Call) -> None:
        self.op, self.call = op, call
        with use_backend("eager"), torch.no_grad():
            outputs = tensors(op.fn(*call.args, **call.kwargs))
        self.cotangents = cotangents_for(outputs)
        self.truth = self._reference(1.0, torch.float64)
        self.budget = [0.0] * len(self.truth)
        for scale in RESCALED:
            plain = self._reference(scale)
            truth = self.truth if scale == 1.0 else self._reference(scale, torch.float64)
            for i, (value, wanted) in enumerate(zip(plain, truth, strict=True)):
                allowed = op.slack * (error(value, wanted) + torch.finfo(value.dtype).eps)
                self.budget[i] = max(self.budget[i], allowed)

    def errors(self, fn: Callable[..., Any], *, gradients: bool) -> Errors:
        """The errors of ``fn``; with ``gradients`` of its backward pass too."""
        with torch.set_grad_enabled(gradients):
            got = self._results(fn, self.call) if gradients else tensors(fn(*self.call.args, **self.call.kwargs))
        found = [error(value, wanted) for value, wanted in zip(got, self.truth, strict=False)]
        count = len(self.cotangents)
        names = [f"output {i}" for i in range(count)] + [f"gradient {i}" for i in range(len(self.truth) - count)]
        over = tuple(
            f"{name}: error {one:.2g}, budget {budget:.2g}"
            for name, one, budget in zip(names, found, self.budget, strict=False)
            if not one <= budget
        )
        return Errors(max(found[:count]), max(found[count:], default=0.0) if gradients else None, over)

    def _reference(self, scale: float, dtype: torch.dtype | None = None) -> list[Tensor]:
        with use_backend("eager"):
            return self._results(self.op.fn, self._rescaled(scale, dtype), scale)

    def _results(self, fn: Callable[..., Any], call: Call, scale: float = 1.0) -> list[Tensor]:
        outputs = tensors(fn(*call.args, **call.kwargs))
        # Rescaled in their own dtype: the truth gets the cotangents that the plain reference got.
        cotangents = [(c * scale).to(y.dtype) for c, y in zip(self.cotangents, outputs, strict=True)]
        wanted = leaves(call)
        gradients = torch.autograd.grad(outputs, wanted, cotangents) if wanted else ()
        return [*(y.detach() for y in outputs), *gradients]

    def _rescaled(self, scale: float, dtype: torch.dtype | None = None) -> Call:
        def change(t: Any) -> Any:
            if isinstance(t, torch.dtype):  # the dtype of the result
                return dtype or t
            if not isinstance(t, Tensor) or not t.is_floating_point():
                return t
            rescaled = t.detach() * scale if t.requires_grad else t
            return rescaled.to(dtype or t.dtype).requires_grad_(t.requires_grad)

        return pytree.tree_map(change, self.call)


def error(value: Tensor, truth: Tensor) -> float:
    """max |value − truth| / max |truth|; infinite if a finite truth came out as something else."""
    if value.shape != truth.shape:
        return float("inf")
    if not truth.numel():
        return 0.0
    difference = (value.double() - truth).abs().max().item()
    scale = truth.abs().max().item()
    return difference / scale if scale and difference == difference else float("inf") if difference else 0.0


def cotangents_for(outputs: Sequence[Tensor]) -> list[Tensor]:
    """Normal numbers for each output, always the same."""
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(y.shape, generator=generator).to(y.device, y.dtype) for y in outputs]


def tensors(outputs: Any) -> Sequence[Tensor]:
    """The outputs of an operator as a sequence, however many they are."""
    return [outputs] if isinstance(outputs, Tensor) else list(outputs)


def leaves(call: Call) -> list[Tensor]:
    """The differentiable inputs of a call."""
    return [t for t in pytree.tree_leaves(call) if isinstance(t, Tensor) and t.requires_grad]
