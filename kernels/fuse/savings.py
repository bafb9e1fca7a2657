"""What a swap saves: bytes moved, and bytes kept for the backward pass, counted on the trial's own inputs.

The original counts as its ATen operators run: each reads its operands and writes its results once. The fused form
counts as its operator is bounded by ``Op.traffic``: each of its launches reads its operands and writes its results
once. What both keep is what autograd is given to save, without parameters, and without the joint's own result, which
the layer behind it keeps anyway.

Counted is a batch and twice that batch; their difference leaves out what does not grow with it (weights, their
gradients).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from .. import dispatch
from .sample import Draw


@dataclass(frozen=True)
class Saving:
    """Bytes that a joint no longer moves in a training step, and no longer keeps for the backward pass, per unit."""

    traffic: float
    activations: float
    #: "token", "pixel", "row" of a norm of heads, or "element" of an input of unknown width; "batch": the example.
    unit: str

    def of(self, measure: Measure) -> Saving:
        """Of a unit, where this is that of an element."""
        traffic, activations = (round(measure.elements * each, 3) for each in (self.traffic, self.activations))
        return Saving(traffic, activations, measure.unit)


class Measure(NamedTuple):
    """What savings are told for, and how many elements that has."""

    unit: str
    elements: float


ELEMENT = Measure("element", 1.0)


class Counted(NamedTuple):
    """What to count on: the modules, their inputs, how many elements those are, and the dim to double them along."""

    original: nn.Module
    fused: nn.Module
    draw: Draw
    elements: int
    dim: int = 0


class Bytes(NamedTuple):
    """Of one forward and backward pass."""

    traffic: int
    activations: int


def saving(counted: Counted, dtype: torch.dtype) -> Saving:
    """The saving for each element, for modules in ``dtype``, in training."""
    once, twice = counted.draw, counted.draw.doubled(counted.dim)
    pairs = [(count(m, twice, dtype), count(m, once, dtype)) for m in counted[:2]]
    plain, joined = (Bytes(*(more - less for more, less in zip(*pair, strict=True))) for pair in pairs)
    traffic, activations = (a - b for a, b in zip(plain, joined, strict=True))
    return Saving(traffic / counted.elements, activations / counted.elements, "element")


def saving_of_batch(counted: Counted, dtype: torch.dtype) -> Saving:
    """The saving for these very inputs."""
    plain, joined = (count(m, counted.draw, dtype) for m in counted[:2])
    return Saving(plain.traffic - joined.traffic, plain.activations - joined.activations, "batch")


def count(module: nn.Module, draw: Draw, dtype: torch.dtype) -> Bytes:
    """What a forward and a backward pass of a copy of ``module`` in ``dtype`` move and keep."""
    module = copy.deepcopy(module).to(dtype).train()
    inputs = [leaf(t, dtype, i < len(draw.inputs) - draw.tables) for i, t in enumerate(draw.inputs)]
    traffic, kept = _Traffic(), dict[int, Tensor]()

    def keep(tensor: Tensor) -> Tensor:
        kept.setdefault(_storage(tensor), tensor)
        return tensor

    with dispatch.counted(traffic.launch):
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), traffic:
            outputs = module.forward(*inputs)
        results = [y for y in tensors(outputs) if y.requires_grad]
        leaves = [t for t in (*inputs, *module.parameters()) if t.requires_grad]
        cotangents = [torch.ones_like(y) for y in results]
        with traffic:
            torch.autograd.grad(results, leaves, cotangents, allow_unused=True)
    others = {_storage(t) for t in (*module.parameters(), *module.buffers(), *tensors(outputs))}
    return Bytes(traffic.bytes, sum(t.untyped_storage().nbytes() for key, t in kept.items() if key not in others))


class _Traffic(TorchDispatchMode):
    """Adds up what operators read and write."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run ``func``; a view moves nothing."""
        outputs = func(*args, **(kwargs or {}))
        operands = list(tensors((args, kwargs)))
        inside = {_storage(t) for t in operands}
        written = [t for t in tensors(outputs) if func._schema.is_mutable or _storage(t) not in inside]
        if written:
            self._add(operands)
            self._add(written)
        return outputs

    def launch(self, function: Callable[..., Any], arguments: Sequence[Tensor | None]) -> Any:
        """Run ``function`` as one launch: what it makes on the way is not moved."""
        with _disable_current_modes():
            outputs = function(*arguments)
        operands = list(tensors(arguments))
        inside = {_storage(t) for t in operands}
        self._add(operands)
        self._add(t for t in tensors(outputs) if _storage(t) not in inside)
        return outputs

    def _add(self, moved: Any) -> None:
        for tensor in {id(t): t for t in moved}.values():
            sizes = (size for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if stride)
            elements = tensor.element_size() if tensor.numel() else 0
            for size in sizes:
                elements *= size
            self.bytes += elements


def leaf(tensor: Tensor, dtype: torch.dtype, differentiable: bool) -> Tensor:
    """A copy to differentiate by, or not."""
    if not tensor.is_floating_point():
        return tensor
    return tensor.to(dtype, copy=True).detach().requires_grad_(differentiable)


def tensors(values: Any) -> Iterator[Tensor]:
    """Every tensor in what a module took or returned."""
    return (leaf for leaf in pytree.tree_leaves(values) if isinstance(leaf, Tensor))


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata
