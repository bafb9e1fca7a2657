"""What CUDA would do with a recorded run: the same operators, called again on fake CUDA tensors. No GPU is needed.

A fake tensor has a shape, strides and a device, and no memory. Its strides come from the operator's meta kernel, which
is not always what the CUDA kernel does: :data:`DIFFERENCES` lists where it is known not to be. Two limits remain. The
operators are those which the CPU dispatched, so what torch chooses by device before it dispatches is not seen; and
meta kernels that err in ways not listed here are believed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch._prims_common import suggest_memory_format
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_leaves, tree_map

from .trace import Call, Ref, Storages

#: Operator → (the argument whose format its CUDA kernel gives to 4-D outputs, or None where these are contiguous;
#: where that is written). Paths are below ``aten/src/ATen/native``.
DIFFERENCES: dict[str, tuple[int | None, str]] = {
    "aten.native_group_norm": (None, "group_norm.cpp: the suggested format on the CPU only"),
    "aten.native_group_norm_backward": (None, "group_norm.cpp: the suggested format on the CPU only"),
    "aten.pixel_shuffle": (None, "PixelShuffle.cpp: math_pixel_shuffle clones as contiguous"),
    "aten.pixel_unshuffle": (None, "PixelShuffle.cpp: math_pixel_unshuffle clones as contiguous"),
    "aten.roll": (None, "cuda/TensorTransformations.cu: empty_like as contiguous"),
    "aten.max_unpool2d": (None, "cuda/MaxUnpooling.cu: the output must be contiguous"),
    "aten.rrelu_with_noise": (None, "cuda/RreluWithNoise.cu: empty_like as contiguous"),
    "aten.reflection_pad2d": (None, "cuda/ReflectionPad.cu"),
    "aten.reflection_pad2d_backward": (None, "cuda/ReflectionPad.cu: zeros_like as contiguous"),
    "aten.replication_pad2d": (None, "cuda/ReplicationPadding.cu"),
    "aten.replication_pad2d_backward": (None, "cuda/ReplicationPadding.cu: zeros_like as contiguous"),
    # The meta kernel is a formula of elementwise operators, and follows the gradient.
    "aten.native_batch_norm_backward": (1, "cudnn/BatchNorm.cpp: the input's suggested format"),
    # The meta kernel says contiguous under 16 channels, where CUDA only chooses another kernel.
    "aten.upsample_bilinear2d": (0, "UpSampleBilinear2d.cpp: the input's suggested format"),
}


def replay(calls: Sequence[Call]) -> tuple[list[Call], list[str]]:
    """The calls as CUDA would make them, and the names of operators that could not be replayed.

    What cannot be replayed (operators of the CPU only, values that decide a shape) keeps the strides that it had on
    the CPU.
    """
    with FakeTensorMode(allow_non_fake_inputs=True) as mode, torch.no_grad():
        player = _Player(mode)
        return [player.play(call) for call in calls], sorted(player.unplayed)


class _Player:
    def __init__(self, mode: FakeTensorMode) -> None:
        self.mode = mode
        self.storages = Storages()
        self.twins: dict[Ref, Tensor] = {}
        self.unplayed: set[str] = set()

    def play(self, call: Call) -> Call:
        args, kwargs = tree_map(self._fake, (call.args, call.kwargs))
        before = self.storages.tree((args, kwargs))
        fakes = self._run(call, args, kwargs)
        for ref, fake in zip(tree_leaves(call.outputs), tree_leaves(fakes), strict=True):
            if isinstance(ref, Ref):
                self.twins[ref] = fake
        # oneDNN is the CPU's.
        return dataclasses.replace(
            call, args=before[0], kwargs=before[1], outputs=self.storages.tree(fakes), crashes=False
        )

    def _fake(self, leaf: Any) -> Any:
        if isinstance(leaf, Ref):
            if leaf not in self.twins:
                self.twins[leaf] = self._empty(leaf)
            return self.twins[leaf]
        if isinstance(leaf, torch.device):
            return torch.device("cuda") if leaf.type == "cpu" else leaf
        return None if isinstance(leaf, torch.Generator) else leaf

    def _empty(self, ref: Ref) -> Tensor:
        return torch.empty_strided(ref.size, ref.stride, dtype=ref.dtype, device="cuda")

    def _run(self, call: Call, args: Any, kwargs: Any) -> Any:
        if _would_be_a_no_op(call, args, kwargs):
            return args[0]
        try:
            fakes = _call(call, args, kwargs)
        except Exception:  # whatever a meta kernel raises
            fakes = None
        if fakes is None or not _same_shapes(call.outputs, fakes):
            self.unplayed.add(call.name)
            return tree_map(lambda leaf: self._empty(leaf) if isinstance(leaf, Ref) else leaf, call.outputs)
        return tree_map(lambda leaf: _restrided(call.name, leaf, args), fakes) if call.name in DIFFERENCES else fakes


def _call(call: Call, args: Any, kwargs: Any) -> Any:
    if call.name in ("aten.view", "aten._unsafe_view"):
        return args[0].reshape(args[1])  # what was a view on the CPU may need a copy here
    return call.op(*args, **kwargs)


def _would_be_a_no_op(call: Call, args: Any, kwargs: Any) -> bool:
    """A clone that names a format is ``contiguous()``; where CUDA has that format already, it would not be called."""
    wanted = kwargs.get("memory_format")
    named = wanted in (torch.contiguous_format, torch.channels_last)
    return call.name == "aten.clone" and named and args[0].is_contiguous(memory_format=wanted)


def _same_shapes(outputs: Any, fakes: Any) -> bool:
    pairs = tree_leaves(outputs), tree_leaves(fakes)
    return len(pairs[0]) == len(pairs[1]) and all(
        isinstance(fake, Tensor) and tuple(fake.shape) == ref.size
        for ref, fake in zip(*pairs, strict=True)
        if isinstance(ref, Ref)
    )


def _restrided(name: str, fake: Any, args: Any) -> Any:
    if not isinstance(fake, Tensor) or fake.dim() != 4:
        return fake
    argument, _ = DIFFERENCES[name]
    wanted = torch.contiguous_format if argument is None else suggest_memory_format(args[argument])
    return torch.empty_like(fake, memory_format=wanted)
