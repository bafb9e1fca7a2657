"""The precision plugin that trains with fused operators."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Literal

import torch
from torch.nn import Module
from torch.optim import LBFGS, Optimizer

from . import precisions
from .clipping import clip_grad_norm_over_meshes_
from .early_zero_grad import release_old_gradients
from .engine import apply
from .fp8 import RecipeName
from .packages import (
    DeepSpeedStrategy,
    FSDPPrecision,
    LightningModule,
    ModelParallelStrategy,
    Precision,
    rank_zero_warn,
)
from .precisions import PrecisionInput
from .recipe import Recipe
from .start_report import Report


# The strategy for fully sharded training takes no other base class, and Lightning's throughput monitor reads the
# compute dtype from it. What differs from the plugins that `Trainer(precision=...)` builds is put right below.
class FusedPrecision(FSDPPrecision):
    """Trains in the given precision, with every module that has a fused form swapped for it.

    ``Trainer(plugins=[FusedPrecision("bf16-mixed")])`` does what ``Trainer(precision="bf16-mixed")`` does, after
    ``braze.kernels.fuse(model)``: parameters, ``state_dict`` keys, optimizer state and checkpoints are the same with
    and without it, so each run can resume the other's checkpoints. It prints what was swapped once, on rank zero;
    ``report`` keeps it. The same line runs on a single device and under DDP, FSDP and ModelParallelStrategy.

    Gradients are clipped by value and norm with every optimizer, also with those that Lightning's own plugins refuse
    (fused ones under mixed precision) and under FSDPStrategy by norm.

    Args:
        precision: "32-true" (or 32), "16-mixed" and "bf16-mixed" (autocast; parameters stay float32; 16-mixed scales
            the loss, and is bf16-mixed on a CPU) or "bf16-true" (parameters and floating-point inputs are cast to
            bfloat16).
        fuse: "auto" swaps every module whose fused form passes its check; "off" swaps none, which leaves Lightning's
            own behaviour in that precision.
        skip: paths (with wildcards) or operators to leave alone, as ``braze.kernels.fuse`` takes them.
        memory_format: "channels_last" converts 2-D convolutions and what is fed to them.
        compile: "off", "regional" (each kind of block that repeats, once) or "full" (each part of the model), in place.
        compile_kwargs: arguments of ``torch.compile``; with "regional" also ``budget`` and ``dynamic_batch`` of
            ``compile_regions``.
        fp8: "tensorwise", "rowwise" or "rowwise_with_gw_hp", recipes of torchao's: plain linear layers whose sizes are
            multiples of 16 multiply in float8. The head whose logits a fused model defers, layers with hooks and what
            ``skip`` names stay as they are. torchao means it for compiled models: compile, too. Not run on a GPU yet.
        early_zero_grad: whether the gradients of the step before are released before the forward pass, where Lightning
            keeps them until after it. Not done where the model or a callback overrides a hook around zero_grad, nor
            in manual optimization. A ``training_step`` that reads ``p.grad`` needs False.

    Raises:
        ValueError: if an argument is none of the above; from a fit, if the strategy or device cannot do it.
        RuntimeError: if fp8 is asked for where the hardware has none.
        ModuleNotFoundError: if it is asked for without torchao.
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
        early_zero_grad: bool = True,
    ) -> None:
        name = type(self).__name__
        found = precisions.unified(name, precision)
        self.recipe = Recipe(name, fuse, tuple(skip), memory_format, compile, compile_kwargs or {}, fp8)
        # The loss scale is made in connect, where the device is known.
        super().__init__("bf16-mixed" if found == "16-mixed" else found)  # type: ignore[arg-type]
        self.precision = found  # type: ignore[assignment]
        self.early_zero_grad = early_zero_grad
        self.report: Report | None = None
        self._device_type = "cpu"
        self._model: weakref.ref[LightningModule] | None = None
        self._root: Any = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_model": None, "_root": None}

    def convert_module(self, module: Module) -> Module:
        """Cast if the precision says so, then apply the recipe in place: DDP discards the module that is returned."""
        if isinstance(module, LightningModule) and module._trainer is not None:
            self._check_strategy(module.trainer.strategy)
            self._model = weakref.ref(module)
        if self.precision == "bf16-true":
            module.to(torch.bfloat16)
        self.report = apply(module, self.recipe, f"{type(self).__name__}({self.precision!r})")
        return module

    def connect(
        self, model: Module, optimizers: list[Optimizer], lr_schedulers: list[Any]
    ) -> tuple[Module, list[Optimizer], list[Any]]:
        """Note what wraps the model, and make the loss scale."""
        from torch.distributed.fsdp import FullyShardedDataParallel
        from torch.distributed.fsdp.sharded_grad_scaler import ShardedGradScaler

        self._root = model if isinstance(model, FullyShardedDataParallel) else None
        parameter = next(model.parameters(), None)
        if self._model is None and parameter is not None:
            self._device_type = parameter.device.type
        if self.precision == "16-mixed" and self.scaler is None:
            if self._root is not None:
                self.scaler = ShardedGradScaler(self._device_type)
            else:
                self.scaler = torch.amp.GradScaler(self._device_type)  # type: ignore[assignment]
        return super().connect(model, optimizers, lr_schedulers)

    def teardown(self) -> None:
        """Let the model go."""
        self._root = None

    @contextmanager
    def train_step_context(self) -> Iterator[None]:
        """The forward context, entered without the gradients of the step before."""
        model = None if self._model is None else self._model()
        if self.early_zero_grad and model is not None:
            release_old_gradients(model)
        with self.forward_context():
            yield

    def optimizer_step(  # type: ignore[override]
        self, optimizer: Any, model: LightningModule, closure: Callable[[], Any], **kwargs: Any
    ) -> Any:
        """Unscale before anybody sees the gradients, also those of optimizers that would do so in their step.

        GradScaler.step looks for infinities in one pass over these gradients in any case; unscaling is the same pass,
        after which it tells the optimizer that nothing is left to unscale.
        """
        if self.scaler is None:
            return Precision.optimizer_step(self, optimizer, model, closure, **kwargs)
        if isinstance(optimizer, LBFGS):
            raise ValueError(
                f"{type(self).__name__}: the optimizer must not be LBFGS in precision '16-mixed', whose loss scale "
                "cannot follow several evaluations in a step; use 'bf16-mixed'"
            )
        result = closure()
        skipped = model.automatic_optimization and result is None
        if not skipped:
            self.scaler.unscale_(optimizer)
        self._after_closure(model, optimizer)
        if skipped:
            return result
        output = self.scaler.step(optimizer, **kwargs)
        self.scaler.update()
        return output

    def clip_grad_by_norm(self, optimizer: Optimizer, clip_val: int | float) -> None:
        """Clip by the norm of all gradients, over all ranks that hold parts of them."""
        if self._root is None:
            clip_grad_norm_over_meshes_(self.main_params(optimizer), clip_val)
            return
        held = {id(p) for p in self.main_params(optimizer)}
        missing = sum(id(p) not in held for p in self._root.parameters() if p.requires_grad)
        if missing:
            raise ValueError(
                f"{type(self).__name__}: under FSDPStrategy the norm is that of the whole model's gradients, so one "
                f"optimizer must hold all of its trainable parameters, got one that misses {missing}; clip by value, "
                "freeze the others, or use ModelParallelStrategy"
            )
        self._root.clip_grad_norm_(clip_val)

    def forward_context(self) -> AbstractContextManager:
        """Autocast, the default dtype or nothing, for mixed precisions, bf16-true and 32-true."""
        if self.precision in ("16-mixed", "bf16-mixed"):
            dtype = torch.float16 if self.precision == "16-mixed" else torch.bfloat16
            # As Lightning's MixedPrecision: a cache would keep the cast weights across an optimizer step.
            return torch.autocast(self._device_type, dtype=dtype, cache_enabled=False)
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

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the loss scale where Lightning's own plugin of this precision looks for it."""
        from torch.distributed.fsdp.sharded_grad_scaler import ShardedGradScaler

        state = checkpoint.pop(type(self).__qualname__, None)
        if state is not None:
            vanilla = "FSDPPrecision" if isinstance(self.scaler, ShardedGradScaler) else "MixedPrecision"
            checkpoint[vanilla] = state

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take the loss scale from there."""
        for vanilla in ("MixedPrecision", "FSDPPrecision"):
            if vanilla in checkpoint:
                self.load_state_dict(checkpoint[vanilla])

    def _default_dtype(self) -> AbstractContextManager:
        return super().tensor_init_context() if self.precision == "bf16-true" else nullcontext()

    def _check_strategy(self, strategy: Any) -> None:
        name = type(self).__name__
        self._device_type = strategy.root_device.type
        if isinstance(strategy, DeepSpeedStrategy):
            raise ValueError(
                f"{name}: the strategy must not be DeepSpeedStrategy, whose engine makes the step itself; use "
                "FusedDeepSpeedPrecision"
            )
        if self.precision != "16-mixed":
            return
        if isinstance(strategy, ModelParallelStrategy):
            raise ValueError(
                f"{name}: ModelParallelStrategy takes '32-true', 'bf16-mixed' and 'bf16-true', got '16-mixed', whose "
                "loss scale would need a look at all shards; use 'bf16-mixed'"
            )
        if not precisions.has_float16_autocast(self._device_type):
            rank_zero_warn(f"{name}: 16-mixed is for GPUs; on the CPU this trains in bf16-mixed, as Lightning does")
            self.precision = "bf16-mixed"
