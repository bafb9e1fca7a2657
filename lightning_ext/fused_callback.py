"""The callback for a Trainer whose precision plugin is somebody else's."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, Literal

from torch.nn import Module

from .engine import apply
from .packages import Callback, LightningModule, Trainer, is_overridden
from .recipe import Recipe
from .start_report import Report


class FusedCallback(Callback):
    """Applies what :class:`FusedPrecision` applies to a model, and leaves precision, clipping and gradients alone.

    Layers are swapped in ``setup``, or after ``configure_model`` where the model has one; in
    ``Fabric(callbacks=[FusedCallback()])`` at the end of ``fabric.setup``. Beside a precision plugin of braze's it does
    nothing: what that plugin was told holds.

    Args:
        fuse: as there.
        skip: as there.
        memory_format: as there.
        compile: as there.
        compile_kwargs: as there.

    Raises:
        ValueError: as there; from ``fabric.setup`` under FSDPStrategy, which has flattened the parameters by then.
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
        if hasattr(trainer.precision_plugin, "recipe"):
            return
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

    def on_after_setup(self, fabric: Any, module: Any) -> None:
        """Fabric's hook: apply inside the wrapper of the strategy."""
        from torch.distributed.fsdp import FullyShardedDataParallel

        if hasattr(fabric._precision, "recipe"):
            return
        if any(isinstance(part, FullyShardedDataParallel) for part in module.modules()):
            raise ValueError(
                f"{type(self).__name__}: the strategy of a Fabric must not be FSDPStrategy, which has flattened the "
                "parameters when it calls back; use Fabric(plugins=[FabricFusedPrecision(...)])"
            )
        self._apply(module.module)

    def _apply(self, model: Module) -> None:
        self.report = apply(model, self.recipe, type(self).__name__)
