"""Normalizations of images: agreement with torch and timm, and what the mathematics promises."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from braze.kernels import (
    BatchNormAct2d,
    GroupNorm,
    GroupNormAct,
    LayerNorm2d,
    batch_norm_act,
    group_norm,
    layer_norm_2d,
    use_backend,
)

from . import budget

BACKENDS = ["eager", "triton"]
ACTIVATIONS = {
    None: lambda z: z,
    "relu": F.relu,
    "silu": F.silu,
    "gelu": F.gelu,
    "hardswish": F.hardswish,
    "relu6": F.relu6,
    "leaky_relu": F.leaky_relu,
}
each_backend = pytest.mark.parametrize("backend", BACKENDS)
#: 3-D, 4-D in both formats, 5-D in both; groups of one program and, in the last two, of several.
SHAPES = {
    "3-D": ((2, 12, 35), torch.contiguous_format),
    "4-D": ((2, 12, 5, 7), torch.contiguous_format),
    "channels last": ((2, 12, 5, 7), torch.channels_last),
    "5-D channels last": ((2, 12, 3, 5, 7), torch.channels_last_3d),
    "5-D, parts": ((1, 12, 2, 41, 53), torch.contiguous_format),
}
each_shape = pytest.mark.parametrize(("shape", "memory_format"), SHAPES.values(), ids=SHAPES)


def draw(shape: tuple[int, ...], memory_format: torch.memory_format, device: str) -> Tensor:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(device)
    return x.contiguous(memory_format=memory_format).requires_grad_()


def parameters(C: int, device: str) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return tuple(torch.randn(C, generator=generator).to(device).requires_grad_() for _ in range(2))  # type: ignore[return-value]


@each_backend
@each_shape
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_group_norm_is_that_of_torch(backend: str, shape, memory_format, activation, device: str) -> None:
    x = draw(shape, memory_format, device)
    affine = parameters(shape[1], device)
    wanted = ACTIVATIONS[activation](F.group_norm(x, 3, *affine))
    with use_backend(backend):
        y = group_norm(x, 3, *affine, activation=activation)
        # Of about unit size each, so that float32's relative tolerance is the right absolute one too.
        got = torch.autograd.grad(y.square().mean().sqrt(), (x, *affine))
    assert y.is_contiguous(memory_format=memory_format)
    torch.testing.assert_close(y, wanted)
    for gradient, theirs in zip(got, torch.autograd.grad(wanted.square().mean().sqrt(), (x, *affine)), strict=True):
        torch.testing.assert_close(gradient, theirs)


@pytest.mark.parametrize("backend", [None, *BACKENDS])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=["NCHW", "NHWC"])
def test_layer_norm_2d_is_layer_norm_of_the_channels(backend: str | None, memory_format, device: str) -> None:
    x = draw((2, 12, 5, 7), memory_format, device)
    affine = parameters(12, device)
    wanted = F.layer_norm(x.permute(0, 2, 3, 1), (12,), *affine, 1e-6).permute(0, 3, 1, 2)
    with use_backend(backend) if backend else nullcontext():
        y = layer_norm_2d(x, *affine)
        got = torch.autograd.grad(y.square().mean().sqrt(), (x, *affine))
    assert y.is_contiguous(memory_format=memory_format)
    torch.testing.assert_close(y, wanted)
    for gradient, theirs in zip(got, torch.autograd.grad(wanted.square().mean().sqrt(), (x, *affine)), strict=True):
        torch.testing.assert_close(gradient, theirs)


@each_backend
def test_a_group_of_each_channel_count_is_another_norm(backend: str, device: str) -> None:
    """One group is LayerNorm over the sample; as many groups as channels are InstanceNorm."""
    x = draw((2, 12, 5, 7), torch.contiguous_format, device)
    with use_backend(backend):
        torch.testing.assert_close(group_norm(x, 1), F.layer_norm(x, x.shape[1:]))
        torch.testing.assert_close(group_norm(x, 12), F.instance_norm(x))


@pytest.mark.parametrize("backend", ["compile", *BACKENDS])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equal_pixels_have_nothing_to_scale(backend: str, dtype: torch.dtype, device: str) -> None:
    """Of eight, whose mean is exact: the gradient of the weight is 0, to the bit."""
    x = torch.full((2, 6, 8), 0.7373, dtype=dtype, device=device).requires_grad_()
    weight, bias = parameters(6, device)
    with use_backend(backend):
        y = group_norm(x, 3, weight, bias)
    dweight, dbias = torch.autograd.grad(y, (weight, bias), torch.randn_like(y))
    assert not dweight.any()
    assert dbias.all()


@pytest.mark.parametrize("backend", ["compile", *BACKENDS])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gradients_lie_in_memory_as_images_do(backend: str, activation: str | None, device: str) -> None:
    x = draw((2, 8, 32, 33), torch.channels_last, device)
    weight, bias = parameters(8, device)
    with use_backend(backend):
        for y in (
            batch_norm_act(x, None, None, weight, bias, training=True, activation=activation),
            group_norm(x, 4, weight, bias, activation=activation),
        ):
            assert y.stride() == x.stride()
            (dx,) = torch.autograd.grad(y, x, torch.ones_like(y))
            assert dx.stride() == x.stride()


@each_backend
def test_norms_ignore_a_scale_of_their_input(backend: str, device: str) -> None:
    """By a power of two, with no eps: to the bit."""
    x = draw((2, 12, 5, 7), torch.contiguous_format, device).detach()
    with use_backend(backend):
        assert torch.equal(group_norm(x, 3, eps=0.0), group_norm(8 * x, 3, eps=0.0))
        assert torch.equal(layer_norm_2d(x, eps=0.0), layer_norm_2d(8 * x, eps=0.0))


@each_backend
@pytest.mark.parametrize("momentum", [0.1, None], ids=["momentum", "average"])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=["NCHW", "NHWC"])
def test_batch_norm_is_that_of_torch_over_training_and_evaluation(
    backend: str, momentum, memory_format, device: str
) -> None:
    ours = BatchNormAct2d(12, momentum=momentum, act="relu").to(device)
    theirs = torch.nn.BatchNorm2d(12, momentum=momentum).to(device)
    x = draw((4, 12, 5, 7), memory_format, device)
    residual = draw((4, 12, 5, 7), memory_format, device).detach().roll(1)
    for training in (True, True, False):
        ours.train(training), theirs.train(training)
        with use_backend(backend):
            y = ours(x, residual)
            got = torch.autograd.grad(y.square().mean().sqrt(), (x, *ours.parameters()))
        wanted = F.relu(theirs(x) + residual)
        torch.testing.assert_close(y, wanted)
        expected = torch.autograd.grad(wanted.square().mean().sqrt(), (x, *theirs.parameters()))
        for gradient, its in zip(got, expected, strict=True):
            torch.testing.assert_close(gradient, its)
        for name, tracked in theirs.state_dict().items():
            torch.testing.assert_close(ours.state_dict()[name], tracked)


@pytest.mark.parametrize("backend", ["compile", *BACKENDS])
def test_the_first_pixels_of_images_may_be_unlike_the_rest(backend: str, device: str) -> None:
    """And far from 0: the shift that statistics are taken with is theirs."""
    x = 100 + torch.randn(4, 12, 1600, device=device)
    x[..., :200] += 1000
    with use_backend(backend):
        y = batch_norm_act(x, None, None, training=True)
    plain, truth = (F.batch_norm(t, None, None, training=True) for t in (x, x.double()))
    assert budget.excess([y], [plain], [truth]) <= 1.0


def test_running_statistics_that_are_infinite_stay_so_as_torchs_do(device: str) -> None:
    ours, plain = BatchNormAct2d(3).to(device), torch.nn.BatchNorm2d(3).to(device)
    for norm in (ours, plain):
        norm.running_var[0] = float("inf")
        norm(draw((2, 3, 4, 4), torch.contiguous_format, device))
    torch.testing.assert_close(ours.running_var, plain.running_var)


def test_modules_load_what_torch_and_timm_saved(device: str) -> None:
    timm = pytest.importorskip("timm.layers", reason="timm is not installed: its modules have nothing to load")
    pairs = [
        (GroupNorm(3, 12), torch.nn.GroupNorm(3, 12), None),
        (GroupNormAct(12, 3), timm.GroupNormAct(12, 3), None),
        (GroupNormAct(12, 3, act="silu"), torch.nn.GroupNorm(3, 12), F.silu),
        (LayerNorm2d(12), timm.LayerNorm2d(12), None),
        (BatchNormAct2d(12, act="relu"), timm.BatchNormAct2d(12), None),
        (BatchNormAct2d(12, act="silu"), torch.nn.BatchNorm2d(12), F.silu),
        (BatchNormAct2d(12, act="leaky_relu", negative_slope=0.2), torch.nn.BatchNorm2d(12), torch.nn.LeakyReLU(0.2)),
    ]
    x = draw((2, 12, 5, 7), torch.contiguous_format, device).detach()
    for ours, theirs, act in pairs:
        ours, theirs = ours.to(device), theirs.to(device)
        with torch.no_grad():
            for parameter in theirs.parameters():
                parameter.uniform_(-1.0, 1.0)
        ours.load_state_dict(theirs.state_dict())
        theirs.load_state_dict(ours.state_dict())
        wanted = theirs(x)
        torch.testing.assert_close(ours(x), wanted if act is None else act(wanted))
