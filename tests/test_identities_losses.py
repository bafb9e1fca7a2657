"""What the mathematics of the vision losses promises: agreement with torch and torchvision, and the limits of each."""

from __future__ import annotations

import copy

import hypothesis.strategies as st
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from torch import Tensor

from braze.kernels import (
    BCEWithLogitsLoss,
    CrossEntropyLoss,
    DiceBCELoss,
    SigmoidFocalLoss,
    SoftTargetCrossEntropy,
    binary_cross_entropy_with_logits,
    cross_entropy,
    dice_bce_loss,
    dice_loss,
    sigmoid_focal_loss,
    soft_target_cross_entropy,
    use_backend,
)

from .test_identities import BACKENDS

every_backend = pytest.mark.parametrize("backend", BACKENDS)
REDUCTIONS = ["none", "mean", "sum"]


def _randn(*shape: int, device: str, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device)


def _probabilities(*shape: int, device: str, seed: int = 1) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)).to(device)


def _gradient(loss: Tensor, x: Tensor) -> Tensor:
    return torch.autograd.grad(loss.sum(), x)[0]


@st.composite
def _binary(draw: st.DrawFn) -> tuple[Tensor, Tensor, dict]:
    """Logits, targets and options of ``F.binary_cross_entropy_with_logits``."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
    shape = draw(st.sampled_from([(), (7,), (3, 5), (2, 3, 4, 5), (2, 1, 4, 5), (1, 3, 1, 33)]))
    order = draw(st.permutations(range(len(shape))))
    inverse = [order.index(dim) for dim in range(len(shape))]

    def operand() -> Tensor:
        return torch.randn([shape[dim] for dim in order], generator=generator).permute(inverse)

    def weight() -> Tensor | None:
        kept = draw(st.lists(st.booleans(), max_size=len(shape)))
        sizes = [size if keep else 1 for size, keep in zip(reversed(shape), kept, strict=False)]
        return draw(st.sampled_from([None, torch.rand(sizes[::-1], generator=generator) + 0.1]))

    x = operand().requires_grad_()
    target = draw(st.sampled_from([operand().sigmoid(), torch.sigmoid(x.detach().contiguous())]))
    options = {"weight": weight(), "pos_weight": weight(), "reduction": draw(st.sampled_from(REDUCTIONS))}
    return x, target, options


@every_backend
def test_binary_cross_entropy_is_that_of_torch(backend: str, device: str) -> None:
    """Weights broadcast along any dims, and logits and targets lie in memory in any order."""

    @given(_binary())
    def check(drawn: tuple[Tensor, Tensor, dict]) -> None:
        x, target, options = drawn
        x, target = x.detach().to(device).requires_grad_(), target.to(device)
        options = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in options.items()}
        wanted = F.binary_cross_entropy_with_logits(x, target, **options)
        with use_backend(backend):
            loss = binary_cross_entropy_with_logits(x, target, **options)
            dx = _gradient(loss, x)
            module = BCEWithLogitsLoss(**options)(x, target)
        torch.testing.assert_close(loss, wanted)
        torch.testing.assert_close(dx, _gradient(wanted, x))
        torch.testing.assert_close(module, loss, rtol=0, atol=0)

    check()


@every_backend
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_smoothing_is_that_of_the_targets(backend: str, reduction: str, device: str) -> None:
    x, target = _randn(5, 33, device=device).requires_grad_(), _probabilities(5, 33, device=device)
    pos_weight = 3.0 * _probabilities(33, device=device, seed=2)
    options = {"pos_weight": pos_weight, "reduction": reduction}
    with use_backend(backend):
        smoothed = binary_cross_entropy_with_logits(x, target, label_smoothing=0.1, **options)
        moved = binary_cross_entropy_with_logits(x, target * 0.9 + 0.05, **options)
        gradients = [_gradient(loss, x) for loss in (smoothed, moved)]
    torch.testing.assert_close(smoothed, moved)
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("alpha", [0.25, 0.9, 0.0, -1])
@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0, 2.0, 2.7])
def test_focal_loss_is_that_of_torchvision(alpha: float, gamma: float, device: str) -> None:
    """In float64, and so of the plain form: torchvision's own error in float32 is larger than braze's."""
    ops = pytest.importorskip("torchvision.ops", reason="torchvision is an extra")
    x = (4.0 * _randn(7, 33, device=device)).double().requires_grad_()
    labels = _probabilities(7, 33, device=device).double()
    for target in (labels, labels.round()):
        for reduction in REDUCTIONS:
            options = {"alpha": alpha, "gamma": gamma, "reduction": reduction}
            loss, wanted = sigmoid_focal_loss(x, target, **options), ops.sigmoid_focal_loss(x, target, **options)
            torch.testing.assert_close(loss, wanted)
            torch.testing.assert_close(_gradient(loss, x), _gradient(wanted, x))
            torch.testing.assert_close(SigmoidFocalLoss(**options)(x, target), loss, rtol=0, atol=0)


@every_backend
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_focal_loss_without_focus_is_binary_cross_entropy(backend: str, reduction: str, device: str) -> None:
    x, target = _randn(5, 33, device=device).requires_grad_(), _probabilities(5, 33, device=device)
    with use_backend(backend):
        focal = sigmoid_focal_loss(x, target, alpha=-1.0, gamma=0.0, reduction=reduction)
        plain = binary_cross_entropy_with_logits(x, target, reduction=reduction)
        halved = sigmoid_focal_loss(x, target, alpha=0.5, gamma=0.0, reduction=reduction)
        gradients = [_gradient(loss, x) for loss in (focal, plain, 2.0 * halved)]
    torch.testing.assert_close(focal, plain, rtol=0, atol=0)
    torch.testing.assert_close(gradients[0], gradients[1], rtol=0, atol=0)
    torch.testing.assert_close(2.0 * halved, plain)
    torch.testing.assert_close(gradients[2], gradients[1])


@pytest.mark.parametrize("backend", [*BACKENDS, "compile"])
@pytest.mark.parametrize("gamma", [0.0, 0.1, 1.0, 2.5])
def test_focal_loss_far_out_is_finite_and_right(backend: str, gamma: float, device: str) -> None:
    """Where p_t rounds to 1 the derivative of (1 − p_t)^γ is infinite for γ < 1, and torchvision's gradient NaN."""
    far = torch.tensor([-1e4, -120.0, -100.0, -20.0, -0.0, 0.0, 20.0, 100.0, 120.0, 1e4])
    x = far.repeat(3).to(device).requires_grad_()
    target = torch.tensor([0.0, 1.0, 0.3]).repeat_interleave(len(far)).to(device)
    with use_backend(backend):
        loss = sigmoid_focal_loss(x, target, gamma=gamma)
        dx = _gradient(loss, x)
        (again,) = torch.autograd.grad(
            torch.autograd.grad(sigmoid_focal_loss(x, target, gamma=gamma).sum(), x, create_graph=True)[0].sum(), x
        )
    wide = x.detach().double().requires_grad_()
    truth = sigmoid_focal_loss(wide, target.double(), gamma=gamma)
    # Far out the loss of a wrong element is about |x|, and any other is small: each is right relatively, as float32
    # allows after a power, a logarithm and a product, or below the smallest normal number.
    close = {"rtol": 1e-5, "atol": torch.finfo(torch.float32).tiny}
    torch.testing.assert_close(loss.double(), truth, **close)
    torch.testing.assert_close(dx.double(), _gradient(truth, wide), **close)
    assert again.isfinite().all()


@every_backend
def test_integers_and_booleans_are_labels(backend: str, device: str) -> None:
    x = _randn(3, 4, 33, device=device).requires_grad_()
    labels = _probabilities(3, 4, 33, device=device) < 0.3
    for loss in (sigmoid_focal_loss, binary_cross_entropy_with_logits, dice_bce_loss):
        with use_backend(backend):
            wanted = loss(x, labels.float())
            dx = _gradient(wanted, x)
            for target in (labels, labels.long(), labels.to(torch.uint8), labels.to(torch.bfloat16)):
                found = loss(x, target)
                assert found.dtype == torch.float32
                torch.testing.assert_close(found, wanted, rtol=0, atol=0)
                torch.testing.assert_close(_gradient(found, x), dx, rtol=0, atol=0)


def test_losses_of_channels_last_lie_as_their_logits_do(device: str) -> None:
    x, target = (t.to(memory_format=torch.channels_last) for t in (
        _randn(2, 3, 4, 5, device=device), _probabilities(2, 3, 4, 5, device=device)
    ))  # fmt: skip
    x.requires_grad_()
    with use_backend("triton"):
        for loss in (sigmoid_focal_loss, binary_cross_entropy_with_logits):
            y = loss(x, target, reduction="none")
            assert y.is_contiguous(memory_format=torch.channels_last)
            assert _gradient(y, x).is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("backend", ["compile", "triton"])
def test_cross_entropy_of_many_classes_lies_as_its_logits_do(backend: str, device: str) -> None:
    """And is that of contiguous ones."""
    target = torch.randint(0, 33, (2, 9, 11), device=device)
    target[0, :3] = -100
    x = _randn(2, 33, 9, 11, device=device).requires_grad_()
    last = x.detach().to(memory_format=torch.channels_last).requires_grad_()
    with use_backend(backend):
        for reduction in REDUCTIONS:
            y, wanted = (cross_entropy(t, target, reduction=reduction) for t in (last, x))
            torch.testing.assert_close(y, wanted)
            dx = _gradient(y, last)
            assert dx.stride() == last.stride()
            torch.testing.assert_close(dx, _gradient(wanted, x))


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_bce_module_loads_what_torch_saved_and_the_reverse(reduction: str, device: str) -> None:
    weights = [2.0 * _probabilities(*shape, device=device) for shape in ((4, 1), (33,))]
    theirs, ours = (
        kind(weight=weights[0], pos_weight=weights[1], reduction=reduction)
        for kind in (torch.nn.BCEWithLogitsLoss, BCEWithLogitsLoss)
    )
    assert list(ours.state_dict()) == list(theirs.state_dict()) == ["weight", "pos_weight"]
    x, target = _randn(4, 33, device=device), _probabilities(4, 33, device=device)
    for saved, loaded in ((theirs, copy.deepcopy(ours)), (ours, copy.deepcopy(theirs))):
        for name in ("weight", "pos_weight"):
            getattr(loaded, name).zero_()
        loaded.load_state_dict(saved.state_dict())
        torch.testing.assert_close(loaded(x, target), saved(x, target))
    assert ours.label_smoothing == 0.0
    smoothed = BCEWithLogitsLoss(label_smoothing=0.1)(x, target)
    torch.testing.assert_close(smoothed, F.binary_cross_entropy_with_logits(x, target * 0.9 + 0.05))


@st.composite
def _soft(draw: st.DrawFn) -> tuple[Tensor, Tensor, dict]:
    """Logits, probabilities and options of ``F.cross_entropy``."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
    shape = draw(st.sampled_from([(1,), (10,), (0, 3), (7, 33), (2, 10, 3), (3, 4, 2, 2)]))
    x = torch.randn(shape, generator=generator)
    # Not normalized: F.cross_entropy does not ask for it.
    target = torch.rand(shape[::-1], generator=generator).permute(*reversed(range(len(shape))))
    classes = shape[1] if len(shape) > 1 else shape[0]
    options = {
        "weight": draw(st.sampled_from([None, torch.rand(classes, generator=generator) + 0.1])),
        "reduction": draw(st.sampled_from(REDUCTIONS)),
        "label_smoothing": draw(st.sampled_from([0.0, 0.1, 1.0])),
    }
    return x, target, options


@every_backend
def test_soft_target_cross_entropy_is_that_of_torch(backend: str, device: str) -> None:
    """And so is that of ``cross_entropy`` and its module, with the gradient of the probabilities."""

    @given(_soft())
    def check(drawn: tuple[Tensor, Tensor, dict]) -> None:
        options = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in drawn[2].items()}
        x, target = (t.to(device).requires_grad_() for t in drawn[:2])
        wanted = F.cross_entropy(x, target, **options)
        with use_backend(backend):
            loss = soft_target_cross_entropy(x, target, **options)
            gradients = torch.autograd.grad(loss.sum(), (x, target))
            others = cross_entropy(x, target, **options), CrossEntropyLoss(**options)(x, target)
        torch.testing.assert_close(loss, wanted, equal_nan=True)
        for found, one in zip(gradients, torch.autograd.grad(wanted.sum(), (x, target)), strict=True):
            torch.testing.assert_close(found, one, equal_nan=True)
        for other in others:
            torch.testing.assert_close(other, loss, rtol=0, atol=0, equal_nan=True)

    check()


@every_backend
@pytest.mark.parametrize("classes", [33, 4099], ids=["one block", "looped"])
def test_one_hot_probabilities_are_class_indices(backend: str, classes: int, device: str) -> None:
    x = _randn(5, classes, device=device).requires_grad_()
    index = torch.randint(0, classes, (5,), generator=torch.Generator().manual_seed(1)).to(device)
    one_hot = F.one_hot(index, classes).float()
    for options in ({}, {"label_smoothing": 0.1}, {"softcap": 3.0}):
        with use_backend(backend):
            soft, hard = soft_target_cross_entropy(x, one_hot, **options), cross_entropy(x, index, **options)
            torch.testing.assert_close(soft, hard)
            torch.testing.assert_close(_gradient(soft, x), _gradient(hard, x))


@every_backend
def test_the_gradient_over_the_classes_sums_to_zero(backend: str, device: str) -> None:
    """As p and the probabilities both sum to 1."""
    x = _randn(4, 1000, device=device).requires_grad_()
    target = torch.softmax(_randn(4, 1000, device=device, seed=1), -1)
    with use_backend(backend):
        dx = _gradient(soft_target_cross_entropy(x, target, reduction="none"), x)
    # p and the probabilities are off by a few roundings of themselves, and each sums to 1.
    assert dx.double().sum(-1).abs().max() <= 8 * torch.finfo(torch.float32).eps
    assert dx.abs().max() > 1e-4


@every_backend
def test_of_a_single_class_the_gradient_is_zero_to_the_last_bit(backend: str, device: str) -> None:
    x = 3 * _randn(16, 1, device=device)
    x.requires_grad_()
    weight = _probabilities(1, device=device)
    with use_backend(backend):
        loss = cross_entropy(x, x.new_zeros(16, dtype=torch.long), weight, label_smoothing=0.3, reduction="sum")
        assert not _gradient(loss, x).any()


@every_backend
def test_soft_target_module_is_that_of_timm(backend: str, device: str) -> None:
    timm = pytest.importorskip("timm.loss", reason="timm is an extra")
    for shape in ((5, 33), (2, 3, 33)):
        x, target = _randn(*shape, device=device).requires_grad_(), torch.softmax(_randn(*shape, device=device), -1)
        wanted = timm.SoftTargetCrossEntropy()(x, target)
        with use_backend(backend):
            loss = SoftTargetCrossEntropy()(x, target)
            dx = _gradient(loss, x)
        torch.testing.assert_close(loss, wanted)
        torch.testing.assert_close(dx, _gradient(wanted, x))
    assert SoftTargetCrossEntropy().state_dict() == {}


@every_backend
def test_dice_is_between_0_and_1_and_0_where_prediction_is_perfect(backend: str, device: str) -> None:
    truth = (_probabilities(3, 2, 17, 19, device=device) < 0.4).float()
    truth[0, 0] = 0.0  # an empty mask
    perfect = 100.0 * (2.0 * truth - 1.0)
    with use_backend(backend):
        right = dice_loss(perfect, truth, reduction="none")
        wrong = dice_loss(-perfect, truth, reduction="none")
        between = dice_loss(_randn(3, 2, 17, 19, device=device), truth, reduction="none")
        both = dice_bce_loss(perfect, truth)
    assert right.shape == (3, 2)
    # e⁻¹⁰⁰ for each wrong pixel; the sums of labels are exact.
    # The quotient that 1 is less by is rounded once.
    eps = torch.finfo(torch.float32).eps
    torch.testing.assert_close(right, torch.zeros_like(right), rtol=0, atol=eps)
    torch.testing.assert_close(both, torch.zeros_like(both), rtol=0, atol=eps)
    # Nothing in common: 1 − smooth / (pixels + smooth).
    torch.testing.assert_close(wrong, torch.full_like(wrong, 1 - 1 / (17 * 19 + 1)))
    assert ((between > 0) & (between < 1)).all()


@every_backend
@pytest.mark.parametrize("shape", [(5, 33), (3, 2, 7, 5), (2, 3, 4, 5, 6)])
def test_dice_and_bce_is_the_sum_of_its_parts(backend: str, shape: tuple[int, ...], device: str) -> None:
    x, target = _randn(*shape, device=device).requires_grad_(), _probabilities(*shape, device=device)
    pixels = tuple(range(2 if len(shape) > 2 else 1, len(shape)))
    p = x.sigmoid()
    overlap, total = (p * target).sum(pixels), (p + target).sum(pixels)
    dice = 1 - (2 * overlap + 0.5) / (total + 0.5)
    bce = F.binary_cross_entropy_with_logits(x, target, reduction="none").mean(pixels)
    wanted = 0.3 * dice + 0.7 * bce
    options = {"dice_weight": 0.3, "bce_weight": 0.7, "smooth": 0.5}
    with use_backend(backend):
        for reduction, reduce in (("none", lambda t: t), ("mean", torch.mean), ("sum", torch.sum)):
            loss = dice_bce_loss(x, target, reduction=reduction, **options)
            torch.testing.assert_close(loss, reduce(wanted))
            torch.testing.assert_close(
                _gradient(loss, x), torch.autograd.grad(reduce(wanted).sum(), x, retain_graph=True)[0]
            )
            torch.testing.assert_close(DiceBCELoss(reduction=reduction, **options)(x, target), loss, rtol=0, atol=0)
        torch.testing.assert_close(dice_loss(x, target, smooth=0.5), dice.mean())
