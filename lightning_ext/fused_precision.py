"""The precision plugin that trains with fused operators."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal

import torch
from lightning.pytorch.plugins.precision import FSDPPrecision, Precision
from lightning.pytorch.utilities import rank_zero_info
from torch.nn import Module
from torch.optim import Optimizer

from braze.kernels import FusionReport
from braze.kernels import fuse as fuse_model

PRECISIONS = ("32-true", "bf16-mixed", "bf16-true")

# One report for one model, though Lightning converts it again for every fit, validate and test.
_reported: weakref.WeakSet[Module] = weakref.WeakSet()


# The strategy for fully sharded training takes no other base class, and Lightning's throughput monitor reads the
# compute dtype from it. What differs from the plugins that `Trainer(precision=...)` builds is put right below.
class FusedPrecision(FSDPPrecision):
    """Trains in the given precision, with every module that has a fused form swapped for it.

    ``Trainer(plugins=[FusedPrecision("bf16-mixed")])`` does what ``Trainer(precision="bf16-mixed")`` does, after
    ``braze.kernels.fuse(model)``: parameters, ``state_dict`` keys, optimizer state and checkpoints are the same with
    and without it, so each run can resume the other's checkpoints. It prints what was swapped once, on rank zero;
    ``report`` keeps it. Runs on a single device and under DDP.

    Args:
        precision: "32-true" (or 32), "bf16-mixed" (autocast; parameters stay float32) or "bf16-true" (parameters and
            floating-point inputs are cast to bfloat16).
        fuse: "auto" swaps every module whose fused form passes its check; "off" swaps none, which leaves Lightning's
            own behaviour in that precision.
        skip: paths (with wildcards) or operators to leave alone, as ``braze.kernels.fuse`` takes them.

    Raises:
        ValueError: if precision or fuse is none of the above.
    """

    def __init__(
        self,
        precision: Literal["32-true", "bf16-mixed", "bf16-true", "32", 32] = "32-true",
        *,
        fuse: Literal["auto", "off"] = "auto",
        skip: Sequence[str] = (),
    ) -> None:
        unified = "32-true" if precision in (32, "32") else precision
        if unified not in PRECISIONS:
            raise ValueError(
                f"FusedPrecision: precision must be one of {', '.join(map(repr, PRECISIONS))} or 32, "
                f"got {precision!r}; bfloat16 needs no loss scaling, so use it in the place of float16"
            )
        if fuse not in ("auto", "off"):
            raise ValueError(f"FusedPrecision: fuse must be 'auto' or 'off', got {fuse!r}")
        super().__init__(unified)  # type: ignore[arg-type]
        self.fuse = fuse
        self.skip = tuple(skip)
        self.report: FusionReport | None = None
        self._device_type = "cpu"
        self._sharded = False

    def convert_module(self, module: Module) -> Module:
        """Cast if the precision says so, then swap in place: DDP discards the module that is returned."""
        if self.precision == "bf16-true":
            module.to(torch.bfloat16)
        if self.fuse == "auto":
            report = fuse_model(module, skip=self.skip)
            if module not in _reported:
                _reported.add(module)
                self.report = report
                rank_zero_info(f"FusedPrecision({self.precision!r}):\n{report}")
        return module

    def connect(
        self, model: Module, optimizers: list[Optimizer], lr_schedulers: list[Any]
    ) -> tuple[Module, list[Optimizer], list[Any]]:
        """Note where the model lives: autocast wants to know."""
        from torch.distributed.fsdp import FullyShardedDataParallel

        parameter = next(model.parameters(), None)
        self._device_type = "cpu" if parameter is None else parameter.device.type
        self._sharded = isinstance(model, FullyShardedDataParallel)
        return super().connect(model, optimizers, lr_schedulers)

    def clip_grad_by_norm(self, *args: Any, **options: Any) -> None:
        """Clip by the norm of all gradients, of which one rank of a fully sharded model holds too few: that raises."""
        if self._sharded:
            super().clip_grad_by_norm(*args, **options)
        Precision.clip_grad_by_norm(self, *args, **options)

    def forward_context(self) -> AbstractContextManager:
        """Autocast, the default dtype or nothing, for bf16-mixed, bf16-true and 32-true."""
        if self.precision == "bf16-mixed":
            # As Lightning's MixedPrecision: a cache would keep the cast weights across an optimizer step.
            return torch.autocast(self._device_type, dtype=torch.bfloat16, cache_enabled=False)
        return self._default_dtype()

    def tensor_init_context(self) -> AbstractContextManager:
        """New tensors are bfloat16 for bf16-true, and otherwise what the user's default says."""
        return self._default_dtype()

    def module_init_context(self) -> AbstractContextManager:
        """As :meth:`tensor_init_context`."""
        return self._default_dtype()

    def convert_input(self, data: Any) -> Any:
        """Cast floating-point inputs for bf16-true only."""
        return super().convert_input(data) if self.precision == "bf16-true" else data

    def _default_dtype(self) -> AbstractContextManager:
        return super().tensor_init_context() if self.precision == "bf16-true" else nullcontext()
