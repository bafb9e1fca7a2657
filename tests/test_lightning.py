"""FusedPrecision against Lightning's own precision on one device: the same curve, the same checkpoints."""

from __future__ import annotations

import logging
import pickle
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("lightning", reason="needs the extra braze[lightning]")
import lightning as L
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging, WeightAveraging
from lightning.pytorch.tuner import Tuner
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter

from braze.kernels import unfuse, use_backend
from braze.lightning_ext import FusedPrecision

from .budget import excess
from .lightning_net import (
    PRECISIONS,
    WARNINGS,
    Block,
    Net,
    SaveInTheMiddle,
    assert_same_curve,
    batches,
    distance,
    make_trainer,
    train,
)

pytestmark = WARNINGS


@pytest.fixture(scope="module")
def exact() -> list[float]:
    return train("64-true", fused=False).losses


@pytest.mark.parametrize("backend", [None, "triton"])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_loss_curve_is_vanillas_on_one_device(precision: str, backend: str | None, exact: list[float]) -> None:
    vanilla = train(precision, fused=False)
    with use_backend(backend) if backend else nullcontext():
        fused = train(precision, fused=True)
    assert_same_curve(fused.losses, vanilla.losses, exact)
    for ours, theirs in zip(fused.parameters(), vanilla.parameters(), strict=True):
        assert ours.dtype == theirs.dtype


class Wrong(Net):
    def __init__(self) -> None:
        super().__init__(eps=1e-4)


def test_a_wrong_epsilon_is_outside_the_noise(exact: list[float]) -> None:
    wrong, vanilla = train("32-true", fused=True, model=Wrong), train("32-true", fused=False)
    with pytest.raises(AssertionError):
        assert_same_curve(wrong.losses, vanilla.losses, exact)


@pytest.mark.parametrize("saved_by", ["fused", "vanilla"])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_checkpoints_load_both_ways(precision: str, saved_by: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    first = make_trainer(precision, saved_by == "fused", max_epochs=1)
    net = Net()
    first.fit(net, batches())
    path = tmp_path / "model.ckpt"
    first.save_checkpoint(path)

    second = make_trainer(precision, saved_by != "fused", max_epochs=2)
    resumed = Net()
    seen: list[dict[str, Any]] = []

    class Look(L.Callback):
        def on_train_start(self, trainer: L.Trainer, model: Net) -> None:
            seen.append({"model": {k: v.clone() for k, v in model.state_dict().items()}, "step": trainer.global_step})
            seen[0]["optimizer"] = trainer.optimizers[0].state_dict()["state"][0]["exp_avg"].clone()

    second.callbacks.append(Look())
    second.fit(resumed, batches(), ckpt_path=path)
    checkpoint = torch.load(path, weights_only=True)
    assert list(seen[0]["model"]) == list(checkpoint["state_dict"]) == list(Net().state_dict())
    for key, value in checkpoint["state_dict"].items():
        torch.testing.assert_close(seen[0]["model"][key], value, rtol=0, atol=0)
    saved = checkpoint["optimizer_states"][0]["state"][0]["exp_avg"]
    torch.testing.assert_close(seen[0]["optimizer"], saved, rtol=0, atol=0)
    assert seen[0]["step"] == 12
    assert second.global_step == 24


@pytest.mark.parametrize("precision", PRECISIONS)
def test_checkpoint_holds_what_vanillas_holds(precision: str, tmp_path: Path) -> None:
    contents = []
    for fused in (False, True):
        trainer = make_trainer(precision, fused, max_epochs=1)
        trainer.fit(Net(), batches())
        trainer.save_checkpoint(tmp_path / "model.ckpt")
        contents.append(torch.load(tmp_path / "model.ckpt", weights_only=True))
    vanilla, ours = contents
    assert ours.keys() == vanilla.keys()
    assert ours["optimizer_states"][0]["state"].keys() == vanilla["optimizer_states"][0]["state"].keys()


def test_conversion_is_in_place_repeatable_and_undone_by_unfuse() -> None:
    net, plugin = Net(), FusedPrecision()
    parameters, keys = list(map(id, net.parameters())), list(net.state_dict())
    classes = [type(module) for module in net.modules()]
    assert plugin.convert_module(net) is net
    once = [type(module) for module in net.modules()]
    assert once != classes
    plugin.convert_module(net)
    plugin.convert_module(net)
    assert [type(module) for module in net.modules()] == once
    assert list(map(id, net.parameters())) == parameters
    assert list(net.state_dict()) == keys
    unfuse(net)
    assert [type(module) for module in net.modules()] == classes


def test_report_is_printed_once_for_fit_and_validate(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="lightning.pytorch.utilities.rank_zero")
    trainer, net = make_trainer("32-true", fused=True), Net()
    trainer.fit(net, batches())
    trainer.validate(net, batches(), verbose=False)
    reports = [message for message in caplog.messages if message.startswith("FusedPrecision(")]
    assert len(reports) == 1
    assert "RMSNorm" in reports[0]


def test_fuse_off_and_skip_leave_modules_alone() -> None:
    net = Net()
    FusedPrecision(fuse="off").convert_module(net)
    assert type(net.body[0].second) is nn.RMSNorm
    FusedPrecision(skip=["body.0.second"]).convert_module(net)
    assert type(net.body[0].second) is nn.RMSNorm
    assert type(net.body[1].second) is not nn.RMSNorm


def test_arguments_are_checked_and_aliased() -> None:
    assert FusedPrecision(32).precision == FusedPrecision("32").precision == "32-true"
    with pytest.raises(ValueError, match=r"precision must be one of '32-true', .* got '16-true'"):
        FusedPrecision("16-true")
    with pytest.raises(ValueError, match="fuse must be 'auto' or 'off', got True"):
        FusedPrecision(fuse=True)
    with pytest.raises(ValueError, match="compile must be 'off' or 'regional' or 'full', got 'all'"):
        FusedPrecision(compile="all")
    with pytest.raises(ValueError, match="memory_format must be None or 'channels_last', got 'nhwc'"):
        FusedPrecision(memory_format="nhwc")
    with pytest.raises(ValueError, match=r"compile_kwargs must be empty where nothing is compiled, got \{'mode'"):
        FusedPrecision(compile_kwargs={"mode": "max-autotune"})


def test_plugin_survives_pickling_after_a_fit() -> None:
    trainer, net = make_trainer("bf16-mixed", fused=True), Net()
    trainer.fit(net, batches())
    copy = pickle.loads(pickle.dumps(trainer.precision_plugin))
    assert copy.precision == "bf16-mixed"


def test_missing_lightning_names_the_extra() -> None:
    program = """
import sys
sys.modules["lightning"] = sys.modules["pytorch_lightning"] = None
import braze.lightning_ext
try:
    braze.lightning_ext.FusedPrecision
except ImportError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=True)
    assert "pip install 'braze[lightning]'" in done.stdout


def rest_of_the_epoch(first: str, second: str, path: Path) -> list[float]:
    """The losses after a checkpoint in the middle of the first epoch."""
    train("32-true", first == "fused", callbacks=[SaveInTheMiddle(path)])
    resumed = Net()
    make_trainer("32-true", second == "fused").fit(resumed, batches(), ckpt_path=path)
    return resumed.losses


def test_resumes_in_the_middle_of_an_epoch_both_ways(tmp_path: Path, exact: list[float]) -> None:
    reference = rest_of_the_epoch("vanilla", "vanilla", tmp_path / "model.ckpt")
    assert len(reference) == 24 - 4
    # Vanilla may be off by its distance from float64, and fused by twice as much.
    noise = distance(train("32-true", fused=False).losses, exact)
    for first, second in (("vanilla", "fused"), ("fused", "vanilla")):
        assert distance(rest_of_the_epoch(first, second, tmp_path / "model.ckpt"), reference) <= 3 * noise


class Late(Net):
    """Makes its layers in ``configure_model``."""

    def __init__(self) -> None:
        super().__init__()
        self.body = None

    def configure_model(self) -> None:
        if self.body is None:
            torch.manual_seed(0)
            self.body = nn.Sequential(Block(16, 1e-5), Block(16, 1e-5), nn.Linear(16, 4))


class ByHand(Net):
    """Two optimizers under manual optimization, which accumulates over two batches and looks at old gradients."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.old: list[float] = []

    def training_step(self, batch: list[Tensor], index: int) -> None:
        x, y = batch
        self.old.append(sum(p.grad.norm().item() for p in self.parameters() if p.grad is not None))
        loss = self.loss(self.body(x), y)
        self.losses.append(loss.item())
        self.manual_backward(loss)
        if index % 2:
            for optimizer in self.optimizers():
                optimizer.step()
                optimizer.zero_grad()

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        first, rest = list(self.body[0].parameters()), list(self.body[1:].parameters())
        return [torch.optim.AdamW(first, lr=3e-3), torch.optim.SGD(rest, lr=0.1)]


@pytest.mark.parametrize(
    ("model", "options"),
    [
        (Late, {}),
        (ByHand, {}),
        (Net, {"accumulate_grad_batches": 5}),  # which does not divide the twelve batches of an epoch
        (Net, {"callbacks": "averaging"}),
        (Net, {"callbacks": "ema"}),
    ],
    ids=["configure_model", "manual optimization, two optimizers", "accumulation", "parameters averaged", "EMA"],
)
def test_loss_curve_is_vanillas_with(model: type[Net], options: dict[str, Any]) -> None:
    averaging = {"averaging": WeightAveraging, "ema": EMAWeightAveraging}
    runs = []
    for precision, fused in (("32-true", True), ("32-true", False), ("64-true", False)):
        own = {**options, **({"callbacks": [averaging[options["callbacks"]]()]} if "callbacks" in options else {})}
        runs.append(train(precision, fused, model, **own))
    fused, vanilla, exact = runs
    assert_same_curve(fused.losses, vanilla.losses, exact.losses)
    weights = [torch.cat([p.detach().double().flatten() for p in run.parameters()]).tolist() for run in runs]
    # Of the averages, where there are any; a rounding step of the largest weight is Adam's where gradients vanish.
    assert distance(weights[0], weights[2]) <= 2 * distance(weights[1], weights[2]) + 1e-6
    if model is ByHand:
        assert any(fused.old), "gradients of a batch before stay under manual optimization"
    assert any("braze" in type(m).forward.__module__ for m in fused.modules()), "nothing was fused"


@pytest.mark.parametrize("precision", PRECISIONS)
def test_outputs_and_parameters_have_vanillas_dtypes(precision: str) -> None:
    dtypes = []
    for fused in (False, True):
        net = Net()
        (first, *_) = make_trainer(precision, fused).predict(net, batches())
        dtypes.append([first.dtype, *(p.dtype for p in net.parameters())])
    assert dtypes[0] == dtypes[1]


def test_learning_rate_finder_finds_vanillas_rate() -> None:
    found = []
    for fused in (False, True):
        torch.manual_seed(0)
        net = Net()
        net.lr = 1e-3
        net.configure_optimizers = lambda net=net: torch.optim.SGD(net.parameters(), lr=net.lr)
        finder = Tuner(make_trainer("32-true", fused)).lr_find(
            net, batches(), num_training=20, early_stop_threshold=None
        )
        found.append(finder.results["loss"])
    assert found[0] == pytest.approx(found[1], rel=1e-4)


def test_validation_and_predict_alone_run_fused(exact: list[float]) -> None:
    torch.manual_seed(0)
    net = Net()
    predictions = make_trainer("32-true", fused=True).predict(net, batches())
    assert type(net.body[0].second) is not nn.RMSNorm
    unfuse(net)
    plain, truth = (
        make_trainer(precision, fused=False).predict(net, batches()) for precision in ("32-true", "64-true")
    )
    assert excess(predictions, plain, truth) <= 1
    losses = []
    for precision, fused in (("32-true", True), ("32-true", False), ("64-true", False)):
        torch.manual_seed(0)
        (metrics,) = make_trainer(precision, fused).validate(Net(), batches(), verbose=False)
        losses.append([torch.tensor(metrics["loss"], dtype=torch.float64)])
    assert excess([losses[0][0].float()], [losses[1][0].float()], losses[2]) <= 1


def test_replacing_the_optimizer_in_connect_is_not_done() -> None:
    seen = []

    class Scheduled(Net):
        def configure_optimizers(self) -> Any:
            optimizer = super().configure_optimizers()
            seen.append(optimizer)
            return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1)]

    net = Scheduled()
    trainer = make_trainer("bf16-mixed", fused=True, max_epochs=3)
    trainer.fit(net, batches())
    assert trainer.optimizers[0] is seen[0]
    assert trainer.lr_scheduler_configs[0].scheduler.optimizer is seen[0]
    assert seen[0].param_groups[0]["lr"] == pytest.approx(3e-6)


def test_user_compiles_the_lightning_module() -> None:
    frames = CompileCounter()
    torch.manual_seed(0)
    net = Quiet()
    make_trainer("32-true", fused=True).fit(torch.compile(net, backend=frames), batches())
    assert frames.frame_count > 0
    vanilla = train("32-true", fused=False)
    exact = train("64-true", fused=False)
    assert list(net.state_dict()) == list(vanilla.state_dict())
    assert_same_curve([loss.item() for loss in net.kept], vanilla.losses, exact.losses)


class Quiet(Net):
    """Keeps losses as tensors: ``item`` breaks the graph."""

    def __init__(self) -> None:
        super().__init__()
        self.kept: list[Tensor] = []

    def training_step(self, batch: list[Tensor], index: int) -> Tensor:
        x, y = batch
        return self.loss(self.body(x), y)

    def on_train_batch_end(self, outputs: dict[str, Tensor], batch: Any, index: int) -> None:
        self.kept.append(outputs["loss"])
