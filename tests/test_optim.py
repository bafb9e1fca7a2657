"""Optimizers: the steps of ``torch.optim``, its checkpoints, and what surrounds a step."""

from __future__ import annotations

import contextlib
import copy
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import settings
from torch import Tensor, nn

from braze.kernels import optim, use_backend
from braze.kernels.audit.child import audit_others

from .budget import excess

#: None is what the CPU runs by default: PyTorch's own fused kernels.
BACKENDS = [None, "eager", "compile", "triton"]

#: An optimizer and its arguments.
CASES = {
    "SGD": ("SGD", {"lr": 0.1}),
    "SGD momentum": ("SGD", {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01, "dampening": 0.3}),
    "SGD Nesterov": ("SGD", {"lr": 0.1, "momentum": 0.9, "nesterov": True, "maximize": True}),
    "Adam": ("Adam", {"lr": 0.01, "weight_decay": 0.1}),
    "Adam AMSGrad": ("Adam", {"lr": 0.01, "amsgrad": True, "maximize": True}),
    "AdamW": ("AdamW", {"lr": 0.01, "betas": (0.8, 0.99), "eps": 1e-6}),
    "AdamW AMSGrad": ("AdamW", {"lr": 0.01, "amsgrad": True, "weight_decay": 0.3}),
}


def running(backend: str | None) -> Any:
    return contextlib.nullcontext() if backend is None else use_backend(backend)


#: More than a tile, less than one, one element, none, and layouts of their own.
SHAPES = ((5000,), (5, 7), (1,), (0, 3), (4, 3, 2, 2), (30, 20), (6, 8))


def parameters(dtype: torch.dtype, device: str, drawn: torch.dtype | None = None) -> list[nn.Parameter]:
    """Parameters whose values are those of the dtype ``drawn``; the last: channels last, transposed, gaps in memory."""
    draw = torch.Generator().manual_seed(0)
    made = [torch.randn(shape, generator=draw).to(drawn or dtype).to(device, dtype) for shape in SHAPES]
    made[4] = made[4].contiguous(memory_format=torch.channels_last)
    made[5] = made[5].mT
    made[6] = torch.empty(6, 16, dtype=dtype, device=device)[:, ::2].copy_(made[6])
    return [nn.Parameter(t) for t in made]


def differentiate(
    params: list[nn.Parameter], step: int, *, scale: float = 1.0, drawn: torch.dtype | None = None
) -> None:
    draw = torch.Generator().manual_seed(1000 + step)
    for p in params:
        p.grad = (scale * torch.randn(p.shape, generator=draw)).to(drawn or p.dtype).to(p.device, p.dtype)


def train(
    make: Callable[[list[nn.Parameter]], Any], dtype: torch.dtype, device: str, drawn: torch.dtype | None = None
) -> list[Tensor]:
    params = parameters(dtype, device, drawn)
    optimizer = make(params)
    for step in range(5):
        differentiate(params, step, drawn=drawn)
        optimizer.step()
    return [p.detach() for p in params]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("case", CASES)
def test_steps_are_those_of_torch(case: str, dtype: torch.dtype, backend: str | None, device: str) -> None:
    name, arguments = CASES[case]
    torch_type, our_type = getattr(torch.optim, name), getattr(optim, name)
    exact = train(lambda params: torch_type(params, **arguments, foreach=False), torch.float64, device, drawn=dtype)
    plain = train(lambda params: torch_type(params, **arguments, foreach=False), dtype, device)
    with running(backend):
        ours = train(lambda params: our_type(params, **arguments), dtype, device)
    assert excess(ours, plain, exact) <= 1


def test_float64_is_not_narrowed(device: str) -> None:
    ours = train(lambda params: optim.AdamW(params), torch.float64, device)
    torch.testing.assert_close(ours, train(lambda params: torch.optim.AdamW(params), torch.float64, device))


@pytest.mark.parametrize("backend", BACKENDS[1:])
def test_lion_is_its_formula(backend: str, device: str) -> None:
    lr, (beta1, beta2), decay = 0.01, (0.9, 0.99), 0.1
    with use_backend(backend):
        ours = train(lambda params: optim.Lion(params, lr, (beta1, beta2), decay), torch.float32, device)
    params = parameters(torch.float64, device)
    momenta = [torch.zeros_like(p) for p in params]
    for step in range(5):
        differentiate(params, step)
        for p, m in zip(params, momenta, strict=True):
            g = p.grad.float().double()
            p.data = (1 - lr * decay) * p.data - lr * torch.sign(beta1 * m + (1 - beta1) * g)
            m.copy_(beta2 * m + (1 - beta2) * g)
    torch.testing.assert_close(ours, [p.detach().float() for p in params])


@pytest.mark.parametrize("backend", BACKENDS[1:])
def test_lion_does_not_hide_nan(backend: str, device: str) -> None:
    p = nn.Parameter(torch.ones(20_000, device=device))
    p.grad = torch.zeros_like(p)
    p.grad[7] = torch.nan
    with use_backend(backend):
        optim.Lion([p]).step()
    assert p.isnan().nonzero().tolist() == [[7]]


@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_and_infinite_gradients_go_where_torch_lets_them(backend: str | None, device: str) -> None:
    def once(optimizer_type: type) -> Tensor:
        p = nn.Parameter(torch.ones(3000, device=device))
        p.grad = torch.ones_like(p)
        p.grad[::7], p.grad[1::7] = torch.nan, torch.inf
        optimizer_type([p]).step()
        return p.detach()

    with running(backend):
        torch.testing.assert_close(once(optim.AdamW), once(torch.optim.AdamW), equal_nan=True)


# ------------------------------------------------------------------------------ a drop-in


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("first", ["torch", "braze"])
def test_a_checkpoint_resumes_in_the_other(case: str, first: str) -> None:
    """The same groups, the same state, and the same bits afterwards as PyTorch's own fused CPU kernels."""
    name, arguments = CASES[case]
    types = {"torch": getattr(torch.optim, name), "braze": getattr(optim, name)}
    second = {"torch": "braze", "braze": "torch"}[first]
    arguments = {**arguments, "fused": True}
    params = [p for p in parameters(torch.float32, "cpu") if p.is_contiguous()]
    other = copy.deepcopy(params)
    one, two = types[first](params, **arguments), types[second](other, **{**arguments, "lr": 123.0})
    for step in range(3):
        differentiate(params, step)
        one.step()
    for p, q in zip(params, other, strict=True):
        q.data.copy_(p.data)
    two.load_state_dict(copy.deepcopy(one.state_dict()))
    for step in range(3, 6):
        for each in (params, other):
            differentiate(each, step)
        one.step()
        two.step()
    torch.testing.assert_close(other, params, rtol=0, atol=0)
    torch.testing.assert_close(two.state_dict(), one.state_dict(), rtol=0, atol=0)


def test_what_we_keep_beside_torchs_state_survives_a_checkpoint() -> None:
    arguments = {"rounding": "kahan", "ema_decay": 0.9}
    params = parameters(torch.bfloat16, "cpu")[:2]
    one = optim.AdamW(params, **arguments)
    differentiate(params, 0)
    one.step()
    other = copy.deepcopy(params)
    two = optim.AdamW(other, **arguments)
    two.load_state_dict(copy.deepcopy(one.state_dict()))
    assert two.state[other[0]]["exp_avg"].dtype == torch.float32
    for each, optimizer in ((params, one), (other, two)):
        differentiate(each, 1)
        optimizer.step()
    torch.testing.assert_close(two.state_dict(), one.state_dict(), rtol=0, atol=0)
    torch.testing.assert_close(other, params, rtol=0, atol=0)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))], ids=["deepcopy", "pickle"])
def test_a_copy_keeps_its_arguments(copied: Callable[[Any], Any]) -> None:
    p = nn.Parameter(torch.ones(3))
    copy_of = copied(optim.Lion([p], max_norm=1.0, seed=7))
    (q,) = copy_of.param_groups[0]["params"]
    q.grad = torch.full_like(q, 1e6)
    copy_of.step()
    assert copy_of.gradient_norm is not None


def test_groups_schedulers_closures_and_hooks(device: str) -> None:
    def run(optimizer_type: type) -> tuple[list[Tensor], list[str]]:
        seen: list[str] = []
        params = parameters(torch.float32, device)
        optimizer = optimizer_type(params[:2], lr=0.1, momentum=0.9)
        optimizer.add_param_group({"params": params[2:5], "lr": 0.01, "weight_decay": 0.1, "momentum": 0.0})
        optimizer.add_param_group({"params": params[5:], "nesterov": True})
        optimizer.register_step_pre_hook(lambda *_: seen.append("before"))
        optimizer.register_step_post_hook(lambda *_: seen.append("after"))
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)

        def closure() -> str:
            assert torch.is_grad_enabled()
            differentiate(params, len(seen))
            return "loss"

        for _ in range(3):
            assert optimizer.step(closure) == "loss"
            scheduler.step()
        return [p.detach() for p in params], seen

    (ours, seen), (theirs, expected) = run(optim.SGD), run(torch.optim.SGD)
    torch.testing.assert_close(ours, theirs)
    assert seen == expected == ["before", "after"] * 3


def test_a_learning_rate_may_be_a_tensor(device: str) -> None:
    lr = torch.tensor(0.1, device=device)
    for backend in BACKENDS:
        with running(backend):
            found = train(lambda params: optim.AdamW(params, lr=lr), torch.float32, device)
        torch.testing.assert_close(
            found, train(lambda params: torch.optim.AdamW(params, lr=0.1), torch.float32, device)
        )


def test_parameters_without_gradients_stay(device: str) -> None:
    params = parameters(torch.float32, device)
    optimizer = optim.AdamW(params, max_norm=1.0)
    optimizer.step()
    assert not optimizer.state
    params[0].grad = torch.ones_like(params[0])
    before = params[1].detach().clone()
    optimizer.step()
    assert list(optimizer.state) == [params[0]]
    torch.testing.assert_close(params[1].detach(), before, rtol=0, atol=0)


def test_parametrized_weights_learn() -> None:
    torch.manual_seed(0)
    layer = nn.utils.parametrizations.weight_norm(nn.Linear(4, 4))
    twin = copy.deepcopy(layer)
    x = torch.randn(8, 4)
    for module, optimizer in ((layer, optim.AdamW(layer.parameters())), (twin, torch.optim.AdamW(twin.parameters()))):
        module(x).square().sum().backward()
        optimizer.step()
    torch.testing.assert_close(layer.state_dict(), twin.state_dict())


@pytest.mark.parametrize("extras", [{}, {"max_norm": 1.0}], ids=["as torch", "clipped"])
@pytest.mark.parametrize("name", ["SGD", "AdamW", "Lion"])
def test_a_compiled_step_is_the_same(name: str, extras: dict[str, Any]) -> None:
    def run(compiled: bool) -> list[Tensor]:
        params = parameters(torch.float32, "cpu")[:3]
        optimizer = getattr(optim, name)(params, lr=0.1, **extras)
        step = torch.compile(optimizer.step, backend="aot_eager") if compiled else optimizer.step
        for k in range(3):
            differentiate(params, k)
            step()
        return [p.detach() for p in params]

    torch._dynamo.reset()
    torch.testing.assert_close(run(compiled=True), run(compiled=False))


@pytest.mark.gpu
def test_a_step_replays_in_a_cuda_graph() -> None:
    """With new gradients in the old memory, and a learning rate that is a tensor."""
    lr = torch.tensor(0.1, device="cuda")
    params, other = parameters(torch.float32, "cuda"), parameters(torch.float32, "cuda")
    optimizer = optim.AdamW(params, lr=lr, capturable=True, max_norm=1.0)
    plain = torch.optim.AdamW(other, lr=lr, capturable=True)
    graph = torch.cuda.CUDAGraph()
    for step in range(4):
        drawn = [torch.randn(p.shape, device="cuda") for p in params]
        for p, q, g in zip(params, other, drawn, strict=True):
            p.grad = g.clone() if p.grad is None else p.grad.copy_(g)
            q.grad = g.clone()
        nn.utils.clip_grad_norm_(other, 1.0)
        plain.step()
        if step == 0:
            optimizer.step()
            torch.cuda.synchronize()
        else:
            if step == 1:
                with torch.cuda.graph(graph):
                    optimizer.step()
            graph.replay()
        lr.mul_(0.5)
    torch.testing.assert_close(params, other)


# ------------------------------------------------------------------------------ what is refused


def gradient_of(p: nn.Parameter, gradient: Tensor) -> nn.Parameter:
    p.grad = gradient
    return p


def refused() -> Iterator[tuple[str, dict[str, Any], nn.Parameter, str]]:
    dense = nn.Parameter(torch.ones(4, 2))
    yield "sparse", {}, gradient_of(dense, torch.ones(4, 2).to_sparse()), "gradients must be dense.*SparseAdam"
    unreal = nn.Parameter(torch.ones(2, dtype=torch.complex64))
    yield (
        "complex",
        {},
        gradient_of(unreal, torch.ones_like(unreal)),
        "real floating-point tensors, got torch.complex64",
    )
    half = nn.Parameter(torch.ones(2, dtype=torch.float16))
    yield (
        "float16",
        {"rounding": "stochastic"},
        gradient_of(half, torch.ones_like(half)),
        "for torch.bfloat16 parameters",
    )


@pytest.mark.parametrize(("extras", "bad", "message"), [c[1:] for c in refused()], ids=[c[0] for c in refused()])
def test_what_cannot_be_updated_is_refused_before_anything_changes(
    extras: dict[str, Any], bad: nn.Parameter, message: str
) -> None:
    good = nn.Parameter(torch.ones(3))
    good.grad = torch.ones(3)
    optimizer = optim.AdamW([good, bad], **extras)
    with pytest.raises(TypeError, match=message):
        optimizer.step()
    torch.testing.assert_close(good.detach(), torch.ones(3), rtol=0, atol=0)
    assert not optimizer.state


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"max_norm": 0.0}, ValueError, "max_norm must be positive, got 0.0"),
        ({"ema_decay": 1.0}, ValueError, r"ema_decay must lie in \[0, 1\), got 1.0"),
        ({"rounding": "up"}, ValueError, "rounding must be one of nearest, stochastic, kahan, got 'up'"),
        (
            {"state_dtype": torch.float16},
            ValueError,
            "state_dtype must be torch.float32, torch.bfloat16 or .8bit., got",
        ),
        ({"seed": -1}, ValueError, "seed must lie in"),
        ({"differentiable": True}, ValueError, "differentiable must be False"),
        ({"maxnorm": 1.0}, TypeError, "no argument maxnorm; beside torch's own there are max_norm"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_arguments_out_of_range(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        optim.AdamW([nn.Parameter(torch.ones(1))], **arguments)


def test_lion_checks_its_own() -> None:
    p = nn.Parameter(torch.ones(1))
    with pytest.raises(ValueError, match="lr must not be negative, got -1"):
        optim.Lion([p], lr=-1)
    with pytest.raises(ValueError, match=r"betas must lie in \[0, 1\), got \(0.9, 1.0\)"):
        optim.Lion([p], betas=(0.9, 1.0))


# ------------------------------------------------------------------------------ kernels, with no GPU


@pytest.fixture(scope="module")
def records() -> dict[str, list[dict[str, Any]]]:
    # As in the audit of operators: machine code for all targets in the deep profile only.
    targets = () if settings.get_current_profile_name() == "deep" else ("sm_90", "gfx942")
    return {"traffic": audit_others("optimizers", "traffic"), "code": audit_others("optimizers", "code", targets)}


@pytest.mark.xdist_group("audit of optimizers")
def test_a_step_moves_the_least_bytes(records: dict[str, list[dict[str, Any]]]) -> None:
    # The rest is the table: a few bytes a tile.
    assert all(0.999 <= record["ratio"] <= 1.01 for record in records["traffic"]), records["traffic"]


@pytest.mark.xdist_group("audit of optimizers")
def test_a_step_spills_nothing_and_accesses_128_bits_at_a_time(records: dict[str, list[dict[str, Any]]]) -> None:
    for record in records["code"]:
        assert record["spills"] == 0, record
        assert record["widest_load"] >= 128, record
        assert record["widest_store"] >= 128, record
