"""The callback for a Trainer whose precision plugin is somebody else's."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, Literal

from .engine import Report, apply
from .packages import Callback, LightningModule, Trainer, is_overridden
from .recipe import Recipe


class FusedCallback(Callback):
    """Applies what :class:`FusedPrecision` applies to a model, and leaves precision, clipping and gradients alone.

    Layers are swapped in ``setup``, or after ``configure_model`` where the model has one.

    Args:
        fuse: as there.
        skip: as there.
        memory_format: as there.
        compile: as there.
        compile_kwargs: as there.

    Raises:
        ValueError: as there.
    """

    def __init__(
        self,
        *,
        fuse: Literal["auto", "off"] = "auto",
        skip: Sequence[str] = (),
        memory_format: Literal["channels_last"] | None = None,
        compile: Literal["off", "regional", "full"] = "off",
        compile_kwargs: dict[str, Any] | None = None,
    ) -> None:
        self.recipe = Recipe(type(self).__name__, fuse, tuple(skip), memory_format, compile, compile_kwargs or {})
        self.report: Report | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Apply now, or when the model's layers have been made."""
        if not is_overridden("configure_model", pl_module):
            self._apply(pl_module)
            return
        configure = pl_module.configure_model

        @functools.wraps(configure)
        def configure_and_apply() -> None:
            # Gone before anything copies or pickles the model: a method of an instance would be the original's.
            pl_module.__dict__.pop("configure_model", None)
            configure()
            self._apply(pl_module)

        pl_module.configure_model = configure_and_apply  # type: ignore[method-assign]

    def _apply(self, model: LightningModule) -> None:
        self.report = apply(model, self.recipe, type(self).__name__)
