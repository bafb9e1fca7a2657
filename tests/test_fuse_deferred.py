"""Deferred logits: losses with no logits in memory, and the ordinary tensor for everything else."""

import copy
import io

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.profiler import ProfilerActivity, profile
from torch.utils.checkpoint import checkpoint

from braze.kernels import cross_entropy, fuse, unfuse, use_backend
from braze.kernels.fuse import deferred, heads
from braze.kernels.fuse.deferred import DeferredLogits, defer
from braze.kernels.fuse.sample import Exactly
from braze.kernels.ops import head_chunks

transformers = pytest.importorskip("transformers")

B, S, D, C = 2, 6, 8, 40


@pytest.fixture(autouse=True)
def however_small(monkeypatch):
    monkeypatch.setattr(heads, "SMALLEST", 0)


def is_deferred(tensor):
    return isinstance(tensor, DeferredLogits) and tensor._logits.value is None


def drawn(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def operands(dtype=torch.float32, bias=True):
    tensors = (drawn(B, S, D, dtype=dtype), drawn(C, D, seed=1, dtype=dtype), drawn(C, seed=2, dtype=dtype))
    return [t.requires_grad_() for t in tensors[: 2 + bias]] + [None] * (not bias)


def targets(*shape):
    target = torch.arange(int(torch.Size(shape).numel())).view(shape) * 7 % C
    return target.masked_fill(target % 5 == 0, -100)


@pytest.fixture
def pair():
    """(deferred, ordinary, their operands): logits [B, S, C] of the same operands."""
    tensors = operands()
    return defer(*tensors), F.linear(*tensors), tensors


def gradients(loss, tensors):
    return torch.autograd.grad(loss, [t for t in tensors if t is not None], retain_graph=True)


def relative(a, b):
    return ((a.double() - b.double()).abs().max() / b.double().abs().max()).item()


def assert_as_good(got, plain, exact, more=0.0):
    """The budget of every fused operator, for the largest of all errors: that of one small gradient is partly luck."""
    assert [(t.shape, t.dtype) for t in got] == [(t.shape, t.dtype) for t in plain]
    steps = torch.finfo(plain[-1].dtype).eps
    error, budget = (max(map(relative, found, exact)) for found in (got, plain))
    assert error <= 2 * (budget + steps) + more, (error, budget)


# ------------------------------------------------------------------------------ models


class GPT(nn.Module):
    """Hand-written, its head tied to its embedding, its loss outside."""

    def __init__(self, vocabulary=C, features=D):
        super().__init__()
        self.wte = nn.Embedding(vocabulary, features)
        self.mlp = nn.Sequential(nn.Linear(features, 16), nn.GELU(), nn.Linear(16, features))
        self.head = nn.Linear(features, vocabulary, bias=False)
        self.head.weight = self.wte.weight

    def forward(self, tokens):
        h = self.wte(tokens)
        return self.head(h + self.mlp(h))

    def training_step(self, tokens, labels):
        return F.cross_entropy(self(tokens).view(-1, self.head.out_features), labels.view(-1))


def gpt(**sizes):
    torch.manual_seed(0)
    return GPT(**sizes)


def tokens(vocabulary=C, length=S):
    return torch.arange(2 * length).view(2, length) * 7 % vocabulary


def llama(name="Llama", vocabulary=C, **options):
    torch.manual_seed(0)
    config = getattr(transformers, name + "Config")(
        hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1,
        head_dim=16, vocab_size=vocabulary, pad_token_id=0, **options,
    )  # fmt: skip
    return getattr(transformers, f"{name}ForCausalLM")(config)


def huggingface_step(model, x):
    return model(input_ids=x, labels=x).loss


def handwritten_step(model, x):
    return model.training_step(x, x.roll(-1, 1))


MODELS = {
    "GPT, tied": (gpt, handwritten_step),
    "Llama": (llama, huggingface_step),
    "Llama, tied": (lambda **o: llama(tie_word_embeddings=True, **o), huggingface_step),
    "Gemma 2, capped": (lambda **o: llama("Gemma2", final_logit_softcapping=0.5, **o), huggingface_step),
    "Granite, scaled": (lambda **o: llama("Granite", logits_scaling=3.0, **o), huggingface_step),
}
models = pytest.mark.parametrize(("make", "step"), MODELS.values(), ids=MODELS)


@pytest.fixture
def losses(monkeypatch):
    """Counts the losses that are computed without logits."""
    calls, function = [], deferred.linear_cross_entropy
    monkeypatch.setattr(
        deferred, "linear_cross_entropy", lambda *args, **options: calls.append(1) or function(*args, **options)
    )
    return calls


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
    fuse(model)
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


# ------------------------------------------------------------------------------ what is a head


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
        (left,) = fuse(model)
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
    (record,) = fuse(gpt())
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
    (record,) = fuse(model)
    assert (record.status, record.reason) == ("left", "it is parametrized")


# ------------------------------------------------------------------------------ steps that stay deferred

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


# ------------------------------------------------------------------------------ losses

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


# ------------------------------------------------------------------------------ the tensor


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


# ------------------------------------------------------------------------------ what surrounds the head


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


def test_a_compiled_loss_takes_deferred_logits(pair):
    deferred, ordinary, tensors = pair

    def loss(logits):
        return F.cross_entropy(logits.view(-1, C), targets(B * S))

    torch._dynamo.reset()
    compiled = torch.compile(loss, backend="aot_eager")
    got, expected = compiled(deferred), loss(ordinary)
    torch.testing.assert_close(got, expected)
    torch.testing.assert_close(gradients(got, tensors), gradients(expected, tensors))


def test_transforms_and_modes_see_an_ordinary_head():
    model = gpt()
    fuse(model)
    x = drawn(B, D)
    per_sample = torch.func.vmap(torch.func.grad(lambda h: model.head(h).square().sum()))(x)
    torch.testing.assert_close(per_sample, 2 * F.linear(model.head(x), model.head.weight.mT))
    with torch.utils.flop_counter.FlopCounterMode(display=False):
        assert type(model.head(x)) is torch.Tensor
