"""What stands for the callbacks of ``BRAZE_LIGHTNING`` until it is known which of them a script has itself."""

from __future__ import annotations

from typing import Any

from .packages import Callback, LightningModule, Trainer


class OptedIn(Callback):
    """Gives its place to its callbacks when a run begins, except for those of which the script has one of its own.

    What the script's own was told holds. Two of a kind would be in each other's way: Lightning refuses two that keep a
    state.
    """

    def __init__(self, callbacks: list[Callback]) -> None:
        self.callbacks = callbacks

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Take part from here on."""
        wanted = self._wanted(trainer.callbacks)  # type: ignore[attr-defined]
        place = trainer.callbacks.index(self)  # type: ignore[attr-defined]
        # A new list: Lightning goes on through the old one, in which this callback comes before the next.
        trainer.callbacks = [*trainer.callbacks[:place], *wanted, *trainer.callbacks[place + 1 :]]  # type: ignore[attr-defined]
        for callback in wanted:
            callback.setup(trainer, pl_module, stage)

    def on_after_setup(self, fabric: Any, module: Any) -> None:
        """Fabric's hook."""
        for callback in self._wanted(fabric._callbacks):
            callback.on_after_setup(fabric, module)  # type: ignore[attr-defined]

    def _wanted(self, others: list[Any]) -> list[Callback]:
        return [one for one in self.callbacks if not any(isinstance(other, type(one)) for other in others)]
