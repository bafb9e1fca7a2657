"""A sample of a module: a small copy with drawn weights, on which a joint can be probed and verified.

Nothing of the live module is run, so neither its buffers, its counters nor its hooks can notice.
"""

from __future__ import annotations

import copy
import random
import sys
import warnings
from collections import OrderedDict
from collections.abc import Hashable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ..dispatch import use_backend


class Refused(Exception):
    """A candidate is left as it is; the message is the reason that the report gives."""


class Draw(NamedTuple):
    """Inputs of one trial, in float64, and what they are.

    The last are ``tables`` (cosines, targets), to which models have no gradient flow; they are verified as if it did.
    """

    label: str
    inputs: tuple[Tensor, ...]
    tables: int = 0

    def doubled(self, dim: int = 0) -> Draw:
        """Twice the same, along a dim of all inputs."""
        return self._replace(inputs=tuple(torch.cat([t, t], dim) for t in self.inputs))

    def scaled(self, factor: float) -> Draw:
        """The floating-point inputs times ``factor``."""
        return self._replace(inputs=tuple(t * factor if t.is_floating_point() else t for t in self.inputs))


class Sample:
    """Float64 copies of ``module`` with drawn parameters and no hooks, on its own device (meta: on the CPU).

    ``sizes`` replaces feature counts of linear layers, so that a large model is verified on a small matrix; None stands
    for no copy at all, where the joint needs only the source.
    """

    def __init__(self, module: nn.Module, root: nn.Module, sizes: dict[int, int] | None) -> None:
        first = next((t for t in (*module.parameters(), *module.buffers()) if t.is_floating_point()), None)
        self.source = module
        self.dtype = torch.float32 if first is None else first.dtype
        self.device = torch.device("cpu") if first is None or first.device.type == "meta" else first.device
        self.generator = torch.Generator().manual_seed(1)
        self.drawn = 0
        self.module = nn.Module() if sizes is None else self._copy(module, root, sizes)

    def randn(self, *shape: int) -> Tensor:
        """Standard normal numbers, float64."""
        return torch.randn(shape, generator=self.generator, dtype=torch.float64).to(self.device)

    def _copy(self, module: nn.Module, root: nn.Module, sizes: dict[int, int]) -> nn.Module:
        # A deepcopy whose memo already holds what must not be copied: the rest of the model stands for itself.
        inside = list(module.modules())
        memo: dict[int, Any] = {id(m): m for m in root.modules()}
        for part in inside:
            del memo[id(part)]
            hooks = (value for name, value in vars(part).items() if "hooks" in name and isinstance(value, dict))
            memo |= {id(value): OrderedDict() for value in hooks}
        for part in inside:
            shrunk = sizes if isinstance(part, nn.Linear) or transposed(part) else {}
            memo |= {id(p): self._draw(p, shrunk) for p in part.parameters(recurse=False)}
            memo |= {id(b): self._buffer(b) for b in part.buffers(recurse=False)}
        try:
            sample = copy.deepcopy(module, memo)
        except Exception as error:
            raise Refused(f"it cannot be copied: {error}") from error
        for part in sample.modules():
            for name in ("in_features", "out_features", "nx", "nf"):
                size = getattr(part, name, None)
                if isinstance(size, int) and size in sizes:
                    setattr(part, name, sizes[size])
        return sample

    def _draw(self, parameter: Tensor, sizes: dict[int, int]) -> nn.Parameter:
        shape = [sizes.get(n, n) for n in parameter.shape]
        if len(shape) > 1:
            return nn.Parameter(self.randn(*shape) / shape[-1] ** 0.5)
        values = 1.0 + 0.5 * self.randn(*shape)
        if values.numel() > 1:
            # Large enough for an output clamp to show. In another channel of each parameter: where a weight is as large
            # as the bias that it is added to, a result of about 0 is all roundings.
            values[self.drawn % len(values)] = 30.0
            self.drawn += 1
        return nn.Parameter(values)

    def _buffer(self, buffer: Tensor) -> Tensor:
        if buffer.is_floating_point():
            return 1.0 + self.randn(*buffer.shape).abs()
        return torch.zeros_like(buffer, device=self.device) if buffer.is_meta else buffer.clone()


def transposed(module: nn.Module) -> bool:
    """Whether it looks like a linear layer whose weight is [in, out], as those of GPT-2: with an nx and an nf."""
    shapes = {name: tuple(p.shape) for name, p in module.named_parameters()}
    sizes = getattr(module, "nx", None), getattr(module, "nf", None)
    return shapes == {"weight": sizes, "bias": sizes[1:]}


def kind(module: nn.Module) -> Hashable:
    """Equal for modules that compute the same function of their parameters and input, as far as attributes tell."""
    tensors = (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False))
    shapes = tuple((name, tuple(t.shape), t.dtype, t.device.type) for name, t in tensors)
    children = tuple((name, kind(child)) for name, child in module.named_children())
    return type(module), attributes_of(module), shapes, children


def attributes_of(module: nn.Module) -> tuple[tuple[str, Hashable], ...]:
    """The public attributes, without tensors and children: plain values, and the identity of others."""
    return tuple((name, _value(value)) for name, value in sorted(vars(module).items()) if name[:1] != "_")


def _value(value: Any) -> Hashable:
    plain = isinstance(value, (bool, int, float, str, tuple, type(None)))
    try:
        hash(value)
    except TypeError:
        plain = False
    return (type(value), value) if plain else id(value)


@contextmanager
def quiet(model: nn.Module, eager: bool = True) -> Iterator[None]:
    """Random states stay as they were, parameters are whole, and nothing is compiled on the CPU if ``eager``."""
    tensors = (*model.parameters(), *model.buffers())
    devices = {t.device.index for t in tensors if t.device.type == "cuda"}
    state = random.getstate()
    try:
        with ExitStack() as stack:
            stack.enter_context(torch.random.fork_rng(devices=sorted(devices)))
            stack.enter_context(torch.inference_mode(False))
            stack.enter_context(torch.enable_grad())
            stack.enter_context(warnings.catch_warnings())
            warnings.simplefilter("ignore")
            stack.enter_context(_gathered(model))
            if eager and not devices:
                stack.enter_context(use_backend("eager"))
            yield
    finally:
        random.setstate(state)


def _gathered(model: nn.Module) -> AbstractContextManager[None]:
    """FullyShardedDataParallel leaves each process a flat piece of a parameter: its shape is known when gathered."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    if fsdp is None or not any(isinstance(module, fsdp.FullyShardedDataParallel) for module in model.modules()):
        return nullcontext()
    return fsdp.FullyShardedDataParallel.summon_full_params(model, writeback=False)


class Exactly(TorchFunctionMode):
    """Keeps a float64 computation in float64 where the code asks for float32 inside, as most norms do."""

    _NARROWING = (Tensor.float, Tensor.half, Tensor.bfloat16)
    _NARROW = (torch.float32, torch.float16, torch.bfloat16)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run ``func`` with every narrower dtype widened."""
        if func in self._NARROWING:
            return args[0].double()
        kwargs = {name: self._widen(value) for name, value in (kwargs or {}).items()}
        return func(*map(self._widen, args), **kwargs)

    def _widen(self, value: Any) -> Any:
        return torch.float64 if isinstance(value, torch.dtype) and value in self._NARROW else value
