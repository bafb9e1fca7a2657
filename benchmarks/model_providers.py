"""Who runs a model of the ``models`` benchmark: PyTorch, Liger-Kernel and braze, eager, compiled and under Lightning.

Each has its own copy of the same initial weights and takes the same batches in the same order. The optimizer is AdamW:
``torch.optim``'s with its defaults (a loop over the parameters on a CPU, foreach on a GPU), or
``braze.kernels.optim.AdamW`` where the provider is braze. Precision is float32 on a CPU and bf16-mixed on a GPU.
"""

from __future__ import annotations

import contextlib
import copy
import importlib.util
import itertools
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from braze.kernels import fuse, optim

from . import memory
from .workloads import Batch, Workload

LEARNING_RATE = 1e-4

#: The baseline of all ratios.
BRAZE = "braze"
VANILLA = "eager"
#: How the names of those end that compile.
COMPILED = "compiled"
#: What each provider is compared with besides: braze, run in the same way.
LIKE = {
    "eager": BRAZE,
    "liger": BRAZE,
    "compiled": "braze compiled",
    "lightning": "braze lightning",
    "lightning compiled": "braze lightning compiled",
}
LIGHTNING = ("lightning", "braze lightning", "lightning compiled", "braze lightning compiled")


class Absent(Exception):
    """A provider that cannot run here, and why."""


@dataclass
class Task:
    """What all providers of a model have in common. Nobody trains ``model`` itself."""

    workload: Workload
    model: nn.Module
    batches: Sequence[Batch]
    device: torch.device

    @property
    def dtype(self) -> str:
        """Lightning's word for the precision."""
        return "bf16-mixed" if self.device.type == "cuda" else "32-true"

    def precision(self) -> AbstractContextManager[Any]:
        """The context of every forward pass."""
        return torch.autocast("cuda", torch.bfloat16) if self.device.type == "cuda" else nullcontext()


class Learner:
    """One provider's copy of a model: it takes steps of training, and it answers."""

    #: Whether it also infers.
    infers = True

    def __init__(self, task: Task, name: str) -> None:
        self.task = task
        self.model = copy.deepcopy(task.model)
        self.around = PREPARE[name](self.model, task.device)
        self.optimizer = adamw(name, self.model)
        self._batches = itertools.cycle(task.batches)

    def train(self, training: bool) -> None:
        """Go into training or evaluation."""
        self.model.train(training)

    def step(self) -> Tensor:
        """Forward, backward and optimizer; the loss, still on its device."""
        with self.around(), self.task.precision():
            loss = self.task.workload.loss(self.model, next(self._batches))
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.detach()

    def infer(self) -> Tensor:
        """The answer to the first batch."""
        with torch.no_grad(), self.around(), self.task.precision():
            return self.task.workload.infer(self.model, self.task.batches[0])

    def peak(self, work: Callable[[], object]) -> int:
        """The most bytes that ``work`` has allocated at one time, beyond what was there before."""
        return memory.peak(work, self.task.device)

    def close(self) -> None:
        """Nothing to end."""


def learner(task: Task, name: str) -> Any:
    """A provider by name, with ``step``, ``peak`` and ``close``.

    Raises:
        Absent: where it cannot run; the message says why.
    """
    if name not in LIGHTNING:
        return Learner(task, name)
    from .model_lightning import LightningLearner

    return LightningLearner(task, name)


def adamw(name: str, model: nn.Module) -> torch.optim.Optimizer:
    """The optimizer of a provider."""
    make = optim.AdamW if name.startswith(BRAZE) else torch.optim.AdamW
    return make(model.parameters(), lr=LEARNING_RATE)


Around = Callable[[], AbstractContextManager[Any]]


def _eager(model: nn.Module, device: torch.device) -> Around:
    return nullcontext


def _compiled(model: nn.Module, device: torch.device) -> Around:
    model.compile(dynamic=False)
    return nullcontext


def _braze(model: nn.Module, device: torch.device) -> Around:
    fuse(model)
    return nullcontext


def _braze_compiled(model: nn.Module, device: torch.device) -> Around:
    fuse(model)
    return _compiled(model, device)


def _liger(model: nn.Module, device: torch.device) -> Around:
    """Its patch of this model; what it exchanges in transformers' own modules is there during its own passes only."""
    if device.type != "cuda":
        raise Absent("skipped: Liger-Kernel runs on GPUs only")
    if importlib.util.find_spec("liger_kernel") is None:
        raise Absent("skipped: liger_kernel is not installed")
    if type(model).__name__ != "LlamaForCausalLM":
        raise Absent("skipped: Liger-Kernel has no kernels for this model")
    from liger_kernel.transformers import apply_liger_kernel_to_llama

    theirs = sys.modules[type(model).__module__]
    before = dict(vars(theirs))
    apply_liger_kernel_to_llama(model=model)
    changed = {name: value for name, value in vars(theirs).items() if before.get(name) is not value}
    original = {name: before[name] for name in changed if name in before}
    vars(theirs).update(original)

    @contextmanager
    def patched() -> Iterator[None]:
        vars(theirs).update(changed)
        with contextlib.ExitStack() as stack:
            stack.callback(vars(theirs).update, original)
            yield

    return patched


#: How each provider changes its copy of the model, in place; what comes back surrounds its forward passes.
PREPARE: dict[str, Callable[[nn.Module, torch.device], Around]] = {
    "eager": _eager,
    "compiled": _compiled,
    "liger": _liger,
    "braze": _braze,
    "braze compiled": _braze_compiled,
}
NAMES = (*PREPARE, *LIGHTNING)
