"""Normalized images: agreement with torchvision and timm over their own options, and with themselves over layouts."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from braze.kernels import ImageNormalize, image_normalize, use_backend

from .test_identities import BACKENDS

every_backend = pytest.mark.parametrize("backend", [*BACKENDS, "compile"])

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
#: Values reach 1 / 0.224: a few roundings of that in float32.
ATOL = 4 * torch.finfo(torch.float32).eps / min(STD)


def _images(*shape: int, device: str) -> Tensor:
    return torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(0), dtype=torch.uint8).to(device)


def _close(y: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(y, wanted, rtol=0, atol=ATOL)


@every_backend
def test_it_is_the_chain_of_torchvision(backend: str, device: str) -> None:
    v2 = pytest.importorskip("torchvision.transforms.v2", reason="torchvision is an extra")
    chain = v2.Compose([v2.ToDtype(torch.float32, scale=True), v2.Normalize(MEAN, STD)])
    x = _images(4, 3, 6, 20, device=device)
    flip = torch.tensor([True, False, True, False], device=device)
    flipped = torch.stack([v2.functional.horizontal_flip(i) if f else i for i, f in zip(x, flip, strict=True)])
    with use_backend(backend):
        _close(ImageNormalize(MEAN, STD)(x), chain(x))
        _close(image_normalize(x, MEAN, STD, flip=flip), chain(flipped))


@every_backend
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize(
    "options", [{}, {"partner": torch.tensor([1, 0]), "lam": 0.25, "flip": torch.tensor([True, False])}]
)
def test_out_gets_what_fresh_memory_would(
    backend: str, memory_format: torch.memory_format, options: dict[str, Any], device: str
) -> None:
    options = {name: t.to(device) if isinstance(t, Tensor) else t for name, t in options.items()}
    x = _images(2, 3, 8, 20, device=device)
    out = torch.full(x.shape, float("nan"), dtype=torch.bfloat16, device=device).to(memory_format=memory_format)
    with use_backend(backend):
        fresh = image_normalize(x, MEAN, STD, dtype=out.dtype, memory_format=memory_format, **options)
        for _ in range(2):
            assert image_normalize(x, MEAN, STD, out=out, **options) is out
            assert torch.equal(out, fresh)
            out.zero_()


@every_backend
def test_mixup_and_cutmix_are_those_of_torchvision(backend: str, device: str) -> None:
    v2 = pytest.importorskip("torchvision.transforms.v2", reason="torchvision is an extra")
    x = _images(4, 3, 8, 20, device=device)
    plain = image_normalize(x, MEAN, STD)
    partner = torch.arange(4, device=device).roll(1)
    labels = {"labels": None, "batch_size": 4}
    lam, box = 0.3, (3, 2, 17, 6)
    mixed = v2.MixUp(num_classes=2).transform(plain, {**labels, "lam": lam})
    cut = v2.CutMix(num_classes=2).transform(plain, {**labels, "box": box})
    with use_backend(backend):
        _close(image_normalize(x, MEAN, STD, partner=partner, lam=lam), mixed)
        _close(image_normalize(x, MEAN, STD, partner=partner, lam=torch.full((4,), lam, device=device)), mixed)
        _close(image_normalize(x, MEAN, STD, partner=partner, box=box), cut)


@every_backend
@pytest.mark.parametrize("mode", ["batch", "pair", "elem"])
def test_mixing_is_that_of_timm(backend: str, mode: str, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    mixup = pytest.importorskip("timm.data.mixup", reason="timm is an extra")
    theirs = mixup.Mixup(mixup_alpha=0.8, cutmix_alpha=1.0, mode=mode, num_classes=2)
    N, H, W = 4, 8, 20
    x = _images(N, 3, H, W, device=device)
    drawn: list[tuple[int, ...]] = []
    draw_box = mixup.cutmix_bbox_and_lam

    def spy(*args: object, **kwargs: object) -> object:
        (yl, yh, xl, xh), lam = draw_box(*args, **kwargs)
        drawn.append(tuple(map(int, (xl, yl, xh, yh))))
        return (yl, yh, xl, xh), lam

    monkeypatch.setattr(mixup, "cutmix_bbox_and_lam", spy)
    for seed in range(4):
        drawn.clear()
        with _seeded(seed):
            wanted, _ = theirs(image_normalize(x, MEAN, STD), torch.zeros(N, dtype=torch.long, device=device))
        with _seeded(seed):
            lam, box = _parameters(theirs, mode, N, drawn)
        with use_backend(backend):
            y = image_normalize(
                x, MEAN, STD, partner=torch.arange(N, device=device).flip(0), lam=lam.to(device), box=box.to(device)
            )
        _close(y, wanted)


class _seeded:
    def __init__(self, seed: int) -> None:
        self.seed = seed

    def __enter__(self) -> None:
        self.state = np.random.get_state()
        np.random.seed(self.seed)

    def __exit__(self, *_: object) -> None:
        np.random.set_state(self.state)


def _parameters(theirs, mode: str, N: int, drawn: list[tuple[int, ...]]) -> tuple[Tensor, Tensor]:
    """timm's draws as λ and a box of each image: λ = 1 where it cuts, an empty box where it blends."""
    if mode == "batch":
        lam, cut = theirs._params_per_batch()
        lams, cuts = np.full(N, lam), np.full(N, cut)
        boxes = iter(drawn * N)
    else:
        lams, cuts = theirs._params_per_elem(N // 2 if mode == "pair" else N)
        boxes = iter(drawn)
    found = [next(boxes) if cut and lam != 1 else (0, 0, 0, 0) for lam, cut in zip(lams, cuts, strict=True)]
    lams = np.where(cuts, 1.0, lams)
    if mode == "pair":
        found, lams = found + found[::-1], np.concatenate((lams, lams[::-1]))
    return torch.tensor(lams, dtype=torch.float32), torch.tensor(found)


@every_backend
@pytest.mark.parametrize("C", [1, 2, 3, 4, 13])
def test_layouts_change_no_value(backend: str, C: int, device: str) -> None:
    mean, std = [0.1 * c for c in range(C)], [0.2 + 0.1 * c for c in range(C)]
    packed = _images(2, 5, 18, C, device=device).permute(0, 3, 1, 2)
    planar, columns_first = packed.contiguous(), packed.mT.contiguous().mT
    with use_backend(backend):
        wanted = image_normalize(planar, mean, std)
        for x in (packed, planar, columns_first):
            for layout in (torch.contiguous_format, torch.channels_last, None):
                y = image_normalize(x, mean, std, memory_format=layout)
                kept = torch.channels_last if x is packed and C > 1 else torch.contiguous_format
                assert y.is_contiguous(memory_format=layout or kept)
                torch.testing.assert_close(y, wanted, rtol=0, atol=0)


@every_backend
def test_mixing_with_oneself_or_not_at_all_changes_nothing(backend: str, device: str) -> None:
    x = _images(3, 3, 4, 18, device=device)
    own, other = torch.arange(3, device=device), torch.arange(3, device=device).flip(0)
    flip = torch.tensor([True, False, False], device=device)
    with use_backend(backend):
        plain = image_normalize(x, MEAN, STD, flip=flip)
        _close(image_normalize(x, MEAN, STD, flip=flip, partner=own, lam=0.25), plain)
        _close(image_normalize(x, MEAN, STD, flip=flip, partner=other, lam=1.0), plain)
        _close(image_normalize(x, MEAN, STD, flip=flip, partner=other, lam=0.0), plain.flip(0))
        _close(image_normalize(x, MEAN, STD, flip=flip, partner=other, box=(9, 2, 9, 4)), plain)
        _close(image_normalize(x, MEAN, STD, flip=flip, partner=other, box=(-5, 0, 99, 4)), plain.flip(0))


def test_a_partner_out_of_range_is_nan_on_the_device(device: str) -> None:
    """The kernel alone, as on a GPU, where the partners are not looked at first."""
    from braze.kernels.triton import image_normalize as kernels

    x, partner = _images(3, 3, 4, 18, device=device), torch.tensor([1, 3, -1], device=device)
    y = kernels.forward(
        x, None, partner, None, None, None, mean=MEAN, std=STD, dtype=torch.bfloat16, channels_last=False
    )
    assert y.isnan().flatten(1).all(1).tolist() == [False, True, True]
    assert y[0].isfinite().all()


def test_bytes_are_rounded_once(device: str) -> None:
    """bfloat16 is float32 rounded: arithmetic in it would be off by 2⁻⁸ of 2.6 even where the result is near 0."""
    x = _images(2, 3, 4, 18, device=device)
    with use_backend("triton"):
        y, wanted = (image_normalize(x, MEAN, STD, dtype=dtype) for dtype in (torch.bfloat16, torch.float32))
    # A whole step: the interpreter's conversion cuts the digits off.
    torch.testing.assert_close(y.float(), wanted, rtol=2.0**-7, atol=ATOL)
