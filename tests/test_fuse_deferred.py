"""Fused heads: losses of whole models with no logits in memory, and what is a head."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.profiler import ProfilerActivity, profile
from torch.utils.checkpoint import checkpoint

from braze.kernels import fuse, unfuse, use_backend
from braze.kernels.fuse import deferred, heads
from braze.kernels.ops import head_chunks

from .deferred import (
    B,
    C,
    D,
    S,
    assert_as_good,
    counted_losses,
    drawn,
    gpt,
    handwritten_step,
    huggingface_step,
    is_deferred,
    llama,
    models,
    relative,
    tokens,
)


@pytest.fixture(autouse=True)
def however_small(monkeypatch):
    monkeypatch.setattr(heads, "SMALLEST", 0)


@pytest.fixture
def losses(monkeypatch):
    return counted_losses(monkeypatch)


def results(model, step):
    model.zero_grad()
    loss = step(model, tokens())
    loss.backward()
    return [loss.detach(), *(p.grad.clone() for p in model.parameters())]


@models
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_loss_and_gradients_are_those_of_the_unfused_model(make, step, dtype, losses):
    plain = make().to(dtype)
    model, exact = copy.deepcopy(plain), copy.deepcopy(plain).double()
    heads = [record for record in fuse(model).fused if record.now == "linear_cross_entropy"]
    assert len(heads) == 1
    losses.clear()  # of the verification
    got = results(model, step)
    assert len(losses) == 1
    assert_as_good(got, results(plain, step), results(exact, step))


def largest_allocation(work):
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        work()
    return max(event.self_cpu_memory_usage for event in profiler.events())


@models
def test_no_logits_in_memory(make, step, monkeypatch):
    vocabulary, length = 4096, 64
    monkeypatch.setattr(head_chunks, "LEAST_BUDGET", 2**18)
    logits = 2 * length * vocabulary * 4
    model, x = make(vocabulary=vocabulary), tokens(vocabulary, length)
    assert largest_allocation(lambda: step(model, x).backward()) >= logits
    fuse(model, only=["linear_cross_entropy", "cross_entropy"])
    with use_backend("compile"):
        step(model, x).backward()  # compiles
        assert largest_allocation(lambda: step(model, x).backward()) < logits / 2


def test_the_logits_can_be_read_before_and_after_the_loss():
    plain, model = llama(), llama()
    fuse(model, only="linear_cross_entropy")
    x = tokens()
    outputs, expected = model(input_ids=x, labels=x), plain(input_ids=x, labels=x)
    assert is_deferred(outputs.logits)
    assert torch.equal(outputs.logits.argmax(-1), expected.logits.argmax(-1))
    assert torch.equal(outputs.logits, expected.logits)
    together = outputs.loss + outputs.logits.square().mean()
    together.backward()
    (expected.loss + expected.logits.square().mean()).backward()
    torch.testing.assert_close([p.grad for p in model.parameters()], [p.grad for p in plain.parameters()])


def test_generation_and_evaluation_give_ordinary_logits():
    plain, model = llama().eval(), llama().eval()
    fuse(model, only="linear_cross_entropy")
    x, options = tokens(), {"max_new_tokens": 5, "do_sample": False}
    assert torch.equal(model.generate(x, **options), plain.generate(x, **options))
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            logits = model(x).logits
        assert type(logits) is torch.Tensor
        assert torch.equal(logits, plain(x).logits)


def test_gradients_accumulate_over_two_batches():
    plain, model = gpt(), gpt()
    fuse(model)
    for m in (plain, model):
        for shift in (0, 3):
            (handwritten_step(m, (tokens() + shift) % C) / 2).backward()
    for ours, theirs in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad)


@pytest.mark.parametrize("frozen", ["head", "body"])
def test_a_frozen_part_gets_no_gradient(frozen, losses):
    plain, model = llama(), llama()
    fuse(model)
    losses.clear()
    for m in (plain, model):
        for parameter in (m.lm_head if frozen == "head" else m.model).parameters():
            parameter.requires_grad_(False)
        huggingface_step(m, tokens()).backward()
    assert len(losses) == 1
    for ours, theirs in zip(model.parameters(), plain.parameters(), strict=True):
        assert (ours.grad is None) == (theirs.grad is None)
        if ours.grad is not None:
            torch.testing.assert_close(ours.grad, theirs.grad)


def test_nothing_is_deferred_where_nothing_is_learned():
    model = gpt().requires_grad_(False)
    fuse(model)
    assert type(model(tokens())) is torch.Tensor


@pytest.mark.parametrize("inside", [True, False], ids=["loss inside", "loss outside"])
def test_autocast_settles_dtypes_when_the_head_runs(inside, losses):
    def found(model, dtype=torch.bfloat16):
        with torch.autocast("cpu", dtype, enabled=dtype == torch.bfloat16):
            logits = model(tokens())
        with torch.autocast("cpu", dtype, enabled=inside and dtype == torch.bfloat16):
            loss = F.cross_entropy(logits.view(-1, C), tokens().view(-1))
        return [loss.detach(), *torch.autograd.grad(loss, list(model.parameters()), retain_graph=True)], logits

    plain, model = gpt(), gpt()
    fuse(model, only="linear_cross_entropy")
    losses.clear()
    (got, logits), (own, expected), (exact, _) = found(model), found(plain), found(gpt().double(), torch.float64)
    assert len(losses) == 1
    assert is_deferred(logits)
    assert logits.dtype == torch.bfloat16
    assert torch.equal(logits, expected)
    assert [t.dtype for t in got] == [t.dtype for t in own]
    assert got[0].dtype == (torch.float32 if inside else torch.bfloat16)
    error, budget = (max(map(relative, t, exact)) for t in (got, own))
    assert error <= 2 * (budget + torch.finfo(torch.bfloat16).eps)


class LoRA(nn.Module):
    """As peft wraps a linear layer."""

    def __init__(self, base_layer, rank=2):
        super().__init__()
        self.base_layer, self.in_features, self.out_features = base_layer, D, C
        self.a, self.b = nn.Linear(D, rank, bias=False), nn.Linear(rank, C, bias=False)
        base_layer.weight.requires_grad_(False)

    def forward(self, x):
        return self.base_layer(x) + 0.5 * self.b(self.a(x))


@pytest.mark.parametrize("first", ["adapted", "fused"])
def test_an_adapter_around_the_head_is_trained(first):
    plain, model = gpt(), gpt()
    if first == "fused":
        fuse(model)
    for m in (plain, model):
        torch.manual_seed(1)
        m.head = LoRA(m.head)
    model.get_output_embeddings = lambda: model.head
    if first == "adapted":
        (left,) = fuse(model, skip="mlp")
        assert (left.path, left.status) == ("head", "left")
        assert "not those of a torch.nn.Linear alone" in left.reason
        assert type(model.head.base_layer) is nn.Linear
    for m in (plain, model):
        F.cross_entropy(m(tokens()).view(-1, C), tokens().view(-1)).backward()
    assert model.head.a.weight.grad.any()
    for ours, theirs in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad)


def heads_of(model):
    return [record.path for record in fuse(model) if record.now == "linear_cross_entropy"]


def test_only_what_looks_like_a_head_is_one():
    wide = nn.Linear(D, 8 * D)
    assert heads_of(nn.Sequential(nn.Linear(D, D), wide)) == ["1"]
    assert heads_of(nn.Sequential(nn.Linear(D, 8 * D - 1))) == []
    assert heads_of(nn.Sequential(nn.Linear(D, 8 * D), nn.Linear(8 * D, D), nn.Linear(D, 8 * D))) == []
    assert heads_of(gpt()) == ["head"]
    tied, untied = gpt(vocabulary=D + 1), gpt(vocabulary=D + 1)
    untied.head.weight = nn.Parameter(untied.head.weight.detach().clone())
    assert (heads_of(tied), heads_of(untied)) == (["head"], [])
    assert heads_of(llama(vocabulary=33)) == ["lm_head"]
    assert heads_of(nn.Sequential(type("Own", (nn.Linear,), {})(D, 8 * D))) == []


def test_the_report_says_where_logits_are_not_deferred():
    report = fuse(gpt())
    (record,) = report.fused
    assert "torch.compile" in record.reason
    assert "no_grad" in str(report)
    assert 0 <= record.check.error <= record.check.budget


def test_small_logits_are_computed_as_ever(monkeypatch):
    monkeypatch.setattr(heads, "SMALLEST", 4 * 2 * S * C)
    model = gpt()
    fuse(model)
    assert is_deferred(model(tokens()))
    assert type(model(tokens(length=S - 1))) is torch.Tensor


def test_a_loss_that_is_wrong_by_a_percent_is_noticed(monkeypatch):
    function = deferred.linear_cross_entropy
    monkeypatch.setattr(deferred, "linear_cross_entropy", lambda *args, **options: 1.01 * function(*args, **options))
    (record,) = fuse(gpt(), skip="mlp")
    assert record.status == "left"
    assert "it computes something else" in record.reason


def test_unfuse_gives_the_ordinary_head_back():
    model = gpt()
    fuse(model)
    assert is_deferred(model(tokens()))
    unfuse(model)
    assert type(model(tokens())) is torch.Tensor


def test_a_parametrized_head_is_left():
    model = gpt()
    model.get_output_embeddings = lambda: model.head
    nn.utils.parametrizations.weight_norm(model.head)
    (record,) = fuse(model, skip="mlp")
    assert (record.status, record.reason) == ("left", "it is parametrized")


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_checkpointed_head(reentrant):
    def loss(model):
        h = model.wte(tokens())
        logits = checkpoint(model.head, h, use_reentrant=reentrant)
        return F.cross_entropy(logits.view(-1, C), tokens().view(-1))

    plain, model = gpt(), gpt()
    fuse(model)
    ours, theirs = (
        torch.autograd.grad(loss(m), m.wte.weight)[0] if not reentrant else backward(m, loss) for m in (model, plain)
    )
    torch.testing.assert_close(ours, theirs)


def backward(model, loss):
    loss(model).backward()
    return model.wte.weight.grad


def test_hooks_on_the_head_fire():
    found = []
    for m in (gpt(), gpt()):
        if not found:
            fuse(m)
        calls = []
        m.head.register_forward_hook(lambda module, args, output, calls=calls: calls.append(output.shape))
        m.head.register_full_backward_hook(lambda module, into, out, calls=calls: calls.append(out[0].clone()))
        handwritten_step(m, tokens()).backward()
        found.append([calls, m.wte.weight.grad])
    (ours, theirs) = found
    assert ours[0][0] == theirs[0][0] == (2, S, C)
    torch.testing.assert_close(ours[0][1], theirs[0][1])
    torch.testing.assert_close(ours[1], theirs[1])


def test_the_compiler_sees_an_ordinary_head():
    plain, model = gpt(), gpt()
    fuse(model)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    logits = compiled(tokens())
    assert type(logits) is torch.Tensor
    torch.testing.assert_close(logits, plain(tokens()))
    exported = torch.export.export(model, (tokens(),)).module()
    torch.testing.assert_close(exported(tokens()), plain(tokens()))


def test_transforms_and_modes_see_an_ordinary_head():
    model = gpt()
    fuse(model)
    x = drawn(B, D)
    per_sample = torch.func.vmap(torch.func.grad(lambda h: model.head(h).square().sum()))(x)
    torch.testing.assert_close(per_sample, 2 * F.linear(model.head(x), model.head.weight.mT))
    with torch.utils.flop_counter.FlopCounterMode(display=False):
        assert type(model.head(x)) is torch.Tensor
