"""What :func:`image_normalize` demands of its arguments."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import dispatch, sharding


def images(x: Tensor, mean: Sequence[float], std: Sequence[float], dtype: torch.dtype, memory_format: object) -> None:
    """Bytes of so many channels, and what becomes of them."""
    if x.dtype != torch.uint8:
        raise TypeError(f"image_normalize: x must be uint8, got {x.dtype}; floating-point images are scaled already")
    if x.dim() != 4:
        raise ValueError(
            f"image_normalize: x must be [N, C, H, W], got {tuple(x.shape)}; a single image is x.unsqueeze(0)"
        )
    if not dtype.is_floating_point:
        raise TypeError(f"image_normalize: dtype must be floating point, got {dtype}; e.g. torch.bfloat16")
    if memory_format not in (None, torch.contiguous_format, torch.channels_last):
        raise ValueError(
            "image_normalize: memory_format must be torch.contiguous_format, torch.channels_last or None, "
            f"got {memory_format}"
        )
    for label, values in (("mean", mean), ("std", std)):
        if len(values) != x.shape[1]:
            raise ValueError(
                f"image_normalize: {label} must have one number for each of the {x.shape[1]} channels of x "
                f"{tuple(x.shape)}, got {len(values)}; images of shape [N, H, W, C] are x.permute(0, 3, 1, 2)"
            )
    if any(not s > 0.0 for s in std):
        raise ValueError(f"image_normalize: std must be positive, got {tuple(std)}")


def mixing(x: Tensor, flip: Tensor | None, partner: Tensor | None, lam: Tensor | None, box: Tensor | None) -> None:
    """Flags, partners and parts of a batch of this size."""
    N = x.shape[0]
    if flip is not None and (flip.dtype != torch.bool or flip.shape != (N,)):
        kind = TypeError if flip.dtype != torch.bool else ValueError
        raise kind(
            f"image_normalize: flip must be boolean [N], ({N},), got {flip.dtype} {tuple(flip.shape)}; "
            "e.g. torch.rand(N) < 0.5"
        )
    if partner is None:
        if lam is not None or box is not None:
            raise ValueError(
                "image_normalize: lam and box say how an image is mixed with its partner, got no partner; "
                "pass e.g. partner=torch.arange(N).roll(1)"
            )
        return
    if partner.dtype != torch.int64:
        raise TypeError(f"image_normalize: partner must be int64, got {partner.dtype}; partner.long()?")
    if partner.shape != (N,):
        raise ValueError(f"image_normalize: partner must be [N], ({N},), got {tuple(partner.shape)}")
    if lam is not None and not lam.is_floating_point():
        raise TypeError(f"image_normalize: lam must be floating point, got {lam.dtype}; lam.float()?")
    if lam is not None and (lam.requires_grad or lam.shape not in ((), (1,), (N,))):
        raise ValueError(
            f"image_normalize: lam must be a number or [N], ({N},), without a gradient, got {tuple(lam.shape)}, "
            f"requires_grad={lam.requires_grad}"
        )
    if box is not None and (box.is_floating_point() or box.dtype == torch.bool):
        raise TypeError(f"image_normalize: box must be integers, got {box.dtype}; box.long()?")
    if box is not None and box.shape not in ((4,), (1, 4), (N, 4)):
        raise ValueError(f"image_normalize: box must be (x1, y1, x2, y2) or [N, 4], ({N}, 4), got {tuple(box.shape)}")
    _partners_in_range(x, partner)


def out(memory: Tensor, x: Tensor, dtype: torch.dtype, memory_format: torch.memory_format) -> None:
    """Memory that can hold the result as it is."""
    if sharding.is_sharded(memory):
        raise TypeError("image_normalize: out must be an ordinary tensor, got a DTensor; leave it out")
    if memory.dtype != dtype:
        raise TypeError(f"image_normalize: out must be of dtype {dtype}, got {memory.dtype}; leave dtype out")
    if memory.shape != x.shape or memory.device != x.device or memory.requires_grad:
        raise ValueError(
            f"image_normalize: out must have x's shape {tuple(x.shape)} on {x.device} and no gradient, got "
            f"{tuple(memory.shape)} on {memory.device}, requires_grad={memory.requires_grad}"
        )
    if not memory.is_contiguous(memory_format=memory_format):
        raise ValueError(
            f"image_normalize: out must be dense in {memory_format}, got strides {memory.stride()}; "
            "make it by torch.empty(x.shape, dtype=dtype, memory_format=memory_format)"
        )


def _partners_in_range(x: Tensor, partner: Tensor) -> None:
    if partner.device.type != "cpu" or torch.compiler.is_compiling() or dispatch.seen_into([x, partner]):
        return
    wrong = partner[(partner < 0) | (partner >= x.shape[0])]
    if len(wrong):
        raise IndexError(f"image_normalize: partner must be in [0, {x.shape[0]}), got {wrong[0].item()}")
