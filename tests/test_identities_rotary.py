"""Rotary tables, packed qkv and normalized heads: agreement with transformers and timm, and with one another."""

from __future__ import annotations

import importlib
import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from braze.kernels import (
    axial_tables,
    grid_positions,
    llama3_frequencies,
    mrope_tables,
    qk_norm_rope,
    rope,
    rope_qkv,
    rotary_frequencies,
    rotary_tables,
    use_backend,
    yarn_attention_factor,
    yarn_frequencies,
)

BACKENDS = ["eager", "triton"]
EPS = torch.finfo(torch.float32).eps

LLAMA_31 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
DEEPSEEK = {"factor": 40.0, "mscale": 0.707, "mscale_all_dim": 1.0, "original_max_position_embeddings": 4096}
GPT_OSS = {"factor": 32.0, "truncate": False, "original_max_position_embeddings": 4096}
SMALL = {"factor": 4.0, "beta_fast": 16.0, "beta_slow": 2.0, "original_max_position_embeddings": 64}


def theirs(rope_type: str, dim: int, base: float, **parameters: Any) -> tuple[Tensor, float]:
    """Frequencies and the attention factor, from transformers."""
    transformers = pytest.importorskip("transformers", reason="transformers computes the other side")
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    config = transformers.LlamaConfig(
        head_dim=dim,
        max_position_embeddings=131_072,
        rope_parameters={"rope_type": rope_type, "rope_theta": base, **parameters},
    )
    return ROPE_INIT_FUNCTIONS[rope_type](config)


def assert_same_frequencies(ours: Tensor, wanted: Tensor, dim: int, base: float, ramp: float = 0.0) -> None:
    """Within roundings of θ in float32: ours is rounded once, transformers' is computed in it.

    There the rounding of an exponent is multiplied by ln base; the power, its reciprocal and the interpolation round
    half a dozen times more. A ramp ends at ``ramp`` times its own length, a number that carries all of that as well.
    """
    roundings = (1 + ramp) * (math.log(base) + 6)
    assert ((ours - wanted).abs() <= roundings * EPS / 2 * rotary_frequencies(dim, base=base)).all()


@pytest.mark.parametrize("base", [1e4, 5e5], ids=["RoFormer", "Llama 3"])
@pytest.mark.parametrize("dim", [2, 64, 128])
def test_linear_frequencies_are_those_of_transformers(dim: int, base: float) -> None:
    wanted, _ = theirs("linear", dim, base, factor=4.0)
    assert_same_frequencies(4 * rotary_frequencies(dim, base=base, factor=4.0), 4 * wanted, dim, base)


@pytest.mark.parametrize("dim", [64, 128])
def test_llama3_frequencies_are_those_of_transformers(dim: int) -> None:
    wanted, _ = theirs("llama3", dim, 5e5, **LLAMA_31)
    ours = llama3_frequencies(dim, **LLAMA_31)  # type: ignore[arg-type]
    assert_same_frequencies(ours, wanted, dim, 5e5, ramp=4 / 3)  # turns up to 4, a ramp from 1 to 4
    plain = rotary_frequencies(dim, base=5e5)
    assert torch.equal(ours[:4], plain[:4])
    torch.testing.assert_close(ours[-4:], plain[-4:] / 8, rtol=EPS, atol=0.0)
    assert ((plain / 8 < ours) & (ours < plain)).any()


@pytest.mark.parametrize("parameters", [DEEPSEEK, GPT_OSS, SMALL], ids=["DeepSeek", "GPT-OSS", "a short context"])
@pytest.mark.parametrize("dim", [64, 128])
def test_yarn_frequencies_are_those_of_transformers(dim: int, parameters: dict[str, Any]) -> None:
    wanted, factor = theirs("yarn", dim, 1e4, **parameters)
    scales = {name: parameters[name] for name in ("mscale", "mscale_all_dim") if name in parameters}
    options = {name: value for name, value in parameters.items() if name not in scales}
    assert_same_frequencies(
        yarn_frequencies(dim, **options), wanted, dim, 1e4, ramp=2.0
    )  # ends at most at twice its length
    assert yarn_attention_factor(parameters["factor"], **scales) == pytest.approx(factor, rel=1e-15)


def test_tables_are_those_of_llama() -> None:
    """From the same frequencies, to the bit: positions of float32 times frequencies of float32."""
    transformers = pytest.importorskip("transformers", reason="transformers computes the other side")
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    parameters = {"rope_type": "yarn", "rope_theta": 1e4, **DEEPSEEK}
    module = LlamaRotaryEmbedding(transformers.LlamaConfig(head_dim=64, rope_parameters=parameters))
    positions = torch.tensor([[0, 1, 2, 4095], [7, 100_000, 131_071, 3]])
    wanted = module(torch.zeros(1), positions)
    factor = yarn_attention_factor(40.0, mscale=0.707, mscale_all_dim=1.0)
    ours = rotary_tables(positions, module.inv_freq, attention_factor=factor)
    torch.testing.assert_close(ours, tuple(wanted), rtol=0, atol=0)


@pytest.mark.parametrize("alternating", [False, True], ids=["Qwen2-VL", "Qwen3-VL"])
def test_mrope_tables_are_those_of_qwen(alternating: bool) -> None:
    pytest.importorskip("transformers", reason="transformers computes the other side")
    if alternating:
        from transformers.models.qwen3_vl.configuration_qwen3_vl import Qwen3VLTextConfig as Config
        from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLTextRotaryEmbedding as Embedding
    else:
        from transformers.models.qwen2_vl.configuration_qwen2_vl import Qwen2VLTextConfig as Config
        from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VLRotaryEmbedding as Embedding
    sections = (24, 20, 20) if alternating else (16, 24, 24)
    parameters = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": list(sections)}
    config = Config(hidden_size=256, num_attention_heads=2, rope_parameters=parameters)
    if alternating:
        config.head_dim = 128
    module = Embedding(config)
    positions = torch.randint(0, 4096, (3, 2, 9), generator=torch.Generator().manual_seed(0))
    wanted = module(torch.zeros(1), positions)
    ours = mrope_tables(positions, module.inv_freq, sections=sections, alternating=alternating)
    torch.testing.assert_close(ours, tuple(wanted), rtol=0, atol=0)
    # Text has the same position along every axis, and so the plain tables.
    text = mrope_tables(positions[:1].expand(3, -1, -1), module.inv_freq, sections=sections, alternating=alternating)
    torch.testing.assert_close(text, rotary_tables(positions[0], module.inv_freq), rtol=0, atol=0)


@pytest.mark.parametrize("tower", ["Qwen2-VL", "Pixtral"])
def test_axial_tables_are_those_of_vision_towers(tower: str) -> None:
    pytest.importorskip("transformers", reason="transformers computes the other side")
    from transformers.models.pixtral import modeling_pixtral as pixtral
    from transformers.models.qwen2_vl import modeling_qwen2_vl as qwen2_vl

    positions = grid_positions(5, 7)
    if tower == "Pixtral":
        theta = rotary_frequencies(64)
        ours = axial_tables(positions, theta[0::2], theta[1::2])
        module = pixtral.PixtralVisionRotaryEmbedding(
            pixtral.PixtralVisionConfig(hidden_size=128, num_attention_heads=2)
        )
    else:
        ours = axial_tables(positions, rotary_frequencies(32))
        config = qwen2_vl.Qwen2VLVisionConfig(embed_dim=128, num_heads=2)
        module = qwen2_vl.Qwen2VLVisionRotaryEmbedding(config)
    for table, wanted in zip(ours, module(torch.zeros(1), positions.T), strict=True):
        assert_same_tables(table, wanted, largest=6.0)


@pytest.mark.parametrize("interleaved", [False, True], ids=["halves", "interleaved"])
def test_axial_tables_are_those_of_timm(interleaved: bool) -> None:
    layers = pytest.importorskip("timm.layers", reason="timm computes the other side")
    sin, cos = layers.build_rotary_pos_embed([5, 7], dim=64, in_pixels=False, rotate_half=not interleaved)
    ours = axial_tables(grid_positions(5, 7), rotary_frequencies(32), interleaved=interleaved)
    for table, wanted in zip(ours, (cos, sin), strict=True):
        assert_same_tables(table, wanted, largest=6.0)
    # EVA-02 resizes its grid of 16 × 16 by scaling the positions.
    sin, cos = layers.build_rotary_pos_embed([5, 7], dim=64, in_pixels=False, ref_feat_shape=[16, 16])
    positions = grid_positions(5, 7) * torch.tensor([[16 / 5], [16 / 7]])
    for table, wanted in zip(
        axial_tables(positions, rotary_frequencies(32), interleaved=True), (cos, sin), strict=True
    ):
        assert_same_tables(table, wanted, largest=16.0)


def assert_same_tables(table: Tensor, wanted: Tensor, largest: float) -> None:
    """Angles up to ``largest``, of frequencies that were rounded differently: cos and sin change no faster."""
    torch.testing.assert_close(table, wanted, rtol=0, atol=(largest * (math.log(1e4) + 8) + 2) * EPS / 2)


@pytest.mark.parametrize("interleaved", [False, True], ids=["halves", "interleaved"])
def test_tables_turn_heads_by_the_position(interleaved: bool, device: str) -> None:
    """Fed to rope as they are: a pair (1, 0) at position p comes out as (cos pθ, sin pθ)."""
    theta = rotary_frequencies(6, device=device)
    positions = torch.arange(9, device=device)
    x = torch.zeros(2, 3, 9, 8, device=device)
    first, second = (slice(0, 6, 2), slice(1, 6, 2)) if interleaved else (slice(0, 3), slice(3, 6))
    x[..., first] = 1.0
    y = rope(x, *rotary_tables(positions, theta, interleaved=interleaved), interleaved=interleaved)
    angles = positions[:, None] * theta
    torch.testing.assert_close(y[..., first], angles.cos().expand(2, 3, 9, 3), rtol=0, atol=0)
    torch.testing.assert_close(y[..., second], angles.sin().expand(2, 3, 9, 3), rtol=0, atol=0)


def test_wrong_tables_teach() -> None:
    theta = rotary_frequencies(8)
    with pytest.raises(ValueError, match="dim must be positive and even, as elements turn in pairs, got 7"):
        rotary_frequencies(7)
    with pytest.raises(ValueError, match=r"base and factor must be positive, got 10000.0 and 0.0"):
        rotary_frequencies(8, factor=0.0)
    with pytest.raises(ValueError, match=r"low_freq_factor must be less than high_freq_factor, got 4.0 and 1.0"):
        llama3_frequencies(8, **{**LLAMA_31, "low_freq_factor": 4.0, "high_freq_factor": 1.0})  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"beta_slow must be less than beta_fast, got 32.0 and 1.0"):
        yarn_frequencies(8, factor=2.0, original_max_position_embeddings=64, beta_fast=1.0, beta_slow=32.0)
    with pytest.raises(ValueError, match=r"frequencies must be one row.*got \(1, 4\)"):
        rotary_tables(torch.arange(3), theta[None])
    with pytest.raises(ValueError, match=r"sum to the 4 frequencies, got \(2, 1, 2\)"):
        mrope_tables(torch.zeros(3, 1, 5), theta, sections=(2, 1, 2))
    with pytest.raises(ValueError, match=r"for each row of positions, \(2, 5\)"):
        mrope_tables(torch.zeros(2, 5), theta, sections=(2, 1, 1))
    with pytest.raises(ValueError, match=r"positions must be \[2, ...\].*got \(3, 5\)"):
        axial_tables(torch.zeros(3, 5), theta)
    with pytest.raises(ValueError, match=r"shape of frequencies, \(4,\), got \(2,\)"):
        axial_tables(torch.zeros(2, 5), theta, theta[:2])


PACKED = {
    "three": ((2, 5, 3, 4, 8), (5, 6), {}),
    "grouped, own positions": ((2, 5, 10, 8), (2, 5, 6), {"num_heads": 6}),
    "one sequence": ((5, 3, 4, 8), (5, 6), {}),
}
LAYOUTS = {
    "contiguous": lambda t: t,
    "tokens apart": lambda t: torch.cat((t, t), -2)[..., : t.shape[-2], :],
    "heads before tokens": lambda t: t.transpose(0, -2).contiguous().transpose(0, -2),
    "elements apart": lambda t: torch.stack((t, t), -1)[..., 0],
}
each_packed = pytest.mark.parametrize(("shape", "table", "options"), PACKED.values(), ids=PACKED)
each_backend = pytest.mark.parametrize("backend", BACKENDS)


def drawn(*shape: int, seed: int = 0, device: str) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device)


@each_backend
@each_packed
def test_packed_rope_is_rope_of_queries_and_keys(
    backend: str, shape: tuple, table: tuple, options: dict, device: str
) -> None:
    qkv = drawn(*shape, device=device)
    cos, sin = drawn(*table, seed=1, device=device), drawn(*table, seed=2, device=device)
    q, k, v = qkv.split((6, 2, 2), -2) if options else (t.squeeze(-3) for t in qkv.split(1, -3))
    with use_backend(backend):
        y = rope_qkv(qkv, cos, sin, **options)
    alone = [rope(t, cos.unsqueeze(-2), sin.unsqueeze(-2)) for t in (q, k)]
    wanted = torch.cat((*alone, v), -2) if options else torch.stack((*alone, v), -3)
    torch.testing.assert_close(y, wanted)
    assert torch.equal(y[..., 8:, :] if options else y[..., 2, :, :], v)


@pytest.mark.parametrize(
    ("backend", "layout"),
    # Compiled code is made anew for every layout, which costs more than it shows.
    [("compile", "contiguous"), *itertools.product(BACKENDS, LAYOUTS)],
)
@each_packed
def test_in_place_gives_the_bits_that_it_gives_otherwise(
    backend: str, layout: str, shape: tuple, table: tuple, options: dict, device: str
) -> None:
    """Values and gradients; so the contract, which holds rope_qkv to its error budget, holds for both."""
    lay_out = LAYOUTS[layout]
    cos, sin = drawn(*table, seed=1, device=device), drawn(*table, seed=2, device=device)
    leaf = drawn(*shape, device=device).requires_grad_()
    cotangent = lay_out(drawn(*shape, seed=3, device=device))
    before = cotangent.clone()
    with use_backend(backend):
        wanted = rope_qkv(lay_out(leaf), cos, sin, **options)
        qkv = lay_out(1.0 * leaf)
        version = qkv._version
        y = rope_qkv(qkv, cos, sin, inplace=True, **options)
        assert y is qkv
        assert y._version > version
        assert torch.equal(y, wanted)
        (gradient,), (wanted_gradient,) = (torch.autograd.grad(t, leaf, cotangent) for t in (y, wanted))
        assert torch.equal(gradient, wanted_gradient)
        assert torch.equal(cotangent, before)
        plain = lay_out(leaf.detach())
        version = plain._version
        assert rope_qkv(plain, cos, sin, inplace=True, **options) is plain
        assert plain._version > version
        assert torch.equal(plain, wanted)


@each_backend
def test_what_was_saved_before_a_rotation_in_place_is_not_read_after_it(backend: str, device: str) -> None:
    leaf, table = drawn(2, 5, 3, 4, 8, device=device).requires_grad_(), drawn(5, 8, seed=1, device=device)
    with use_backend(backend):
        qkv = 1.0 * leaf
        saved = qkv.square()
        rope_qkv(qkv, table, table, inplace=True)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            torch.autograd.grad(saved.sum(), leaf)


@pytest.mark.filterwarnings("ignore:.*aliases.*input:UserWarning")
def test_in_place_compiles_and_exports(device: str) -> None:
    cos, sin = drawn(5, 8, seed=1, device=device), drawn(5, 8, seed=2, device=device)

    class Rotated(torch.nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            qkv = 2.0 * x
            rope_qkv(qkv, cos, sin, inplace=True)
            return qkv

    x = drawn(2, 5, 3, 4, 8, device=device)
    wanted = rope_qkv(2.0 * x, cos, sin)
    torch.testing.assert_close(torch.compile(Rotated(), fullgraph=True, backend="aot_eager")(x), wanted)
    torch.testing.assert_close(torch.export.export(Rotated(), (x,)).module()(x), wanted)
    changed = x.clone()
    torch.compile(rope_qkv, fullgraph=True, backend="aot_eager")(changed, cos, sin, inplace=True)
    torch.testing.assert_close(changed, rope_qkv(x, cos, sin))


@pytest.mark.parametrize("R", [8, 4], ids=["all turn", "half of them turn"])
def test_in_place_moves_only_what_turns(R: int, device: str) -> None:
    if device != "cpu":
        pytest.skip("bytes are counted in Triton's interpreter")
    from braze.kernels.audit.traffic import metered
    from braze.kernels.triton import rope as kernels

    qkv, table = drawn(2, 5, 3, 4, 8, device=device), drawn(5, 1, 1, R, device=device)
    with metered() as meter:
        kernels.packed_forward(qkv, table, table, dim=-3, turning=2, interleaved=False, inplace=True)
    turning = 2 * 5 * 2 * 4 * R * 4
    assert meter.written.total() == turning
    assert meter.read.total() == turning + 2 * 5 * R * 4


NORMS = {
    "Qwen3": ("qwen3.modeling_qwen3", "Qwen3RMSNorm", {}),
    "Gemma 3": ("gemma3.modeling_gemma3", "Gemma3RMSNorm", {"weight_offset": 1.0}),
    "LayerNorm": (None, "LayerNorm", {"norm": "layer"}),
}


@each_backend
@pytest.mark.parametrize(("file", "name", "options"), NORMS.values(), ids=NORMS)
def test_normalized_heads_are_those_of_the_models(
    backend: str, file: str | None, name: str, options: dict, device: str
) -> None:
    """The model's own norm and apply_rotary_pos_emb, on queries transposed from [B, S, H, D]."""
    transformers = pytest.importorskip("transformers", reason="transformers computes the other side")
    del transformers
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    models = importlib.import_module(f"transformers.models.{file}") if file else torch.nn
    norm = getattr(models, name)(16, eps=1e-6).to(device)
    with torch.no_grad():
        for seed, parameter in enumerate(norm.parameters()):
            parameter.copy_(drawn(16, seed=seed, device=device))
    x = drawn(2, 7, 3, 16, seed=5, device=device).transpose(1, 2).requires_grad_()
    cos, sin = rotary_tables(torch.arange(7, device=device), rotary_frequencies(16, device=device))
    normed = norm(x)
    wanted, _ = apply_rotary_pos_emb(normed, normed, cos[None], sin[None])
    with use_backend(backend):
        y = qk_norm_rope(x, norm.weight, cos, sin, bias=getattr(norm, "bias", None), **options)
    assert y.stride() == x.stride() or backend != "triton"
    torch.testing.assert_close(y, wanted)
    inputs, dy = (x, *norm.parameters()), drawn(2, 3, 7, 16, seed=6, device=device)
    for ours, theirs_ in zip(torch.autograd.grad(y, inputs, dy), torch.autograd.grad(wanted, inputs, dy), strict=True):
        # assert_close's tolerance is for single elements; those of a parameter add up 42 products.
        torch.testing.assert_close(ours, theirs_, rtol=42 * EPS, atol=42 * EPS * theirs_.abs().max().item())


@each_backend
def test_lengths_of_normalized_heads_depend_on_neither_scale_nor_position(backend: str, device: str) -> None:
    """Without a weight a head of D elements comes out √D long, whatever it was and wherever it is turned to."""
    x = drawn(2, 3, 7, 64, device=device)
    cos, sin = rotary_tables(torch.arange(7, device=device), rotary_frequencies(48, device=device))
    with use_backend(backend):
        y = qk_norm_rope(x, None, cos, sin, eps=0.0)
        scaled = qk_norm_rope(1024.0 * x, None, cos, sin, eps=0.0)  # a power of two: no rounding changes
    torch.testing.assert_close(y.norm(dim=-1), torch.full((2, 3, 7), 8.0, device=device))
    torch.testing.assert_close(scaled, y, rtol=4 * EPS, atol=0)


@each_backend
def test_normalized_heads_of_six_dims_with_tables_along_every_other(backend: str, device: str) -> None:
    """More dims than two strides can describe."""
    x = drawn(2, 3, 2, 3, 2, 8, device=device).requires_grad_()
    weight = drawn(8, seed=1, device=device).requires_grad_()
    cos, sin = drawn(2, 1, 2, 1, 2, 4, seed=2, device=device), drawn(2, 1, 2, 1, 2, 4, seed=3, device=device)
    dy = drawn(*x.shape, seed=4, device=device)
    wanted = rope(torch.nn.functional.rms_norm(x, (8,), weight, 1e-6), cos, sin)
    with use_backend(backend):
        y = qk_norm_rope(x, weight, cos, sin)
        gradients = torch.autograd.grad(y, (x, weight), dy)
    torch.testing.assert_close(y, wanted)
    # An element of the weight's gradient adds up 72 products, each of the order of 1.
    torch.testing.assert_close(gradients, torch.autograd.grad(wanted, (x, weight), dy), rtol=72 * EPS, atol=72 * EPS)


@each_backend
def test_normalized_heads_have_a_gradient_for_their_tables(backend: str, device: str) -> None:
    x, cos, sin = (drawn(5, 4, seed=seed, device=device).requires_grad_() for seed in range(3))
    with use_backend(backend):
        dcos, dsin = torch.autograd.grad(qk_norm_rope(x, None, cos, sin).sum(), (cos, sin))
    z = torch.nn.functional.rms_norm(x.detach(), (4,), None, 1e-6)
    torch.testing.assert_close(dcos, z)
    torch.testing.assert_close(dsin, torch.cat((-z[..., 2:], z[..., :2]), -1))
