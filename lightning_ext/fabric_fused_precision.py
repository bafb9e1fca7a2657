"""The precision plugin of Fabric."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import Module
from torch.optim import Optimizer

from . import precisions
from .engine import apply
from .fp8 import RecipeName
from .packages import FabricFSDPPrecision, rank_zero_warn
from .precisions import PrecisionInput
from .recipe import Recipe
from .start_report import Report


class FabricFusedPrecision(FabricFSDPPrecision):
    """As :class:`FusedPrecision`, for ``Fabric(plugins=[FabricFusedPrecision("bf16-mixed")])``.

    ``fabric.setup`` swaps in place: an optimizer that was made before holds the same parameters after. Inputs stay in
    their dtype under mixed precision, where Fabric's own plugin rounds them; autocast casts what it computes with.

    Args:
        precision: as there, and so are the others. Gradients are released by the user's own ``zero_grad``.
        fuse: as there.
        skip: as there.
        memory_format: as there.
        compile: as there; "full" compiles the module that is set up, in place and inside the strategy's wrapper.
        compile_kwargs: as there.
        fp8: as there.

    Raises:
        ValueError: as there.
        RuntimeError, ModuleNotFoundError: as there.
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
        fp8: RecipeName | None = None,
    ) -> None:
        name = type(self).__name__
        found = precisions.unified(name, precision)
        self.recipe = Recipe(name, fuse, tuple(skip), memory_format, compile, compile_kwargs or {}, fp8)
        super().__init__("bf16-mixed" if found == "16-mixed" else found)  # type: ignore[arg-type]
        self.precision = found  # type: ignore[assignment]
        self.report: Report | None = None
        self._model: weakref.ref[Module] | None = None
        self._loaded: dict[str, Any] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_model": None}

    def convert_module(self, module: Module) -> Module:
        """Cast if the precision says so, then apply the recipe in place."""
        self._model = weakref.ref(module)
        if self.precision == "bf16-true":
            module.to(torch.bfloat16)
        self.report = apply(module, self.recipe, f"{type(self).__name__}({self.precision!r})")
        return module

    def forward_context(self) -> AbstractContextManager:
        """Autocast, the default dtype or nothing, for mixed precisions, bf16-true and 32-true."""
        if self.precision == "bf16-true":
            return super().tensor_init_context()
        if self.precision == "32-true":
            return nullcontext()
        model = None if self._model is None else self._model()
        parameter = None if model is None else next(model.parameters(), None)
        device_type = "cpu" if parameter is None else parameter.device.type
        self._fall_back(device_type)
        return torch.autocast(device_type, dtype=torch.float16 if self.precision == "16-mixed" else torch.bfloat16)

    def tensor_init_context(self) -> AbstractContextManager:
        """New tensors are bfloat16 for bf16-true, and otherwise what the user's default says."""
        return super().tensor_init_context() if self.precision == "bf16-true" else nullcontext()

    def module_init_context(self) -> AbstractContextManager:
        """As :meth:`tensor_init_context`."""
        return self.tensor_init_context()

    def convert_input(self, data: Any) -> Any:
        """Cast floating-point inputs for bf16-true only."""
        return super().convert_input(data) if self.precision == "bf16-true" else data

    def convert_output(self, data: Any) -> Any:
        """Outputs in the default dtype, unless the precision computes in it."""
        return data if self.precision == "32-true" else super().convert_output(data)

    def backward(self, tensor: Tensor, model: Module | None, *args: Any, **kwargs: Any) -> None:
        """Scale the loss for 16-mixed."""
        if self.precision == "16-mixed" and self.scaler is None:
            self.scaler = self._loss_scale(tensor.device.type)
            self.scaler.load_state_dict(self._loaded or self.scaler.state_dict())
        super().backward(tensor, model, *args, **kwargs)

    def unscale_gradients(self, optimizer: Optimizer) -> None:
        """Unscale them, also those of optimizers that would do so in their step: GradScaler tells these."""
        if self.scaler is not None:
            self.scaler.unscale_(optimizer)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Resume the loss scale, or keep its state until the first backward pass makes one."""
        self._loaded = state_dict
        super().load_state_dict(state_dict)

    def _loss_scale(self, device_type: str) -> Any:
        from torch.distributed.fsdp import FullyShardedDataParallel
        from torch.distributed.fsdp.sharded_grad_scaler import ShardedGradScaler

        model = None if self._model is None else self._model()
        parts = () if model is None else model.modules()
        sharded = any(isinstance(part, FullyShardedDataParallel) for part in parts)
        return ShardedGradScaler(device_type) if sharded else torch.amp.GradScaler(device_type)

    def _fall_back(self, device_type: str) -> None:
        if self.precision == "16-mixed" and not precisions.has_float16_autocast(device_type):
            rank_zero_warn(
                f"{type(self).__name__}: 16-mixed is for GPUs; on the CPU this trains in bf16-mixed, as Lightning does"
            )
            self.precision = "bf16-mixed"
