"""Which blocks of a model repeat: found by structure, whatever contains them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Iterator
from types import MethodType
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.parameter import is_lazy


class Block(NamedTuple):
    """A module and where it is."""

    path: str
    module: nn.Module


class Left(NamedTuple):
    """A block that no region was made of, and why."""

    path: str
    was: str
    reason: str


def repeated_blocks(model: nn.Module) -> tuple[list[list[Block]], list[Left]]:
    """The outermost units of ``model`` that repeat, equal ones together, and what was left.

    Two modules are equal if they are of one class, with parameters and buffers of the same names and shapes, and equal
    children of the same names. A unit runs code of its own and holds at least two modules with parameters: a lone
    linear layer is a kernel already. Where smaller units that hold most of a unit's parameters repeat more often inside
    of it than it does itself, as layers do in twin encoders, these are taken.

    Raises:
        ValueError: if a parameter has no shape yet.
    """
    return _Search(model).found()


class _Search:
    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._known: dict[Hashable, int] = {}
        self._structures: dict[nn.Module, int] = {}
        for path, module in reversed(list(model.named_modules())):  # children before their parents
            self._structures[module] = self._structure(path, module)
        self._count = Counter(self._structures.values())
        self._groups: dict[int, list[Block]] = {}
        self._left: list[Left] = []

    def found(self) -> tuple[list[list[Block]], list[Left]]:
        # Also if the model itself is compiled: LightningModule.compile() compiles nothing of a training_step on one
        # device, and where a whole model is traced, regions are as if they were not there.
        self._visit("", self.model, set())
        groups = [group for group in self._groups.values() if len(group) > 1]
        chosen = {type(block.module) for group in groups for block in group} - {nn.Sequential}
        self._left += list(self._single(chosen, groups))
        return groups, self._left

    def _structure(self, path: str, module: nn.Module) -> int:
        """A number that equal modules share."""
        shapes = []
        for name, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is not None and is_lazy(tensor):
                raise ValueError(
                    f"compile_regions: every parameter must have a shape, {path}.{name} has none yet; "
                    "run one batch through the model first"
                )
            shapes.append((name, None if tensor is None else tuple(tensor.shape)))
        children = [(name, None if child is None else self._of(child)) for name, child in module._modules.items()]
        return self._known.setdefault((type(module), tuple(shapes), tuple(children)), len(self._known))

    def _of(self, module: nn.Module) -> int:
        # A module that is its own descendant, or shared with a later parent, has not been numbered when it is met.
        if module not in self._structures:
            self._structures[module] = -1
            self._structures[module] = self._structure("", module)
        return self._structures[module]

    def _visit(self, path: str, module: nn.Module, seen: set[nn.Module]) -> None:
        for name, child in module.named_children():
            where = f"{path}.{name}".strip(".")
            if child in seen:
                continue
            seen.add(child)
            if self._is_unit(child) and self._count[self._structures[child]] > 1 and not self._finer(child):
                reason = _refusal(child)
                if reason:
                    self._left.append(Left(where, type(child).__name__, reason))
                else:
                    self._groups.setdefault(self._structures[child], []).append(Block(where, child))
            elif not compiled_already(child):
                self._visit(where, child, seen)

    def _is_unit(self, module: nn.Module) -> bool:
        if type(module).forward is nn.Module.forward or isinstance(module, (*_wrappers(), torch.jit.ScriptModule)):
            return False
        return sum(any(p is not None for p in part._parameters.values()) for part in module.modules()) > 1

    def _finer(self, module: nn.Module) -> bool:
        inside = [part for part in module.modules() if part is not module and self._is_unit(part)]
        counts = Counter(self._structures[part] for part in inside)
        sizes = {self._structures[part]: _size(part) for part in inside}
        own, total = self._count[self._structures[module]], _size(module)
        return any(count > own and 2 * count * sizes[one] >= total for one, count in counts.items())

    def _single(self, classes: set[type], groups: list[list[Block]]) -> Iterator[Left]:
        inside = {part for group in groups for block in group for part in block.module.modules()}
        told = {left.path for left in self._left}
        for path, module in self.model.named_modules():
            if type(module) in classes and module not in inside and path not in told:
                yield Left(path, type(module).__name__, "its structure occurs once")


def compiled_already(module: nn.Module) -> bool:
    """Whether the user compiled it, by ``module.compile()`` or ``torch.compile(module)``."""
    return module._compiled_call_impl is not None or isinstance(module, torch._dynamo.OptimizedModule)


def replaced_forward(module: nn.Module) -> Any:
    """What stands in the place of the class's ``forward`` at this module alone, if anything does."""
    own = vars(module).get("forward")
    # Unpickled, a region's forward is the class's own, bound.
    plain = isinstance(own, MethodType) and own.__self__ is module and own.__func__ is type(module).forward
    return None if plain else own


def _refusal(module: nn.Module) -> str:
    if compiled_already(module):
        return "it is compiled already"
    own = replaced_forward(module)
    if own is not None and not hasattr(own, "region"):
        return "its forward was replaced by something else"
    return ""


def _size(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _wrappers() -> tuple[type[nn.Module], ...]:
    from torch.distributed.fsdp import FullyShardedDataParallel

    return DistributedDataParallel, FullyShardedDataParallel
