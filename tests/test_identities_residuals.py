"""Activations and residual tails: agreement with torch and timm, and what their mathematics alone promises."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from braze.kernels import (
    MLP,
    BiasAct,
    DropPath,
    DyT,
    GatedMLP,
    LayerScale,
    bias_act,
    dropout,
    dropout_add,
    dyt,
    gated_mlp,
    mlp,
    scale_add,
    use_backend,
)

BACKENDS = ["eager", "triton"]
every_backend = pytest.mark.parametrize("backend", BACKENDS)

THEIRS = {
    "silu": nn.SiLU(),
    "gelu": nn.GELU(),
    "gelu_tanh": nn.GELU("tanh"),
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "relu": nn.ReLU(),
    "relu_squared": lambda x: torch.relu(x) ** 2,
    "sigmoid": nn.Sigmoid(),
}


def drawn(*shape: int, device: str, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device).requires_grad_()


def kept_bytes(run, *known: Tensor) -> int:
    """Bytes that the backward pass of ``run()`` keeps in memory, beside the tensors it is known to have."""
    held = {}

    def pack(t: Tensor) -> Tensor:
        held[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        run()
    return sum(size for at, size in held.items() if at not in {t.untyped_storage().data_ptr() for t in known})


@every_backend
@pytest.mark.parametrize("activation", THEIRS)
def test_bias_act_is_the_activation_of_torch(backend: str, activation: str, device: str) -> None:
    x, bias = drawn(5, 33, device=device), drawn(33, device=device, seed=1)
    wanted = THEIRS[activation](x + bias)
    with use_backend(backend):
        y = bias_act(x, bias, activation=activation)
        found = torch.autograd.grad(y.sum(), (x, bias))
    torch.testing.assert_close(y, wanted)
    torch.testing.assert_close(found, torch.autograd.grad(wanted.sum(), (x, bias)))


@every_backend
def test_dropout_add_is_dropout_and_an_add(backend: str, device: str) -> None:
    x, residual, bias = drawn(5, 33, device=device), drawn(5, 33, device=device, seed=1), drawn(33, device=device)
    seed = torch.tensor(9, device=device)
    with use_backend(backend):
        y = dropout_add(x, residual, bias, p=0.3, seed=seed)
        torch.testing.assert_close(y, residual + dropout(x + bias, p=0.3, seed=seed))
        rest = dropout_add(x, residual, bias, p=0.3, training=False)
        everything_dropped = dropout_add(x, residual, bias, p=1.0)
    torch.testing.assert_close(rest, x + bias + residual)
    torch.testing.assert_close(everything_dropped, residual, rtol=0, atol=0)


def test_the_backward_pass_of_dropout_add_and_drop_path_keeps_the_seed_alone(device: str) -> None:
    x, residual = drawn(64, 256, device=device), drawn(64, 256, device=device, seed=1)
    with use_backend("triton"):
        assert kept_bytes(lambda: dropout_add(x, residual, p=0.5)) == 8
        assert kept_bytes(lambda: scale_add(x, residual, drop_path=0.5)) == 8


@every_backend
def test_layer_scale_is_that_of_timm(backend: str, device: str) -> None:
    timm = pytest.importorskip("timm")
    theirs, ours = timm.layers.LayerScale(33, 0.5).to(device), LayerScale(33).to(device)
    ours.load_state_dict(theirs.state_dict())
    theirs.load_state_dict(ours.state_dict())
    x = drawn(2, 5, 33, device=device)
    with use_backend(backend):
        torch.testing.assert_close(ours(x), theirs(x))


@every_backend
@pytest.mark.parametrize("shape", [(64, 33), (64, 3, 5), (64, 3, 5, 7)], ids=str)
@pytest.mark.parametrize("scale_by_keep", [True, False])
def test_drop_path_drops_whole_samples(backend: str, shape: tuple[int, ...], scale_by_keep: bool, device: str) -> None:
    x = torch.ones(shape, device=device)
    module = DropPath(0.5, scale_by_keep)
    torch.manual_seed(0)
    with use_backend(backend):
        y = module(x).flatten(1)
        assert module.eval()(x) is x
    assert torch.equal(y, y[:, :1].expand_as(y))
    assert set(y[:, 0].tolist()) == {0.0, 2.0 if scale_by_keep else 1.0}
    # 64 coins: 4 standard deviations are 16.
    assert abs(int((y[:, 0] == 0).sum()) - 32) < 16


@pytest.mark.parametrize("backend", ["compile", "triton"])
@pytest.mark.parametrize("size", [(5, 7), (2, 5, 7)], ids=["2-D", "3-D"])
def test_drop_path_of_channels_last_lies_as_its_images_do(backend: str, size: tuple[int, ...], device: str) -> None:
    """And is that of contiguous ones."""
    memory_format = torch.channels_last if len(size) == 2 else torch.channels_last_3d
    x, residual, dy = (drawn(8, 33, *size, device=device, seed=seed).detach() for seed in range(3))
    seed = torch.tensor(3, device=device)

    def run(**layout: torch.memory_format) -> tuple[Tensor, ...]:
        images = [t.contiguous(**layout) for t in (x, residual, dy)]
        leaves = [t.requires_grad_() for t in images[:2]]
        y = scale_add(*leaves, drop_path=0.5, seed=seed)
        found = y, *torch.autograd.grad(y, leaves, images[2])
        assert all(t.is_contiguous(**layout) for t in found)
        return found

    with use_backend(backend):
        torch.testing.assert_close(run(memory_format=memory_format), run(), rtol=0, atol=0)


@every_backend
def test_a_dropped_sample_contributes_nothing_whatever_it_holds(backend: str, device: str) -> None:
    x, residual, scale = drawn(8, 5, 33, device=device), drawn(8, 5, 33, device=device), drawn(33, device=device)
    seed = torch.tensor(3, device=device)
    with use_backend(backend):
        y = scale_add(x, residual, scale, drop_path=0.5, seed=seed)
        dropped = (y == residual).flatten(1).all(1)
        assert 0 < dropped.sum() < 8
        poisoned = x.detach().masked_fill(dropped[:, None, None], float("nan")).requires_grad_()
        again = scale_add(poisoned, residual, scale, drop_path=0.5, seed=seed)
        wanted = torch.autograd.grad(y.sum(), (x, scale))
        found = torch.autograd.grad(again.sum(), (poisoned, scale))
    torch.testing.assert_close(again, y, rtol=0, atol=0)
    torch.testing.assert_close(found, wanted, rtol=0, atol=0)


@every_backend
def test_dyt_is_odd_and_depends_on_the_product_of_alpha_and_x(backend: str, device: str) -> None:
    x, alpha, weight = drawn(5, 33, device=device), drawn(1, device=device), drawn(33, device=device)
    with use_backend(backend):
        y, mirrored, doubled = dyt(x, alpha, weight), dyt(-x, alpha, weight), dyt(2 * x, alpha / 2, weight)
        dx, dalpha = torch.autograd.grad(y.sum(), (x, alpha))
    torch.testing.assert_close(mirrored, -y, rtol=0, atol=0)
    torch.testing.assert_close(doubled, y, rtol=0, atol=0)  # powers of two: no rounding
    # Euler: x·∂/∂x = α·∂/∂α. A sum of 165 terms of either sign, in units of its largest.
    rounding = 165 * torch.finfo(torch.float32).eps * (x * dx).abs().max().item()
    torch.testing.assert_close((x * dx).sum(), (alpha * dalpha).sum(), rtol=0, atol=rounding)


def test_parameters_are_called_as_in_their_sources(device: str) -> None:
    assert {k: tuple(v.shape) for k, v in BiasAct(8).state_dict().items()} == {"bias": (8,)}
    shapes = {k: tuple(v.shape) for k, v in DyT((2, 4)).to(device).state_dict().items()}
    assert shapes == {"alpha": (1,), "weight": (2, 4), "bias": (2, 4)}
    assert DyT((2, 4)).to(device)(torch.ones(3, 2, 4, device=device)).shape == (3, 2, 4)
    assert list(GatedMLP(8, 16).state_dict()) == ["gate_proj.weight", "up_proj.weight", "down_proj.weight"]


@every_backend
def test_mlp_is_that_of_timm(backend: str, device: str) -> None:
    timm = pytest.importorskip("timm")
    theirs, ours = timm.layers.Mlp(8, 32, 16).to(device), MLP(8, 32, 16).to(device)
    ours.load_state_dict(theirs.state_dict())
    theirs.load_state_dict(ours.state_dict())
    x = drawn(2, 5, 8, device=device)
    with use_backend(backend):
        y = ours(x)
        found = torch.autograd.grad(y.sum(), (x, *ours.parameters()))
    wanted = theirs(x)
    torch.testing.assert_close(y, wanted)
    torch.testing.assert_close(found, torch.autograd.grad(wanted.sum(), (x, *theirs.parameters())))


def test_mlps_keep_x_and_the_weights_alone(device: str) -> None:
    x = drawn(64, 16, device=device)
    for module in (MLP(16, 64).to(device), GatedMLP(16, 64).to(device)):
        known = (x, *module.parameters())
        with use_backend("triton"):
            assert kept_bytes(lambda module=module: module(x), *known) == 0
        with use_backend("eager"):  # the arguments of the activation, and what it gives: [64, 64] of float32 each
            assert kept_bytes(lambda module=module: module(x), *known) >= 2 * 64 * 64 * 4


@every_backend
def test_mlps_run_in_the_dtype_of_autocast(backend: str, device: str) -> None:
    """Forward, and in the backward pass, which runs outside of autocast and computes the middle again."""
    x, w1, w2 = drawn(33, 16, device=device), drawn(64, 16, device=device), drawn(16, 64, device=device)
    half = [t.detach().bfloat16().requires_grad_() for t in (x, w1, w2)]

    def both(x: Tensor, w1: Tensor, w2: Tensor) -> list[Tensor]:
        return [mlp(x, w1, None, w2), gated_mlp(x, w1, w1, w2)]

    with use_backend(backend):
        with torch.autocast(device, torch.bfloat16):
            cast = both(x, w1, w2)
        plain = both(*half)
        for y, wanted in zip(cast, plain, strict=True):
            assert y.dtype == torch.bfloat16
            torch.testing.assert_close(y, wanted)
            found = torch.autograd.grad(y.sum(), (x, w1, w2))
            assert all(g.dtype == torch.float32 for g in found)
            halves = torch.autograd.grad(wanted.sum(), half)
            # Rounded to bfloat16 at the same places, but gradients of w1 may be added up before they are rounded.
            for g, h in zip(found, halves, strict=True):
                step = 2 * torch.finfo(torch.bfloat16).eps * h.abs().max().item()
                torch.testing.assert_close(g, h.float(), rtol=0, atol=step)
