"""The callback that copies batches to the device ahead of time."""

from __future__ import annotations

import warnings
from collections import deque
from collections.abc import Iterator
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from braze.layouts import PinnedLoader
from braze.layouts.pinned.tree import map_leaves

from .packages import Callback, LightningModule, Trainer, is_overridden, rank_zero_info
from .start_report import Part, Report, reports, start_table

#: Hooks that are written for a batch on the host.
HOST_HOOKS = ("on_before_batch_transfer", "transfer_batch_to_device")


class PrefetchCallback(Callback):
    """Puts a :class:`braze.layouts.PinnedLoader` around every dataloader of a Trainer, after its sampler is made.

    Batches are on the device when the loop asks for them, so that what Lightning does to them on the way, such as the
    cast of ``bf16-true``, happens there and not on the host. ``on_after_batch_transfer`` runs once, as always. Where
    the model or the data module overrides ``on_before_batch_transfer`` or ``transfer_batch_to_device``, a batch has to
    stay on the host for them: then a DataLoader gets ``pin_memory=True``, and nothing else is done.

    Checkpoints saved in the middle of an epoch resume with the next batch, whatever the loader: a
    StatefulDataLoader's state is where Lightning keeps it, that of other loaders is in the callback's, so that a
    Trainer without this callback reads the checkpoint, too.

    Args:
        depth: how many batches are copied ahead.
        memory_format: "channels_last" puts tensors [N, C, H, W] of a batch in that format, on the device.

    Raises:
        ValueError: if depth is negative or memory_format is none of these.
    """

    def __init__(self, depth: int = 2, *, memory_format: Literal["channels_last"] | None = None) -> None:
        if depth < 0:
            raise ValueError(f"PrefetchCallback: depth must be 0 or more, got {depth}")
        if memory_format not in (None, "channels_last"):
            raise ValueError(f"PrefetchCallback: memory_format must be 'channels_last' or None, got {memory_format!r}")
        self.depth, self.memory_format = depth, memory_format
        #: What was done with the loaders of this run, and why: pairs for the report at the start.
        self.report: list[tuple[str, str]] = []
        self._trainer: Trainer | None = None
        self._active = self._told = False
        self._printed: Report | None = None
        self._pinned: list[DataLoader] = []
        self._to_load: list[Any] = []
        self._resumes = False

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Wrap what the strategy makes of a dataloader."""
        if not self._active:
            self._trainer, self._active, self._told, self.report = trainer, True, False, []
            original = trainer.strategy.process_dataloader
            # An attribute of the instance, before the class's method.
            wrapped = {"process_dataloader": lambda dataloader: self._process(original(dataloader))}
            vars(trainer.strategy).update(wrapped)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Leave the strategy and the user's loaders as they were."""
        if self._active:
            vars(trainer.strategy).pop("process_dataloader", None)
        for loader in self._pinned:
            loader.pin_memory = False
        self._active, self._pinned, self._to_load, self._resumes = False, [], [], False

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """As :meth:`teardown`, which is not called then."""
        self.teardown(trainer, pl_module, "")

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Print what was done to the model and its loaders.

        What Lightning says of loaders in which it sees no state is silenced, where these resume from the callback's.
        """
        self._tell(trainer, pl_module)
        if self._resumes:
            warnings.filterwarnings("ignore", message="You're resuming from a checkpoint that ended before the epoch")

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Print it where nothing is trained."""
        if not trainer.sanity_checking:
            self._tell(trainer, pl_module)

    on_test_start = on_predict_start = on_validation_start

    def state_dict(self) -> dict[str, Any]:
        """Where the training loaders are that keep no state of their own, after the batch that was trained on last."""
        loaders = None if self._trainer is None else self._trainer.fit_loop._combined_loader
        plain = [] if loaders is None else [one for one in loaders.flattened if type(one) is Prefetched]
        return {"loaders": [one.state_after_last() for one in plain]} if plain else {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Note it for the loaders that are to come."""
        self._to_load = list(state_dict.get("loaders", ()))
        self._resumes = bool(self._to_load)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_trainer": None, "_active": False, "_pinned": [], "_printed": None}

    def _tell(self, trainer: Trainer, model: LightningModule) -> None:
        if self._told:
            return
        self._told = True
        done = reports.get(model)
        title = type(self).__name__
        parts: dict[str, Part] = {"precision": str(trainer.precision), "loaders": self.report}
        if done is not None and done is not self._printed:
            title, parts = f"{done.title}, {title}", {**done.parts, **parts}
        self._printed = done
        rank_zero_info(str(start_table(parts, title)))

    def _process(self, loader: Any) -> Any:
        trainer = self._trainer
        assert trainer is not None
        device = trainer.strategy.root_device
        stage = trainer.state.stage.value if trainer.state.stage else "run"
        name = f"{stage}: {type(loader).__name__}"
        if isinstance(loader, Prefetched | PinnedLoader):
            self._note(name, "wrapped already")
            return loader
        if device.type == "xla":
            self._note(name, "left: torch_xla's own loader moves the batches")
            return loader
        overridden = _overridden(trainer)
        if overridden:
            self._note(name, f"{self._pin(loader, device)}: {overridden} is overridden and expects it on the host")
            return loader
        where = "passed on" if device.type == "cpu" else f"on {device}, {self.depth} batches ahead"
        self._note(name, f"{where}{', channels_last' if self.memory_format else ''}")
        transform = _channels_last if self.memory_format else None
        pinned = PinnedLoader(loader, device=device, depth=self.depth, transform=transform)
        stateful = hasattr(loader, "state_dict") and hasattr(loader, "load_state_dict")
        if stateful:
            return StatefulPrefetched(pinned, trainer if trainer.training else None)
        wrapped = Prefetched(pinned, trainer if trainer.training else None)
        if trainer.training and self._to_load:
            state = self._to_load.pop(0)
            if state is not None:
                pinned.load_state_dict(state)
        return wrapped

    def _pin(self, loader: Any, device: torch.device) -> str:
        if device.type != "cuda" or not isinstance(loader, DataLoader) or loader.pin_memory:
            return "left"
        loader.pin_memory = True
        self._pinned.append(loader)
        return "page-locked only"

    def _note(self, name: str, what: str) -> None:
        if (name, what) not in self.report:  # once for all epochs
            self.report.append((name, what))


class Prefetched:
    """A loader for Lightning's loops: everything but the iteration is the wrapped loader's, also what is assigned.

    It has no ``state_dict``: Lightning would put it where a run without this wrapper expects no state.
    """

    _OWN = frozenset({"pinned", "trainer", "_states"})

    def __init__(self, pinned: PinnedLoader, trainer: Trainer | None) -> None:
        self.pinned = pinned
        #: The Trainer whose training loop takes the batches; None for other loops.
        self.trainer = trainer
        #: After each of the last batches; Lightning fetches one ahead, and may end in the middle of another.
        self._states: deque[Any] = deque(maxlen=3)

    def __iter__(self) -> Iterator[Any]:
        self._states.clear()
        return iter(self.pinned) if self.trainer is None else self._noted()

    def _noted(self) -> Iterator[Any]:
        # From the first batch on: Lightning makes the iterator of a resumed epoch before it tells the sampler which
        # epoch that is.
        iterator = iter(self.pinned)
        self._states.append(self.pinned.state_dict())
        yield from map(self._note, iterator)  # with no variable that would hold the batch

    def _note(self, batch: Any) -> Any:
        self._states.append(self.pinned.state_dict())
        return batch

    def state_after_last(self) -> Any:
        """The state after the batch that was trained on last; None where the next epoch starts from its beginning."""
        assert self.trainer is not None
        if not self._states:
            return self.pinned.state_dict()
        loop = self.trainer.fit_loop.epoch_loop
        progress = loop.batch_progress
        unused = progress.current.ready - progress.current.processed  # type: ignore[attr-defined]  # its declared type is too wide
        if progress.is_last_batch and not unused:
            return None
        ahead = len(getattr(self.trainer.fit_loop._data_fetcher, "batches", ()))
        return self._states[max(-len(self._states), -1 - ahead - unused)]

    def __len__(self) -> int:
        return len(self.pinned)

    def __getattr__(self, name: str) -> Any:
        if name in Prefetched._OWN:
            raise AttributeError(name)
        return getattr(self.pinned.loader, name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in self._OWN:
            object.__setattr__(self, name, value)
        else:
            setattr(self.pinned.loader, name, value)


class StatefulPrefetched(Prefetched):
    """One whose loader has a state, which Lightning saves and loads."""

    def state_dict(self) -> dict[str, Any]:
        """The wrapped loader's, after the batch that was trained on last."""
        state = self.state_after_last() if self.trainer is not None else None
        return self.pinned.state_dict() if state is None else state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """The wrapped loader's."""
        self.pinned.load_state_dict(state_dict)


def _overridden(trainer: Trainer) -> str:
    """The first hook of the user's that needs the batch on the host."""
    for owner in (trainer.lightning_module, getattr(trainer, "datamodule", None)):
        for hook in HOST_HOOKS:
            if is_overridden(hook, owner):
                return f"{type(owner).__name__}.{hook}"
    return ""


def _channels_last(batch: Any) -> Any:
    def order(leaf: Any) -> Any:
        if isinstance(leaf, Tensor) and leaf.dim() == 4:
            return leaf.contiguous(memory_format=torch.channels_last)
        return leaf

    return map_leaves(batch, order)
