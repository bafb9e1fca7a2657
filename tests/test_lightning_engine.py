"""The engine behind the plugins of Lightning, and the thin classes over it."""

from __future__ import annotations

import copy
import pickle
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("lightning", reason="needs the extra braze[lightning]")
import lightning as L
import torch
from lightning.pytorch.plugins import DeepSpeedPrecision, MixedPrecision
from lightning.pytorch.strategies import DeepSpeedStrategy, ModelParallelStrategy
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter

from braze.kernels import unfuse
from braze.lightning_ext import (
    FabricFusedPrecision,
    FusedCallback,
    FusedDeepSpeedPrecision,
    FusedPrecision,
    precisions,
    prepare_for_sharding,
)

from .lightning_net import PRECISIONS, WARNINGS, Block, Net, assert_same_curve, batches, make_trainer, train

pytestmark = WARNINGS


def fused(module: nn.Module) -> bool:
    return type(module) not in (nn.RMSNorm, nn.LayerNorm)


class Late(Net):
    """Makes its layers in ``configure_model``."""

    def __init__(self) -> None:
        super().__init__()
        self.body = None

    def configure_model(self) -> None:
        if self.body is None:
            torch.manual_seed(0)
            self.body = nn.Sequential(Block(16, 1e-5), Block(16, 1e-5), nn.Linear(16, 4))


@pytest.mark.parametrize("model", [Net, Late], ids=["setup", "configure_model"])
def test_callback_setup_misses_no_layers(model: type[Net]) -> None:
    callback = FusedCallback()
    torch.manual_seed(0)
    net = model()
    trainer = make_trainer("bf16-mixed", False, callbacks=[callback])
    trainer.fit(net, batches())
    assert isinstance(trainer.precision_plugin, MixedPrecision)
    assert all(fused(block.norm) and fused(block.second) for block in net.body[:2])
    assert "configure_model" not in vars(net)
    vanilla, exact = train("bf16-mixed", False), train("64-true", False)
    assert_same_curve(net.losses, vanilla.losses, exact.losses)
    trainer.validate(net, batches(), verbose=False)
    again = pickle.loads(pickle.dumps(copy.deepcopy(net.body)))
    assert fused(again[0].norm)
    unfuse(net)
    assert not fused(net.body[0].norm)


def test_convert_module_repeats() -> None:
    frames = CompileCounter()
    plugin, net = FusedPrecision(compile="full", compile_kwargs={"backend": frames}), Net()
    first = plugin.convert_module(net) and plugin.report
    calls = [part._compiled_call_impl for part in net.children()]
    assert plugin.convert_module(net) is net
    assert plugin.report is first
    assert [part._compiled_call_impl for part in net.children()] == calls


def test_compile_full_is_in_place_where_the_step_calls() -> None:
    """LightningModule.compile compiles a forward that nothing calls; torch.compile renames keys."""
    frames = CompileCounter()
    plugin = FusedPrecision(compile="full", compile_kwargs={"backend": frames})
    net = train("32-true", plugin)
    assert frames.frame_count > 0
    assert list(net.state_dict()) == list(Net().state_dict())
    assert_same_curve(net.losses, train("32-true", False).losses, train("64-true", False).losses)
    assert plugin.report.compiled == [("body", "compiled in place")]
    assert net._compiled_call_impl is None


def test_compile_full_leaves_what_the_user_compiled() -> None:
    net = Net()
    net.body.compile(backend="eager")
    own = net.body._compiled_call_impl
    plugin = FusedPrecision(compile="full", compile_kwargs={"backend": CompileCounter()})
    plugin.convert_module(net)
    assert net.body._compiled_call_impl is own
    assert plugin.report.compiled == [("body", "left: it is compiled already")]


def test_compile_regional_compiles_the_blocks() -> None:
    frames = CompileCounter()
    net = train("32-true", FusedPrecision(compile="regional", compile_kwargs={"backend": frames}))
    assert frames.frame_count == 2, "one for the first block, whose input needs no gradient"
    assert list(net.state_dict()) == list(Net().state_dict())
    assert_same_curve(net.losses, train("32-true", False).losses, train("64-true", False).losses)


class Pictures(Net):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(4, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(32, 4))
        self.seen: list[bool] = []
        self.body[0].register_forward_hook(
            lambda module, args, y: self.seen.append(y.is_contiguous(memory_format=torch.channels_last))
        )

    def training_step(self, batch: list[Tensor], index: int) -> Tensor:
        return super().training_step([batch[0].view(-1, 1, 4, 4).expand(-1, 4, 4, 4), batch[1]], index)


def test_channels_last_converts_what_the_step_feeds_to_a_child() -> None:
    plugin = FusedPrecision(memory_format="channels_last")
    net = train("32-true", plugin, Pictures)
    assert net.body[0].weight.is_contiguous(memory_format=torch.channels_last)
    assert net.seen == [True] * 24
    assert "channels_last: converted" in str(plugin.report)
    vanilla = train("32-true", False, Pictures)
    assert not any(vanilla.seen)
    assert_same_curve(net.losses, vanilla.losses, train("64-true", False, Pictures).losses)


def attached(strategy: Any) -> Net:
    """A model whose Trainer has a strategy that cannot run here."""
    net = Net()
    plugin = FusedPrecision(skip=["*.second"])
    net._trainer = SimpleNamespace(strategy=strategy, precision_plugin=plugin, precision="32-true", callbacks=[])
    return net


def test_deepspeed_engine_makes_the_step() -> None:
    plugin = FusedDeepSpeedPrecision("bf16-true")
    own = {name for name in vars(FusedDeepSpeedPrecision) if not name.startswith("__")}
    assert own == {"convert_module"}
    assert isinstance(plugin, DeepSpeedPrecision)
    net = plugin.convert_module(Net())
    assert fused(net.body[0].second)
    assert net.body[0].up.weight.dtype == torch.bfloat16


def test_deepspeed_refuses_the_generic_plugin(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(DeepSpeedStrategy, "root_device", torch.device("cpu"))
    with pytest.raises(ValueError, match=r"the strategy must not be DeepSpeedStrategy.*use FusedDeepSpeedPrecision"):
        FusedPrecision().convert_module(attached(object.__new__(DeepSpeedStrategy)))


def test_model_parallel_has_no_loss_scale(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ModelParallelStrategy, "root_device", torch.device("cpu"))
    net = attached(object.__new__(ModelParallelStrategy))
    with pytest.raises(ValueError, match="ModelParallelStrategy takes '32-true', 'bf16-mixed' and 'bf16-true'"):
        FusedPrecision("16-mixed").convert_module(net)
    assert not fused(net.body[0].norm)


def test_prepare_for_sharding_asks_the_trainers_plugin() -> None:
    net = attached(None)
    report = prepare_for_sharding(net, skip=["loss"])
    assert fused(net.body[0].norm)
    assert not fused(net.body[0].second)
    assert len(report.fusion.fused) == 2
    body = Net().body
    prepare_for_sharding(body, skip=["*.norm"])
    assert fused(body[0].second)
    assert not fused(body[0].norm)


def test_report_of_a_prepared_model_tells_of_swaps_and_of_compiling() -> None:
    body = Net().body
    swaps = prepare_for_sharding(body).fusion
    plugin = FusedPrecision(compile="full", compile_kwargs={"backend": "eager"})
    plugin.convert_module(body)
    assert plugin.report.fusion is swaps
    assert plugin.report.compiled == [("(the model)", "compiled in place")]


def fabric_losses(plugin: Any, precision: str | None = None, optimizer: str = "") -> list[float]:
    fabric = L.Fabric(accelerator="cpu", devices=1, plugins=[plugin] if plugin else None, precision=precision)
    torch.manual_seed(0)
    net = Net().body
    before = list(map(id, net.parameters()))
    own = torch.optim.SGD(net.parameters(), lr=2.0, fused=optimizer == "fused")
    net, own = fabric.setup(net, own)
    assert list(map(id, net.parameters())) == before, "new parameters would train nothing"
    losses = []
    for x, y in [*batches(), *batches()]:
        loss = nn.functional.cross_entropy(net(x.double() if precision == "64-true" else x).double(), y)
        losses.append(loss.item())
        fabric.backward(loss)
        fabric.clip_gradients(net, own, max_norm=0.05)
        own.step()
        own.zero_grad()
    return losses


@pytest.mark.parametrize("precision", PRECISIONS)
def test_new_parameters_in_fabric_there_are_none(precision: str) -> None:
    losses = fabric_losses(FabricFusedPrecision(precision), optimizer="fused")
    assert_same_curve(losses, fabric_losses(None, precision), fabric_losses(None, "64-true"))


def test_fabric_scales_the_loss_in_16_mixed(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.warns(UserWarning, match="on the CPU this trains in bf16-mixed"):
        fallen = fabric_losses(FabricFusedPrecision("16-mixed"))
    assert fallen == fabric_losses(FabricFusedPrecision("bf16-mixed"))
    monkeypatch.setattr(precisions, "has_float16_autocast", lambda device_type: True)
    plugin = FabricFusedPrecision("16-mixed")
    plugin.load_state_dict({**torch.amp.GradScaler("cpu").state_dict(), "scale": 2.0**10})
    losses = fabric_losses(plugin, optimizer="fused")
    assert plugin.state_dict()["scale"] == 2.0**10, "resumed, and nothing overflowed"
    assert_same_curve(losses, fabric_losses(None, "bf16-mixed"), fabric_losses(None, "64-true"))
