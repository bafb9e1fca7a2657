"""Conversion to channels_last: what is converted, what is not, that it lasts, that it is checked and taken back."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from braze.layouts import channels_last, memory_format, undo_channels_last
from braze.layouts.rounding import compare

LAST = torch.channels_last


class Net(nn.Module):
    """Convolutions of all kinds, a position embedding with four dims, and a parameter with five."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 16, 3, padding=1)
        self.depthwise = nn.Conv2d(16, 16, 3, padding=1, groups=16)
        self.pointwise = nn.Conv2d(16, 16, 1)
        self.norm = nn.BatchNorm2d(16)
        self.up = nn.ConvTranspose2d(16, 8, 2, stride=2)
        self.position = nn.Parameter(torch.randn(1, 16, 8, 8))
        self.volume = nn.Parameter(torch.randn(1, 2, 2, 2, 2))

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.first(x))) + self.position
        return self.up(self.pointwise(self.depthwise(x))) * self.volume.sum()


def net() -> Net:
    torch.manual_seed(0)
    return Net()


def images(batch: int = 4, channels: int = 3, size: int = 8) -> Tensor:
    return torch.randn(batch, channels, size, size, generator=torch.Generator().manual_seed(1))


def strides(model: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: t.stride() for name, t in model.state_dict().items()}


def is_last(weight: Tensor) -> bool:
    """By strides, which also tell where ``is_contiguous`` is true of both formats."""
    return weight.stride() == torch.empty(weight.shape).to(memory_format=LAST).stride()


WEIGHTS = ["first.weight", "depthwise.weight", "pointwise.weight", "up.weight"]


def test_weights_of_convolutions_are_converted_and_nothing_else() -> None:
    model = net()
    before, parameters = strides(model), dict(model.named_parameters())
    report = channels_last(model)
    assert [record.path for record in report.converted] == ["first", "depthwise", "pointwise", "up"]
    assert dict(model.named_parameters()) == parameters  # the same objects
    changed = [name for name, stride in strides(model).items() if stride != before[name]]
    assert changed == WEIGHTS
    assert all(is_last(parameters[name]) for name in WEIGHTS)


def test_a_depthwise_weight_is_really_restrided() -> None:
    """[O, 1, H, W] counts as contiguous in both formats, and ``.contiguous`` leaves it as it is."""
    model = net()
    plain = model.depthwise.weight.contiguous(memory_format=LAST)
    assert plain.stride() == model.depthwise.weight.stride()
    channels_last(model)
    assert model.depthwise.weight.stride() == (9, 1, 3, 1)


def test_inputs_are_converted() -> None:
    model = net()
    channels_last(model)
    seen: list[Tensor] = []
    model.first.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    model(images())
    model(x=images())
    assert all(is_last(x) for x in seen)
    assert len(seen) == 2


def test_undo_gives_back_every_stride_and_hook() -> None:
    model = net()
    model.first.weight.data = model.first.weight.data.transpose(2, 3).contiguous().transpose(2, 3)  # neither format
    before, values = strides(model), copy.deepcopy(model.state_dict())
    channels_last(model)
    assert undo_channels_last(model) == 4
    assert strides(model) == before
    assert all(torch.equal(t, values[name]) for name, t in model.state_dict().items())
    for module in model.modules():
        hooks = (module._forward_pre_hooks, module._forward_hooks, module._load_state_dict_post_hooks)
        assert not any(hooks)
        assert not module._forward_pre_hooks_with_kwargs
    assert undo_channels_last(model) == 0


def test_converting_twice_adds_nothing() -> None:
    model = net()
    before = strides(model)
    channels_last(model)
    hooks = [len(m._forward_pre_hooks) + len(m._load_state_dict_post_hooks) for m in model.modules()]
    assert {record.reason for record in channels_last(model)} == {"already"}
    assert hooks == [len(m._forward_pre_hooks) + len(m._load_state_dict_post_hooks) for m in model.modules()]
    undo_channels_last(model)
    assert strides(model) == before


@pytest.mark.parametrize("assign", [False, True])
def test_survives_load_state_dict(assign: bool) -> None:
    model, other = net(), net()
    channels_last(model)
    model.load_state_dict(copy.deepcopy(other.state_dict()), assign=assign)
    assert all(is_last(dict(model.named_parameters())[name]) for name in WEIGHTS)
    assert torch.equal(model.first.weight, other.first.weight)


def pickled(model: nn.Module) -> nn.Module:
    return pickle.loads(pickle.dumps(model))


@pytest.mark.parametrize("copied", [copy.deepcopy, pickled])
def test_copies_are_converted_and_can_be_taken_back(copied: Any) -> None:
    model = net()
    before = strides(model)
    channels_last(model)
    twin = copied(model)
    assert strides(twin) == strides(model) != before
    twin.load_state_dict(net().state_dict(), assign=True)
    assert is_last(twin.depthwise.weight)
    assert undo_channels_last(twin) == 4
    assert strides(twin) == before
    assert is_last(model.depthwise.weight)


def test_gradients_go_along() -> None:
    model = net()
    model(images()).sum().backward()
    want = model.first.weight.grad.clone()  # type: ignore[union-attr]
    channels_last(model)
    assert model.first.weight.grad is not None
    assert model.first.weight.grad.stride() == model.first.weight.stride()
    assert torch.equal(model.first.weight.grad, want)


def test_compiles_whole() -> None:
    model = net()
    channels_last(model)
    torch.testing.assert_close(torch.compile(model, backend="aot_eager", fullgraph=True)(images()), model(images()))


def test_is_checked_in_training_and_passes() -> None:
    report = channels_last(net(), images())
    assert report.check is not None
    assert report.check.mode == "train"
    assert report.check.results == 1 + len(list(net().parameters()))
    assert len(report.converted) == 4
    assert "4 of 4 convolutions converted to channels_last\nchecked: 13 results in train" in str(report)


def test_a_model_that_draws_is_checked_in_evaluation() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Dropout(0.5), nn.Conv2d(8, 8, 3))
    report = channels_last(model, images())
    assert report.check is not None
    assert report.check.mode == "eval"
    assert model.training
    assert len(report.converted) == 2


@pytest.mark.parametrize("wrong", ["weight", "input"])
def test_a_wrong_conversion_is_put_back(wrong: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Planted: strides changed without moving the values; images read as if they were channels_last."""

    def relabel(weight: nn.Parameter, stride: tuple[int, ...]) -> None:
        weight.data = weight.data.as_strided(weight.shape, stride)

    def misread(leaf: Any) -> Any:
        _, c, h, w = leaf.shape
        return leaf.as_strided(leaf.shape, (c * h * w, 1, w * c, c))

    model = net()
    values = copy.deepcopy(model.state_dict())
    target, planted = ("_restride", relabel) if wrong == "weight" else ("_to_channels_last", misread)
    with monkeypatch.context() as planting:
        planting.setattr(memory_format, target, planted)
        report = channels_last(model, (images(),))
    assert report.check is not None
    assert report.check.failed
    assert report.converted == []
    assert all("the model computes something else" in record.reason for record in report)
    assert all(torch.equal(t, values[name]) for name, t in model.state_dict().items())


@pytest.mark.parametrize("factor", [1 + 1e-4, float("nan")])
def test_an_error_beyond_rounding_is_seen(factor: float) -> None:
    before, after = net(), net()
    with torch.no_grad():
        after.up.bias.mul_(factor)
    assert compare(before, after, [images()]).failed


def test_a_wrong_gradient_is_seen() -> None:
    class Doubled(nn.Conv2d):
        def forward(self, x: Tensor) -> Tensor:
            y = super().forward(x)
            return y.detach() + 1.05 * (y - y.detach())

    before, after = net(), net()
    after.first.__class__ = Doubled
    check = compare(before, after, [images()])
    assert check.failed
    assert check.where.startswith("gradient of first")


def test_position_embeddings_keep_their_format() -> None:
    model = net()
    channels_last(model)
    assert model.position.stride() == (1024, 64, 8, 1)


def test_what_is_left_says_why() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.utils.parametrizations.weight_norm(nn.Conv2d(8, 8, 3)))
    first, second = channels_last(model)
    assert (first.status, second.status) == ("converted", "left")
    assert "parametrized" in second.reason


def test_a_batch_of_one_is_left() -> None:
    model = net()
    before = strides(model)
    report = channels_last(model, images(batch=1))
    assert report.converted == []
    assert "a batch of one is no faster on the CPU" in str(report)
    assert strides(model) == before
    assert not model._forward_pre_hooks


def test_a_compiled_model_is_left_on_the_cpu() -> None:
    report = channels_last(torch.compile(net(), backend="eager"))  # type: ignore[arg-type]
    assert report.converted == []
    assert "Inductor" in str(report)


def test_a_model_that_loses_most_of_it_is_left() -> None:
    class Loses(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.convolutions = nn.ModuleList(nn.Conv2d(3, 3, 3) for _ in range(4))

        def forward(self, x: Tensor) -> Tensor:
            for convolution in self.convolutions:
                x = convolution(x.softmax(1))
            return x

    report = channels_last(Loses(), images(size=12))
    assert report.converted == []
    assert "convolutions, forward and backward, would be fed a contiguous [N, C, H, W]" in str(report)


CRASH = """
import torch
from torch import nn
from braze.layouts import channels_last
torch.manual_seed(0)
model = nn.Sequential(nn.Conv2d(3, 48, 1, stride=2), nn.ReLU(), nn.Conv2d(48, 8, 3))
channels_last(model)
for _ in range(4):
    model(torch.randn(2, 3, 320, 320)).sum().backward()
    [torch.empty(37 * size) for size in range(1, 200)]
print("survived")
"""


def test_the_crash_of_onednn_is_guarded_against() -> None:
    done = subprocess.run([sys.executable, "-c", CRASH], capture_output=True, text=True)
    # Unguarded, some runs print and die on the way out, freeing what was overwritten.
    assert (done.returncode, done.stdout) == (0, "survived\n"), done.stderr


def test_a_guarded_convolution_computes_the_same() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 48, 1, stride=2), nn.ReLU(), nn.Conv2d(48, 8, 3))
    twin = copy.deepcopy(model)
    report = channels_last(model, images(channels=1, size=16))
    assert [record.status for record in report] == ["guarded", "converted"]
    seen: list[Tensor] = []
    model[1].register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    torch.testing.assert_close(model(images(channels=1, size=16)), twin(images(channels=1, size=16)))
    assert is_last(seen[0])
    assert undo_channels_last(model) == 2


def test_gradients_have_the_strides_of_ddp_buckets() -> None:
    """DDP warns, an error here, where a gradient's strides are not those of its bucket."""
    store = dist.HashStore()
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.Conv2d(16, 16, 1), nn.Conv2d(16, 16, 3, groups=16))
        channels_last(model)
        wrapped = nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=True)
        for _ in range(2):
            wrapped(images()).sum().backward()
        for p in model.parameters():
            assert p.grad is not None
            assert p.grad.stride() == p.stride()
        with pytest.raises(ValueError, match="convert the model first, then wrap it"):
            channels_last(wrapped)
    finally:
        dist.destroy_process_group()


def test_what_is_not_a_module_is_refused() -> None:
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module, got Tensor"):
        channels_last(images())  # type: ignore[arg-type]
