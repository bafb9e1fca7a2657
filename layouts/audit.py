"""Where a model loses channels_last, copies, or makes an operator transpose."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from .convolutions import convolutions
from .predict import replay
from .report import Convolutions, Device, Event, Kind, LayoutReport
from .trace import Call, Ref, Trace, refs

CONVOLUTION, CONVOLUTION_BACKWARD = "aten.convolution", "aten.convolution_backward"

#: Operators that only move bytes: name → the argument that they are moved from.
COPIES = {"aten.clone": 0, "aten._to_copy": 0, "aten.copy_": 1}


def audit(model: nn.Module, *inputs: Any, backward: bool = True) -> LayoutReport:
    """Run a channels_last copy of ``model`` and report every operator that loses that layout, copies or transposes.

    The weights of 2-D convolutions and all 4-D floating-point tensors in ``inputs`` are converted; the model runs once
    on the CPU as it is (training or evaluation, its dtype), with ``backward`` from random cotangents of its outputs.
    The model, its buffers and gradients, and the random state stay as they were. What CUDA would do is predicted from
    the same run (:mod:`braze.layouts.predict`).

    Convolutions are judged by the tensor that they are fed, in backward by the gradient of their output. An operator
    that writes a contiguous [N, C, H, W] from a channels_last one is reported as losing; so is the origin of one that
    reaches a convolution from something else, such as an expanded gradient. Weights are not activations: only copies
    of them are reported.

    Raises:
        TypeError: if ``model`` is not a module, or cannot be copied.
        ValueError: if ``backward`` is asked for and no output requires a gradient.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}: pass the module itself")
    subject = _channels_last_copy(model)
    trace = Trace(subject)
    inputs = tree_map(_channels_last_input, inputs)
    with torch.random.fork_rng(devices=[]), torch.enable_grad(), trace.modules(subject):
        with trace:
            outputs = subject(*inputs)
        if backward:
            _backward(outputs, trace)
    predicted, unpredicted = replay(trace.calls)
    parameters = {id(p): trace.storages.ref(p) for p in subject.parameters()}
    weights = {ref.storage for ref in parameters.values()}
    # A storage has one number among the calls of the CPU, and another among those of CUDA.
    twins = _twins(trace.calls, predicted)
    judged: dict[Device, _Judge] = {
        "cpu": _judge(trace.calls, "cpu", weights),
        "cuda": _judge(predicted, "cuda", {twins[number] for number in weights if number in twins}),
    }
    return LayoutReport(
        [event for judge in judged.values() for event in judge.events],
        {device: judge.convolutions for device, judge in judged.items()},
        list(dict.fromkeys(call.place.module for call in trace.calls if not call.place.backward)),
        unpredicted,
    )


def _channels_last_copy(model: nn.Module) -> nn.Module:
    try:
        subject = copy.deepcopy(model).cpu()
    except Exception as error:
        raise TypeError(f"model must be copyable, but copy.deepcopy failed ({error}): audit runs on a copy") from error
    subject.zero_grad(set_to_none=True)
    for _, module in convolutions(subject):
        if isinstance(module.weight, nn.Parameter):
            module.weight.data = module.weight.data.to(memory_format=torch.channels_last)
    return subject


def _channels_last_input(leaf: Any) -> Any:
    if not isinstance(leaf, Tensor):
        return leaf
    leaf = leaf.detach().cpu().requires_grad_(leaf.requires_grad)
    image = leaf.dim() == 4 and leaf.is_floating_point()
    return leaf.to(memory_format=torch.channels_last) if image else leaf


def _backward(outputs: Any, trace: Trace) -> None:
    leaves = [leaf for leaf in tree_leaves(outputs) if isinstance(leaf, Tensor) and leaf.requires_grad]
    if not leaves:
        raise ValueError("backward=True needs an output that requires a gradient: pass backward=False")
    cotangents = [torch.randn_like(leaf) for leaf in leaves]
    with trace:
        torch.autograd.backward(leaves, cotangents)


def _twins(calls: Sequence[Call], predicted: Sequence[Call]) -> dict[int, int]:
    pairs = (
        zip(mine.inputs() + refs(mine.outputs), its.inputs() + refs(its.outputs), strict=False)
        for mine, its in zip(calls, predicted, strict=True)
    )
    return {mine.storage: its.storage for pair in pairs for mine, its in pair}


def _judge(calls: Iterable[Call], device: Device, weights: set[int]) -> _Judge:
    judge = _Judge(device, weights)
    for call in calls:
        judge.see(call)
    return judge


class _Judge:
    """Follows, for every storage, which operator is to blame if it is read as a contiguous [N, C, H, W]."""

    def __init__(self, device: Device, weights: set[int]) -> None:
        self.device = device
        self.weights = set(weights)
        self.events: list[Event] = []
        self.convolutions = Convolutions()
        self._blamed: dict[int, tuple[Call, Ref] | None] = {}

    def see(self, call: Call) -> None:
        """Judge one operator, after all before it."""
        if call.crashes:
            self._add("crashes", call, call.inputs()[1])
        if call.name == CONVOLUTION:
            self._convolution(call, call.args[0], refs(call.outputs)[0])
        elif call.name == CONVOLUTION_BACKWARD:
            self._convolution(call, call.args[0], call.args[1])
        elif call.name in COPIES:
            self._copy(call)
        self._follow(call)

    def _convolution(self, call: Call, fed: Ref, computes_like: Ref) -> None:
        if len(fed.size) != 4:
            return
        nchw = fed.layout == "contiguous"
        which = "backward" if call.name == CONVOLUTION_BACKWARD else "forward"
        counted = {which: True, f"{which}_nchw": nchw, f"{which}_gaps": fed.layout == "channels_last" and fed.gaps}
        before = {name: getattr(self.convolutions, name) for name in counted}
        self.convolutions = dataclasses.replace(self.convolutions, **{n: before[n] + counted[n] for n in counted})
        if nchw:
            if computes_like.layout == "channels_last":
                self._add("transposes", call, fed)
            blamed = self._blamed.get(fed.storage)
            if blamed is not None:
                self._add("loses", *blamed)
                self._blamed[fed.storage] = None

    def _copy(self, call: Call) -> None:
        source, target = call.args[COPIES[call.name]], refs(call.outputs)[0]
        if not isinstance(source, Ref) or source.dtype != target.dtype or target.bytes <= target.dtype.itemsize:
            return
        reordered = source.size == target.size and None not in (source.order, target.order)
        if reordered and source.order != target.order:
            if not self._loses(call, target):
                self._add("transposes", call, target)
        else:
            self._add("copies", call, target)

    def _follow(self, call: Call) -> None:
        inputs = call.inputs()
        known = {ref.storage for ref in inputs}
        of_weights = bool(known) and known <= self.weights
        for index, output in enumerate(refs(call.outputs)):
            if output.storage in known:
                continue  # a view, or written in place
            self._blamed.pop(output.storage, None)
            if of_weights or (call.name == CONVOLUTION_BACKWARD and output.size == call.args[2].size and index < 2):
                self.weights.add(output.storage)
            elif self._loses(call, output):
                self._add("loses", call, output)
                self._blamed[output.storage] = None
            elif output.layout == "contiguous" and (before := self._contiguous_inputs(call)):
                self._blamed[output.storage] = self._blamed.get(before[0].storage)
            else:
                self._blamed[output.storage] = (call, output)

    def _loses(self, call: Call, output: Ref) -> bool:
        return (
            output.layout == "contiguous"
            and output.dtype.is_floating_point
            and any(ref.layout == "channels_last" and ref.dtype.is_floating_point for ref in self._activations(call))
        )

    def _contiguous_inputs(self, call: Call) -> list[Ref]:
        return [ref for ref in self._activations(call) if ref.layout == "contiguous"]

    def _activations(self, call: Call) -> list[Ref]:
        return [ref for ref in call.inputs() if ref.storage not in self.weights]

    def _add(self, kind: Kind, call: Call, ref: Ref) -> None:
        place = call.place
        event = Event(kind, call.name, place.module, place.line, place.backward, self.device, ref.bytes)
        self.events.append(event)
