"""FusedPrecision between backward and step: clipping, loss scaling, optimizers that Lightning's plugins refuse."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("lightning", reason="needs the extra braze[lightning]")
import torch
from lightning.pytorch.plugins import MixedPrecision

from braze.kernels import optim
from braze.lightning_ext import FusedPrecision, precisions
from braze.lightning_ext.clipping import clip_grad_norm_over_meshes_

from .lightning_net import WARNINGS, Net, assert_same_curve, batches, distance, make_trainer, train

pytestmark = WARNINGS
NORM = {"gradient_clip_val": 0.05}
VALUE = {"gradient_clip_val": 0.01, "gradient_clip_algorithm": "value"}
STOCK = functools.partial(torch.optim.SGD, lr=2.0, momentum=0.5)
OPTIMIZERS = {
    "torch": STOCK,
    "torch, fused": functools.partial(STOCK, fused=True),
    "braze": functools.partial(optim.SGD, lr=2.0, momentum=0.5),
}


class Steep(Net):
    """Takes steps whose size is that of the gradients."""

    def __init__(self, optimizer: Any = STOCK) -> None:
        super().__init__()
        self.optimizer = optimizer

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return self.optimizer(self.parameters())


def steep(precision: str, fused: Any, optimizer: Any = STOCK, **options: Any) -> list[float]:
    return train(precision, fused, functools.partial(Steep, optimizer), **options).losses


@functools.cache
def reference(precision: str, algorithm: str) -> list[float]:
    """Vanilla's curve, with an optimizer that every plugin takes."""
    return steep(precision, False, **(NORM if algorithm == "norm" else VALUE))


def test_clipping_decides_the_curve() -> None:
    free, norm, value = steep("64-true", False), reference("64-true", "norm"), reference("64-true", "value")
    assert min(distance(free, norm), distance(free, value), distance(norm, value)) > 0.1


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "bf16-true"])
@pytest.mark.parametrize("algorithm", ["norm", "value"])
def test_fused_optimizers_are_clipped_as_plain_ones(precision: str, algorithm: str, optimizer: str) -> None:
    """Lightning 2.6.6 refuses to clip with the fused ones in bf16-mixed."""
    fused = steep(precision, True, OPTIMIZERS[optimizer], **(NORM if algorithm == "norm" else VALUE))
    assert_same_curve(fused, reference(precision, algorithm), reference("64-true", algorithm))


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_clipping_inside_the_step_of_the_optimizer(precision: str) -> None:
    inside = functools.partial(OPTIMIZERS["braze"], max_norm=NORM["gradient_clip_val"])
    assert_same_curve(steep(precision, True, inside), reference(precision, "norm"), reference("64-true", "norm"))


def test_norm_of_plain_gradients_is_torchs() -> None:
    found = []
    for clip in (torch.nn.utils.clip_grad_norm_, clip_grad_norm_over_meshes_):
        torch.manual_seed(0)
        parameters = [torch.nn.Parameter(torch.randn(3, 4)) for _ in range(3)]
        for parameter in parameters[:2]:
            parameter.grad = torch.randn(3, 4)
        found.append([clip(parameters, 0.1), *(parameter.grad for parameter in parameters[:2])])
    torch.testing.assert_close(found[1], found[0])
    assert clip_grad_norm_over_meshes_(parameters[2:], 0.1) == 0


def test_16_mixed_is_bf16_mixed_on_a_cpu_as_in_lightning() -> None:
    with pytest.warns(UserWarning, match="on the CPU this trains in bf16-mixed, as Lightning does"):
        fallen = steep("16-mixed", True, **NORM)
    assert fallen == steep("bf16-mixed", True, **NORM)


@pytest.fixture
def float16(monkeypatch: pytest.MonkeyPatch) -> None:
    """float16 autocast and loss scaling as on a GPU: torch has both on the CPU, too."""
    monkeypatch.setattr(precisions, "has_float16_autocast", lambda device_type: True)


def scaled_vanilla(**options: Any) -> list[float]:
    return steep("16-mixed", MixedPrecision("16-mixed", "cpu"), **options)


@pytest.mark.usefixtures("float16")
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_16_mixed_with_fused_optimizer_and_clip(optimizer: str) -> None:
    fused = steep("16-mixed", True, OPTIMIZERS[optimizer], **NORM)
    assert_same_curve(fused, scaled_vanilla(**NORM), reference("64-true", "norm"))


class Overflowing(Steep):
    """Every fifth loss has gradients beyond float16; at the scale that it starts from, no other has."""

    def on_train_start(self) -> None:
        if self.trainer.global_step == 0:
            scaler = self.trainer.precision_plugin.scaler
            scaler.load_state_dict({**scaler.state_dict(), "scale": 2.0**12})

    def training_step(self, batch: Any, index: int) -> Any:
        loss = super().training_step(batch, index)
        return loss * 1e30 if index % 5 == 1 else loss


@pytest.mark.usefixtures("float16")
@pytest.mark.filterwarnings("ignore:`training_step` returned `None`:UserWarning")  # in the exact run
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_16_mixed_skips_steps_that_overflow(optimizer: str) -> None:
    model = functools.partial(Overflowing, OPTIMIZERS[optimizer])
    fused = train("16-mixed", True, model, **NORM)
    vanilla = train("16-mixed", MixedPrecision("16-mixed", "cpu"), Overflowing, **NORM)
    scales = [net.trainer.precision_plugin.scaler.get_scale() for net in (fused, vanilla)]
    assert scales[0] == scales[1] == 2.0 ** (12 - 6)
    skipped = train("64-true", False, Skipping, **NORM).losses
    assert_same_curve(fused.losses, vanilla.losses, skipped)


class Skipping(Steep):
    """What the loss scale makes of :class:`Overflowing`."""

    def training_step(self, batch: Any, index: int) -> Any:
        loss = super().training_step(batch, index)
        return None if index % 5 == 1 else loss


@pytest.mark.usefixtures("float16")
@pytest.mark.parametrize("first", ["fused", "vanilla"])
def test_loss_scale_resumes_both_ways(first: str, tmp_path: Path) -> None:
    def trainer(fused: bool, **options: Any) -> Any:
        plugin = FusedPrecision("16-mixed") if fused else MixedPrecision("16-mixed", "cpu")
        return make_trainer("16-mixed", plugin, **NORM, **options)

    one, two = trainer(first == "fused", max_epochs=1), trainer(first != "fused", max_epochs=2)
    one.fit(Overflowing(), batches())
    scale = one.precision_plugin.scaler.get_scale()
    assert scale == 2.0 ** (12 - 3)
    one.save_checkpoint(tmp_path / "model.ckpt")
    assert "FusedPrecision" not in torch.load(tmp_path / "model.ckpt", weights_only=False)
    two.fit(Steep(), batches(), ckpt_path=tmp_path / "model.ckpt", weights_only=False)
    assert two.precision_plugin.scaler.get_scale() == scale


@pytest.mark.usefixtures("float16")
def test_lbfgs_and_a_loss_scale_are_refused() -> None:
    with pytest.raises(ValueError, match="the optimizer must not be LBFGS in precision '16-mixed'"):
        steep("16-mixed", True, torch.optim.LBFGS)


def test_fsdp_norm_over_some_of_the_parameters_is_refused() -> None:
    plugin, net = FusedPrecision(), Net()
    plugin._root = net  # in the place of FullyShardedDataParallel
    optimizer = torch.optim.SGD(net.body[0].parameters(), lr=1.0)
    with pytest.raises(ValueError, match="one optimizer must hold all of its trainable parameters"):
        plugin.clip_gradients(optimizer, 1.0)


@pytest.mark.parametrize("optimizer", ["SGD", "AdamW"])
def test_stochastic_rounding_in_bf16_true(optimizer: str, tmp_path: Path) -> None:
    """The weights of norms start at 1, where bfloat16 has steps of 2⁻⁹ and more: ten times those of the optimizer."""
    rate = {"SGD": 1e-2, "AdamW": 1e-4}[optimizer]
    moved = {}
    for rounding in ("nearest", "stochastic"):
        make = functools.partial(getattr(optim, optimizer), lr=rate, rounding=rounding, max_norm=0.1)
        torch.manual_seed(0)
        net, trainer = Steep(make), make_trainer("bf16-true", fused=True)
        trainer.fit(net, batches())
        weights = [p.detach() for name, p in net.named_parameters() if name.endswith(("norm.weight", "second.weight"))]
        assert {p.dtype for p in weights} == {torch.bfloat16}
        moved[rounding] = sum((p != 1).sum().item() for p in weights)
    assert moved["nearest"] == 0
    assert moved["stochastic"] > 0
    trainer.save_checkpoint(tmp_path / "model.ckpt")
    resumed = make_trainer("bf16-true", fused=True, max_epochs=3)
    resumed.fit(Steep(make), batches(), ckpt_path=tmp_path / "model.ckpt")
    assert resumed.global_step == 36
