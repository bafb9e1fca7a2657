"""What an operator is: one value that the tests, the benchmarks, the audit and the documentation all read."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor

Dims = Mapping[str, int]
Options = Mapping[str, Any]

#: How a drawn tensor lies in memory: "padded" rows are further apart than they are long, "strided" rows have a gap
#: between elements, "transposed" swaps the first and the last axis, "expanded" repeats the first row with stride 0,
#: "offset" starts one element after the allocation and so misses every vector alignment.
LAYOUTS = ("contiguous", "padded", "strided", "transposed", "expanded", "offset")

#: What a drawn tensor holds. "constant" rows repeat one value; "inf" and "nan" plant a few special values.
REGIMES = ("ordinary", "tiny", "huge", "constant", "inf", "nan")


class Call(NamedTuple):
    """The arguments of one call: ``fn(*args, **kwargs)``."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any] = MappingProxyType({})


class ErrorInput(NamedTuple):
    """An invalid call, the exception that it must raise, and a regular expression that its message must match."""

    call: Call
    exception: type[Exception]
    match: str


class Traffic(NamedTuple):
    """The least bytes that a forward and a backward pass must move: each operand once; 0 without a backward pass."""

    forward: int
    backward: int


class Excess(NamedTuple):
    """The most that a pass moves, in units of its :class:`Traffic`, and why it is more than 1."""

    ratio: float
    reason: str


class Draw:
    """Draws tensors of one dtype, layout and value regime; everything follows from ``seed``."""

    def __init__(
        self,
        seed: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        layout: str = "contiguous",
        regime: str = "ordinary",
        weight_dtype: torch.dtype | None = None,
    ) -> None:
        self.dtype, self.device, self.layout, self.regime = dtype, torch.device(device), layout, regime
        self.weight_dtype = weight_dtype or dtype
        self.random = random.Random(seed)
        self.generator = torch.Generator().manual_seed(seed)

    def tensor(self, *shape: int) -> Tensor:
        """A differentiable operand, in the drawn layout and value regime."""
        values = torch.randn(shape, generator=self.generator, dtype=torch.float64)
        if self.regime == "tiny":
            values *= 1e-3
        elif self.regime == "huge":
            values *= 1e3 if self.dtype == torch.float16 else 1e8
        elif self.regime == "constant" and shape:
            values = values[..., :1].expand(shape)
        values = values.to(self.dtype)
        if self.regime in ("inf", "nan") and values.numel():
            special = [float("inf"), float("-inf")] if self.regime == "inf" else [float("nan")]
            flat = values.flatten()
            for _ in range(3):
                flat[self.random.randrange(flat.numel())] = self.random.choice(special)
            values = flat.view(shape)
        return self._lay_out(values.to(self.device)).requires_grad_()

    def weight(self, *shape: int) -> Tensor:
        """A differentiable parameter: ordinary values, contiguous; its dtype may differ from the operands'."""
        values = torch.randn(shape, generator=self.generator, dtype=torch.float64)
        return values.to(dtype=self.weight_dtype, device=self.device).requires_grad_()

    def constant(self, *shape: int, low: float = -1.0, high: float = 1.0) -> Tensor:
        """A floating-point operand that no gradient flows to, uniform in [low, high)."""
        values = torch.rand(shape, generator=self.generator, dtype=torch.float64) * (high - low) + low
        return values.to(dtype=self.dtype, device=self.device)

    def integers(self, low: int, high: int, *shape: int) -> Tensor:
        """Integers (int64) in [low, high); all ``low`` where that range is empty."""
        return torch.randint(low, max(high, low + 1), shape, generator=self.generator).to(self.device)

    def bytes(self, *shape: int) -> Tensor:
        """A uint8 operand, in the drawn layout; no gradient flows to it."""
        return self._lay_out(torch.randint(0, 256, shape, generator=self.generator, dtype=torch.uint8).to(self.device))

    def permutation(self, n: int) -> Tensor:
        """The integers below n (int64) in random order."""
        return torch.randperm(n, generator=self.generator).to(self.device)

    def booleans(self, *shape: int, probability: float = 0.5) -> Tensor:
        """True with the given probability."""
        return (torch.rand(shape, generator=self.generator) < probability).to(self.device)

    def _lay_out(self, values: Tensor) -> Tensor:
        if values.dim() == 0 or self.layout == "contiguous":
            return values.contiguous()
        shape = values.shape
        if self.layout == "padded":
            return values.new_zeros(*shape[:-1], shape[-1] + 3)[..., : shape[-1]].copy_(values)
        if self.layout == "strided":
            return values.new_zeros(*shape[:-1], 2 * shape[-1])[..., ::2].copy_(values)
        if self.layout == "transposed":
            return values.transpose(0, -1).contiguous().transpose(0, -1)
        if self.layout == "expanded":
            return values[:1].contiguous().expand(shape) if values.dim() > 1 else values
        if self.layout == "offset":
            return values.new_zeros(values.numel() + 1)[1:].view(shape).copy_(values)
        raise ValueError(f"layout must be one of {LAYOUTS}, got {self.layout!r}")


@dataclass(frozen=True, repr=False)
class Op:
    """One operator: what it computes, what must agree with it, and what is worth testing and timing.

    Adding an operator is one of these, in ``kernels/ops/``; nothing else needs to be told about it.
    """

    name: str
    #: What a user has in its place, for the operator table: Markdown.
    replaces: str
    #: The public function: checks its arguments, then dispatches.
    fn: Callable[..., Any]
    #: The mathematics in plain PyTorch: float32 (or wider) inside, differentiable to any order.
    reference: Callable[..., Any]
    #: Every other implementation, called as ``reference`` is: ``"triton"``; ``"compile"``, where that is not simply
    #: the compiled ``reference``.
    impls: Mapping[str, Callable[..., Any]]
    #: ``inputs(draw, **dims, **options)``: a valid call of ``fn``.
    inputs: Callable[..., Call]
    #: Test sizes of each named dimension, on the edges of the kernels' branches.
    dims: Mapping[str, Sequence[int]]
    #: Benchmark sizes, from real workloads.
    bench: Sequence[Dims]
    #: ``traffic(itemsize, **dims, **options)``: the least bytes moved.
    traffic: Callable[..., Traffic]
    #: ``flops(**dims)``: floating-point operations of the forward pass.
    flops: Callable[..., int]
    #: What the same call is in plain ATen: the benchmarks' baseline, and the model for result dtypes.
    aten: Callable[..., Any]
    #: The dims of the tensors that go in and come out, and which may be sharded (``sharding.py``): a signature, or a
    #: function that gives it for the tensors and options of a call.
    axes: str | Callable[..., str]
    #: Invalid calls and the message each must get.
    errors: Callable[[], Iterable[ErrorInput]]
    #: Sizes at which the kernels are audited; empty is ``bench``. Bytes are counted at the first: large enough that
    #: what each program moves once does not show, small enough for the interpreter (a few ms a tile).
    audit: Sequence[Dims] = ()
    #: By variant and pass ("forward", "backward"): where more than 1.02 times the least bytes move.
    excess: Mapping[tuple[str, str], Excess] = field(default_factory=dict)
    #: What runs in place of ``reference``, called as it is, where a CPU tensor is too small for compiled code: fewer of
    #: ATen's operators, as accurate.
    small: Callable[..., Any] | None = None
    #: What ``torch.compile`` traces in place of ``reference``: for what its compiler would not find by itself.
    traced: Callable[..., Any] | None = None
    #: Named option sets for ``inputs``: one for each branch of the kernels worth its own test.
    variants: Mapping[str, Options] = field(default_factory=lambda: {"default": {}})
    #: Those that are timed at the benchmark sizes.
    bench_variants: Sequence[str] = ("default",)
    #: Whether the ATen counterpart draws random numbers of its own, so that its results cannot be judged.
    random: bool = False
    #: The module classes that wrap ``fn``.
    modules: Sequence[type[torch.nn.Module]] = ()
    #: Allowed error in units of the reference's own. Raising it needs a reason beside it.
    slack: float = 2.0
    #: Whether a gradient flows to any of the inputs.
    differentiable: bool = True
    #: Device types on which autocast runs the ATen counterpart in float32.
    autocast_to_float32: frozenset[str] = frozenset()

    def __repr__(self) -> str:
        return self.name
