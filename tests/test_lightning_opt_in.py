"""Opting in by an environment variable: nothing without it, the callbacks that it names with it."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("lightning", reason="needs the extra braze[lightning]")
import lightning as L
import torch
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel

from braze.lightning_ext import (
    FabricFusedPrecision,
    FusedCallback,
    FusedPrecision,
    MetersCallback,
    PrefetchCallback,
    opt_in,
)
from braze.lightning_ext.opted_in import OptedIn

from .lightning_net import WARNINGS, Net, SaveInTheMiddle, assert_same_curve, batches, make_trainer, train

pytestmark = WARNINGS


def ours(trainer: Any) -> list[type]:
    found = trainer.callbacks if isinstance(trainer, L.Trainer) else trainer._callbacks
    return [type(callback) for one in found if isinstance(one, OptedIn) for callback in one.callbacks]


@pytest.mark.parametrize(
    ("value", "trainers", "fabrics"),
    [
        (None, [], []),
        ("", [], []),
        ("0", [], []),
        ("1", [FusedCallback], [FusedCallback]),
        ("fuse, prefetch,meters", [FusedCallback, PrefetchCallback, MetersCallback], [FusedCallback]),
        ("prefetch", [PrefetchCallback], []),
    ],
)
def test_every_trainer_and_fabric_gets_what_the_variable_names(
    value: str | None, trainers: list[type], fabrics: list[type], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(opt_in.VARIABLE, raising=False)
    if value is not None:
        monkeypatch.setenv(opt_in.VARIABLE, value)
    assert ours(make_trainer("32-true", False)) == trainers
    assert ours(L.Fabric(accelerator="cpu", devices=1)) == fabrics


def test_names_say_what_a_model_gets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(opt_in.VARIABLE, "channels_last,regional,prefetch")
    (opted_in,) = opt_in.trainer_callbacks()
    fused, prefetch = opted_in.callbacks
    assert (fused.recipe.fuse, fused.recipe.memory_format, fused.recipe.compile) == ("off", "channels_last", "regional")
    assert prefetch.memory_format == "channels_last"
    monkeypatch.setenv(opt_in.VARIABLE, "fuse,speed")
    with pytest.raises(ValueError, match=r"BRAZE_LIGHTNING must be 0, 1 .* or a list of fuse, .*, got 'speed'"):
        make_trainer("32-true", False)


def test_an_unchanged_run_trains_fused(monkeypatch: pytest.MonkeyPatch) -> None:
    vanilla, exact = train("bf16-mixed", False), train("64-true", False)
    monkeypatch.setenv(opt_in.VARIABLE, "1")
    net = train("bf16-mixed", False)
    assert type(net.body[0].second) is not nn.RMSNorm
    assert_same_curve(net.losses, vanilla.losses, exact.losses)


def test_an_unchanged_fabric_trains_fused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(opt_in.VARIABLE, "1")
    fabric = L.Fabric(accelerator="cpu", devices=1)
    net = Net().body
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    module, optimizer = fabric.setup(net, optimizer)
    assert type(net[0].second) is not nn.RMSNorm
    before = net[0].second.weight.clone()
    fabric.backward(module(torch.randn(4, 16)).square().sum())
    optimizer.step()
    assert not net[0].second.weight.equal(before), "the optimizer holds the parameters of the fused modules"


def test_what_a_plugin_of_the_script_was_told_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(opt_in.VARIABLE, "1")
    net = Net()
    make_trainer("32-true", FusedPrecision(skip=["*.second"])).fit(net, batches())
    assert type(net.body[0].second) is nn.RMSNorm
    assert type(net.body[0].norm) is not nn.LayerNorm
    body = Net().body
    L.Fabric(accelerator="cpu", devices=1, plugins=[FabricFusedPrecision(skip=["*.second"])]).setup(body)
    assert type(body[0].second) is nn.RMSNorm


def test_what_a_callback_of_the_script_was_told_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(opt_in.VARIABLE, "fuse,prefetch,meters")
    own = [FusedCallback(skip=["*.second"]), PrefetchCallback(depth=1)]
    net, trainer = Net(), make_trainer("32-true", False, callbacks=own)
    trainer.fit(net, batches())
    assert type(net.body[0].second) is nn.RMSNorm
    assert type(net.body[0].norm) is not nn.LayerNorm
    assert [type(one) for one in trainer.callbacks if type(one).__module__.startswith("braze.")] == [
        FusedCallback,
        PrefetchCallback,
        MetersCallback,
    ]
    body = Net().body
    L.Fabric(accelerator="cpu", devices=1, callbacks=[own[0]]).setup(body)
    assert type(body[0].second) is nn.RMSNorm
    assert type(body[0].norm) is not nn.LayerNorm


def test_a_checkpoint_resumes_with_and_without_the_variable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the middle of an epoch, where the place in it is in the state of PrefetchCallback."""
    curves = []
    for saving, resuming in (("", ""), ("prefetch", ""), ("", "prefetch"), ("prefetch", "prefetch")):
        own = {"prefetch": [], "": [PrefetchCallback()]}
        monkeypatch.setenv(opt_in.VARIABLE, saving)
        train("32-true", False, callbacks=[*own[saving], SaveInTheMiddle(tmp_path / "checkpoint")])
        monkeypatch.setenv(opt_in.VARIABLE, resuming)
        net = Net()
        options = {"callbacks": list(own[resuming])}
        make_trainer("32-true", False, **options).fit(net, batches(), ckpt_path=tmp_path / "checkpoint")
        curves.append(net.losses)
    assert curves == [curves[0]] * 4
    assert len(curves[0]) == 20


def test_flattened_parameters_are_refused() -> None:
    wrapped = object.__new__(FullyShardedDataParallel)
    nn.Module.__init__(wrapped)
    with pytest.raises(ValueError, match=r"must not be FSDPStrategy.*use Fabric\(plugins=\[FabricFusedPrecision"):
        FusedCallback().on_after_setup(L.Fabric(accelerator="cpu", devices=1), nn.Sequential(wrapped))


def test_not_asked_for_it_imports_nothing(tmp_path: Path) -> None:
    program = """
import sys
from braze.lightning_ext import opt_in
before = set(sys.modules)
print(opt_in.trainer_callbacks(), opt_in.fabric_callbacks(), set(sys.modules) - before)
print(any(name.split(".")[0] in ("torch", "lightning", "triton") for name in sys.modules))
"""
    environment = {name: value for name, value in os.environ.items() if name != opt_in.VARIABLE}
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.stdout == "[] [] set()\nFalse\n", done.stderr


def test_both_packages_of_lightning_find_the_factories() -> None:
    for package in ("lightning.pytorch", "pytorch_lightning"):
        (found,) = (one for one in entry_points(group=f"{package}.callbacks_factory") if one.name == "braze")
        assert found.load() is opt_in.trainer_callbacks
    for package in ("lightning.fabric", "lightning_fabric"):
        (found,) = (one for one in entry_points(group=f"{package}.callbacks_factory") if one.name == "braze")
        assert found.load() is opt_in.fabric_callbacks
