"""The audit: small modules that lose their layout in a known place, and what must be said of them."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from braze.layouts import LayoutReport, audit
from braze.layouts.__main__ import main
from braze.layouts.report import Event
from braze.layouts.trace import Ref

HERE = Path(__file__).name


class Around(nn.Module):
    """A convolution, something, and a convolution that takes what comes."""

    def __init__(self, middle: Callable[[Tensor], Tensor], channels: int = 8) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.second = nn.Conv2d(channels, 4, 3, padding=1)
        self.middle = middle

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        x = self.middle(x)
        return self.second(x)


MIDDLE = Around.forward.__code__.co_firstlineno + 2  # the line that calls self.middle


def images(size: int = 8) -> Tensor:
    return torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0))


def fed(report: LayoutReport, device: str) -> tuple[int, int]:
    found = report.convolutions[device]  # type: ignore[index]
    return found.forward_nchw, found.backward_nchw


def order(x: Tensor) -> Tensor:
    return torch.arange(x.shape[1] - 1, -1, -1)


#: (what it does, channels after it): loses in forward everywhere.
LOSES: dict[str, tuple[Callable[[Tensor], Tensor], int]] = {
    "instance_norm": (F.instance_norm, 8),
    "softmax": (lambda x: x.softmax(1), 8),
    "masked_fill": (lambda x: x.masked_fill(x > 0, 0.0), 8),
    "index_select": (lambda x: x.index_select(1, order(x)), 8),
    "indexing": (lambda x: x[:, order(x)], 8),
    "repeat": (lambda x: x.repeat(1, 2, 1, 1), 16),
    "cumsum": (lambda x: x.cumsum(1), 8),
    "grid_sample": (lambda x: F.grid_sample(x, torch.zeros(2, 8, 8, 2), align_corners=False), 8),
    "fold": (lambda x: F.fold(F.unfold(x, 3, padding=1), (8, 8), 3, padding=1), 8),
    "stack": (lambda x: torch.stack([x, x], 2).flatten(1, 2), 16),
    "shuffle by views": (lambda x: x.unflatten(1, (2, 4)).transpose(1, 2).contiguous().flatten(1, 2), 8),
    "cat": (lambda x: torch.cat([x, x.contiguous(memory_format=torch.contiguous_format)], 1), 16),
    "left operand": (lambda x: x.contiguous(memory_format=torch.contiguous_format) + x, 8),
}
KEEPS: dict[str, tuple[Callable[[Tensor], Tensor], int]] = {
    "relu": (F.relu, 8),
    "pool": (lambda x: F.max_pool2d(x, 2), 8),
    "pad": (lambda x: F.pad(x, (1, 1, 1, 1)), 8),
    "layer norm over channels": (lambda x: F.layer_norm(x.permute(0, 2, 3, 1), (8,)).permute(0, 3, 1, 2), 8),
    "tokens": (lambda x: (x.flatten(2).transpose(1, 2) * 2).transpose(1, 2).unflatten(2, (8, 8)), 8),
}
#: What the CPU keeps and CUDA loses.
CUDA_ONLY: dict[str, tuple[Callable[[Tensor], Tensor], int]] = {
    "pixel_shuffle": (lambda x: F.pixel_shuffle(x, 2), 2),
    "reflect": (lambda x: F.pad(x, (1, 1, 1, 1), mode="reflect"), 8),
    "replicate": (lambda x: F.pad(x, (1, 1, 1, 1), mode="replicate"), 8),
    "roll": (lambda x: x.roll(1, 2), 8),
    "max_unpool": (lambda x: F.max_unpool2d(*F.max_pool2d(x, 2, return_indices=True), 2), 8),
    "pixel_unshuffle": (lambda x: F.pixel_unshuffle(x, 2), 32),
    "group_norm": (lambda x: F.group_norm(x, 2), 8),
}
#: What loses the gradient, and only it.
BACKWARD_ONLY: dict[str, tuple[Callable[[Tensor], Tensor], int]] = {
    "glu": (lambda x: F.glu(x, 1), 4),
    "bicubic": (lambda x: F.interpolate(x, scale_factor=2, mode="bicubic"), 8),
    "sort": (lambda x: x.sort(1)[0], 8),
}


def run(middle: tuple[Callable[[Tensor], Tensor], int]) -> LayoutReport:
    return audit(Around(*middle), images())


def test_slices_of_channels_last_memory_are_counted_and_lose_nothing() -> None:
    forward = run((lambda x: x[:, :4], 4)).convolutions["cpu"]
    assert (forward.forward_gaps, forward.backward_gaps, forward.forward_nchw) == (1, 0, 0)
    report = run((lambda x: torch.cat([x, x.detach()], 1), 16))  # its gradient is split
    assert report.convolutions["cpu"].backward_gaps == 1
    assert report.verdict("cpu") == "clean"
    assert "channels_last with gaps, copied first: 1" in str(report)


@pytest.mark.parametrize("name", LOSES)
def test_a_loss_in_forward_is_blamed_on_its_line(name: str) -> None:
    report = run(LOSES[name])
    for device in ("cpu", "cuda"):
        assert report.verdict(device) == "loses in forward"  # type: ignore[arg-type]
        assert fed(report, device)[0] == 1
        losses = [e for e in report if e.kind == "loses" and e.device == device and not e.backward]
        assert losses
        assert all(Path(e.line).name.startswith(f"{HERE}:") and e.bytes > 0 for e in losses)
        assert all(e.module == "" for e in losses)  # the module whose forward calls the function
    (transposed,) = [e for e in report if e.kind == "transposes" and e.op == "aten.convolution" and e.device == "cpu"]
    assert transposed.module == "second"


@pytest.mark.parametrize("name", KEEPS)
def test_what_keeps_the_layout_is_clean(name: str) -> None:
    report = run(KEEPS[name])
    assert report.verdict("cpu") == report.verdict("cuda") == "clean"
    assert [e for e in report if e.kind in ("loses", "transposes")] == []


@pytest.mark.parametrize("name", CUDA_ONLY)
def test_what_only_cuda_loses_is_predicted(name: str) -> None:
    report = run(CUDA_ONLY[name])
    assert report.verdict("cpu") == "clean"
    assert report.verdict("cuda") == "loses in forward"
    assert {e.device for e in report if e.kind == "loses" and not e.backward} == {"cuda"}


@pytest.mark.parametrize("name", BACKWARD_ONLY)
def test_a_loss_in_backward_is_blamed_on_the_forward_line(name: str) -> None:
    report = run(BACKWARD_ONLY[name])
    assert report.verdict("cpu") == "loses in backward"
    assert fed(report, "cpu") == (0, 1)
    losses = [e for e in report if e.kind == "loses" and e.device == "cpu"]
    assert losses
    assert all(e.backward and Path(e.line).name.startswith(f"{HERE}:") for e in losses)
    assert audit(Around(*BACKWARD_ONLY[name]), images(), backward=False).verdict("cpu") == "clean"


def test_the_line_is_the_line() -> None:
    class Masks(Around):
        def forward(self, x: Tensor) -> Tensor:
            x = self.first(x)
            x = x.masked_fill(x > 0, 0.0)  # this one
            return self.second(x)

    (loss,) = [e for e in audit(Masks(F.relu), images(), backward=False) if e.kind == "loses" and e.device == "cpu"]
    assert loss.line == f"{__file__}:{Masks.forward.__code__.co_firstlineno + 2}"
    assert loss.op == "aten.masked_fill"
    assert loss.bytes == 2 * 8 * 8 * 8 * 4


def test_bilinear_under_16_channels_stays_on_cuda() -> None:
    """The meta kernel says that it does not."""
    assert run((lambda x: F.interpolate(x, scale_factor=2, mode="bilinear"), 8)).verdict("cuda") == "clean"


def test_copies_of_a_slice_are_reported() -> None:
    events = list(run((lambda x: x[:, :4].contiguous(memory_format=torch.channels_last), 4)))
    copies = [e for e in events if e.kind == "copies" and e.device == "cpu" and not e.backward]
    assert [(e.op, e.bytes) for e in copies] == [("aten.clone", 2 * 4 * 8 * 8 * 4)]


def test_an_expanded_gradient_that_reaches_a_convolution_is_blamed() -> None:
    """Not what carried it on: the gradient of the doubling is as contiguous as what it gets."""

    class Doubles(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * 2

    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), Doubles(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    report = audit(model, images())
    assert fed(report, "cpu") == (0, 1)
    (loss,) = [e for e in report if e.kind == "loses" and e.device == "cpu"]
    assert (loss.op, loss.module, loss.backward) == ("aten.div", "3", True)


def test_weights_are_not_activations() -> None:
    class Pruned(nn.Conv2d):
        def forward(self, x: Tensor) -> Tensor:
            return F.conv2d(x, (2 * self.weight).masked_fill(self.weight > 0.1, 0.0))

    report = audit(nn.Sequential(nn.Conv2d(3, 8, 3), Pruned(8, 8, 3)), images())
    assert report.verdict("cpu") == "clean"
    assert not [e for e in report if e.kind == "loses"]


def test_the_convolution_that_crashes_is_found_and_survived() -> None:
    model = nn.Sequential(nn.Conv2d(3, 48, 1, stride=2), nn.ReLU())
    report = audit(model, images(160))
    assert report.verdict("cpu") == "crashes"
    assert report.verdict("cuda") == "clean"
    (event,) = [e for e in report if e.kind == "crashes"]
    assert (event.module, event.device, event.backward) == ("0", "cpu", True)


@pytest.mark.parametrize(
    "harmless",
    [
        nn.Conv2d(16, 8, 1, stride=2),
        nn.Conv2d(3, 8, 1),
        nn.Conv2d(3, 8, 3, stride=2),
        nn.Conv2d(3, 8, 1, stride=2, padding=1),
        nn.Conv2d(4, 8, 1, stride=2, groups=2),
        nn.ConvTranspose2d(8, 4, 1, stride=2),
    ],
    ids=str,
)
def test_its_neighbours_are_not_suspected(harmless: nn.Conv2d) -> None:
    assert audit(harmless, torch.randn(2, harmless.in_channels, 8, 8)).verdict("cpu") != "crashes"


def test_transposed_convolutions_count() -> None:
    report = audit(nn.Sequential(nn.Conv2d(3, 8, 3), nn.ConvTranspose2d(8, 4, 2, stride=2)), images())
    assert report.convolutions["cpu"].forward == report.convolutions["cpu"].backward == 2


def test_the_model_stays_as_it_was() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Dropout(0.5)).train()
    x = images().requires_grad_()
    before = {name: (t.clone(), t.stride()) for name, t in model.state_dict().items()}
    state = torch.get_rng_state()
    audit(model, x)
    assert torch.equal(torch.get_rng_state(), state)
    assert x.grad is None
    for name, t in model.state_dict().items():
        assert torch.equal(t, before[name][0])
        assert t.stride() == before[name][1]
    assert all(p.grad is None for p in model.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize(
    ("size", "stride", "layout"),
    [
        ((2, 3, 4, 5), (60, 1, 15, 3), "channels_last"),
        ((2, 3, 4, 5), (60, 20, 5, 1), "contiguous"),
        ((2, 3, 4, 5), (120, 1, 30, 6), "channels_last"),  # a slice of more channels
        ((2, 1, 4, 5), (20, 20, 5, 1), "either"),
        ((2, 1, 4, 5), (20, 1, 5, 1), "either"),
        ((2, 3, 1, 1), (3, 1, 1, 1), "either"),
        ((2, 3, 4, 5), (3, 1, 0, 0), "either"),  # expanded
        ((2, 3, 4, 1), (12, 1, 3, 3), "channels_last"),
        ((2, 3, 4, 5), (60, 20, 1, 4), "other"),
        ((2, 3, 4), (12, 4, 1), "other"),
    ],
)
def test_layouts(size: tuple[int, ...], stride: tuple[int, ...], layout: str) -> None:
    assert Ref(0, size, stride, 0, torch.float32).layout == layout


def test_the_report_prints_iterates_and_writes() -> None:
    rich = pytest.importorskip("rich.console")
    report = run(LOSES["softmax"])
    assert all(isinstance(event, Event) for event in report)
    assert len(json.loads(json.dumps(report.as_dicts()))) == len(report) > 0
    console = rich.Console(width=200, file=io.StringIO())
    console.print(report)
    for printed in (str(report), console.file.getvalue()):
        assert "aten._softmax" in printed
        assert "cpu, measured: loses in forward; convolutions fed [N, C, H, W] contiguous: 1 of 2 in forward" in printed
        assert "cuda, predicted: loses in forward" in printed


def softmax_model() -> nn.Module:
    return Around(*LOSES["softmax"])


def not_a_model() -> int:
    return 3


def test_the_command_prints_and_draws(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    picture, file = tmp_path / "flow.png", tmp_path / "events.json"
    arguments = ["audit", f"{__name__}:softmax_model", "--size", "8", "--plot", str(picture), "--json", str(file)]
    assert main(arguments) == 0
    assert "aten._softmax" in capsys.readouterr().out
    assert picture.read_bytes()[:4] == b"\x89PNG"
    assert json.loads(file.read_text())["events"]


def test_the_command_prints_without_rich(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "rich.console", None)
    main(["audit", f"{__name__}:softmax_model", "--size", "8", "--eval"])
    assert "aten._softmax" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("specifier", "message"),
    [
        ("resnet18", "a model is named torchvision:NAME, timm:NAME or package.module:function, got 'resnet18'"),
        ("torchvision:resnet81", "torchvision has no model 'resnet81'; did you mean resnet18"),
        ("timm:mobilevitv2_05", "timm has no model 'mobilevitv2_05'; did you mean mobilevitv2_0"),
        ("no_such_package:f", "there is no module 'no_such_package'"),
        ("math:no_such_function", "math has no function 'no_such_function'"),
        (f"{__name__}:not_a_model", "must return a torch.nn.Module, got int"),
    ],
)
def test_an_unknown_model_is_refused(specifier: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("timm")
    pytest.importorskip("torchvision")
    with pytest.raises(SystemExit):
        main(["audit", specifier])
    assert message in capsys.readouterr().err


def test_what_cannot_be_audited_is_refused() -> None:
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module, got function"):
        audit(lambda x: x, images())  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="an output that requires a gradient: pass backward=False"):
        audit(nn.Conv2d(3, 4, 1).requires_grad_(False), images())
