"""The examples train as they stand, but for the number and kind of devices."""

from __future__ import annotations

import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("lightning", reason="needs the extra braze[lightning]")
pytest.importorskip("jsonargparse", reason="needs LightningCLI's parser")
import torch

from .lightning_net import WARNINGS

FOLDER = Path(__file__).parent.parent / "examples" / "lightning"
pytestmark = [
    *WARNINGS,
    # LightningCLI 2.6 calls what jsonargparse 4.53 has renamed.
    pytest.mark.filterwarnings("ignore::jsonargparse._deprecated.JsonargparseDeprecationWarning"),
    # Its summary knows the sizes of a few precisions only, and its default logger falls back to another.
    pytest.mark.filterwarnings("ignore:Precision bf16-mixed is not supported by the model summary:UserWarning"),
    pytest.mark.filterwarnings("ignore:Starting from v1.9.0, `tensorboardX` has been removed:UserWarning"),
]


def test_one_node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    small = "--trainer.accelerator cpu --trainer.max_epochs 1 --trainer.limit_train_batches 12"
    eager = "--trainer.plugins.init_args.compile_kwargs.backend eager"
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        sys, "argv", ["train.py", "fit", "--config", str(FOLDER / "one_node.yaml"), *small.split(), *eager.split()]
    )
    runpy.run_path(str(FOLDER / "train.py"), run_name="__main__")
    assert "samples_per_s" in capsys.readouterr().out


def test_several_processes_and_their_checkpoint_in_one_file(tmp_path: Path) -> None:
    here = """
        --trainer.accelerator cpu --trainer.num_nodes 1 --trainer.devices 2 --trainer.max_epochs 1
        --trainer.limit_train_batches 2 --trainer.strategy.init_args.data_parallel_size 1
        --trainer.strategy.init_args.tensor_parallel_size 2 --trainer.plugins.init_args.compile off
    """
    torchrun = [sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    train = [str(FOLDER / "train.py"), "fit", "--config", str(FOLDER / "several_nodes.yaml"), *here.split()]
    consolidate = [sys.executable, "-m", "lightning.fabric.utilities.consolidate_checkpoint", "checkpoints/last.ckpt"]
    for command in ([*torchrun, *train], consolidate):
        done = subprocess.run(
            command,
            cwd=tmp_path,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, done.stderr
    whole = torch.load(tmp_path / "checkpoints" / "last.ckpt.consolidated", weights_only=True)
    assert whole["global_step"] == 2
    plain = runpy.run_path(str(FOLDER / "train.py"))["Net"]()
    before = plain.head.weight.clone()
    plain.load_state_dict(whole["state_dict"])
    assert not plain.head.weight.equal(before)
