"""Linear layers in float8: torchao's, emulated here, and trained as torchao's user would train them."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("lightning", reason="needs the extra braze[lightning]")
pytest.importorskip("torchao", reason="needs the extra braze[fp8]")
import torch
from torch import nn

from braze.lightning_ext import FabricFusedPrecision, FusedPrecision, fp8

from .lightning_net import WARNINGS, Net, batches, distance, emulate_float8, make_trainer, train

pytestmark = WARNINGS


@pytest.fixture
def emulated(monkeypatch: pytest.MonkeyPatch) -> None:
    emulate_float8(monkeypatch.setattr)


def kinds(module: nn.Module) -> list[str]:
    return [type(part).__name__ for part in module.modules() if isinstance(part, nn.Linear)]


class ByHand(Net):
    """As torchao's documentation has it, with the one layer left that is too small."""

    def __init__(self) -> None:
        from torchao.float8 import convert_to_float8_training

        super().__init__()
        wanted = lambda layer, path: layer.out_features == 16  # noqa: E731
        convert_to_float8_training(self, module_filter_fn=wanted, config=fp8.config("tensorwise"))


@pytest.mark.usefixtures("emulated")
def test_trains_what_torchao_trains() -> None:
    plugin = FusedPrecision(fuse="off", fp8="tensorwise")
    net = train("32-true", plugin)
    assert kinds(net) == ["Float8Linear", "Float8Linear", "Linear"]
    assert net.losses == train("32-true", False, ByHand).losses
    assert distance(net.losses, train("32-true", False).losses) > 0.0


@pytest.mark.usefixtures("emulated")
def test_parameters_keys_and_modes_are_those_of_before() -> None:
    net = Net()
    parameters, keys = list(map(id, net.parameters())), list(net.state_dict())
    net.body[0].eval()
    modes = [part.training for part in net.modules()]
    plugin = FusedPrecision(fp8="rowwise")
    plugin.convert_module(net)
    assert kinds(net) == ["Float8Linear", "Float8Linear", "Linear"]
    assert list(map(id, net.parameters())) == parameters
    assert list(net.state_dict()) == keys
    assert [part.training for part in net.modules()] == modes
    first, converted = plugin.report, list(net.modules())
    plugin.convert_module(net)
    assert plugin.report is first
    assert list(map(id, net.modules())) == list(map(id, converted))


@pytest.mark.usefixtures("emulated")
def test_report_says_what_was_left_and_why(monkeypatch: pytest.MonkeyPatch) -> None:
    net = Net()
    hooked = nn.Linear(16, 16)
    hooked.register_forward_hook(lambda module, args, y: y)
    net.body.append(hooked)
    plugin = FusedPrecision(fp8="tensorwise", skip=["body.1"])
    plugin.convert_module(net)
    assert dict(plugin.report.fp8) == {
        "body.0.up": "Linear → Float8Linear (tensorwise)",
        "body.1.up": "left, as skip says",
        "body.2": "left: 16 → 4 features are not both multiples of 16",
        "body.3": "left: it has hooks, which the new layer would lack",
    }
    assert "float8" in str(plugin.report)
    alone = nn.Linear(16, 16)
    FusedPrecision(fp8="tensorwise").convert_module(alone)
    assert type(alone) is nn.Linear


@pytest.mark.usefixtures("emulated")
def test_runs_compiled_and_resumes_in_vanilla(tmp_path: Any) -> None:
    options = {"compile": "regional", "compile_kwargs": {"backend": "eager"}}
    torch.manual_seed(0)
    net = Net()
    trainer = make_trainer("bf16-true", FusedPrecision("bf16-true", fp8="tensorwise", **options))
    trainer.fit(net, batches())
    trainer.save_checkpoint(tmp_path / "checkpoint")
    vanilla = Net()
    make_trainer("bf16-true", False, max_epochs=3).fit(vanilla, batches(), ckpt_path=tmp_path / "checkpoint")
    assert len(vanilla.losses) == 12
    assert sum(vanilla.losses) < sum(net.losses[:12])


@pytest.mark.parametrize("plugin", [FusedPrecision, FabricFusedPrecision])
def test_what_is_missing_is_said(plugin: type, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"fp8 must be None or 'tensorwise' or .*, got 'fp8'"):
        plugin(fp8="fp8")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(RuntimeError, match="fp8 must be None here, got 'rowwise': this machine has no CUDA GPU"):
        plugin(fp8="rowwise")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 0))
    with pytest.raises(RuntimeError, match=r"compute capability 8\.0, and float8 matrix products need 8\.9"):
        plugin(fp8="rowwise")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    plugin(fp8="rowwise")
    monkeypatch.setattr(fp8.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match=r"fp8='rowwise' needs torchao, .*pip install torchao"):
        plugin(fp8="rowwise")
