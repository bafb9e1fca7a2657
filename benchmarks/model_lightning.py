"""A provider of the ``models`` benchmark that a Lightning Trainer runs, one step at a time."""

from __future__ import annotations

import copy
import gc
import itertools
import queue
import threading
from collections.abc import Callable
from typing import Any

import lightning as L
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from braze.lightning_ext import FusedPrecision

from . import memory
from .model_providers import BRAZE, COMPILED, Task, adamw

#: Steps whose memory is looked at: the gradients of one live on through the next one's forward pass.
MEASURED = 2


class LightningLearner:
    """A Trainer in a thread of its own, which waits before every batch until a step is asked for.

    So a step is all that a Trainer does from one batch to the next. Braze is there as a user has it: ``FusedPrecision``
    as the Trainer's plugin, and its AdamW. Compiled, vanilla is the whole model, and braze the plugin's own
    ``compile="regional"``.
    """

    infers = False

    def __init__(self, task: Task, name: str) -> None:
        self._asked: queue.SimpleQueue[Callable[[], object] | None] = queue.SimpleQueue()
        self._answers: queue.SimpleQueue[Tensor | BaseException | None] = queue.SimpleQueue()
        self._task, self._name = task, name
        self._module = _Module(task, name, self._turn)
        self._thread = threading.Thread(target=self._fit, daemon=True)
        self._thread.start()
        self._answer()

    def train(self, training: bool) -> None:
        """The Trainer does that."""

    def step(self) -> Tensor:
        """One step; the loss, still on its device."""
        return self._step(lambda: None)

    def peak(self, work: Callable[[], object]) -> int:
        """The most bytes that a step has allocated at one time. The gradients of the step before are among them."""
        # A profiler does not see the release of what it did not see allocated, and the step would release these.
        for p in self._module.parameters():
            p.grad = None
        if self._task.device.type == "cuda":
            return memory.peak(lambda: [self.step() for _ in range(MEASURED)], self._task.device)
        gc.collect()
        profiler = profile(activities=[ProfilerActivity.CPU], profile_memory=True)
        self._step(profiler.start)  # it sees the thread that starts it
        for _ in range(MEASURED - 1):
            self.step()
        self._step(profiler.stop)
        return memory.most_allocated(profiler)

    def close(self) -> None:
        """End the fit."""
        self._asked.put(None)
        self._thread.join()

    def _step(self, first: Callable[[], object]) -> Tensor:
        """A step, after ``first`` has run in the thread that trains."""
        self._asked.put(first)
        loss = self._answer()
        assert loss is not None
        return loss

    def _answer(self) -> Tensor | None:
        answer = self._answers.get()
        if isinstance(answer, BaseException):
            raise answer
        return answer

    def _turn(self, loss: Tensor | None) -> bool:
        """Hand over the last loss, and wait; whether to go on."""
        self._answers.put(loss)
        first = self._asked.get()
        if first is not None:
            first()
        return first is not None

    def _fit(self) -> None:
        try:
            precision: Any = self._task.dtype
            fused, compiled = self._name.startswith(BRAZE), self._name.endswith(COMPILED)
            if compiled and not fused:
                self._module.network.compile(dynamic=False)
            trainer = L.Trainer(
                accelerator=self._task.device.type,
                devices=1,
                plugins=[FusedPrecision(precision, compile="regional" if compiled else "off")] if fused else None,
                precision=None if fused else precision,
                max_epochs=-1,
                logger=False,
                enable_checkpointing=False,
                enable_progress_bar=False,
                enable_model_summary=False,
            )
            trainer.fit(self._module, itertools.cycle(self._task.batches))
        except BaseException as error:  # to be raised where the step was asked for
            self._answers.put(error)


class _Module(L.LightningModule):
    def __init__(self, task: Task, name: str, turn: Callable[[Tensor | None], bool]) -> None:
        super().__init__()
        self.network = copy.deepcopy(task.model)
        self.task, self.provider, self.turn = task, name, turn
        self.last: Tensor | None = None

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> int | None:
        if self.turn(self.last):
            return None
        self.trainer.should_stop = True
        return -1

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = self.task.workload.loss(self.network, batch)
        self.last = loss.detach()
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return adamw(self.provider, self.network)
