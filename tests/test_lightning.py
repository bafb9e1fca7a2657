"""FusedPrecision against Lightning's own precision: the same curve, the same checkpoints, on one device and on two."""

from __future__ import annotations

import json
import logging
import os
import pickle
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest

L = pytest.importorskip("lightning", reason="needs the extra braze[lightning]")
import torch  # noqa: E402  (after the skip)
from torch import Tensor, nn  # noqa: E402
from torch.utils.data import DataLoader, TensorDataset  # noqa: E402

from braze.kernels import unfuse, use_backend  # noqa: E402
from braze.lightning_ext import FusedPrecision  # noqa: E402

# Lightning's class for advice: add workers, define no unused loop, set a log interval.
pytestmark = [
    pytest.mark.filterwarnings("ignore::lightning.fabric.utilities.warnings.PossibleUserWarning"),
    # Lightning 2.6 builds a class of torch.utils._pytree that later versions of torch deprecate.
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*is deprecated:FutureWarning"),
    # torch's own RMSNorm says that it is slow under autocast, in the vanilla run.
    pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight:UserWarning"),
]
PRECISIONS = ("32-true", "bf16-mixed", "bf16-true")


class Block(nn.Module):
    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, eps)
        self.up = nn.Linear(width, width)
        self.second = nn.RMSNorm(width, eps)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.second(nn.functional.silu(self.up(self.norm(x))))


class Net(L.LightningModule):
    def __init__(self, eps: float = 1e-5) -> None:
        super().__init__()
        self.body = nn.Sequential(Block(16, eps), Block(16, eps), nn.Linear(16, 4))
        self.loss = nn.CrossEntropyLoss()
        self.losses: list[float] = []

    def training_step(self, batch: list[Tensor], index: int) -> Tensor:
        x, y = batch
        loss = self.loss(self.body(x), y)
        self.losses.append(loss.item())
        return loss

    def validation_step(self, batch: list[Tensor], index: int) -> None:
        x, y = batch
        self.log("loss", self.loss(self.body(x), y))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=3e-3)


def batches() -> DataLoader:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(96, 16, generator=generator)
    return DataLoader(TensorDataset(x, x[:, :4].argmax(1)), batch_size=8)


def make_trainer(precision: str, fused: bool, **options: Any) -> L.Trainer:
    chosen = {"plugins": [FusedPrecision(precision)]} if fused else {"precision": precision}
    quiet = {
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
    }
    return L.Trainer(accelerator="cpu", **{"devices": 1, "max_epochs": 2, **quiet, **chosen, **options})


def train(precision: str, fused: bool, eps: float = 1e-5) -> Net:
    torch.manual_seed(0)
    net = Net(eps)
    make_trainer(precision, fused).fit(net, batches())
    return net


def distance(a: list[float], b: list[float]) -> float:
    assert len(a) == len(b) > 0
    return max(abs(x - y) for x, y in zip(a, b, strict=True))


def assert_same_curve(fused: list[float], vanilla: list[float], exact: list[float]) -> None:
    """The operators' own contract, for a whole run: at most twice as far from the float64 run as vanilla is."""
    assert fused[-1] < fused[0], "nothing was learned, so the curves say nothing"
    assert distance(fused, exact) <= 2 * distance(vanilla, exact)


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


def test_a_wrong_epsilon_is_outside_the_noise(exact: list[float]) -> None:
    wrong, vanilla = train("32-true", fused=True, eps=1e-4), train("32-true", fused=False)
    with pytest.raises(AssertionError):
        assert_same_curve(wrong.losses, vanilla.losses, exact)


class KeepCurve(L.Callback):
    """Forked ranks return nothing, so rank zero writes its curve down."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_end(self, trainer: L.Trainer, model: Net) -> None:
        if trainer.is_global_zero:
            self.path.write_text(json.dumps({"losses": model.losses, "ranks": trainer.world_size}))


def train_on_two(folder: str) -> None:
    """Runs in a process of its own, which may fork because it has computed nothing yet."""
    for name, precision, fused in (
        ("exact", "64-true", False),
        *(
            (f"{kind} {precision}", precision, kind == "fused")
            for precision in PRECISIONS
            for kind in ("fused", "vanilla")
        ),
    ):
        torch.manual_seed(0)
        keep = KeepCurve(Path(folder) / name)
        trainer = make_trainer(precision, fused, devices=2, strategy="ddp_fork", callbacks=[keep])
        trainer.fit(Net(), batches())


def test_loss_curve_is_vanillas_on_two_devices(tmp_path: Path) -> None:
    program = f"from tests.test_lightning import train_on_two; train_on_two({str(tmp_path)!r})"
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=Path(__file__).parent.parent,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    curves = {path.name: json.loads(path.read_text()) for path in tmp_path.iterdir()}
    assert {curve["ranks"] for curve in curves.values()} == {2}
    for precision in PRECISIONS:
        names = (f"fused {precision}", f"vanilla {precision}", "exact")
        assert_same_curve(*(curves[name]["losses"] for name in names))
    assert done.stderr.count("FusedPrecision(") == len(PRECISIONS), "one report for a run, from rank zero"


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


def test_gradient_clipping_by_norm() -> None:
    clipped = []
    for fused in (False, True):
        torch.manual_seed(0)
        net = Net()
        make_trainer("32-true", fused, gradient_clip_val=1e-3, max_epochs=1).fit(net, batches())
        clipped.append(torch.cat([p.grad.flatten() for p in net.parameters()]).norm().item())
    assert clipped == pytest.approx([1e-3, 1e-3], rel=1e-2)


def test_arguments_are_checked_and_aliased() -> None:
    assert FusedPrecision(32).precision == FusedPrecision("32").precision == "32-true"
    with pytest.raises(ValueError, match=r"precision must be one of '32-true', 'bf16-mixed', 'bf16-true'.*'16-mixed'"):
        FusedPrecision("16-mixed")
    with pytest.raises(ValueError, match="fuse must be 'auto' or 'off', got True"):
        FusedPrecision(fuse=True)


def test_plugin_survives_pickling_after_a_fit() -> None:
    trainer, net = make_trainer("bf16-mixed", fused=True), Net()
    trainer.fit(net, batches())
    copy = pickle.loads(pickle.dumps(trainer.precision_plugin))
    assert copy.precision == "bf16-mixed"


def test_missing_lightning_names_the_extra() -> None:
    program = """
import sys
sys.modules["lightning"] = None
import braze.lightning_ext
try:
    braze.lightning_ext.FusedPrecision
except ImportError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=True)
    assert "pip install 'braze[lightning]'" in done.stdout
