"""Parameters, and their gradients, one behind the other in memory.

    values     | w of layer 1 | b | w of layer 2 ……… | b |      one buffer for each group, dtype and device,
    gradients  | ∂L/∂w        | … | ∂L/∂w            | … |      and one of the same form for the gradients

Every parameter stays the same object with the same shape and strides (channels_last is kept) and becomes a view of its
part. What is done to all of them alike is then one kernel over a buffer instead of one for each parameter: zero, norm,
clip, running average. Optimizers take the parameters as before. What this saves is launches: on the CPU, memory is the
limit, and it takes as long as torch's ``_foreach`` functions do.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

#: Parameters start at multiples of this many bytes: a cache line, and more than the widest vector access.
ALIGNMENT = 64


@dataclass(eq=False)
class Slot:
    """One parameter: where it is, and whose it is."""

    parameter: nn.Parameter
    value: Tensor
    gradient: Tensor
    owners: list[tuple[nn.Module, str]]
    name: str


@dataclass(eq=False)
class FlatBuffer:
    """The parameters of one group, dtype and device.

    Attributes:
        values: [n], the parameters, with zeros between some of them.
        gradients: [n], in the same places; where a parameter has no gradient, it is what it was.
        group: the number of the group.
        slots: the parameters.
    """

    values: Tensor
    gradients: Tensor
    group: int
    slots: list[Slot]


class FlatParameters:
    """What :func:`flatten_parameters` made; :meth:`unflatten` undoes it."""

    def __init__(self, buffers: list[FlatBuffer], handles: list[Any]) -> None:
        self.buffers = buffers
        self._handles = handles

    def slots(self) -> Iterator[Slot]:
        """Every parameter's place."""
        for buffer in self.buffers:
            yield from buffer.slots

    def zero_grad(self) -> None:
        """Set all gradients to zero, in one kernel for each buffer: ``optimizer.zero_grad(set_to_none=False)``.

        A parameter without a gradient stays without. ``set_to_none=True`` works too: the next gradients are then copied
        to their places.
        """
        self._gather()
        for buffer in self.buffers:
            buffer.gradients.zero_()

    def norm(self) -> Tensor:
        """The 2-norm of all gradients, in float32 or wider, as ``clip_grad_norm_`` returns it."""
        self._gather()
        norms = [
            torch.linalg.vector_norm(b.gradients, dtype=torch.promote_types(b.gradients.dtype, torch.float32))
            for b in self.buffers
        ]
        return nn.utils.get_total_norm(norms)

    def clip_grad_norm_(self, max_norm: float) -> Tensor:
        """Scale all gradients by min(1, max_norm / (norm + 1e-6)), as torch does, and return the norm."""
        norm = self.norm()
        factor = (max_norm / (norm + 1e-6)).clamp(max=1.0)
        for buffer in self.buffers:
            buffer.gradients.mul_(factor.to(buffer.gradients.device))
        return norm

    def average(self, decay: float) -> FlatAverage:
        """A running average of the parameters, which starts at what they are."""
        return FlatAverage(self, decay)

    def unflatten(self) -> None:
        """Give every parameter, and its gradient, memory of its own again."""
        for handle in self._handles:
            handle.remove()
        for slot in self.slots():
            p = slot.parameter
            gradient, p.grad = p.grad, None
            if p.data_ptr() == slot.value.data_ptr():
                p.data = p.data.clone()
            if gradient is not None:
                p.grad = gradient.clone() if gradient.data_ptr() == slot.gradient.data_ptr() else gradient
        self.buffers, self._handles = [], []

    def _gather(self) -> None:
        """See to it that every gradient is in its place, and that zeros are where there is none."""
        for slot in self.slots():
            if slot.parameter.data_ptr() != slot.value.data_ptr():
                raise RuntimeError(
                    f"FlatParameters: {slot.name} has left its buffer (.to, .half, .cuda or the like gave it other "
                    "memory); call unflatten before, and flatten_parameters again after"
                )
            if slot.parameter.grad is None:
                slot.gradient.zero_()
            else:
                _place_gradient(slot)


class FlatAverage:
    """a ← decay·a + (1 − decay)·p, in float32 or wider; for float32 in one kernel for each buffer."""

    def __init__(self, flat: FlatParameters, decay: float) -> None:
        if not 0.0 <= decay <= 1.0:
            raise ValueError(f"FlatParameters.average: decay must be between 0 and 1, got {decay}; e.g. 0.999")
        self.flat, self.decay = flat, decay
        self.values = [b.values.to(_wide(b.values), copy=True) for b in flat.buffers]

    @torch.no_grad()
    def update(self) -> None:
        """Take in the parameters as they are now."""
        for average, buffer in zip(self.values, self.flat.buffers, strict=True):
            if average.dtype == buffer.values.dtype:
                average.lerp_(buffer.values, 1 - self.decay)
            else:
                average.mul_(self.decay).add_(buffer.values, alpha=1 - self.decay)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """The averages in the place of the parameters, which come back afterwards."""
        kept = [b.values.clone() for b in self.flat.buffers]
        self._write(self.values)
        try:
            yield
        finally:
            self._write(kept)

    def _write(self, values: list[Tensor]) -> None:
        for buffer, value in zip(self.flat.buffers, values, strict=True):
            buffer.values.copy_(value)


def flatten_parameters(
    model: nn.Module, groups: Iterable[Mapping[str, Any] | Iterable[nn.Parameter]] | None = None
) -> FlatParameters:
    """Move the parameters of a model that train, in place, into one buffer for each group, dtype and device.

    The parameters stay the same objects. They are in their buffers still after ``load_state_dict``, also with
    ``assign=True``, which then copies; a gradient that autograd or somebody else allocated is copied into its place.
    Copies and pickles of the model are not flat. Call it when the model has its device, dtype and memory format, before
    or after the optimizer is made. Under ``DistributedDataParallel`` leave ``gradient_as_bucket_view`` off, which wants
    the gradients in buffers of its own.

    Args:
        model: frozen parameters are left where they are.
        groups: like the first argument of an optimizer; None for all parameters in one group.

    Raises:
        TypeError: for a parameter that is no plain tensor, like the shards of FSDP2.
        ValueError: for one on the meta device, one that is flat already, in two groups, or not the model's.
    """
    owners: dict[int, list[tuple[nn.Module, str]]] = {}
    names: dict[int, str] = {}
    for path, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            owners.setdefault(id(parameter), []).append((module, name))
            names.setdefault(id(parameter), f"{path}.{name}".lstrip("."))
    kinds: dict[tuple[Any, ...], list[nn.Parameter]] = {}
    for number, group in enumerate([list(model.parameters())] if groups is None else groups):
        for parameter in group["params"] if isinstance(group, Mapping) else group:
            if parameter.requires_grad:
                kinds.setdefault((number, parameter.dtype, parameter.device), []).append(parameter)
    _check([p for own in kinds.values() for p in own], names)
    buffers = [_buffer(own, key[0], owners, names) for key, own in kinds.items()]
    slots = [slot for buffer in buffers for slot in buffer.slots]
    return FlatParameters(buffers, list(_watch(slots)))


def _check(parameters: list[nn.Parameter], names: dict[int, str]) -> None:
    seen: set[int] = set()
    for p in parameters:
        if id(p) not in names:
            raise ValueError(
                f"flatten_parameters: every parameter must be the model's, got one of {list(p.shape)} that is not"
            )
        name = names[id(p)]
        if type(p) is not nn.Parameter or type(p.data) is not Tensor or p.layout != torch.strided:
            raise TypeError(
                f"flatten_parameters: parameters must be plain tensors, got {name} of type {type(p.data).__name__}; "
                "flatten before the model is sharded or quantized, or not at all"
            )
        if p.is_meta:
            raise ValueError(f"flatten_parameters: {name} is on the meta device; give the model its memory first")
        if id(p) in seen:
            raise ValueError(f"flatten_parameters: {name} is in two groups, or twice in one; list it once")
        if any(isinstance(hook, _Accumulated) for hook in (p._post_accumulate_grad_hooks or {}).values()):
            raise ValueError(f"flatten_parameters: {name} is flat already; call unflatten of the first result before")
        seen.add(id(p))


def _buffer(
    parameters: list[nn.Parameter], group: int, owners: dict[int, list[tuple[nn.Module, str]]], names: dict[int, str]
) -> FlatBuffer:
    first = parameters[0]
    step = max(ALIGNMENT // first.element_size(), 1)
    starts, total = [], 0
    for p in parameters:
        starts.append(total)
        total += -(-p.numel() // step) * step
    values, gradients = (torch.zeros(total, dtype=first.dtype, device=first.device) for _ in range(2))
    slots = []
    for p, start in zip(parameters, starts, strict=True):
        # Dense parameters keep their strides, whatever their order; ones with gaps lose the gaps.
        strides = torch.empty_like(p, device="meta").stride()
        value, gradient = (t.as_strided(p.shape, strides, start) for t in (values, gradients))
        slot = Slot(p, value, gradient, owners[id(p)], names[id(p)])
        slot.value.copy_(p.data)
        p.data = slot.value
        if p.grad is not None:
            _place_gradient(slot)
        slots.append(slot)
    return FlatBuffer(values, gradients, group, slots)


def _watch(slots: list[Slot]) -> Iterator[Any]:
    by_module: dict[nn.Module, list[tuple[str, Slot]]] = {}
    for slot in slots:
        yield slot.parameter.register_post_accumulate_grad_hook(_Accumulated(slot))
        for module, name in slot.owners:
            by_module.setdefault(module, []).append((name, slot))
    for module, own in by_module.items():
        yield module.register_load_state_dict_post_hook(_Loaded(own))


class _Accumulated:
    """Puts a gradient that autograd allocated in its place; leaves one alone that is to be differentiated itself."""

    def __init__(self, slot: Slot) -> None:
        self.slot = slot

    def __call__(self, parameter: Tensor) -> None:
        gradient = parameter.grad
        if gradient is not None and not gradient.requires_grad:
            _place_gradient(self.slot)


class _Loaded:
    """Puts what ``load_state_dict`` assigned in its place, and the parameter back. A copy of it does nothing."""

    def __init__(self, slots: Iterable[tuple[str, Slot]] = ()) -> None:
        self.slots = slots

    def __reduce__(self) -> tuple[Any, ...]:
        return _Loaded, ()

    def __call__(self, module: nn.Module, keys: Any) -> None:
        for name, slot in self.slots:
            new = module._parameters[name]
            assert new is not None
            if new is not slot.parameter or new.data_ptr() != slot.value.data_ptr():
                slot.value.copy_(new.detach())
                slot.parameter.data = slot.value
                module._parameters[name] = slot.parameter


def _place_gradient(slot: Slot) -> None:
    gradient = slot.parameter.grad
    assert gradient is not None
    if gradient.layout != torch.strided or gradient.data_ptr() != slot.gradient.data_ptr():
        slot.gradient.copy_(gradient.detach().to_dense())
        slot.parameter.grad = slot.gradient


def _wide(t: Tensor) -> torch.dtype:
    return torch.promote_types(t.dtype, torch.float32)
