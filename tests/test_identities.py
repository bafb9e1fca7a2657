"""Mathematical identities of the operators, and agreement with torch over its own options."""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from torch import Tensor

from braze.kernels import GLU, CrossEntropyLoss, cross_entropy, glu, packed_glu, rope, softmax, use_backend

BACKENDS = ["eager", "triton"]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("width", [33, 16_385], ids=["one tile", "looped"])
def test_softmax_rows_sum_to_one_and_ignore_a_shift(backend: str, width: int, device: str) -> None:
    x = torch.randn(5, width, generator=torch.Generator().manual_seed(0)).to(device)
    with use_backend(backend):
        y, shifted = softmax(x), softmax(x + 64.0)
    rounding = width**0.5 * torch.finfo(torch.float32).eps
    torch.testing.assert_close(y.sum(-1), torch.ones(5, device=device), rtol=rounding, atol=0.0)
    # x + 64 is rounded to a multiple of 2⁻¹⁷, which moves a logarithm by half of that, twice.
    torch.testing.assert_close(shifted, y, rtol=2.0**-16, atol=0.0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_causal_softmax_is_softmax_with_a_triangle_as_mask(backend: str, device: str) -> None:
    for queries, keys in [(5, 5), (3, 7), (7, 3)]:
        x = torch.randn(2, queries, keys, generator=torch.Generator().manual_seed(0)).to(device)
        triangle = torch.ones(queries, keys, dtype=torch.bool, device=device).tril(keys - queries)
        with use_backend(backend):
            torch.testing.assert_close(
                softmax(x, causal=True), softmax(x, mask=triangle), rtol=0, atol=0, equal_nan=True
            )


@pytest.mark.parametrize("backend", BACKENDS)
def test_softmax_reads_a_mask_through_any_strides(backend: str, device: str) -> None:
    """[B, G, H, Q, K] and masks that merge into one, two and three dims, and into more than three."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 3, 2, 4, 5, generator=generator).to(device)
    for shape in [(5,), (4, 1), (2, 1, 1, 4, 5), (2, 1, 2, 1, 5), (3, 1, 4, 5), (2, 3, 2, 4, 5)]:
        mask = (torch.rand(shape, generator=generator) < 0.7).to(device)
        for view in (mask, mask.mT.contiguous().mT if mask.dim() > 1 else mask):
            with use_backend(backend):
                y = softmax(x, mask=view)
            wanted = torch.softmax(x.masked_fill(~mask, float("-inf")), -1)
            torch.testing.assert_close(y, wanted, equal_nan=True)


@pytest.mark.parametrize("backend", BACKENDS)
def test_masked_out_entries_have_no_gradient_even_in_a_row_of_nan(backend: str, device: str) -> None:
    for width in (8, 16_392):
        x = torch.randn(3, width, generator=torch.Generator().manual_seed(0)).to(device)
        x[1, 1] = float("nan")
        keep = torch.ones(3, width, dtype=torch.bool, device=device)
        keep[0] = False
        keep[1, ::2] = False
        keep[2, 0] = False
        x.requires_grad_()
        with use_backend(backend):
            (dx,) = torch.autograd.grad(softmax(x, mask=keep).square().sum(), x)
        assert (dx[~keep] == 0).all()
        assert dx[1][keep[1]].isnan().all()
        assert dx[2].isfinite().all()


@st.composite
def _losses(draw: st.DrawFn) -> tuple[Tensor, Tensor, dict]:
    """Logits, targets and options of ``F.cross_entropy``."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
    classes = draw(st.sampled_from([1, 2, 10, 33]))
    shape = draw(st.sampled_from([None, (0,), (1,), (7,), (2, 3), (3, 2, 2), (0, 3)]))
    logits_shape = (classes,) if shape is None else (shape[0], classes, *shape[1:])
    x = torch.randn(logits_shape, generator=generator)
    ignore_index = draw(st.sampled_from([-100, -1, 0]))
    target = torch.randint(0, classes, shape or (), generator=generator)
    ignored = draw(st.sampled_from([0.0, 0.3, 1.0]))
    target = target.masked_fill(torch.rand(target.shape, generator=generator) < ignored, ignore_index)
    options = {
        "ignore_index": ignore_index,
        "weight": draw(st.sampled_from([None, torch.rand(classes, generator=generator) + 0.1])),
        "reduction": draw(st.sampled_from(["none", "mean", "sum"])),
        "label_smoothing": draw(st.sampled_from([0.0, 0.1, 1.0])),
    }
    return x, target, options


@pytest.mark.parametrize("backend", BACKENDS)
def test_cross_entropy_is_that_of_torch(backend: str, device: str) -> None:
    @given(_losses())
    def check(drawn: tuple[Tensor, Tensor, dict]) -> None:
        x, target, options = drawn
        options = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in options.items()}
        x, target = x.to(device).requires_grad_(), target.to(device)
        wanted = F.cross_entropy(x, target, **options)
        with use_backend(backend):
            loss = cross_entropy(x, target, **options)
            module = CrossEntropyLoss(**options)(x, target)
            (dx,) = torch.autograd.grad(loss.sum(), x)
        torch.testing.assert_close(loss, wanted, equal_nan=True)
        torch.testing.assert_close(module, loss, rtol=0, atol=0, equal_nan=True)
        torch.testing.assert_close(dx, torch.autograd.grad(wanted.sum(), x)[0], equal_nan=True)

    check()


@pytest.mark.parametrize("backend", BACKENDS)
def test_cross_entropy_with_a_masked_vocabulary_is_that_of_torch(backend: str, device: str) -> None:
    """Logits of −∞: finite where the target is not one of them, infinite with smoothing, never a NaN of our own."""
    x = torch.randn(4, 5000, generator=torch.Generator().manual_seed(0)).to(device)
    x[0, :4500] = float("-inf")
    x[1, 4500:] = float("-inf")
    x[3] = float("-inf")
    target = torch.tensor([4600, 4600, 7, 7], device=device)
    x.requires_grad_()
    for smoothing in (0.0, 0.1):
        wanted = F.cross_entropy(x, target, reduction="none", label_smoothing=smoothing)
        with use_backend(backend):
            loss = cross_entropy(x, target, reduction="none", label_smoothing=smoothing)
            (dx,) = torch.autograd.grad(loss.sum(), x)
        torch.testing.assert_close(loss, wanted, equal_nan=True)
        torch.testing.assert_close(dx, torch.autograd.grad(wanted.sum(), x)[0], equal_nan=True)


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_ignored_position_contributes_nothing_whatever_its_logits(backend: str, device: str) -> None:
    x = torch.randn(3, 10, generator=torch.Generator().manual_seed(0)).to(device)
    x[1] = float("nan")
    target = torch.tensor([3, -100, 5], device=device)
    x.requires_grad_()
    with use_backend(backend):
        loss = cross_entropy(x, target, label_smoothing=0.1, z_loss=1e-3)
        (dx,) = torch.autograd.grad(loss, x)
        alone = cross_entropy(x[::2], target[::2], label_smoothing=0.1, z_loss=1e-3)
    torch.testing.assert_close(loss, alone)
    assert (dx[1] == 0).all()


def test_a_target_out_of_range_is_nan_on_the_device(device: str) -> None:
    """The kernel alone, as on a GPU, where the targets are not looked at first."""
    from braze.kernels.triton import cross_entropy as kernels

    x, target = torch.randn(3, 10, device=device), torch.tensor([3, 10, -1], device=device)
    options = {"reduction": "none", "ignore_index": -100, "label_smoothing": 0.0, "softcap": None, "z_loss": 0.0}
    loss, saved = kernels.forward(x, target, None, **options)
    dx, _, _ = kernels.backward((torch.ones_like(loss),), saved, (True,), **options)
    assert loss.isnan().tolist() == [False, True, True]
    assert dx.isnan().any(-1).tolist() == [False, True, True]


def _angles(*shape: int, device: str) -> Tensor:
    """Angles [..., 2 · pairs], those of a pair the same."""
    angles = torch.rand(shape, generator=torch.Generator().manual_seed(1)) * 6.28
    return torch.cat((angles, angles), -1).to(device)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("pairs", [1, 5, 32], ids=["one pair", "partial", "all of the head"])
@pytest.mark.parametrize("interleaved", [False, True], ids=["halves", "interleaved"])
def test_a_rotation_keeps_lengths_and_its_inverse_undoes_it(
    backend: str, pairs: int, interleaved: bool, device: str
) -> None:
    x = torch.randn(2, 3, 7, 64, generator=torch.Generator().manual_seed(0)).to(device)
    angles = _angles(7, pairs, device=device)
    if interleaved:
        angles = angles.unflatten(-1, (2, pairs)).mT.flatten(-2)
    cos, sin = angles.cos(), angles.sin()
    with use_backend(backend):
        y = rope(x, cos, sin, interleaved=interleaved)
        back = rope(y, cos, -sin, interleaved=interleaved)
    assert not torch.equal(y[..., : 2 * pairs], x[..., : 2 * pairs])
    torch.testing.assert_close(y.norm(dim=-1), x.norm(dim=-1))
    torch.testing.assert_close(back, x)
    torch.testing.assert_close(y[..., 2 * pairs :], x[..., 2 * pairs :], rtol=0, atol=0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_rotated_dot_products_depend_on_the_distance_alone(backend: str, device: str) -> None:
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(1, 16, generator=generator).expand(9, 16).to(device) for _ in range(2))
    angles = torch.arange(9.0, device=device)[:, None] * _angles(8, device=device)
    with use_backend(backend):
        q, k = (rope(t, angles.cos(), angles.sin()) for t in (q, k))
    scores = q @ k.mT
    # In units of eps·|q||k|: a dot product of 16, the rounding of two rotations, and of angles up to 8 in both.
    bound = (16 + 15 + 2 * 8) * torch.finfo(torch.float32).eps * (q.norm(dim=-1).max() * k.norm(dim=-1).max()).item()
    torch.testing.assert_close(scores[1:, 1:], scores[:-1, :-1], rtol=0, atol=bound)


ROPE_LAYOUTS = {
    "heads transposed, a slice of packed qkv": lambda x: (
        torch.cat((x, x), 1).transpose(1, 2).contiguous().transpose(1, 2)[:, : x.shape[1]]
    ),
    "tokens in reverse memory order": lambda x: x.permute(2, 1, 0, 3).contiguous().permute(2, 1, 0, 3),
    "elements apart": lambda x: torch.stack((x, x), -1)[..., 0],
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("layout", ROPE_LAYOUTS.values(), ids=ROPE_LAYOUTS)
@pytest.mark.parametrize(
    "table", [(6,), (5, 6), (3, 1, 6), (2, 1, 5, 6), (2, 3, 1, 6), (2, 3, 5, 6)], ids=lambda shape: str(list(shape))
)
def test_rope_broadcasts_over_any_dims_and_strides(backend: str, layout, table: tuple[int, ...], device: str) -> None:
    generator = torch.Generator().manual_seed(0)
    x, dy = (layout(torch.randn(2, 3, 5, 8, generator=generator).to(device)) for _ in range(2))
    cos, sin = (torch.randn(table, generator=generator).to(device) for _ in range(2))
    x.requires_grad_()
    with use_backend(backend):
        y = rope(x, cos, sin)
        (dx,) = torch.autograd.grad(y, x, dy)
    a, b = x.detach()[..., :3], x.detach()[..., 3:6]
    turned = torch.cat((a * cos[..., :3] - b * sin[..., :3], b * cos[..., 3:] + a * sin[..., 3:]), -1)
    torch.testing.assert_close(y[..., :6], turned)
    # The gradient of a linear map is its adjoint: ⟨dy, y⟩ = ⟨dx, x⟩ for every x, also on each token alone.
    torch.testing.assert_close((dy * y).sum(-1), (dx * x).sum(-1))


def test_rope_keeps_the_order_of_dims_in_memory(device: str) -> None:
    x = torch.randn(2, 5, 3, 8, device=device).transpose(1, 2)
    with use_backend("triton"):
        assert rope(x, torch.ones(5, 8, device=device), torch.zeros(5, 8, device=device)).stride() == x.stride()


@pytest.mark.parametrize("backend", BACKENDS)
def test_rope_of_six_dims_with_tables_along_every_other(backend: str, device: str) -> None:
    """More dims than two strides can describe."""
    x, cos, sin = torch.randn(2, 3, 2, 3, 2, 4), torch.randn(2, 1, 2, 1, 2, 4), torch.randn(2, 1, 2, 1, 2, 4)
    with use_backend(backend):
        y = rope(x.to(device), cos.to(device), sin.to(device))
    turned = x * cos + torch.cat((-x[..., 2:], x[..., :2]), -1) * sin
    torch.testing.assert_close(y, turned.to(device))


@pytest.mark.parametrize("backend", BACKENDS)
def test_rope_has_a_gradient_for_its_tables(backend: str, device: str) -> None:
    x, cos, sin = (torch.randn(5, 4, device=device, requires_grad=True) for _ in range(3))
    with use_backend(backend):
        dcos, dsin = torch.autograd.grad(rope(x, cos, sin).sum(), (cos, sin))
    torch.testing.assert_close(dcos, x.detach())
    torch.testing.assert_close(dsin, torch.cat((-x[..., 2:], x[..., :2]), -1).detach())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_tanh", "relu", "sigmoid"])
def test_packed_glu_is_glu_of_the_halves(backend: str, activation: str, device: str) -> None:
    x = torch.randn(5, 2 * 33, device=device, requires_grad=True)
    dy = torch.randn(5, 33, device=device)
    gate, up = x.chunk(2, -1)
    with use_backend(backend):
        packed, apart = packed_glu(x, activation=activation), glu(gate, up, activation=activation)
        swapped = packed_glu(torch.cat((up, gate), -1), activation=activation, gate_first=False)
        for other in (apart, swapped):
            torch.testing.assert_close(packed, other, rtol=0, atol=0)
            (dx,) = torch.autograd.grad(packed, x, dy, retain_graph=True)
            torch.testing.assert_close(dx, torch.autograd.grad(other, x, dy, retain_graph=True)[0], rtol=0, atol=0)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dim", [0, 1, 2, -1])
def test_glu_module_is_that_of_torch(backend: str, dim: int, device: str) -> None:
    theirs, ours, changed = torch.nn.GLU(dim), GLU(dim), torch.nn.GLU(dim)
    changed.__class__ = GLU
    for x in (torch.randn(4, 6, 8, device=device), torch.randn(8, 6, 4, device=device).permute(2, 1, 0)):
        with use_backend(backend):
            torch.testing.assert_close(ours(x), theirs(x))
            torch.testing.assert_close(changed(x), theirs(x))
    with pytest.raises(ValueError, match="even size at dim"):
        ours(torch.randn(3, 3, 3, device=device))
