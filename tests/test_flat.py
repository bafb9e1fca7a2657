"""Flat parameters: the same model, optimizers and checkpoints, in one piece of memory."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from braze.kernels import optim
from braze.layouts import FlatParameters, flatten_parameters
from braze.layouts.flat import ALIGNMENT


class Model(nn.Module):
    """Parameters that are channels_last, transposed, with gaps, empty, tied, frozen, unused, and of two dtypes."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(3, 5, 3).to(memory_format=torch.channels_last)
        self.transposed = nn.Parameter(torch.randn(7, 5).mT)
        self.gaps = nn.Parameter(torch.randn(7, 8)[:, ::2])
        self.empty = nn.Parameter(torch.randn(0, 3))
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4, bias=False)
        self.second.weight = self.first.weight
        self.frozen = nn.Parameter(torch.randn(4), requires_grad=False)
        self.low = nn.Parameter(torch.randn(4, dtype=torch.bfloat16))
        self.unused = nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x).mean((2, 3)) @ self.transposed @ self.gaps
        return self.second(self.first(x).tanh()) * self.frozen + self.low.float() + self.empty.sum()


def groups(model: Model) -> list[dict[str, Any]]:
    conv = list(model.conv.parameters())
    rest = [p for p in model.parameters() if all(p is not c for c in conv)]
    return [{"params": conv, "lr": 0.02, "weight_decay": 0.0}, {"params": rest}]


def losses(model: nn.Module, step: int) -> Tensor:
    x = torch.randn(6, 3, 8, 8, generator=torch.Generator().manual_seed(step))
    return model(x).square().mean()


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: t.detach().clone() for name, t in model.named_parameters(remove_duplicate=False)}


def assert_same_bits(mine: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert list(mine) == list(theirs)
    for name in mine:
        assert torch.equal(mine[name], theirs[name]), name


def assert_flat(flat: FlatParameters) -> None:
    """Every parameter, and gradient if there is one, lies in its own part of its buffer."""
    for buffer in flat.buffers:
        assert buffer.values.is_contiguous()
        end = buffer.values.data_ptr()
        for slot in buffer.slots:
            p = slot.parameter
            assert all(module._parameters[name] is p for module, name in slot.owners)
            if p.numel() == 0:
                continue
            assert p.data_ptr() >= end
            assert (p.data_ptr() - buffer.values.data_ptr()) % ALIGNMENT == 0
            end = p.data_ptr() + p.nbytes
            if p.grad is not None:
                assert p.grad.stride() == p.stride()
                assert p.grad.data_ptr() - buffer.gradients.data_ptr() == p.data_ptr() - buffer.values.data_ptr()
        assert end <= buffer.values.data_ptr() + buffer.values.nbytes


@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize("differentiated", [False, True])
def test_parameters_stay_what_they_are(grouped: bool, differentiated: bool) -> None:
    model = Model()
    if differentiated:
        losses(model, 0).backward()
    before, parameters = state(model), dict(model.named_parameters())
    strides = {name: p.stride() for name, p in parameters.items()}
    gradients = {name: p.grad.clone() for name, p in parameters.items() if p.grad is not None}
    flat = flatten_parameters(model, groups(model) if grouped else None)
    kinds = {(b.group, b.values.dtype) for b in flat.buffers}
    assert kinds == {(0, torch.float32), (int(grouped), torch.float32), (int(grouped), torch.bfloat16)}
    assert len(kinds) == len(flat.buffers)
    assert_same_bits(state(model), before)
    assert all(p is parameters[name] for name, p in model.named_parameters())
    assert_flat(flat)
    assert model.conv.weight.is_contiguous(memory_format=torch.channels_last)
    assert {name: p.stride() for name, p in model.named_parameters() if name != "gaps"} == {
        name: stride for name, stride in strides.items() if name != "gaps"
    }
    assert model.gaps.is_contiguous()
    assert_same_bits({name: p.grad for name, p in model.named_parameters() if p.grad is not None}, gradients)
    assert all(slot.name != "frozen" for slot in flat.slots())


OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "torch SGD": lambda g: torch.optim.SGD(g, lr=0.1, momentum=0.9, weight_decay=0.1, foreach=False),
    "torch AdamW, for-loop": lambda g: torch.optim.AdamW(g, lr=0.1, foreach=False),
    "torch AdamW, foreach": lambda g: torch.optim.AdamW(g, lr=0.1, foreach=True),
    "torch AdamW, fused": lambda g: torch.optim.AdamW(g, lr=0.1, fused=True),
    "braze SGD": lambda g: optim.SGD(g, lr=0.1, momentum=0.9),
    "braze AdamW": lambda g: optim.AdamW(g, lr=0.1, max_norm=1.0),
    "braze Muon": lambda g: optim.Muon(g, lr=0.1),
}


@pytest.mark.parametrize("zero", ["to none", "to zero", "flat"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_trains_to_the_same_bits(name: str, zero: str) -> None:
    plain, model = Model(), Model()
    plain.gaps.data = plain.gaps.data.contiguous()  # its product is another routine's otherwise
    if "Muon" in name:
        plain, model = (nn.Sequential(nn.Flatten(), nn.Linear(192, 4, bias=False)) for _ in range(2))
        model.load_state_dict(plain.state_dict())
    own = [groups(m) if isinstance(m, Model) else m.parameters() for m in (plain, model)]
    flat = flatten_parameters(model)
    optimizers = [OPTIMIZERS[name](g) for g in own]
    for step in range(4):
        for m, optimizer in zip((plain, model), optimizers, strict=True):
            losses(m, step).backward()
            losses(m, step + 100).backward()  # accumulated
            optimizer.step()
            if m is model and zero == "flat":
                flat.zero_grad()
            else:
                optimizer.zero_grad(set_to_none=zero == "to none")
        assert_flat(flat)
    assert_same_bits(state(model), state(plain))
    if zero != "flat":
        pairs = zip(model.parameters(), plain.parameters(), strict=True)
        assert all((p.grad is None) == (q.grad is None) for p, q in pairs)


def exact_norm(model: nn.Module) -> Tensor:
    return torch.cat([p.grad.double().flatten() for p in model.parameters() if p.grad is not None]).norm()


@pytest.mark.parametrize("max_norm", [0.01, 1e6])
def test_norm_and_clip_are_those_of_torch(max_norm: float) -> None:
    plain, model = Model(), Model()
    flat = flatten_parameters(model)
    for m in (plain, model):
        losses(m, 0).backward()
        m.zero_grad()
        losses(m, 1).backward()
    before = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    exact = exact_norm(model)
    theirs, mine = nn.utils.clip_grad_norm_(plain.parameters(), max_norm), flat.clip_grad_norm_(max_norm)
    # Twice torch's own error and one rounding step of bfloat16, in which torch sums the squares of those gradients.
    assert (mine - exact).abs() <= 2 * ((theirs - exact).abs() + torch.finfo(torch.float32).eps * exact)
    after = [p.grad for p in model.parameters() if p.grad is not None]
    for gradient, was in zip(after, before, strict=True):
        expected = was.double() * min(1.0, max_norm / (exact.item() + 1e-6))
        # A factor of three roundings and a product of one, rounded to the gradient's dtype.
        bound = (
            2 * torch.finfo(gradient.dtype).eps * expected.abs() + 8 * torch.finfo(torch.float32).eps * expected.abs()
        )
        assert ((gradient.double() - expected).abs() <= bound).all()
        if max_norm > exact:
            assert torch.equal(gradient, was)
    assert_flat(flat)


def test_a_gradient_that_is_gone_does_not_count() -> None:
    model = Model()
    flat = flatten_parameters(model)
    losses(model, 0).backward()
    model.conv.weight.grad = None
    exact = exact_norm(model)
    torch.testing.assert_close(flat.norm().double(), exact)
    assert model.conv.weight.grad is None
    assert model.unused.weight.grad is None  # nor do optimizers see one


def test_a_gradient_from_elsewhere_counts() -> None:
    model = Model()
    flat = flatten_parameters(model)
    model.conv.weight.grad = torch.ones(5, 3, 3, 3)
    model.low.grad = torch.full((4,), 2.0, dtype=torch.bfloat16)
    torch.testing.assert_close(flat.norm(), torch.tensor(5 * 27 + 16.0).sqrt())
    assert_flat(flat)
    flat.zero_grad()
    assert model.conv.weight.grad.eq(0).all()
    assert all(b.gradients.eq(0).all() for b in flat.buffers)


def test_gradients_to_be_differentiated_are_left_to_autograd() -> None:
    model = Model()
    flatten_parameters(model)
    with pytest.warns(UserWarning, match="create_graph"):
        losses(model, 0).backward(create_graph=True)
    assert model.conv.weight.grad.requires_grad


def test_sparse_gradients_become_dense() -> None:
    embedding = nn.Embedding(5, 3, sparse=True)
    flat = flatten_parameters(embedding)
    embedding(torch.tensor([1, 1, 4])).sum().backward()
    assert embedding.weight.grad[:, 0].tolist() == [0, 2, 0, 0, 1]
    assert_flat(flat)


# ------------------------------------------------------------------------------ checkpoints and copies


@pytest.mark.parametrize("how", ["copied", "assigned", "swapped"])
def test_load_state_dict_loads_into_the_buffers(how: str) -> None:
    model, other = Model(), Model()
    flat = flatten_parameters(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with torch.no_grad():
        for p in other.parameters():
            p.add_(0.01)
    saved = {name: t.contiguous() for name, t in other.state_dict().items()}
    torch.__future__.set_swap_module_params_on_conversion(how == "swapped")
    try:
        model.load_state_dict(saved, assign=how == "assigned")
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)
    assert_flat(flat)
    assert_same_bits(state(model), state(other))
    assert model.second.weight is model.first.weight
    assert model.conv.weight.is_contiguous(memory_format=torch.channels_last)
    losses(model, 0).backward()
    before = state(model)
    optimizer.step()  # it still has the parameters
    flat.norm()  # a parameter whose tensor was swapped has lost its hooks: its gradient is put in place here
    assert not torch.equal(model.conv.weight, before["conv.weight"])
    assert_flat(flat)


def test_a_layer_alone_can_be_loaded() -> None:
    model = Model()
    flat = flatten_parameters(model)
    model.conv.load_state_dict({"weight": torch.ones(5, 3, 3, 3), "bias": torch.zeros(5)}, assign=True)
    assert model.conv.weight.eq(1).all()
    assert_flat(flat)


def test_checkpoints_are_as_before() -> None:
    from safetensors.torch import load, save

    model = Model()
    expected = {name: t.clone() for name, t in model.state_dict().items()}
    flatten_parameters(model)
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    assert_same_bits(torch.load(file), expected)
    tensors = {"first.bias": model.first.bias.detach(), "first.weight": model.first.weight.detach()}
    loaded = load(save(tensors))  # in no order
    assert_same_bits({name: loaded[name] for name in tensors}, {name: expected[name] for name in tensors})


@pytest.mark.parametrize("again", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["copy", "pickle"])
def test_a_copy_is_a_model_of_its_own(again: Any) -> None:
    model = Model()
    flat = flatten_parameters(model)
    before = state(model)
    other = again(model)
    other.load_state_dict({name: t + 1 for name, t in other.state_dict().items()}, assign=True)
    assert all(p.untyped_storage().nbytes() == p.nbytes for p in other.parameters())
    losses(other, 0).backward()
    assert_same_bits(state(model), before)
    assert_same_bits(state(other), {name: t + 1 for name, t in before.items()})
    assert not {id(p) for p in model.parameters()} & {id(p) for p in other.parameters()}
    assert all(p.grad is None for p in model.parameters())
    assert_flat(flat)


def test_unflatten_gives_each_its_own_memory() -> None:
    model = Model()
    before = state(model)
    flat = flatten_parameters(model)
    losses(model, 0).backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    flat.unflatten()
    assert_same_bits(state(model), before)
    assert_same_bits({name: p.grad for name, p in model.named_parameters() if p.grad is not None}, gradients)
    assert model.conv.weight.is_contiguous(memory_format=torch.channels_last)
    assert all(p.untyped_storage().nbytes() == p.nbytes for p in model.parameters() if p is not model.frozen)
    model.half()
    model.load_state_dict(before, assign=True)
    flatten_parameters(model)


# ------------------------------------------------------------------------------ running averages


def test_the_average_is_its_formula_and_can_be_tried() -> None:
    model = Model()
    flat = flatten_parameters(model)
    average = flat.average(decay=0.9)
    expected = {name: t.double() for name, t in state(model).items()}
    for step in range(3):
        losses(model, step).backward()
        torch.optim.SGD(model.parameters(), lr=0.5).step()
        average.update()
        expected = {name: 0.9 * t + 0.1 * state(model)[name].double() for name, t in expected.items()}
    trained = state(model)
    with average.applied():
        for name, p in model.named_parameters():
            # Three updates of three roundings each in float32, and one to the parameter's dtype.
            bound = 9 * torch.finfo(torch.float32).eps + torch.finfo(p.dtype).eps
            scale = max(expected[name].abs().max().item(), 1.0) if p.numel() else 1.0
            assert p.numel() == 0 or (p.double() - expected[name]).abs().max() <= bound * scale
        assert not torch.equal(model.low, trained["low"])
    assert_same_bits(state(model), trained)
    assert average.values[1].dtype == torch.float32  # of bfloat16 parameters
    with pytest.raises(ValueError, match=r"decay must be between 0 and 1, got 1\.5"):
        flat.average(1.5)


# ------------------------------------------------------------------------------ what cannot be


def test_a_model_that_moved_is_named() -> None:
    model = Model()
    flat = flatten_parameters(model)
    model.double()
    with pytest.raises(RuntimeError, match=r"conv\.weight has left its buffer|transposed has left its buffer"):
        flat.norm()


def test_what_cannot_be_flat_is_named() -> None:
    model = Model()
    with pytest.raises(ValueError, match="every parameter must be the model's"):
        flatten_parameters(model, [[nn.Parameter(torch.ones(2))]])
    with pytest.raises(ValueError, match=r"first\.weight is in two groups"):
        flatten_parameters(model, [[model.first.weight], {"params": [model.second.weight]}])
    with pytest.raises(ValueError, match="meta device"):
        flatten_parameters(nn.Linear(2, 2, device="meta"))
    before = state(model)
    flat = flatten_parameters(model)
    with pytest.raises(ValueError, match="is flat already; call unflatten"):
        flatten_parameters(model)
    assert_same_bits(state(model), before)
    assert_flat(flat)


def test_shards_are_refused() -> None:
    from torch.testing._internal.two_tensor import TwoTensor

    module = nn.Linear(2, 2)
    module.weight = nn.Parameter(TwoTensor(torch.ones(2, 2), torch.ones(2, 2)))
    with pytest.raises(TypeError, match=r"got weight of type TwoTensor; flatten before"):
        flatten_parameters(module)


def test_a_model_with_nothing_to_train_has_no_norm() -> None:
    flat = flatten_parameters(nn.Linear(2, 2).requires_grad_(False))
    assert flat.norm() == 0
