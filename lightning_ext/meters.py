"""The callback that measures a run: time of a step, throughput, utilization, waiting for data, memory."""

from __future__ import annotations

import importlib.util
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

import torch
from torch.utils.flop_counter import FlopCounterMode

from braze.layouts.pinned.tree import tensors

from .measured import Window, draw, summary
from .packages import Callback, LightningModule, Trainer, rank_zero_info
from .peaks import peak_flops
from .table import Table

#: Batches before those of a trace: the first is counted, the second may compile, and the third warms the profiler up.
IDLE_STEPS = 3


class MetersCallback(Callback):
    """Measures training, logs the readings, shows them in the progress bar, and sums them up at the end.

    A step lasts from asking for its batch to the end of its hooks; validation and what lies between steps do not count.
    Every ``every_n_steps`` batches the device is waited for, so that what it was given is counted, too. The floating
    point operations of the first batch are counted by :class:`torch.utils.flop_counter.FlopCounterMode`, under which
    compiled regions run eagerly: that batch is not measured. MFU is what they make of the device's peak, and is left
    out where the peak is not known. While copies and kernels are under way, waiting on the host may cost a GPU
    nothing: ``wait_ms`` is what data costs at most.

    Logged: ``step_ms``, ``wait_ms``, ``samples_per_s`` or ``tokens_per_s`` (of all processes), ``tflops`` (10¹² FLOP/s
    of a device), ``mfu``, ``peak_gib``.

    Args:
        every_n_steps: how many batches make a reading.
        unit: "samples" counts along the first dim of a batch's first tensor; "tokens" the elements of its first tensor
            of integers. A subclass may count otherwise, in :meth:`count`.
        folder: where rank zero writes ``summary.txt`` and ``summary.png``; None writes none.
        trace_steps: how many batches go into ``trace.json`` in the folder, for chrome://tracing or Perfetto.
        device_peak: FLOP/s of the device in this precision; None looks it up.

    Raises:
        ValueError: if every_n_steps is less than 1, unit is none of these, or trace_steps is negative or has no folder.
        ImportError: if folder is given and Matplotlib is not installed.
    """

    def __init__(
        self,
        every_n_steps: int = 20,
        *,
        unit: Literal["samples", "tokens"] = "samples",
        folder: str | None = None,
        trace_steps: int = 0,
        device_peak: float | None = None,
    ) -> None:
        if every_n_steps < 1:
            raise ValueError(f"MetersCallback: every_n_steps must be at least 1, got {every_n_steps}")
        if unit not in ("samples", "tokens"):
            raise ValueError(f"MetersCallback: unit must be 'samples' or 'tokens', got {unit!r}")
        if trace_steps < 0 or (trace_steps and folder is None):
            raise ValueError(
                f"MetersCallback: trace_steps must be 0, or more with a folder to write to, got {trace_steps} and "
                f"folder={folder!r}"
            )
        if folder is not None and importlib.util.find_spec("matplotlib") is None:
            raise ImportError("MetersCallback: folder needs Matplotlib, which is not installed: pip install matplotlib")
        self.every_n_steps, self.unit, self.folder = every_n_steps, unit, folder
        self.trace_steps, self.device_peak = trace_steps, device_peak
        self.windows: list[Window] = []
        self._trace: torch.profiler.profile | None = None
        self._counter: FlopCounterMode | None = None
        self._watch: _Watch | None = None
        self._peak: float | None = None
        self._flops = self._seen = self._steps = 0
        self._items: int | None = 0  # None once a batch has nothing to count

    def count(self, batch: Any) -> int | None:
        """Samples or tokens of a batch; None if it has no such tensor."""
        for leaf in tensors(batch):
            if self.unit == "samples" and leaf.dim():
                return leaf.shape[0]
            if self.unit == "tokens" and not leaf.is_floating_point() and leaf.dtype != torch.bool:
                return leaf.numel()
        return None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start measuring."""
        device = trainer.strategy.root_device
        self.windows, self._flops, self._seen = [], 0, 0
        self._peak = self.device_peak
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            if self._peak is None:
                self._peak = peak_flops(torch.cuda.get_device_name(device), str(trainer.precision))
        self._watch = _Watch(trainer)
        self._start_window()
        if self.trace_steps and trainer.is_global_zero:
            self._start_trace()

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Count the operations of the first batch."""
        if self._seen == 0 and self._counter is None:
            self._counter = FlopCounterMode(display=False)
            self._counter.__enter__()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Take the time, and a reading if it is due."""
        assert self._watch is not None
        self._seen += 1
        if self._trace is not None:
            self._trace.step()
        if self._counter is not None:
            self._flops = self._stop_counting()
            self._start_window()
            return
        items = self.count(batch)
        self._items = None if items is None or self._items is None else self._items + items
        self._steps += 1
        if self._steps == self.every_n_steps:
            self._read(trainer, pl_module)
        else:
            self._watch.step_ended()

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Forget the batch in which a hook ended the epoch."""
        self._stop_counting()
        if self._watch is not None:
            self._watch.forget()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop measuring, and sum up on rank zero."""
        traced = max(self._seen - IDLE_STEPS, 0)
        if self._trace is not None and traced < self.trace_steps:
            rank_zero_info(
                f"MetersCallback: the trace has {traced} of {self.trace_steps} steps: there were {self._seen} batches, "
                f"and the first {IDLE_STEPS} are not in it"
            )
        self._stop()
        if self.windows and trainer.is_global_zero:
            self._write(trainer)
        elif not self.windows:
            rank_zero_info(f"MetersCallback: no reading in {self._seen} batches; every_n_steps={self.every_n_steps}")

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Stop measuring."""
        self._stop()

    def summary(self, title: str = "") -> Table:
        """The readings so far, on one page.

        Raises:
            RuntimeError: if there is none yet.
        """
        if not self.windows:
            raise RuntimeError(f"MetersCallback: no reading yet: train for more than {self.every_n_steps} batches")
        unknown = "no MFU: the peak of this device is not known; MetersCallback(device_peak=…) takes it, in FLOP/s"
        notes = [unknown] if self.windows[-1].mfu is None else []
        return summary(self.windows, self.unit, title, notes)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_trace": None, "_counter": None, "_watch": None}

    def _start_window(self) -> None:
        assert self._watch is not None
        self._steps, self._items = 0, 0
        self._watch.restart()

    def _read(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert self._watch is not None
        device = trainer.strategy.root_device
        if device.type != "cpu":
            torch.accelerator.synchronize(device)
        self._watch.step_ended()
        seconds = self._watch.busy / self._steps
        flops = self._flops / seconds if self._flops else None
        window = Window(
            step=self._seen,
            seconds=seconds,
            wait=self._watch.waited / self._steps,
            rate=None if self._items is None else self._items * trainer.world_size / self._watch.busy,
            flops=flops,
            mfu=None if flops is None or self._peak is None else flops / self._peak,
            memory=_peak_memory(device),
        )
        self.windows.append(window)
        metrics = window.metrics(self.unit)
        pl_module.log_dict(metrics, prog_bar=True, logger=False, on_step=True, on_epoch=False)
        for logger in trainer.loggers:
            # Lightning's own count of steps, by which it logs everything else.
            logger.log_metrics(metrics, step=trainer.fit_loop.epoch_loop._batches_that_stepped)
        self._start_window()

    def _stop_counting(self) -> int:
        counter, self._counter = self._counter, None
        if counter is None:
            return 0
        counter.__exit__(None, None, None)
        return counter.get_total_flops()

    def _start_trace(self) -> None:
        assert self.folder is not None
        path = Path(self.folder) / "trace.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        schedule = torch.profiler.schedule(wait=IDLE_STEPS - 1, warmup=1, active=self.trace_steps, repeat=1)
        self._trace = torch.profiler.profile(
            schedule=schedule, on_trace_ready=lambda trace: trace.export_chrome_trace(str(path))
        )
        self._trace.start()

    def _stop(self) -> None:
        self._stop_counting()
        if self._trace is not None:
            self._trace.stop()
        if self._watch is not None:
            self._watch.stop()
        self._trace = self._watch = None

    def _write(self, trainer: Trainer) -> None:
        device = trainer.strategy.root_device
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
        title = f"{name}, {trainer.precision}, processes: {trainer.world_size}"
        page = self.summary(title)
        if importlib.util.find_spec("rich") is None:
            rank_zero_info(str(page))
        else:
            import rich

            rich.print(page)
        if self.folder is not None:
            folder = Path(self.folder)
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "summary.txt").write_text(f"{page}\n", encoding="utf-8")
            draw(self.windows, self.unit, title, folder / "summary.png")


class _Watch:
    """Times what Lightning tells its profiler: asking for a batch, and moving it."""

    def __init__(self, trainer: Trainer) -> None:
        self._trainer = trainer
        self._profiler = profiler = trainer.profiler  # type: ignore[attr-defined]  # it is set by a connector
        self._since: float | None = None
        self._began: float | None = None
        self._waiting = 0.0
        start, stop = profiler.start, profiler.stop
        self.restart()

        def started(action: str) -> None:
            if self._counts(action):
                self._since = time.perf_counter()
                self._began = self._began or self._since
            start(action)

        def stopped(action: str) -> None:
            stop(action)
            if self._counts(action) and self._since is not None:
                self._waiting += time.perf_counter() - self._since
                self._since = None

        vars(profiler).update(start=started, stop=stopped)  # before the class's methods, until stop()

    def restart(self) -> None:
        """Start at zero, with the next batch."""
        self.busy, self.waited = 0.0, 0.0
        self.forget()

    def step_ended(self) -> None:
        """Add the time since its batch was asked for."""
        if self._began is not None:
            self.busy += time.perf_counter() - self._began
            self.waited += self._waiting
        self.forget()

    def forget(self) -> None:
        """Leave out the step under way."""
        self._began, self._waiting = None, 0.0

    def stop(self) -> None:
        """Leave the profiler as it was."""
        for name in ("start", "stop"):
            vars(self._profiler).pop(name, None)

    def _counts(self, action: str) -> bool:
        return action.endswith(".train_dataloader_next") or (
            action.endswith(".batch_to_device") and self._trainer.training
        )


def _peak_memory(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    with suppress(ImportError):  # Windows has none
        import resource

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024
    return 0
