"""What the mathematics promises of dropout before a norm, modulated and gated norms, and vectors of length one."""

from __future__ import annotations

import importlib.util

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from braze.kernels import (
    AdaLayerNormContinuous,
    AdaLayerNormZero,
    AdaLayerNormZeroSingle,
    RMSNormGated,
    add_layer_norm,
    add_modulated_layer_norm,
    add_modulated_rms_norm,
    add_rms_norm,
    dropout,
    gated_add,
    gated_rms_norm,
    l2_normalize,
    layer_norm,
    modulated_layer_norm,
    modulated_rms_norm,
    rms_norm,
    use_backend,
)

BACKENDS = ["eager", "triton"]
every_backend = pytest.mark.parametrize("backend", BACKENDS)


def draw(*shape: int, seed: int = 0, device: str = "cpu") -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device)


@every_backend
@pytest.mark.parametrize("width", [33, 8193], ids=["one tile", "looped"])
def test_dropout_before_a_norm_is_dropout_then_the_norm(backend: str, width: int, device: str) -> None:
    x, residual, weight, bias = (draw(*shape, device=device) for shape in ((5, width), (5, width), (width,), (width,)))
    seed = torch.tensor(7, device=device)
    with use_backend(backend):
        dropped = dropout(x, p=0.3, seed=seed)
        together = add_layer_norm(x, residual, weight, bias, p=0.3, seed=seed)
        torch.testing.assert_close(together, add_layer_norm(dropped, residual, weight, bias))
        together = add_rms_norm(x, residual, weight, p=0.3, seed=seed)
        torch.testing.assert_close(together, add_rms_norm(dropped, residual, weight))


@every_backend
def test_dropout_before_a_norm_rests_in_eval_and_at_zero(backend: str, device: str) -> None:
    x, residual = draw(5, 33, device=device), draw(5, 33, seed=1, device=device)
    with use_backend(backend):
        plain = add_rms_norm(x, residual)
        for options in ({"p": 0.0}, {"p": 0.5, "training": False}):
            torch.testing.assert_close(add_rms_norm(x, residual, **options), plain, rtol=0, atol=0)
        torch.manual_seed(3)
        first, second = add_rms_norm(x, residual, p=0.5), add_rms_norm(x, residual, p=0.5)
        torch.manual_seed(3)
        torch.testing.assert_close(add_rms_norm(x, residual, p=0.5), first, rtol=0, atol=0)
    assert not torch.equal(first[1], second[1])


@every_backend
def test_a_norm_modulated_by_nothing_is_the_norm(backend: str, device: str) -> None:
    x, zero = draw(2, 5, 33, device=device), torch.zeros(2, 33, device=device)
    with use_backend(backend):
        torch.testing.assert_close(modulated_layer_norm(x, zero, zero), layer_norm(x, eps=1e-6), rtol=0, atol=0)
        torch.testing.assert_close(modulated_rms_norm(x, zero, None), rms_norm(x, eps=1e-6), rtol=0, atol=0)
        y, h = add_modulated_layer_norm(x, x, zero, zero, zero)
        torch.testing.assert_close((y, h), (layer_norm(x, eps=1e-6), x), rtol=0, atol=0)


@every_backend
def test_rows_for_samples_are_rows_for_tokens_repeated(backend: str, device: str) -> None:
    """All ways to say it, in any number of dims; and the gradient is the sum of the tokens'."""
    x = draw(2, 3, 5, 33, device=device)
    scale, shift = draw(2, 33, seed=1, device=device).requires_grad_(), draw(2, 33, seed=2, device=device)
    spread = [t.detach()[:, None, None].expand(x.shape) for t in (scale, shift)]
    tokens = spread[0].clone().requires_grad_()
    with use_backend(backend):
        wanted = modulated_layer_norm(x, tokens, spread[1])
        (each,) = torch.autograd.grad(wanted.square().sum(), tokens)
        for lead in ((2,), (2, 1, 1)):
            found = modulated_layer_norm(x, scale.view(*lead, 33), shift.view(*lead, 33))
            (gradient,) = torch.autograd.grad(found.square().sum(), scale)
            torch.testing.assert_close(found, wanted, rtol=0, atol=0)
            torch.testing.assert_close(gradient, each.sum((1, 2)))


@every_backend
def test_the_joint_is_the_gated_residual_then_the_modulated_norm(backend: str, device: str) -> None:
    x, residual = draw(2, 5, 33, device=device), draw(2, 5, 33, seed=1, device=device)
    gate, scale, shift = draw(2, 99, seed=2, device=device).chunk(3, -1)
    with use_backend(backend):
        h = gated_add(residual, x, gate)
        for joint, norm in (
            (add_modulated_layer_norm, modulated_layer_norm),
            (add_modulated_rms_norm, modulated_rms_norm),
        ):
            found = joint(x, residual, gate, scale, shift)
            torch.testing.assert_close(found, (norm(h, scale, shift), h))
    torch.testing.assert_close(h, residual + gate[:, None] * x)


@pytest.mark.parametrize("norm_type", ["layer_norm", "rms_norm"])
@pytest.mark.parametrize("affine", [True, False], ids=["affine", "plain"])
def test_the_adaptive_module_is_its_formula(norm_type: str, affine: bool) -> None:
    torch.manual_seed(0)
    module = AdaLayerNormContinuous(32, 7, elementwise_affine=affine, eps=1e-6, norm_type=norm_type)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter)
    norm = {"layer_norm": torch.nn.LayerNorm, "rms_norm": torch.nn.RMSNorm}[norm_type](32, 1e-6, affine)
    norm.load_state_dict(module.norm.state_dict())
    x, condition = draw(2, 5, 32), draw(2, 7, seed=1)
    scale, shift = F.linear(F.silu(condition), module.linear.weight, module.linear.bias).chunk(2, 1)
    torch.testing.assert_close(module(x, condition), norm(x) * (1 + scale)[:, None] + shift[:, None])
    parts = {"linear": ("weight", "bias"), "norm": ("weight", "bias")[: affine * (2 - (norm_type == "rms_norm"))]}
    assert set(module.state_dict()) == {f"{part}.{name}" for part, names in parts.items() for name in names}


@pytest.mark.skipif(importlib.util.find_spec("diffusers") is None, reason="the modules of diffusers to agree with")
def test_the_adaptive_modules_are_those_of_diffusers() -> None:
    from diffusers.models import normalization as theirs

    torch.manual_seed(0)
    x, emb = draw(2, 5, 32), draw(2, 32, seed=1)
    for ours, original in (
        (AdaLayerNormContinuous(32, 32, eps=1e-6), theirs.AdaLayerNormContinuous(32, 32, eps=1e-6)),
        (AdaLayerNormContinuous(32, 32, False, norm_type="rms_norm"),
         theirs.AdaLayerNormContinuous(32, 32, False, norm_type="rms_norm")),
        (AdaLayerNormZero(32), theirs.AdaLayerNormZero(32)),
        (AdaLayerNormZero(32, None, "fp32_layer_norm", False),
         theirs.AdaLayerNormZero(32, None, "fp32_layer_norm", False)),
        (AdaLayerNormZeroSingle(32), theirs.AdaLayerNormZeroSingle(32)),
    ):  # fmt: skip
        ours.load_state_dict(original.state_dict())
        original.load_state_dict(ours.state_dict())
        # Their Zero takes a timestep and labels before the condition.
        found = original(x, emb=emb) if isinstance(original, theirs.AdaLayerNormZero) else original(x, emb)
        torch.testing.assert_close(ours(x, emb), found)


@every_backend
@pytest.mark.parametrize("norm_before_gate", [True, False])
def test_an_open_gate_leaves_the_norm_of_each_group(backend: str, norm_before_gate: bool, device: str) -> None:
    """σ(30) is 1 in float32."""
    x, weight = draw(5, 3 * 33, device=device), draw(3 * 33, seed=1, device=device)
    options = {"activation": "sigmoid", "norm_before_gate": norm_before_gate, "group_size": 33, "eps": 1e-6}
    with use_backend(backend):
        y = gated_rms_norm(x, torch.full_like(x, 30.0), weight, **options)
        groups = [rms_norm(part, w, eps=1e-6) for part, w in zip(x.chunk(3, -1), weight.chunk(3), strict=True)]
    torch.testing.assert_close(y, torch.cat(groups, -1))


@pytest.mark.skipif(
    importlib.util.find_spec("transformers") is None, reason="the modules of transformers to agree with"
)
def test_the_gated_module_is_that_of_transformers() -> None:
    from transformers.models.mamba2.modeling_mamba2 import MambaRMSNormGated
    from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextRMSNormGated

    x, gate, weight = draw(2, 5, 96), draw(2, 5, 96, seed=1), draw(96, seed=2)
    for theirs, ours in (
        (Qwen3NextRMSNormGated(96, eps=1e-6), RMSNormGated(96, eps=1e-6)),
        (MambaRMSNormGated(96, 32, eps=1e-6), RMSNormGated(96, eps=1e-6, group_size=32, norm_before_gate=False)),
    ):
        theirs.load_state_dict({"weight": weight})
        ours.load_state_dict(theirs.state_dict())
        torch.testing.assert_close(ours(x, gate), theirs(x, gate))
        theirs.load_state_dict(ours.state_dict())


@every_backend
def test_normalizing_is_that_of_torch_over_every_dim(backend: str, device: str) -> None:
    x = draw(3, 4, 5, device=device)
    with use_backend(backend):
        for dim in (-3, -2, -1, 0, 1, 2):
            y = l2_normalize(x, dim=dim)
            torch.testing.assert_close(y, F.normalize(x, dim=dim))
            # The direction is all that counts: a power of two changes no bit.
            torch.testing.assert_close(l2_normalize(4.0 * x, dim=dim), y, rtol=0, atol=0)


@every_backend
@pytest.mark.parametrize("width", [2, 16_386], ids=["one tile", "looped"])
def test_a_vector_at_or_below_eps_is_divided_by_it(backend: str, width: int, device: str) -> None:
    """Lengths 0, below, at and above ε = 5, all exact; at ε the divisor is constant, as in torch 2.15 and not 2.11."""
    x = torch.zeros(4, width, device=device)
    x[1, 0], x[1, 1] = 0.3, 0.4
    x[2, 0], x[2, 1] = 3.0, 4.0
    x[3, 0], x[3, 1] = 6.0, 8.0
    cotangent = draw(4, width, device=device)
    results = []
    for normalize in (l2_normalize, F.normalize):
        leaf = x.clone().requires_grad_()
        with use_backend(backend):
            y = normalize(leaf, eps=5.0)
        results.append((y.detach(), *torch.autograd.grad(y, leaf, cotangent)))
    (y, dx), (their_y, their_dx) = results
    torch.testing.assert_close(y, their_y)
    torch.testing.assert_close(dx[[0, 1, 3]], their_dx[[0, 1, 3]])
    torch.testing.assert_close(dx[2], cotangent[2] / 5.0)


@every_backend
def test_smoothly_normalized_vectors_are_finite_at_zero(backend: str, device: str) -> None:
    x = torch.zeros(2, 5, device=device).requires_grad_()
    with use_backend(backend):
        y = l2_normalize(x, eps=1e-4, smooth=True)
    (dx,) = torch.autograd.grad(y, x, torch.ones_like(y))
    assert (y == 0).all()
    torch.testing.assert_close(dx, torch.full_like(dx, 100.0))  # 1 / √ε
