"""The precision plugin for DeepSpeedStrategy."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from torch.nn import Module

from . import precisions
from .engine import apply
from .packages import DeepSpeedPrecision
from .precisions import PrecisionInput
from .recipe import Recipe
from .start_report import Report


class FusedDeepSpeedPrecision(DeepSpeedPrecision):
    """As :class:`FusedPrecision`, for DeepSpeedStrategy, whose engine casts, scales, clips and steps by itself.

    Swaps come before the engine takes the model; nothing else is overridden. It has not been run with DeepSpeed.

    Args:
        precision: as there, and so are the others.
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
        precision: PrecisionInput = "32-true",
        *,
        fuse: Literal["auto", "off"] = "auto",
        skip: Sequence[str] = (),
        memory_format: Literal["channels_last"] | None = None,
        compile: Literal["off", "regional", "full"] = "off",
        compile_kwargs: dict[str, Any] | None = None,
    ) -> None:
        name = type(self).__name__
        super().__init__(precisions.unified(name, precision))  # type: ignore[arg-type]
        self.recipe = Recipe(name, fuse, tuple(skip), memory_format, compile, compile_kwargs or {})
        self.report: Report | None = None

    def convert_module(self, module: Module) -> Module:
        """Cast as DeepSpeedPrecision does, then apply the recipe in place."""
        module = super().convert_module(module)
        self.report = apply(module, self.recipe, f"{type(self).__name__}({self.precision!r})")
        return module
