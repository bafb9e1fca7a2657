"""Normalization of uint8 images, flipped and mixed on the way.

    y = (v / 255 − mean) / std                              of each channel
    v = own·x[n] + (1 − own)·x[partner[n]]                  own = 0 inside the box, lam outside

Every image is first mirrored left to right if its flag says so. Without a partner v = x[n].

Source: ``torchvision.transforms.v2``: ToDtype(scale=True), Normalize, RandomHorizontalFlip, MixUp and CutMix. Zhang et
al., mixup: Beyond Empirical Risk Minimization (2018); Yun et al., CutMix (2019).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import dispatch
from ..compiled import compiled_call
from ..op import Call, Draw, ErrorInput, Excess, Op, Traffic
from . import image_checks


def reference(
    x: Tensor,
    flip: Tensor | None,
    partner: Tensor | None,
    lam: Tensor | None,
    box: Tensor | None,
    out: Tensor | None,
    *,
    mean: Sequence[float],
    std: Sequence[float],
    dtype: torch.dtype,
    channels_last: bool,
) -> Tensor:
    """The images in plain PyTorch: float32 (or wider) inside, one rounding."""
    if flip is not None:
        x = torch.where(flip.view(-1, 1, 1, 1), x.flip(-1), x)
    wide = torch.promote_types(dtype, torch.float32)
    center, spread = (torch.tensor(t, dtype=wide, device=x.device).view(-1, 1, 1) for t in (mean, std))
    column = torch.arange(x.shape[-1], device=x.device)
    other = None if partner is None else x[partner]
    y = _values(x, other, lam, box, column, center, spread, out, dtype=dtype)
    return y.contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)


def _values(
    x: Tensor,
    other: Tensor | None,
    lam: Tensor | None,
    box: Tensor | None,
    column: Tensor,
    center: Tensor,
    spread: Tensor,
    out: Tensor | None,
    *,
    dtype: torch.dtype,
) -> Tensor:
    """What becomes of bytes [N, …, H, L] that lie at ``column`` [L] of their rows; in ``out`` if there is one."""
    v = x.to(spread.dtype)
    if other is not None:
        partners = other.to(v.dtype)
        if lam is not None:
            own = lam.to(v.dtype).view(-1, 1, 1, 1)
            v = own * v + (1.0 - own) * partners
        if box is not None:
            v = torch.where(_inside(box, x.shape[-2], column), partners, v)
    y = ((v / 255.0 - center) / spread).to(dtype)
    return y if out is None else out.copy_(y)


def _inside(box: Tensor, H: int, column: Tensor) -> Tensor:
    """True where a box (x1, y1, x2, y2) is, [N or 1, 1, H, L]."""
    x1, y1, x2, y2 = box.view(-1, 4, 1, 1, 1).unbind(1)
    row = torch.arange(H, device=box.device)[:, None]
    return (x1 <= column) & (column < x2) & (y1 <= row) & (row < y2)


def image_normalize(
    x: Tensor,
    mean: Sequence[float],
    std: Sequence[float],
    *,
    dtype: torch.dtype | None = None,
    memory_format: torch.memory_format | None = None,
    flip: Tensor | None = None,
    partner: Tensor | None = None,
    lam: Tensor | float | None = None,
    box: Tensor | Sequence[int] | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """``(x / 255 − mean) / std`` of uint8 images, in one pass from bytes to the dtype and layout that a model takes.

    Computed in float32 and rounded once. On the same pass images are mirrored, and mixed with partners: MixUp is a
    partner and a ``lam``, CutMix a partner and a ``box``; both at once choose by box and lam for each image, as
    ``timm.data.Mixup(mode="elem")`` does. No gradient flows: the images are bytes.

    Args:
        x: uint8 [N, C, H, W], in planar or channels-last memory; the permuted view of an [N, H, W, C] batch will do.
        mean: of each channel, of values in [0, 1].
        std: likewise.
        dtype: of the result; floating point. None is that of ``out``, or float32.
        memory_format: of the result: ``torch.contiguous_format``, ``torch.channels_last``, or None for that of ``out``,
            or x's.
        flip: boolean [N], True where an image is mirrored left to right, before it is mixed.
        partner: int64 [N]: the image of the batch that each is mixed with; ``arange(N).roll(1)`` in torchvision,
            ``arange(N).flip(0)`` in timm.
        lam: the part that an image itself has in the mixture, the same for all or a floating-point [N]; None is 1.
        box: (x1, y1, x2, y2), the same for all or int64 [N, 4]: pixels with x1 ≤ x < x2 and y1 ≤ y < y2 are the
            partner's. A box with no pixel changes nothing.
        out: memory for the result, [N, C, H, W], which is overwritten and returned. On the CPU, fresh memory for a
            large batch costs more than the arithmetic: the system hands it out page by page.

    Returns:
        [N, C, H, W] in ``dtype``.

    Raises:
        TypeError: if x is not uint8, dtype is not floating point, or flip, partner, lam or box has another dtype.
        ValueError: if a shape does not fit, a std is not positive, lam or box comes with no partner, or ``out`` is of
            another dtype, layout or device.
        IndexError: if a partner on the CPU is out of range. On a GPU, where looking would stall the stream, such an
            image is NaN.
    """
    dtype = dtype or (torch.float32 if out is None else out.dtype)
    image_checks.images(x, mean, std, dtype, memory_format)
    lam = None if lam is None else _tensor(lam, torch.float32, x)
    box = None if box is None else _tensor(box, torch.int64, x)
    image_checks.mixing(x, flip, partner, lam, box)
    memory_format = memory_format or _layout(x if out is None else out)
    if out is not None:
        image_checks.out(out, x, dtype, memory_format)
    y = dispatch.run(
        IMAGE_NORMALIZE,
        x,
        flip,
        partner,
        lam,
        box,
        out,
        mean=tuple(map(float, mean)),
        std=tuple(map(float, std)),
        dtype=dtype,
        channels_last=memory_format == torch.channels_last,
    )
    return y if out is None else out


class ImageNormalize(torch.nn.Module):
    """``ToDtype(scale=True)``, then ``Normalize(mean, std)``, of batches of bytes; runs :func:`image_normalize`.

    Args:
        mean: of each channel, of values in [0, 1].
        std: likewise.
        dtype: of the result.
        memory_format: of the result; None keeps that of the images.
    """

    def __init__(
        self,
        mean: Sequence[float],
        std: Sequence[float],
        dtype: torch.dtype = torch.float32,
        memory_format: torch.memory_format | None = None,
    ) -> None:
        super().__init__()
        self.mean, self.std, self.dtype, self.memory_format = tuple(mean), tuple(std), dtype, memory_format

    def forward(self, x: Tensor, **more: Any) -> Tensor:
        """uint8 [N, C, H, W] → the same in ``dtype``; flip, partner, lam, box and out as in :func:`image_normalize`."""
        return image_normalize(x, self.mean, self.std, dtype=self.dtype, memory_format=self.memory_format, **more)

    def extra_repr(self) -> str:
        """The arguments."""
        return f"mean={self.mean}, std={self.std}, dtype={self.dtype}, memory_format={self.memory_format}"


def _tensor(value: Any, dtype: torch.dtype, x: Tensor) -> Tensor:
    if isinstance(value, Tensor):
        return value
    # non_blocking: pageable memory of a few bytes is copied before the call returns, and the stream is not stalled.
    return torch.tensor(value, dtype=dtype).to(x.device, non_blocking=True)


def _layout(images: Tensor) -> torch.memory_format:
    keeps = images.is_contiguous(memory_format=torch.channels_last) and not images.is_contiguous()
    return torch.channels_last if keeps else torch.contiguous_format


def _triton(x: Tensor, *more: Tensor | None, **options: Any) -> Tensor:
    if options["dtype"] == torch.float64:  # the kernel computes in float32
        return reference(x, *more, **options)
    from ..triton import image_normalize as kernels

    return kernels.forward(x, *more, **options)


def _compiled(
    x: Tensor,
    flip: Tensor | None,
    partner: Tensor | None,
    lam: Tensor | None,
    box: Tensor | None,
    out: Tensor | None,
    *,
    mean: Sequence[float],
    std: Sequence[float],
    dtype: torch.dtype,
    channels_last: bool,
) -> Tensor:
    """Bytes are brought into place first, image by image; the arithmetic is compiled for whole rows of them.

    The compiler vectorizes neither over three channels nor through the number of a partner or a flag: of float32
    [16, 3, 224, 224] in channels-last memory the reference took 12.6 ms compiled, and rows 1.3 (one core of an EPYC).
    """
    N, C, H, W = x.shape
    wide = torch.promote_types(dtype, torch.float32)
    center, spread = (torch.tensor(t, dtype=wide) for t in (mean, std))
    column = torch.arange(W)
    if channels_last:
        packed = x.is_contiguous(memory_format=torch.channels_last)
        images = x.permute(0, 2, 3, 1) if packed else torch.stack(x.unbind(1), -1)
        x, shape = images.permute(0, 3, 1, 2), (N, 1, H, W * C)
        center, spread, column = center.repeat(W), spread.repeat(W), column.repeat_interleave(C)
    else:
        x = images = x.contiguous()
        shape, center, spread = (N, C, H, W), center.view(-1, 1, 1), spread.view(-1, 1, 1)
    if flip is not None and N:
        mirrored = x.flip(-1).permute(0, 2, 3, 1) if channels_last else x.flip(-1)
        images = torch.stack([m if f else i for i, m, f in zip(images, mirrored, flip.tolist(), strict=True)])
    rows = images.reshape(shape)
    other = None if partner is None else rows.index_select(0, partner)
    if out is not None and channels_last:
        out = out.permute(0, 2, 3, 1).view(shape)
    y = compiled_call(_values, (rows, other, lam, box, column, center, spread, out), {"dtype": dtype})
    return y.view(N, H, W, C).permute(0, 3, 1, 2) if channels_last else y


def _aten(
    x: Tensor,
    mean: Sequence[float],
    std: Sequence[float],
    *,
    dtype: torch.dtype,
    memory_format: torch.memory_format | None = None,
    flip: Tensor | None = None,
    partner: Tensor | None = None,
    lam: Tensor | None = None,
    box: Tensor | None = None,
) -> Tensor:
    """As torchvision's transforms and timm's prefetcher do it, one operation after another."""
    center, spread = (torch.tensor(t, dtype=dtype, device=x.device).view(-1, 1, 1) for t in (mean, std))
    y = x.to(dtype).div(255.0).sub(center).div(spread)
    if flip is not None:
        y = torch.where(flip.view(-1, 1, 1, 1), y.flip(-1), y)
    if partner is not None:
        other = y[partner]
        if lam is not None:
            y = torch.lerp(other, y, lam.view(-1, 1, 1, 1).to(dtype))
        if box is not None:
            column = torch.arange(x.shape[-1], device=x.device)
            y = torch.where(_inside(box, x.shape[-2], column), other, y)
    return y.contiguous(memory_format=memory_format or torch.contiguous_format)


def _inputs(
    draw: Draw,
    *,
    N: int,
    C: int,
    H: int,
    W: int,
    packed: bool = False,
    flipped: bool = False,
    mixup: bool = False,
    cutmix: bool = False,
    **options: Any,
) -> Call:
    x = draw.bytes(N, H, W, C).permute(0, 3, 1, 2) if packed else draw.bytes(N, C, H, W)
    options["dtype"] = draw.dtype
    if flipped:
        options["flip"] = draw.booleans(N)
    if mixup or cutmix:
        options["partner"] = draw.permutation(N)
    if mixup:
        options["lam"] = draw.constant(N, low=0.0)
    if cutmix:
        left, top = draw.integers(0, W // 2 + 1, N), draw.integers(0, H // 2 + 1, N)
        options["box"] = torch.stack((left, top, left + (W + 1) // 2, top + (H + 1) // 2), 1)
    return Call((x, [0.485 + 0.01 * c for c in range(C)], [0.229 + 0.01 * c for c in range(C)]), options)


def _errors() -> Iterator[ErrorInput]:
    x = torch.zeros(2, 3, 4, 5, dtype=torch.uint8)
    three, partner = (0.5, 0.5, 0.5), torch.tensor([1, 0])

    def mixing(**options: Any) -> Call:
        return Call((x, three, three), options)

    yield ErrorInput(Call((x.float(), three, three)), TypeError, "x must be uint8, got torch.float32")
    yield ErrorInput(Call((x[0], three, three)), ValueError, r"must be \[N, C, H, W\], got \(3, 4, 5\)")
    yield ErrorInput(Call((x, three[:2], three)), ValueError, "mean must have one number for each of the 3 channels")
    yield ErrorInput(Call((x, three, (0.5, 0.0, 0.5))), ValueError, "std must be positive")
    yield ErrorInput(mixing(dtype=torch.int32), TypeError, "dtype must be floating point, got torch.int32")
    yield ErrorInput(mixing(memory_format=torch.preserve_format), ValueError, "memory_format must be")
    yield ErrorInput(mixing(flip=partner), TypeError, r"flip must be boolean \[N\], \(2,\), got torch.int64")
    yield ErrorInput(mixing(flip=partner[:1] > 0), ValueError, r"flip must be boolean.*\(1,\)")
    yield ErrorInput(mixing(lam=0.5), ValueError, "got no partner")
    yield ErrorInput(mixing(partner=partner.int()), TypeError, "partner must be int64, got torch.int32")
    yield ErrorInput(mixing(partner=partner[:1]), ValueError, r"partner must be \[N\], \(2,\), got \(1,\)")
    yield ErrorInput(mixing(partner=partner + 1), IndexError, r"partner must be in \[0, 2\), got 2")
    yield ErrorInput(mixing(partner=partner, lam=partner), TypeError, "lam must be floating point")
    yield ErrorInput(mixing(partner=partner, lam=torch.rand(3)), ValueError, r"lam must be a number or \[N\], \(2,\)")
    yield ErrorInput(mixing(partner=partner, box=torch.zeros(4)), TypeError, "box must be integers")
    yield ErrorInput(mixing(partner=partner, box=(1, 2, 3)), ValueError, r"box must be \(x1, y1, x2, y2\)")
    half, packed = torch.empty(x.shape, dtype=torch.float16), torch.empty(x.shape).to(memory_format=torch.channels_last)
    yield ErrorInput(mixing(out=half, dtype=torch.float32), TypeError, "out must be of dtype torch.float32")
    yield ErrorInput(mixing(out=half[:1]), ValueError, r"out must have x's shape \(2, 3, 4, 5\).*\(1, 3, 4, 5\)")
    yield ErrorInput(mixing(out=torch.empty(2, 3, 4, 10)[..., ::2]), ValueError, "out must be dense in")
    yield ErrorInput(
        mixing(out=packed, memory_format=torch.contiguous_format), ValueError, "dense in torch.contiguous_format"
    )


def _traffic(
    itemsize: int, *, N: int, C: int, H: int, W: int, mixup: bool = False, cutmix: bool = False, **_: Any
) -> Traffic:
    """The bytes, twice where they are blended, and the result; flags, partners and boxes are nothing beside them."""
    blended = (H * W - (((H + 1) // 2) * ((W + 1) // 2) if cutmix else 0)) if mixup else 0
    return Traffic(forward=N * C * (H * W * (1 + itemsize) + blended), backward=0)


def _axes(x: Tensor, flip: Tensor | None, partner: Tensor | None, *_: Tensor | None, **__: Any) -> str:
    """A partner may be any image of the batch; a box and a mirrored row are counted in pixels of the whole image."""
    signature = "n C H W, n, n, n, n I, n C H W -> n C H W"
    return signature if partner is None else signature.replace("n", "N")


_EDGES = "groups of 16 pixels across an edge of the box are read of both images"

IMAGE_NORMALIZE = Op(
    name="image_normalize",
    replaces="`v2.ToDtype`, `v2.Normalize`, flips, `v2.MixUp`, `v2.CutMix`, `.to(channels_last)`",
    fn=image_normalize,
    reference=reference,
    impls={"triton": _triton, "compile": _compiled},
    inputs=_inputs,
    dims={"N": (0, 1, 3), "C": (1, 3, 4, 5), "H": (1, 2, 9, 33), "W": (1, 15, 16, 17, 33, 80)},
    bench=({"N": 64, "C": 3, "H": 224, "W": 224},),
    audit=({"N": 2, "C": 3, "H": 224, "W": 224}, {"N": 256, "C": 3, "H": 224, "W": 224}),
    traffic=_traffic,
    flops=lambda N, C, H, W: 2 * N * C * H * W,
    aten=_aten,
    axes=_axes,
    errors=_errors,
    differentiable=False,
    excess={
        ("planar, cutmix", "forward"): Excess(1.05, _EDGES),
    },
    variants={
        "default": {"packed": True, "memory_format": torch.channels_last},
        "packed to planar, flipped": {"packed": True, "flipped": True, "memory_format": torch.contiguous_format},
        "planar to packed, mixup": {"mixup": True, "memory_format": torch.channels_last},
        "planar, cutmix": {"cutmix": True, "flipped": True, "memory_format": torch.contiguous_format},
        "everything": {
            "packed": True,
            "flipped": True,
            "mixup": True,
            "cutmix": True,
            "memory_format": torch.contiguous_format,
        },
    },
    modules=(ImageNormalize,),
)
