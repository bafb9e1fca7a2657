"""The callback that replays the forward and backward pass of a model's parts as CUDA graphs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module
from torch.utils._pytree import tree_map_only

from .engine import called
from .packages import Callback, LightningModule, Trainer, rank_zero_info, rank_zero_warn
from .repeated import compiled_already, replaced_forward
from .start_report import start_table

#: Attributes by which transformers, diffusers and timm say that activations are recomputed.
CHECKPOINTING = ("gradient_checkpointing", "grad_checkpointing")


class CUDAGraphCallback(Callback):
    """Captures each part of a model that a training step calls, after some batches, and replays it from then on.

    The first batches train as ever and are watched. A part whose calls can be replayed is then captured by
    :func:`torch.cuda.make_graphed_callables`; others are left, and ``report`` says why. Batches are copied into the
    graph's own memory; outputs (of any nesting) and gradients are copied out of it, so that they may be kept. A call of
    other shapes, such as a last batch that is not full, a second one in a batch, one without gradients, and those after
    parameters were frozen or moved run as before. Clipping, the loss and the optimizer's step are not captured, so that
    they may look at values on the host. What a part itself decides on the host, such as to drop a layer, it decides
    once, when it is captured.

    Nothing is captured where there is no CUDA GPU, under a strategy for several devices, whose communication is in
    hooks, or in manual optimization. It has not been run on a GPU.

    Args:
        warmup: how many batches are watched.

    Raises:
        ValueError: if warmup is less than 1.
    """

    def __init__(self, warmup: int = 3) -> None:
        if warmup < 1:
            raise ValueError(f"CUDAGraphCallback: warmup must be at least 1, got {warmup}; a batch has to be seen")
        self.warmup = warmup
        #: What was done with each part: pairs of its path and "captured", or "left" and the reason.
        self.report: list[tuple[str, str]] = []
        self._parts: list[_Part] = []
        self._seen = 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Watch the parts, or say why not."""
        self.report, self._parts, self._seen = [], [], 0
        reason = _unsafe_run(trainer, pl_module)
        if reason:
            self.report = [("(the model)", f"left: {reason}")]
            rank_zero_warn(f"CUDAGraphCallback: nothing is captured: {reason}")
            return
        for path, module in called(pl_module):
            if any(p.requires_grad for p in module.parameters()):
                self._parts.append(_Part(path or "(the model)", module))

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Let each part be replayed once."""
        for part in self._parts:
            part.calls = 0

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Capture when enough was seen."""
        self._seen += 1
        if self._parts and self._seen <= self.warmup:
            for part in self._parts:
                part.check()
            if self._seen == self.warmup:
                with trainer.precision_plugin.forward_context():
                    self.report = [(part.path, part.capture()) for part in self._parts]
                rank_zero_info(str(start_table({"CUDA graphs": self.report}, type(self).__name__)))

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leave the model as it was."""
        for part in self._parts:
            part.restore()
        self._parts = []

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """As :meth:`on_train_end`, which is not called then."""
        self.on_train_end(trainer, pl_module)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_parts": []}


class _Part:
    """A module that is watched, then replayed."""

    def __init__(self, path: str, module: Module) -> None:
        self.path, self.module = path, module
        self.calls = 0
        self.reason = _unsafe_part(module)
        self._args: tuple[Any, ...] | None = None
        self._call: Any = None
        self._captured = False
        self._hooks: list[Any] = []
        if not self.reason:
            self._hooks = [module.register_forward_pre_hook(self._watch, with_kwargs=True)]
            self._hooks += [part.register_forward_pre_hook(self._look) for part in module.modules()]

    def check(self) -> None:
        """Judge the calls of a batch."""
        if self.calls != 1:
            self.reason = self.reason or f"a batch must call it once, got {self.calls} calls"

    def capture(self) -> str:
        """Replace the forward, if that is safe; what was done."""
        self._unhook()
        args, self._args = self._args, None
        if not self.reason and self._call[0] != _autocast():
            self.reason = "it is called under an autocast of its own"
        if self.reason:
            return f"left: {self.reason}"
        assert args is not None
        samples = tuple(arg.detach().clone().requires_grad_(arg.requires_grad) for arg in args)
        buffers = [buffer.clone() for buffer in self.module.buffers()]
        original = self.module.forward
        try:
            graphed = make_graphed(self.module, samples)
        except RuntimeError as error:
            self.module.__dict__.pop("forward", None)
            return f"left: it cannot be captured: {str(error).splitlines()[0]}"
        finally:
            # Capturing runs the module some times more.
            for buffer, before in zip(self.module.buffers(), buffers, strict=True):
                buffer.data.copy_(before)
        self._captured = True
        self.module.forward = self._guarded(graphed, original)
        # Without a copy, a gradient that is kept would be the graph's memory, which the next replay writes to.
        self._hooks = [p.register_hook(torch.clone) for p in self.module.parameters() if p.requires_grad]
        return "captured"

    def restore(self) -> None:
        """Run the class's own forward again."""
        self._unhook()
        if self._captured:
            del self.module.forward
        self._captured = False

    def _guarded(self, graphed: Callable[..., Any], original: Callable[..., Any]) -> Callable[..., Any]:
        held = [*self.module.parameters(), *self.module.buffers()]

        def memory() -> list[tuple[bool, int]]:
            return [(one.requires_grad, one.data_ptr()) for one in held]

        expected = self._call, memory()

        def forward(*args: Any, **kwargs: Any) -> Any:
            self.calls += 1
            if self.calls > 1 or kwargs or (_call(args), memory()) != expected or not torch.is_grad_enabled():
                return original(*args, **kwargs)
            return tree_map_only(Tensor, torch.clone, graphed(*args))

        return forward

    def _watch(self, module: Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not torch.is_grad_enabled() or not module.training:
            return
        self.calls += 1
        if kwargs or not all(isinstance(arg, Tensor) for arg in args):
            self.reason = self.reason or "its arguments must be tensors, by position"
            return
        call = _call(args)
        if self._call is not None and call != self._call:
            self.reason = self.reason or f"its inputs must stay the same, got {call[1]} after {self._call[1]}"
        self._call, self._args = call, args

    def _look(self, module: Module, args: tuple[Any, ...]) -> None:
        # Recomputation packs what autograd saves, or runs without it and again later.
        packs = torch._C._autograd._top_saved_tensors_default_hooks(False) is not None
        if self.module.training and self.calls and (packs or not torch.is_grad_enabled()):
            self.reason = self.reason or "activations are recomputed in it, or parts run without gradients"

    def _unhook(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks = []


def make_graphed(module: Module, samples: tuple[Tensor, ...]) -> Callable[..., Any]:
    """The module's forward, captured."""
    torch.cuda.make_graphed_callables(module, samples, allow_unused_input=True)
    return module.forward


def has_graphs(device: torch.device) -> bool:
    """Whether graphs of a device can be captured."""
    return device.type == "cuda"


def _unsafe_run(trainer: Trainer, model: LightningModule) -> str:
    device = trainer.strategy.root_device
    if not has_graphs(device):
        return f"the device must be a CUDA GPU, got {device.type}"
    if trainer.world_size > 1:
        return f"the strategy must be for one device, got {trainer.world_size}, whose communication is in hooks"
    if not model.automatic_optimization:
        return "optimization must be automatic: by hand, a forward pass may have several backward passes"
    if torch.is_anomaly_enabled():
        return "detect_anomaly must be off: it looks at gradients on the host"
    return ""


def _unsafe_part(module: Module) -> str:
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import CheckpointWrapper

    for path, part in module.named_modules():
        where = path or "(itself)"
        if isinstance(part, CheckpointWrapper) or any(getattr(part, name, False) is True for name in CHECKPOINTING):
            return f"activations of {where} are recomputed"
        if part._forward_hooks or part._forward_pre_hooks or part._backward_hooks or part._backward_pre_hooks:
            return f"hooks of {where} would run when it is captured, and never again"
        if compiled_already(part) or replaced_forward(part) is not None:
            return f"{where} is compiled, or its forward replaced; torch.compile(mode='reduce-overhead') captures, too"
    if any(buffer.requires_grad for buffer in module.buffers()):
        return "its buffers must need no gradient"
    return ""


def _call(args: tuple[Any, ...]) -> Any:
    """What must be the same at each call."""
    inputs = [
        (tuple(arg.shape), str(arg.dtype), arg.device.type, arg.requires_grad) if isinstance(arg, Tensor) else None
        for arg in args
    ]
    return _autocast(), inputs


def _autocast() -> tuple[bool, torch.dtype]:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)
