"""Which modules are 2-D convolutions with a weight of their own, and which of them crash oneDNN."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch._prims_common import suggest_memory_format


def convolutions(model: nn.Module) -> Iterator[tuple[str, nn.Conv2d | nn.ConvTranspose2d]]:
    """Each 2-D convolution of ``model`` once, transposed ones included, under the first of its names."""
    for name, module in model.named_modules():
        if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)):
            yield name, module


def would_crash(op: Any, args: Any) -> bool:
    """Whether this call is a weight gradient at which oneDNN writes past its buffer (oneDNN #6035).

    Found by one process for each case, torch 2.15 on AVX-512: only the gradient of the weight, only where input *or*
    weight is channels_last. Images of 96² and more crash; smaller ones overwrite less than the slack of the buffer.
    """
    if op is not torch.ops.aten.convolution_backward.default:
        return False
    _, x, weight, _, stride, padding, _, transposed, _, groups, wanted = args
    if not (wanted[1] and x.is_cpu and x.dim() == 4 and not transposed):
        return False
    formats = (suggest_memory_format(x), suggest_memory_format(weight))
    return crashing_shape(weight, stride, padding, groups) and torch.channels_last in formats


def crashing_shape(weight: Tensor, stride: Any, padding: Any, groups: int) -> bool:
    """Whether a convolution is what crashes: 1×1, strided, unpadded, one group, float32, under 16 input channels.

    16 is the vector of AVX-512; with AVX2 it is 8, with SSE 4.1 nothing crashes. float64, bfloat16, padded and grouped
    convolutions were tried too and do not.
    """
    if weight.dim() != 4 or weight.dtype != torch.float32 or groups != 1:
        return False
    unpadded = padding == "valid" or padding == "same" or not any(padding)
    return unpadded and weight.shape[1] < 16 and tuple(weight.shape[2:]) == (1, 1) and max(stride) > 1


def contiguous_backward(op: Any, args: Any, kwargs: Any) -> Any:
    """What ``convolution_backward`` gives, computed on contiguous copies; the input's gradient as channels_last."""
    plain = [t.to(memory_format=torch.contiguous_format) for t in args[:3]]
    dx, dw, db = op(*plain, *args[3:], **kwargs)
    return dx if dx is None else dx.to(memory_format=torch.channels_last), dw, db
