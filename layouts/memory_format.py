"""Converting a model to channels_last, and back.

In [N, C, H, W] a tensor is channels_last when its memory is ordered N, H, W, C. Convolutions compute in that order if
their input or their weight has it, and hand it on; a model gains where most of its convolutions then get it.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from .audit import audit
from .convolutions import convolutions, crashing_shape
from .rounding import Check, compare

#: More convolutions fed a contiguous [N, C, H, W] than this share, and transposing eats what the rest gains: ResNet-50
#: gains a quarter of a step, and a transpose reads and writes the input once more.
MOST_NCHW = 0.5


@dataclasses.dataclass(frozen=True)
class FormatRecord:
    """One convolution: what was done to its weight, and why."""

    path: str
    status: str  #: "converted", "guarded" or "left"
    reason: str = ""


class FormatReport:
    """What :func:`channels_last` did: a record for each convolution, and the check if an example was given."""

    def __init__(self, records: Sequence[FormatRecord], check: Check | None = None) -> None:
        self.records = list(records)
        self.check = check

    def __iter__(self) -> Iterator[FormatRecord]:
        return iter(self.records)

    def __len__(self) -> int:
        return len(self.records)

    @property
    def converted(self) -> list[FormatRecord]:
        """The convolutions that compute in channels_last now."""
        return [record for record in self.records if record.status == "converted"]

    def as_dicts(self) -> list[dict[str, Any]]:
        """The records as plain values, ready for ``json.dumps``."""
        return [dataclasses.asdict(record) for record in self.records]

    def __str__(self) -> str:
        lines = [f"{len(self.converted)} of {len(self)} convolutions converted to channels_last"]
        groups: dict[tuple[str, str], list[str]] = {}
        for record in self.records:
            if record.status != "converted":
                groups.setdefault((record.status, record.reason), []).append(record.path or "(the model)")
        for (status, reason), paths in groups.items():
            shown = ", ".join(paths[:3]) + (f" and {len(paths) - 3} more" if len(paths) > 3 else "")
            lines.append(f"{status}: {shown}: {reason}")
        if self.check:
            lines.append(f"checked: {self.check}")
        return "\n".join(lines)


def channels_last(model: nn.Module, example: Any = None) -> FormatReport:
    """Convert the weights of the 2-D convolutions of ``model``, in place, and its inputs as they come.

    Weights of ``Conv2d`` and ``ConvTranspose2d`` are converted, and nothing else: not other parameters with four dims,
    nor any with five. Parameters stay the same objects; gradients that they have are converted with them. A forward
    pre-hook converts 4-D floating-point inputs; a hook after ``load_state_dict`` converts weights that ``assign=True``
    brought in another format. Hooks and all survive ``deepcopy`` and pickle. :func:`undo_channels_last` takes
    everything back. Convert before wrapping in DistributedDataParallel, and before ``torch.compile`` for a GPU.

    The convolution whose weight gradient makes oneDNN write past its buffer (:mod:`braze.layouts.convolutions`) is
    guarded: on the CPU it computes on a contiguous copy of its input.

    With ``example`` (the input, or a tuple of them), the model is first audited, and left as it is where converting it
    loses: on the CPU a batch of one, and on any device a model most of whose convolutions would be fed a contiguous
    [N, C, H, W]. Then outputs and gradients are compared with those before, within rounding
    (:func:`braze.layouts.rounding.compare`); a model that does not agree is put back.

    A model compiled by ``torch.compile`` is left on the CPU, where Inductor lays out convolutions itself (ResNet-18:
    1.32 times as fast as eager with and 1.33 without). Sharded and parametrized weights are left.

    Raises:
        TypeError: if ``model`` is not a module.
        ValueError: if it is wrapped in DistributedDataParallel, whose buckets have the strides of the gradients.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}: pass the module itself")
    if any(isinstance(module, nn.parallel.DistributedDataParallel) for module in model.modules()):
        raise ValueError("model must not be wrapped in DistributedDataParallel yet, whose gradient buckets keep the "
                         "strides that they were made with: convert the model first, then wrap it")  # fmt: skip
    inputs = () if example is None else example if isinstance(example, tuple) else (example,)
    on_cpu = all(p.device.type == "cpu" for p in model.parameters())
    reason = _redundant(model, inputs, on_cpu) or (_loses(model, inputs, on_cpu) if inputs else "")
    if reason:
        return FormatReport([FormatRecord(path, "left", reason) for path, _ in convolutions(model)])
    before = copy.deepcopy(model) if inputs else None
    records = [_convert(path, module) for path, module in convolutions(model)]
    if any(record.status == "converted" for record in records):
        _convert_inputs(model)
    if before is None:
        return FormatReport(records)
    check = compare(before, copy.deepcopy(model), inputs)
    if check.failed:
        undo_channels_last(model)
        reason = f"the model computes something else: {check}"
        records = [FormatRecord(record.path, "left", reason) for record in records]
    return FormatReport(records, check)


def undo_channels_last(model: nn.Module) -> int:
    """Take back :func:`channels_last`, on the model or a copy of it; return how many weights got back their strides."""
    restored = 0
    for module in model.modules():
        for hooks in (module._forward_pre_hooks, module._forward_hooks, module._load_state_dict_post_hooks):
            for number, hook in list(hooks.items()):
                if isinstance(hook, _KeepWeight):
                    _restride(module.weight, hook.before)  # type: ignore[arg-type]
                    restored += 1
                if isinstance(hook, (_KeepWeight, _ConvertInputs, _Contiguous, _ChannelsLast)):
                    del hooks[number]
                    module._forward_pre_hooks_with_kwargs.pop(number, None)
    return restored


def _redundant(model: nn.Module, inputs: tuple[Any, ...], on_cpu: bool) -> str:
    compiled = isinstance(model, torch._dynamo.OptimizedModule) or model._compiled_call_impl is not None
    if compiled and on_cpu:
        return "compiled: on the CPU Inductor lays out convolutions itself"
    images = [leaf for leaf in tree_leaves(inputs) if _is_image(leaf)]
    if images and on_cpu and max(len(image) for image in images) == 1:
        return "a batch of one is no faster on the CPU (measured: ResNet-50 0.97 times, ResNeXt-50 0.89 times as fast)"
    return ""


def _loses(model: nn.Module, inputs: tuple[Any, ...], on_cpu: bool) -> str:
    report = audit(model, *inputs, backward=_trains(model))
    found = report.convolutions["cpu" if on_cpu else "cuda"]
    fed, total = found.forward_nchw + found.backward_nchw, found.forward + found.backward
    if total and fed / total > MOST_NCHW:
        return f"{fed} of {total} convolutions, forward and backward, would be fed a contiguous [N, C, H, W]"
    return ""


def _trains(model: nn.Module) -> bool:
    return model.training and any(p.requires_grad for p in model.parameters())


def _convert(path: str, module: nn.Conv2d | nn.ConvTranspose2d) -> FormatRecord:
    if "weight" not in module._parameters:
        return FormatRecord(path, "left", "its weight is not a parameter of its own: it is parametrized")
    if not _is_plain(module.weight):
        kind = type(module.weight.data).__name__
        return FormatRecord(path, "left", f"its weight is a {kind}: convert before sharding")
    if any(isinstance(hook, _KeepWeight) for hook in module._load_state_dict_post_hooks.values()):
        return FormatRecord(path, "converted", "already")
    guarded = isinstance(module, nn.Conv2d) and crashing_shape(
        module.weight, module.stride, module.padding, module.groups
    )
    keep = _KeepWeight(module.weight.stride(), torch.contiguous_format if guarded else torch.channels_last)
    module.register_load_state_dict_post_hook(keep)
    keep(module, None)
    if not guarded:
        return FormatRecord(path, "converted")
    module.register_forward_pre_hook(_Contiguous())
    module.register_forward_hook(_ChannelsLast())
    return FormatRecord(path, "guarded", "its weight gradient crashes oneDNN in channels_last")


def _convert_inputs(model: nn.Module) -> None:
    """Add the hook once."""
    if not any(isinstance(hook, _ConvertInputs) for hook in model._forward_pre_hooks.values()):
        model.register_forward_pre_hook(_ConvertInputs(), with_kwargs=True)


def _is_plain(weight: Tensor) -> bool:
    return type(weight.data) is Tensor and weight.dim() == 4


def _is_image(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and leaf.dim() == 4 and leaf.is_floating_point()


def _restride(weight: nn.Parameter, stride: tuple[int, ...]) -> None:
    """Give a weight and its gradient these strides."""
    for tensor in (weight, weight.grad):
        if tensor is not None and tensor.stride() != stride:
            restrided = torch.empty_strided(tensor.shape, stride, dtype=tensor.dtype, device=tensor.device)
            tensor.data = restrided.copy_(tensor.detach())


class _KeepWeight:
    """After ``load_state_dict``, the weight has the format that it was converted to; knows the strides from before.

    ``.to`` and not ``.contiguous``, which leaves [O, 1, H, W] and [O, I, 1, 1] as they are: they count as contiguous in
    both formats, but their strides decide in which one a convolution computes.
    """

    def __init__(self, before: tuple[int, ...], wanted: torch.memory_format) -> None:
        self.before = before
        self.wanted = wanted

    def __call__(self, module: nn.Module, incompatible_keys: Any) -> None:
        weight = module.weight
        if isinstance(weight, nn.Parameter) and _is_plain(weight):
            _restride(weight, weight.data.to(memory_format=self.wanted).stride())


class _ConvertInputs:
    """4-D floating-point inputs as channels_last."""

    def __call__(self, module: nn.Module, args: Any, kwargs: Any) -> Any:
        return tree_map(_to_channels_last, (args, kwargs))


class _Contiguous:
    """The input of a guarded convolution: contiguous on the CPU."""

    def __call__(self, module: nn.Module, args: Any) -> Any:
        (x,) = args
        return x.to(memory_format=torch.contiguous_format) if x.is_cpu else x


class _ChannelsLast:
    """The output of a guarded convolution."""

    def __call__(self, module: nn.Module, args: Any, output: Tensor) -> Tensor:
        return output.to(memory_format=torch.channels_last)


def _to_channels_last(leaf: Any) -> Any:
    return leaf.to(memory_format=torch.channels_last) if _is_image(leaf) else leaf
