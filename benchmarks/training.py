"""One training run of the demo in a process of its own, a block of steps at a time.

A run waits for its turn before every block. So two runs can share one machine and be timed in alternation, each with
its own compiler state and its own peak memory.
"""

from __future__ import annotations

import logging
import resource
import sys
import time
import traceback
import warnings
from collections.abc import Sequence
from multiprocessing.connection import Connection
from typing import Any

import lightning as L
import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils.data import DataLoader

from braze.lightning_ext import FusedPrecision

from .memory import most_allocated
from .result import BLOCK, PROFILED, Precision, Result
from .tasks import TASKS


def run(connection: Connection, task: str, precision: Precision, fused: bool, steps: int) -> None:
    """Train, then send the :class:`Result`; a string instead is a traceback."""
    try:
        connection.send(_train(connection, task, precision, fused, steps))
    except EOFError:
        pass  # the one who gives the turns is gone
    except Exception:
        connection.send(traceback.format_exc())


def _train(connection: Connection, name: str, precision: Precision, fused: bool, steps: int) -> Result:
    warnings.simplefilter("ignore")  # Lightning's advice about workers and loggers would tear up the progress bars
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    task = TASKS[name]
    L.seed_everything(0, verbose=False)
    model = task.build()
    train_data, validation_data = task.data()
    train = DataLoader(train_data, task.batch, shuffle=True, drop_last=True, generator=torch.Generator().manual_seed(0))
    validation = DataLoader(validation_data, task.batch, drop_last=True)
    clock = _Turns(connection, steps)
    plugin = FusedPrecision(precision) if fused else None
    trainer = L.Trainer(
        accelerator="cpu",
        devices=1,
        plugins=[plugin] if plugin else None,
        precision=None if plugin else precision,
        max_steps=steps,
        max_epochs=-1,
        limit_val_batches=20,
        num_sanity_val_steps=2,  # compiles validation before the first step, where its time is counted as set-up
        val_check_interval=steps,
        check_val_every_n_epoch=None,
        callbacks=[clock],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    clock.mark = time.perf_counter()
    trainer.fit(model, train, validation)
    result = clock.result
    result.validation_loss = float(trainer.callback_metrics["validation_loss"])
    result.process_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (
        1 if sys.platform == "darwin" else 1024
    )
    if plugin:
        result.joints = [(record.was, record.status, record.reason) for record in plugin.report.fusion]
    return result


class _Turns(L.Callback):
    """Waits for the turn before every block, times every step, and measures the memory of the last two."""

    def __init__(self, connection: Connection, steps: int) -> None:
        self.connection, self.steps = connection, steps
        self.result = Result()
        self.mark = 0.0
        self.profiler: profile | None = None

    def on_train_batch_start(self, trainer: L.Trainer, model: L.LightningModule, batch: Any, batch_idx: int) -> None:
        done = len(self.result.seconds)
        if done == 0:
            self.result.set_up = time.perf_counter() - self.mark
        if done % BLOCK == 0:
            self.connection.send(done)
            self.connection.recv()
        if done == self.steps - PROFILED:
            # The profiler does not see the release of what it did not see allocated, and the step would release these.
            for optimizer in trainer.optimizers:
                optimizer.zero_grad()
            self.result.tensor_bytes = _held(model, trainer.optimizers)
            self.profiler = profile(activities=[ProfilerActivity.CPU], profile_memory=True)
            self.profiler.start()
        self.mark = time.perf_counter()

    def on_train_batch_end(
        self, trainer: L.Trainer, model: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.result.seconds.append(time.perf_counter() - self.mark)
        self.result.losses.append(float(outputs["loss"]))
        if self.profiler and len(self.result.seconds) == self.steps:
            self.profiler.stop()
            self.result.tensor_bytes += most_allocated(self.profiler)


def _held(model: torch.nn.Module, optimizers: Sequence[torch.optim.Optimizer]) -> int:
    """Bytes of parameters, buffers and optimizer state."""
    tensors = [*model.parameters(), *model.buffers()]
    for optimizer in optimizers:
        for state in optimizer.state.values():
            tensors += [value for value in state.values() if isinstance(value, torch.Tensor)]
    return sum(t.numel() * t.element_size() for t in tensors)
