"""The tensor that stands for logits: steps that stay deferred, losses, and the ordinary tensor for everything else.

One file, because the tables of steps and losses also make up the drawn sequences, and everything is about one class.
"""

import io

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from braze.kernels import cross_entropy
from braze.kernels.fuse import heads
from braze.kernels.fuse.deferred import defer
from braze.kernels.fuse.sample import Exactly

from .deferred import (
    B,
    C,
    D,
    S,
    assert_as_good,
    counted_losses,
    drawn,
    gradients,
    is_deferred,
    operands,
    targets,
    tokens,
)


@pytest.fixture(autouse=True)
def however_small(monkeypatch):
    monkeypatch.setattr(heads, "SMALLEST", 0)


@pytest.fixture
def losses(monkeypatch):
    return counted_losses(monkeypatch)


@pytest.fixture
def pair():
    """(deferred, ordinary, their operands): logits [B, S, C] of the same operands."""
    tensors = operands()
    return defer(*tensors), F.linear(*tensors), tensors


STEPS = {
    "view": lambda x: x.view(-1, C),
    "view of a size": lambda x: x.view(torch.Size((S, B, C))),
    "reshape": lambda x: x.reshape(3, -1, C),
    "flatten": lambda x: x.flatten(0, -2),
    "flatten, function": lambda x: torch.flatten(x, end_dim=-2),
    "unflatten": lambda x: x.unflatten(0, (2, -1)),
    "unsqueeze": lambda x: x.unsqueeze(0),
    "squeeze": lambda x: x.squeeze(0),
    "shift": lambda x: x[..., :-1, :],
    "shift by two": lambda x: x[:, 2:],
    "stride": lambda x: x[:, ::2],
    "row": lambda x: x[0],
    "last": lambda x: x[:, -1],
    "new dim": lambda x: x[:, None],
    "all": lambda x: x[...],
    "contiguous": lambda x: x.contiguous(),
    "float": lambda x: x.float(),
    "to": lambda x: x.to(torch.float32),
    "to, named": lambda x: x.to(dtype=torch.float32),
    "transpose": lambda x: x.transpose(1, 2),
    "transpose, back": lambda x: x.transpose(-1, -2),
    "permute": lambda x: torch.permute(x, (0, 2, 1)),
    "movedim": lambda x: x.movedim(-1, 1),
    "batch first": lambda x: x.transpose(0, 1),
    "mT": lambda x: x.mT,
    "divided": lambda x: x / 0.7,
    "multiplied": lambda x: 3 * x,
    "negated": lambda x: x * -1.0,
    "tanh": lambda x: torch.tanh(x),
}  # fmt: skip

#: The same of the classes, and other things.
OTHERS = {
    "classes cut": lambda x: x[..., :-1],
    "a class": lambda x: x[..., 3],
    "new last dim": lambda x: x[..., None],
    "regrouped": lambda x: x.reshape(-1, C // 2),
    "flat": lambda x: x.flatten(),
    "masked": lambda x: x[x[..., 0] > 0],
    "half": lambda x: x.bfloat16(),
    "double": lambda x: x.double(),
    "clone": lambda x: x.clone(),
    "detach": lambda x: x.detach(),
    "softmax": lambda x: x.softmax(-1),
    "log_softmax": lambda x: F.log_softmax(x, -1),
    "argmax": lambda x: x.argmax(-1),
    "sum": lambda x: x.sum(),
    "added": lambda x: x + 1,
    "divided by a tensor": lambda x: x / torch.tensor(3.0),
    "divided, rounded": lambda x: x.div(0.5, rounding_mode="floor"),
    "by zero": lambda x: x / 0,
    "reciprocal": lambda x: 1 / x,
    "stacked": lambda x: torch.stack([x, x]),
    "concatenated": lambda x: torch.cat([x, x], -1),
    "split": lambda x: x.split(C // 2, -1)[0],
    "linear": lambda x: F.linear(x, x.new_ones(3, C)),
    "einsum": lambda x: torch.einsum("...c->...", x),
    "where": lambda x: torch.where(x > 0, x, torch.zeros(())),
    "top": lambda x: x.topk(3, -1).values,
    "gather": lambda x: x.gather(-1, torch.zeros(*x.shape[:-1], 1, dtype=torch.long)),
    "out": lambda x: torch.tanh(x.detach(), out=torch.empty(0)),
    "dropout": lambda x: F.dropout(x, 0.5, training=False),
    "norm": lambda x: F.layer_norm(x, x.shape[-1:]),
    "twice": lambda x: torch.add(input=x, other=x),
}  # fmt: skip

METADATA = {
    "shape": lambda x: (x.shape, x.size(), x.size(-1), len(x), x.dim(), x.ndim, x.numel(), torch.numel(x)),
    "memory": lambda x: (x.stride(), x.is_contiguous(), x.storage_offset(), x.element_size(), x.nbytes, x.itemsize),
    "kind": lambda x: (x.dtype, x.device, x.layout, x.is_floating_point(), torch.is_floating_point(x), x.is_complex()),
    "place": lambda x: (x.is_cuda, x.is_cpu, x.is_meta, x.is_sparse, x.is_nested, x.get_device()),
    "history": lambda x: (x.requires_grad, x.is_leaf, x.grad_fn is None),
}  # fmt: skip


def by_name(cases):
    return pytest.mark.parametrize("function", cases.values(), ids=cases)


@by_name(METADATA)
def test_metadata_is_that_of_the_logits_and_computes_nothing(function, pair):
    deferred, ordinary, _ = pair
    assert function(deferred) == function(ordinary)
    assert function(deferred[:, 1:]) == function(ordinary[:, 1:])
    assert is_deferred(deferred)
    assert isinstance(deferred, torch.Tensor)
    assert hash(deferred) == id(deferred)
    deferred.sum()
    assert function(deferred) == function(ordinary)


def called(function, x):
    try:
        return function(x)
    except (RuntimeError, IndexError, ValueError) as error:
        return type(error), str(error)


@by_name(STEPS)
def test_a_step_stays_deferred_and_is_then_the_ordinary_one(function, pair):
    deferred, ordinary, _ = pair
    got, expected = called(function, deferred), called(function, ordinary)
    if isinstance(expected, tuple):
        assert got == expected
        return
    assert is_deferred(got)
    assert (got.shape, got.stride(), got.dtype) == (expected.shape, expected.stride(), expected.dtype)
    assert torch.equal(got, expected)


@by_name(OTHERS)
def test_everything_else_is_done_with_the_ordinary_tensor(function, pair):
    deferred, ordinary, tensors = pair
    got, expected = function(deferred), function(ordinary)
    assert type(got) is torch.Tensor
    assert torch.equal(got, expected)
    assert got.requires_grad == expected.requires_grad
    if got.requires_grad and got.is_floating_point():
        both = [gradients(y.sum(), tensors) for y in (got, expected)]
        torch.testing.assert_close(*both, rtol=0, atol=0, equal_nan=True)


@pytest.mark.filterwarnings("ignore:Tensor.mT is deprecated on 0-D tensors")
@settings(max_examples=10 * settings.default.max_examples)  # each takes milliseconds
@given(st.lists(st.sampled_from([*STEPS, *OTHERS]), min_size=1, max_size=6), st.booleans(), st.sampled_from(["f", "b"]))
def test_any_sequence_of_steps_is_the_ordinary_one(names, bias, dtype):
    tensors = operands(torch.float32 if dtype == "f" else torch.bfloat16, bias)
    deferred, ordinary = defer(*tensors), F.linear(*tensors)
    done = []
    for name in names:
        function = {**STEPS, **OTHERS}[name]
        got, expected = called(function, deferred), called(function, ordinary)
        if isinstance(expected, tuple):
            assert got == expected
            break
        deferred, ordinary = got, expected
        done.append(name)
        assert (deferred.shape, deferred.dtype) == (ordinary.shape, ordinary.dtype)
        assert strides(deferred) == strides(ordinary)
        if not ordinary.requires_grad or not ordinary.is_floating_point():
            break
    loss_of = lossable(ordinary)
    if loss_of is not None:
        check_loss(loss_of, deferred, ordinary, tensors, done)
    torch.testing.assert_close(deferred, ordinary, rtol=0, atol=0, equal_nan=True)


def strides(x):
    """Where a dim has one element, its stride means nothing, and meta tensors have another."""
    return [stride for size, stride in zip(x.shape, x.stride(), strict=True) if size > 1]


def lossable(x):
    classes = 1 if x.dim() > 1 else 0
    if not x.is_floating_point() or not x.requires_grad or x.dim() == 0 or x.shape[classes] != C:
        return None
    target = targets(*(n for dim, n in enumerate(x.shape) if dim != classes))
    return lambda logits: F.cross_entropy(logits, target, reduction="sum")


def check_loss(loss_of, deferred, ordinary, tensors, names):
    wide = [t if t is None else t.detach().double().requires_grad_() for t in tensors]
    with Exactly():
        exact = F.linear(*wide)
        for name in names:
            exact = {**STEPS, **OTHERS}[name](exact)
        got, plain, true = (
            [loss.detach(), *gradients(loss, leaves)]
            for x, leaves in ((deferred, tensors), (ordinary, tensors), (exact, wide))
            for loss in [loss_of(x)]
        )
    if all(t.isfinite().all() and t.any() for t in true):
        assert_as_good(got, plain, true, of_scaling(deferred, tensors))


def of_scaling(x, tensors):
    """Half a step of each entry of a scaled input, in the sum that a logit is; a probability changes twice as much."""
    if not is_deferred(x):
        return 0.0
    form = x._logits.form
    factor = abs(form.scale * (form.cap or 1.0))
    terms = F.linear(*(t if t is None else t.detach().abs() for t in tensors)).max().item()
    return 0.0 if factor == 1.0 else torch.finfo(tensors[0].dtype).eps * factor * terms


LOSSES = {
    "flat": lambda x, t: F.cross_entropy(x.view(-1, C), t.view(-1)),
    "named": lambda x, t: F.cross_entropy(input=x.view(-1, C), target=t.view(-1)),
    "shifted": lambda x, t: F.cross_entropy(x[:, :-1].reshape(-1, C), t[:, 1:].reshape(-1)),
    "classes second": lambda x, t: F.cross_entropy(x.transpose(1, 2), t),
    "one token": lambda x, t: F.cross_entropy(x[0, 0], t[0, 1]),
    "none": lambda x, t: F.cross_entropy(x.view(-1, C), t.view(-1), reduction="none").sum(),
    "weighted": lambda x, t: F.cross_entropy(x.view(-1, C), t.view(-1), torch.linspace(0.1, 1.0, C).to(x.dtype)),
    "smoothed": lambda x, t: F.cross_entropy(x.view(-1, C), t.view(-1), label_smoothing=0.2),
    "ignoring": lambda x, t: F.cross_entropy(x.view(-1, C), t.view(-1), ignore_index=7),
    "module": lambda x, t: nn.CrossEntropyLoss(reduction="sum")(x.view(-1, C), t.view(-1)),
    "float": lambda x, t: F.cross_entropy(x.float().view(-1, C), t.view(-1)),
    "capped": lambda x, t: F.cross_entropy((torch.tanh(x / 3.0) * 3.0).view(-1, C), t.view(-1)),
    "scaled": lambda x, t: F.cross_entropy((x * 0.3).view(-1, C), t.view(-1)),
    "braze": lambda x, t: cross_entropy(x.view(-1, C), t.view(-1), z_loss=1e-2, softcap=4.0),
}  # fmt: skip


@by_name(LOSSES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", ""])
def test_a_loss_is_as_good_as_that_of_the_logits(function, dtype, bias, losses):
    target = targets(B, S)
    if function in (LOSSES["ignoring"], LOSSES["named"]):
        target = target.clamp(min=0)
    tensors = operands(dtype, bias)
    wide = [t if t is None else t.detach().double().requires_grad_() for t in tensors]
    logits, ordinary = defer(*tensors), F.linear(*tensors)
    got, plain = (
        [loss.detach(), *gradients(loss, tensors)] for x in (logits, ordinary) for loss in [function(x, target)]
    )
    with Exactly():
        loss = function(F.linear(*wide), target)
        exact = [loss.detach(), *gradients(loss, wide)]
    assert len(losses) == 1
    assert is_deferred(logits)
    assert_as_good(got, plain, exact)


NEEDS_LOGITS = {
    "probabilities": lambda x: F.cross_entropy(x.view(-1, C), torch.full((B * S, C), 1 / C)),
    "reduce": lambda x: F.cross_entropy(x.view(-1, C), targets(B * S), reduce=False),
    "classes elsewhere": lambda x: F.cross_entropy(x, torch.zeros(B, C, dtype=torch.long)),
    "after a look": lambda x: (x.argmax(-1), F.cross_entropy(x.view(-1, C), targets(B * S)))[1],
    "half a cap": lambda x: F.cross_entropy(torch.tanh(x).flatten().view(-1, C), targets(B * S)),
}  # fmt: skip


@by_name(NEEDS_LOGITS)
@pytest.mark.filterwarnings("ignore:size_average and reduce args will be deprecated")
def test_a_loss_that_needs_logits_has_them(function, pair, losses):
    deferred, ordinary, tensors = pair
    got, expected = function(deferred), function(ordinary)
    assert not losses
    assert torch.equal(got, expected)
    for ours, theirs in zip(*(gradients(y.sum(), tensors) for y in (got, expected)), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize(
    "wrong",
    [
        lambda x: F.cross_entropy(x.view(-1, C), torch.full((B * S,), C)),
        lambda x: F.cross_entropy(x.view(-1, C), torch.zeros(3, dtype=torch.long)),
        lambda x: F.cross_entropy(x, torch.zeros(B, S, dtype=torch.long)),
        lambda x: F.cross_entropy(x.view(-1, C), torch.zeros(B * S, dtype=torch.int32)),
        lambda x: x[:, :-1].view(-1, C),
        lambda x: x.view(-1, C + 1),
        lambda x: x[7],
    ],
    ids=["target", "shape", "classes elsewhere", "int32", "view of a part", "view", "index"],
)
def test_mistakes_are_refused_as_ever(wrong, pair):
    deferred, ordinary, _ = pair
    with pytest.raises((RuntimeError, ValueError, IndexError)) as theirs:
        wrong(ordinary)
    with pytest.raises(theirs.type):
        wrong(deferred)


def test_the_logits_are_computed_once(pair):
    deferred, ordinary, _ = pair
    assert deferred.data_ptr() == deferred.data_ptr() == deferred.view(-1, C).data_ptr()
    assert deferred.sum().item() == ordinary.sum().item()
    assert type(deferred.view(-1, C)) is torch.Tensor


def test_python_sees_numbers(pair):
    deferred, ordinary, _ = pair
    flat = defer(*pair[2])[0, 0]
    assert repr(deferred) == repr(ordinary)
    assert f"{flat}" == f"{ordinary[0, 0]}"
    assert deferred.tolist() == ordinary.tolist()
    assert (deferred.detach().numpy() == ordinary.detach().numpy()).all()
    assert torch.equal(torch.stack(list(defer(*pair[2]))), torch.stack(list(ordinary)))
    assert defer(*pair[2])[0, 0].max().item() == ordinary[0, 0].max().item()
    assert (deferred == ordinary).all()
    assert ordinary[0, 0, 0] in deferred
    buffer = io.BytesIO()
    torch.save(defer(*pair[2]), buffer)
    buffer.seek(0)
    loaded = torch.load(buffer, weights_only=True)
    assert type(loaded) is torch.Tensor
    assert torch.equal(loaded, ordinary)


def test_writing_reaches_views_and_not_copies(pair):
    deferred, ordinary, tensors = pair
    found = []
    for x in (deferred, ordinary):
        view, copied = x.view(-1, C), x[:, 1:].contiguous()
        x.mul_(2.0)
        view[0] = 5.0
        found.append([x, view, copied])
    for ours, theirs in zip(*found, strict=True):
        assert torch.equal(ours, theirs)
    for ours, theirs in zip(*(gradients(sum(t.square().sum() for t in f), tensors) for f in found), strict=True):
        assert torch.equal(ours, theirs)


def test_hooks_and_retained_gradients_see_what_is_computed_after_them(pair):
    deferred, ordinary, tensors = pair
    seen = []
    for x in (deferred, ordinary):
        x.register_hook(seen.append)
        x.retain_grad()
        gradients(F.cross_entropy(x.view(-1, C), targets(B * S)), tensors)
        F.cross_entropy(x.view(-1, C), targets(B * S)).backward()
        seen.append(x.grad)
    assert all(torch.equal(a, b) for a, b in zip(seen[:3], seen[3:], strict=True))


def test_a_hook_keeps_the_logits_until_it_is_removed(pair, losses):
    deferred, ordinary, tensors = pair
    target, seen = targets(B * S), []
    handle = deferred.register_hook(lambda grad: seen.append(grad) or 2 * grad)
    assert is_deferred(deferred)
    flat = deferred.view(-1, C)
    handle.remove()
    F.cross_entropy(flat, target)
    assert len(losses) == 1
    deferred.register_hook(lambda grad: seen.append(grad) or 2 * grad)
    ours = gradients(F.cross_entropy(flat, target), tensors)
    theirs = gradients(2 * F.cross_entropy(ordinary.view(-1, C), target), tensors)
    assert len(losses) == len(seen) == 1
    assert seen[0].shape == deferred.shape
    torch.testing.assert_close(ours, theirs)


def test_logits_of_a_strided_input():
    hidden, weight = drawn(S, B, D).requires_grad_().transpose(0, 1), drawn(C, D).requires_grad_()
    for bias in (None, drawn(C, seed=1)):
        got, expected = defer(hidden, weight, bias)[:, 1:], F.linear(hidden, weight, bias)[:, 1:]
        assert got.stride() == expected.stride()
        got.sum()
        assert (got.stride(), got.storage_offset()) == (expected.stride(), expected.storage_offset())


class Doubled(torch.autograd.Function):
    """Autograd knows of its operands; ``__torch_function__`` never hears of it."""

    @staticmethod
    def forward(ctx, x):
        return 2 * x

    @staticmethod
    def backward(ctx, grad):
        return 2 * grad


def test_a_function_of_autograd_loses_no_gradient(pair):
    deferred, ordinary, tensors = pair
    for got, expected in ((deferred, ordinary), (deferred[:, 1:], ordinary[:, 1:])):
        ours, theirs = Doubled.apply(got), Doubled.apply(expected)
        assert type(ours) is torch.Tensor
        assert torch.equal(ours, theirs)
        cotangent = drawn(*ours.shape, seed=3)
        for a, b in zip(
            gradients((ours * cotangent).sum(), tensors), gradients((theirs * cotangent).sum(), tensors), strict=True
        ):
            assert torch.equal(a, b)


def test_a_tied_weight_is_not_counted_twice_below_python():
    found = []
    for make in (defer, F.linear):
        weight = drawn(C, D, seed=1).requires_grad_()
        logits = make(torch.tanh(F.embedding(tokens(), weight)), weight, None)
        found.append(torch.autograd.grad(Doubled.apply(logits).square().mean(), weight)[0])
    torch.testing.assert_close(*found)


def test_backward_of_the_logits_themselves(pair):
    deferred, ordinary, tensors = pair
    cotangent = drawn(B, S, C, seed=3)
    torch.autograd.backward([deferred], [cotangent])
    ours = [t.grad.clone() for t in tensors]
    for got, expected in zip(ours, torch.autograd.grad(ordinary, tensors, cotangent), strict=True):
        torch.testing.assert_close(got, expected)
    again = torch.autograd.grad(defer(*tensors), tensors, cotangent)
    torch.testing.assert_close(list(again), ours)


def test_second_derivatives(pair):
    deferred, ordinary, tensors = pair
    found = []
    for logits in (deferred, ordinary):
        (first,) = torch.autograd.grad(
            F.cross_entropy(logits.view(-1, C), targets(B * S)), tensors[0], create_graph=True
        )
        found.append(torch.autograd.grad(first.square().sum(), tensors[1:]))
    torch.testing.assert_close(*found)


def test_operands_that_changed_are_refused(pair):
    deferred, _, (hidden, weight, _) = pair
    read = defer(hidden, weight, None)
    read.sum()
    with torch.no_grad():
        weight.add_(1.0)
    for use in (torch.sum, lambda x: F.cross_entropy(x.view(-1, C), targets(B * S))):
        with pytest.raises(RuntimeError, match=r"head's weight must be what it was.*skip=\[\"linear_cross_entropy"):
            use(deferred)
    read.sum()


def test_freed_operands_are_refused():
    hidden, weight = drawn(B, D), nn.Parameter(drawn(C, D))
    logits = defer(hidden, weight, None)
    weight.untyped_storage().resize_(0)
    for use in (torch.sum, lambda x: F.cross_entropy(x, targets(B))):
        with pytest.raises(RuntimeError, match=r"head's weight must be in memory.*FSDP"):
            use(logits)


def test_steps_without_gradients_are_those_of_the_ordinary_tensor(pair):
    deferred, ordinary, tensors = pair
    with torch.no_grad():
        flat, expected = deferred.view(-1, C), ordinary.view(-1, C)
        assert type(flat) is torch.Tensor
        assert (flat.requires_grad, flat.grad_fn) == (expected.requires_grad, expected.grad_fn)
        loss = F.cross_entropy(defer(*tensors).transpose(1, 2), targets(B, S))
        assert not loss.requires_grad
    with torch.inference_mode():
        assert torch.equal(deferred.argmax(-1), ordinary.argmax(-1))
    assert deferred.square().requires_grad  # though it was computed without


def test_a_compiled_loss_takes_deferred_logits(pair):
    deferred, ordinary, tensors = pair

    def loss(logits):
        return F.cross_entropy(logits.view(-1, C), targets(B * S))

    torch._dynamo.reset()
    compiled = torch.compile(loss, backend="aot_eager")
    got, expected = compiled(deferred), loss(ordinary)
    torch.testing.assert_close(got, expected)
    torch.testing.assert_close(gradients(got, tensors), gradients(expected, tensors))
