"""A model to be trained from a configuration file: ``python train.py fit --config one_node.yaml``."""

from __future__ import annotations

import torch
from lightning.pytorch import LightningDataModule, LightningModule
from lightning.pytorch.cli import LightningCLI
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.utils.data import DataLoader, TensorDataset

#: How the processes of a group hold a block: columns of what widens, rows of what narrows, one sum behind it.
TENSOR_PARALLEL = {"gate": ColwiseParallel(), "up": ColwiseParallel(), "down": RowwiseParallel()}


class Block(nn.Module):
    """A gated MLP on a residual stream [N, width]."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(width)
        self.gate = nn.Linear(width, 4 * width, bias=False)
        self.up = nn.Linear(width, 4 * width, bias=False)
        self.down = nn.Linear(4 * width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """[N, width] → [N, width]."""
        h = self.norm(x)
        return x + self.down(nn.functional.silu(self.gate(h)) * self.up(h))


class Net(LightningModule):
    """Gated MLPs, and a classifier.

    Args:
        width: of the residual stream, and of what comes in.
        depth: how many blocks.
        classes: how many.
        lr: the learning rate.
    """

    def __init__(self, width: int = 64, depth: int = 4, classes: int = 8, lr: float = 1e-3) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.blocks = nn.Sequential(*(Block(width) for _ in range(depth)))
        self.head = nn.Linear(width, classes)
        self.loss = nn.CrossEntropyLoss()

    def training_step(self, batch: list[Tensor], index: int) -> Tensor:
        """The loss of a batch."""
        x, y = batch
        loss = self.loss(self.head(self.blocks(x)), y)
        self.log("loss", loss, prog_bar=True)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """AdamW, fused, whose gradients Lightning clips."""
        return torch.optim.AdamW(self.parameters(), lr=self.hparams["lr"], fused=True)


class ShardedNet(Net):
    """The same, held in parts by the processes of ModelParallelStrategy."""

    def configure_model(self) -> None:
        """Cut the blocks up, first along their width and then, FSDP2, by parameters."""
        mesh = self.device_mesh
        if mesh is None or any(isinstance(p, torch.distributed.tensor.DTensor) for p in self.parameters()):
            return
        for block in self.blocks:
            if mesh["tensor_parallel"].size() > 1:
                parallelize_module(block, mesh["tensor_parallel"], TENSOR_PARALLEL)
            fully_shard(block, mesh=mesh["data_parallel"])
        fully_shard(self.head, mesh=mesh["data_parallel"])


class Teacher(LightningDataModule):
    """Points [width], named by the largest of their first coordinates.

    Args:
        width: of a point.
        classes: how many of its coordinates count.
        batch_size: of a process.
    """

    def __init__(self, width: int = 64, classes: int = 8, batch_size: int = 32) -> None:
        super().__init__()
        self.width, self.classes, self.batch_size = width, classes, batch_size

    def train_dataloader(self) -> DataLoader:
        """1,024 points, the same each time."""
        x = torch.randn(1024, self.width, generator=torch.Generator().manual_seed(0))
        y = x[:, : self.classes].argmax(1)
        return DataLoader(TensorDataset(x, y), batch_size=self.batch_size, shuffle=True, drop_last=True)


if __name__ == "__main__":
    LightningCLI(Net, Teacher, subclass_mode_model=True, save_config_callback=None)
