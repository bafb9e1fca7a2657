"""The plugins from a configuration file, and with the other of Lightning's two packages."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("lightning", reason="needs the extra braze[lightning]")
pytest.importorskip("jsonargparse", reason="needs LightningCLI's parser")
from lightning.pytorch.cli import LightningCLI
from torch.utils.data import DataLoader

from braze.lightning_ext import FusedCallback, FusedPrecision

from .lightning_net import WARNINGS, Net, batches

pytestmark = [
    *WARNINGS,
    # LightningCLI 2.6 calls what jsonargparse 4.53 has renamed.
    pytest.mark.filterwarnings("ignore::jsonargparse._deprecated.JsonargparseDeprecationWarning"),
]

YAML = """
seed_everything: 0
trainer:
  accelerator: cpu
  devices: 1
  max_epochs: 1
  logger: false
  enable_checkpointing: false
  enable_progress_bar: false
  enable_model_summary: false
  plugins:
    - class_path: braze.lightning_ext.FusedPrecision
      init_args:
        precision: bf16-mixed
        skip: ["*.second"]
        compile: full
        compile_kwargs: {backend: eager}
        early_zero_grad: false
  callbacks:
    - class_path: braze.lightning_ext.FusedCallback
      init_args: {fuse: "off"}
"""


class WithData(Net):
    def train_dataloader(self) -> DataLoader:
        return batches()


def run(*arguments: str) -> LightningCLI:
    return LightningCLI(WithData, args=["fit", *arguments], save_config_callback=None)


def test_yaml_trains_and_its_printed_form_is_the_same(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["fit"])  # Lightning warns of arguments from two places
    (tmp_path / "config.yaml").write_text(YAML)
    with pytest.raises(SystemExit):
        run("--config", str(tmp_path / "config.yaml"), "--print_config")
    printed = capsys.readouterr().out
    (tmp_path / "printed.yaml").write_text(printed)
    with pytest.raises(SystemExit):
        run("--config", str(tmp_path / "printed.yaml"), "--print_config")
    assert capsys.readouterr().out == printed
    cli = run("--config", str(tmp_path / "printed.yaml"))
    plugin = cli.trainer.precision_plugin
    assert type(plugin) is FusedPrecision
    assert (plugin.precision, plugin.early_zero_grad) == ("bf16-mixed", False)
    assert plugin.recipe.skip == ("*.second",)
    assert plugin.recipe.compile_kwargs == {"backend": "eager"}
    assert any(type(callback) is FusedCallback for callback in cli.trainer.callbacks)
    assert len(cli.model.losses) == 12
    assert plugin.report.fusion.fused


STANDALONE = """
import warnings; warnings.simplefilter("ignore")
import pytorch_lightning as pl, lightning_fabric, torch
from torch import nn
from braze.lightning_ext import FabricFusedPrecision, FusedPrecision, MetersCallback, PrefetchCallback

class Net(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.norm = nn.RMSNorm(16)
    def training_step(self, batch, index):
        return self.norm(batch).mean()
    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)

net = Net()
quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
added = {"plugins": [FusedPrecision("bf16-mixed")], "callbacks": [PrefetchCallback(), MetersCallback(2)]}
trainer = pl.Trainer(accelerator="cpu", max_epochs=1, gradient_clip_val=1e-3, **added, **quiet)
trainer.fit(net, torch.utils.data.DataLoader(torch.randn(6, 16), batch_size=2))
fabric = lightning_fabric.Fabric(accelerator="cpu", devices=1, plugins=[FabricFusedPrecision()])
module = fabric.setup(nn.RMSNorm(16)).module
print(type(net.norm) is nn.RMSNorm, type(module) is nn.RMSNorm, f"{net.norm.weight.grad.norm():.0e}")
print(len(added["callbacks"][1].windows), added["callbacks"][0].report, "lightning" in __import__("sys").modules)
"""


def test_pytorch_lightning_takes_them_too(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", STANDALONE], cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("False False 1e-03\n1 [('train: DataLoader', 'passed on')] False\n")
