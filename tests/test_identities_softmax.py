"""What the mathematics of softmax and log-softmax promises: agreement with torch and with two models' attention."""

from __future__ import annotations

import types

import pytest
import torch
from torch import Tensor

from braze.kernels import LogSoftmax, log_softmax, softmax, use_backend

from .test_identities import BACKENDS

every_backend = pytest.mark.parametrize("backend", [*BACKENDS, "compile"])
WIDTHS = pytest.mark.parametrize("width", [24, 16_392], ids=["one tile", "looped"])


def _randn(*shape: int, device: str, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dim", [None, 0, 1, 2, -1])
@pytest.mark.filterwarnings("ignore:Implicit dimension choice for log_softmax")  # torch's remark on dim=None
def test_log_softmax_module_is_that_of_torch(backend: str, dim: int | None, device: str) -> None:
    theirs, ours = torch.nn.LogSoftmax(dim), LogSoftmax(dim)
    x, dy = (_randn(4, 6, 8, device=device, seed=seed).permute(2, 0, 1).requires_grad_() for seed in (0, 1))
    with use_backend(backend):
        y = ours(x)
        (dx,) = torch.autograd.grad(y, x, dy)
    torch.testing.assert_close(y, theirs(x))
    torch.testing.assert_close(dx, torch.autograd.grad(theirs(x), x, dy)[0])
    assert ours.state_dict() == theirs.state_dict() == {}


@every_backend
@WIDTHS
def test_log_softmax_ignores_a_shift_and_has_the_log_of_softmax(backend: str, width: int, device: str) -> None:
    x = _randn(3, width, device=device)
    with use_backend(backend):
        y, shifted = log_softmax(x), log_softmax(x + 64.0)
    exact = torch.softmax(x.double(), -1).log()
    # Twice torch's own error and one rounding of the largest entry.
    budget = 2 * (torch.log_softmax(x, -1) - exact).abs().max() + torch.finfo(y.dtype).eps * exact.abs().max()
    assert (y - exact).abs().max() <= budget
    # x + 64 is rounded to a multiple of 2⁻¹⁷, which moves an element and the sum by half of that each.
    assert (shifted.double() - y).abs().max() <= 2.0**-17 + 2 * budget


@every_backend
def test_log_softmax_of_special_values_is_that_of_torch(backend: str, device: str) -> None:
    inf, nan = float("inf"), float("nan")
    x = torch.tensor([[-inf, 0.0, 1.0], [-inf, -inf, -inf], [inf, 0.0, 1.0], [nan, 0.0, 1.0], [3e38, -3e38, 3e38]])
    x = x.to(device).requires_grad_()
    with use_backend(backend):
        y = log_softmax(x)
        (dx,) = torch.autograd.grad(y.sum(), x)
    wanted = torch.log_softmax(x, -1)
    torch.testing.assert_close(y, wanted, equal_nan=True)
    torch.testing.assert_close(dx, torch.autograd.grad(wanted.sum(), x)[0], equal_nan=True)


@every_backend
def test_the_gradient_of_log_softmax_sums_to_zero_in_half_precision(backend: str, device: str) -> None:
    """As p sums to 1: exponentials of a rounded y would be off by the rounding of y, 2⁻⁹ of its 7."""
    x = _randn(4, 1000, device=device).bfloat16().requires_grad_()
    dy = torch.zeros_like(x)
    dy[:, 3] = -1.0
    with use_backend(backend):
        (dx,) = torch.autograd.grad(log_softmax(x), x, dy)
    # Each element is rounded once, by at most 2⁻⁹ of itself, and Σ |dx| < 2; the errors of 1000 do not all agree.
    bound = 2.0**-9 * dx.float().norm(dim=-1).max().item() * 4
    assert dx.float().sum(-1).abs().max().item() <= bound


@every_backend
@pytest.mark.parametrize("mask", ["causal", "boolean"])
@WIDTHS
def test_the_cotangent_of_a_dropped_entry_counts_for_nothing(backend: str, mask: str, width: int, device: str) -> None:
    """A dropped entry is a constant 0, and so neither inf nor NaN that comes back to it reaches its row."""
    x = _randn(2, 4, width, device=device).requires_grad_()
    keep = torch.ones(4, width, dtype=torch.bool, device=device).tril(width - 4)
    options = {"causal": True} if mask == "causal" else {"mask": keep}
    dy = _randn(2, 4, width, device=device, seed=1)
    wrong = dy.clone()
    wrong[0, 0, -1], wrong[0, 1, -2], wrong[1, 2, -1] = float("inf"), float("nan"), float("-inf")
    for extra in ({}, {"softcap": 5.0}):
        with use_backend(backend):
            y = softmax(x, **options, **extra)
            (dx,) = torch.autograd.grad(y, x, wrong, retain_graph=True)
            (wanted,) = torch.autograd.grad(y, x, dy, retain_graph=True)
            (again,) = torch.autograd.grad(y, x, wrong, create_graph=True)
        torch.testing.assert_close(dx, wanted, rtol=0, atol=0)
        torch.testing.assert_close(again, wanted)
        assert (dx[~keep.expand_as(dx)] == 0).all()


@every_backend
@WIDTHS
def test_the_cotangent_of_a_kept_entry_counts(backend: str, width: int, device: str) -> None:
    x = _randn(2, width, device=device).requires_grad_()
    keep = torch.arange(width, device=device) % 2 == 0
    dy = torch.ones_like(x)
    dy[0, 0] = float("inf")
    with use_backend(backend):
        (dx,) = torch.autograd.grad(softmax(x, mask=keep), x, dy)
    assert not dx[0, keep].isfinite().any()
    assert (dx[0, ~keep] == 0).all()
    assert dx[1].isfinite().all()


@every_backend
@WIDTHS
def test_a_sink_is_one_more_score_that_is_dropped(backend: str, width: int, device: str) -> None:
    x, dy = (_randn(2, 3, width, device=device, seed=seed).requires_grad_() for seed in (0, 1))
    sink = _randn(3, 1, device=device, seed=2).requires_grad_()
    joined = torch.cat((x, sink.expand(2, 3, 1)), -1)
    wanted = torch.softmax(joined, -1)[..., :-1]
    with use_backend(backend):
        y = softmax(x, sink=sink)
        found = torch.autograd.grad(y, (x, sink), dy)
    torch.testing.assert_close(y, wanted)
    for gradient, one in zip(found, torch.autograd.grad(wanted, (x, sink), dy), strict=True):
        torch.testing.assert_close(gradient, one)


@every_backend
@WIDTHS
def test_limits_of_a_sink(backend: str, width: int, device: str) -> None:
    """At −∞ it is not there; beside it a row with nothing kept is 0 and not NaN."""
    x = _randn(2, width, device=device).requires_grad_()
    keep = torch.tensor([[True], [False]], device=device)
    absent, present = torch.tensor([float("-inf")], device=device), torch.zeros(1, device=device)
    with use_backend(backend):
        torch.testing.assert_close(softmax(x, sink=absent), softmax(x))
        y = softmax(x, mask=keep, sink=present)
        (dx,) = torch.autograd.grad(y, x, torch.ones_like(y))
    assert (y[1] == 0).all()
    assert (dx[1] == 0).all()
    assert (y[0].sum() < 1).all()


@every_backend
def test_a_sink_and_a_cap_along_another_dim(backend: str, device: str) -> None:
    x, sink = _randn(2, 5, 3, device=device), _randn(3, device=device, seed=1)
    with use_backend(backend):
        y = softmax(x, sink=sink, softcap=2.0, dim=1)
        moved = softmax(x.movedim(1, -1), sink=sink[:, None], softcap=2.0).movedim(-1, 1)
    torch.testing.assert_close(y, moved, rtol=0, atol=0)


@every_backend
def test_attention_of_gpt_oss_and_of_gemma2(backend: str, device: str) -> None:
    """The models' own eager attention, on queries that give the scores, and the identity as values."""
    gpt_oss = pytest.importorskip("transformers.models.gpt_oss.modeling_gpt_oss", reason="transformers is an extra")
    gemma2 = pytest.importorskip("transformers.models.gemma2.modeling_gemma2", reason="transformers is an extra")
    B, H, S = 2, 4, 7
    query, key = (_randn(B, H, S, 8, device=device, seed=seed) for seed in (0, 1))
    value = torch.eye(S, device=device).expand(B, H, S, S)
    keep = torch.ones(S, S, dtype=torch.bool, device=device).tril()
    bias = torch.zeros(S, S, device=device).masked_fill(~keep, torch.finfo(torch.float32).min)
    sinks = _randn(H, device=device, seed=2).requires_grad_()
    module = types.SimpleNamespace(num_key_value_groups=1, sinks=sinks, training=False, head_dim=8)
    scores = query @ key.mT
    _, beside_sinks = gpt_oss.eager_attention_forward(module, query, key, value, bias, 0.3)
    _, capped = gemma2.eager_attention_forward(module, query, key, value, bias, scaling=0.3, softcap=1.5)
    with use_backend(backend):
        y = softmax(scores, sink=sinks.view(H, 1, 1), scale=0.3, causal=True)
        torch.testing.assert_close(softmax(scores, softcap=1.5, scale=0.3, mask=keep), capped)
    torch.testing.assert_close(y, beside_sinks)
    dy = _randn(B, H, S, S, device=device, seed=3)
    found, wanted = (torch.autograd.grad(w, sinks, dy)[0] for w in (y, beside_sinks))
    torch.testing.assert_close(found, wanted)
