"""A parameter with zeros behind its entries, of which nobody outside its module knows.

The parameter stays the same object; ``state_dict`` shows it without the zeros, and ``load_state_dict`` takes it with
and without them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

#: The attribute of a module that holds its :class:`Padded`. Hooks find it there, so that a copy has its own.
ATTRIBUTE = "_braze_padded"


class Padding(NamedTuple):
    """Zeros behind each of some blocks of equal size along a dim.

    Attributes:
        dim: of the tensor.
        size: of the dim without zeros.
        padded: with them.
        blocks: how many; more than one where a dim is heads × entries.
    """

    dim: int
    size: int
    padded: int
    blocks: int = 1

    def pad(self, t: Tensor) -> Tensor:
        """A copy of t with zeros."""
        shape = list(t.shape)
        shape[self.dim : self.dim + 1] = self.blocks, self.padded // self.blocks
        padded = t.new_zeros(shape)
        padded.narrow(self.dim + 1, 0, self.size // self.blocks).copy_(t.unflatten(self.dim, (self.blocks, -1)))
        return padded.flatten(self.dim, self.dim + 1)

    def strip(self, t: Tensor) -> Tensor:
        """What is not zeros: a view for one block, else a copy."""
        blocks = t.unflatten(self.dim, (self.blocks, -1)).narrow(self.dim + 1, 0, self.size // self.blocks)
        return blocks.flatten(self.dim, self.dim + 1)


class Padded:
    """What is padded in one module, and how to undo it."""

    def __init__(self) -> None:
        self.paddings: dict[str, Padding] = {}
        self.attributes: dict[str, Any] = {}
        self.handles: list[Any] = []


def pad_parameters(module: nn.Module, paddings: Mapping[str, Padding], done: set[int]) -> Padded:
    """Pad parameters of a module; those whose id is in ``done`` are padded already, by another that shares them."""
    padded = Padded()
    module.__dict__[ATTRIBUTE] = padded
    for name, padding in paddings.items():
        parameter = module.get_parameter(name)
        padded.paddings[name] = padding
        if id(parameter) not in done:
            _replace(parameter, padding.pad)
        done.add(id(parameter))
    padded.handles = [
        module.register_state_dict_post_hook(_show_stripped),
        module.register_load_state_dict_pre_hook(_take_either),
    ]
    return padded


def padded_modules(model: nn.Module) -> Iterator[tuple[nn.Module, Padded]]:
    """The modules of which something is padded."""
    for module in model.modules():
        if ATTRIBUTE in module.__dict__:
            yield module, module.__dict__[ATTRIBUTE]


def restore(model: nn.Module) -> None:
    """Take all zeros away again."""
    done: set[int] = set()
    for module, padded in list(padded_modules(model)):
        for name, padding in padded.paddings.items():
            parameter = module.get_parameter(name)
            if id(parameter) not in done:
                _replace(parameter, lambda t, padding=padding: padding.strip(t).clone())  # type: ignore[misc]
            done.add(id(parameter))
        for name, value in padded.attributes.items():
            setattr(module, name, value)
        for handle in padded.handles:
            handle.remove()
        del module.__dict__[ATTRIBUTE]


def zeros_stay(module: nn.Module) -> bool:
    """Whether the gradients of padded parameters are zero behind their entries, so that training leaves zeros there."""
    for name, padding in module.__dict__[ATTRIBUTE].paddings.items():
        gradient = module.get_parameter(name).grad
        if gradient is not None and not torch.equal(gradient, padding.pad(padding.strip(gradient))):
            return False
    return True


def _replace(parameter: nn.Parameter, function: Callable[[Tensor], Tensor]) -> None:
    gradient, parameter.grad = parameter.grad, None
    replaced = function(parameter.data)
    # A graph that is still alive holds the parameter to its old shape, until its dtype changes for a moment.
    parameter.data = replaced.new_empty(0, dtype=torch.float32 if replaced.dtype != torch.float32 else torch.float64)
    parameter.data = replaced
    if gradient is not None:
        parameter.grad = function(gradient)


def _show_stripped(module: nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
    for name, padding in module.__dict__[ATTRIBUTE].paddings.items():
        if prefix + name in state:
            state[prefix + name] = padding.strip(state[prefix + name])


def _take_either(module: nn.Module, state: dict[str, Any], prefix: str, *arguments: Any) -> None:
    for name, padding in module.__dict__[ATTRIBUTE].paddings.items():
        given = state.get(prefix + name)
        if given is None or given.dim() <= padding.dim:
            continue
        if given.shape[padding.dim] == padding.padded:
            given = padding.strip(given)  # somebody else's padding may hold anything
        if given.shape[padding.dim] == padding.size:
            state[prefix + name] = padding.pad(given)
