"""What is audited: every operator, at the sizes and in the variants that it names, forward and backward."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple
from unittest import mock

import torch
import torch.fx.experimental._config
from torch import Tensor
from torch.utils._pytree import tree_leaves

from .. import OPS, dispatch
from ..op import Dims, Draw, Op

#: Multiprocessors of an H100, for the machine code.
MULTIPROCESSORS = 132


class Case(NamedTuple):
    """One call of one operator."""

    op: Op
    variant: str
    dtype: torch.dtype
    dims: Dims

    def facts(self) -> dict[str, Any]:
        """The fields that say what a record is about."""
        return {
            "op": self.op.name,
            "provider": "triton",
            "variant": self.variant,
            "dtype": str(self.dtype).removeprefix("torch."),
            "shape": dict(self.dims),
        }


def audited_operators() -> list[Op]:
    """The operators that have kernels."""
    return [op for op in OPS if "triton" in op.impls]


def cases(ops: Iterable[Op], sizes: Callable[[Op], Sequence[Dims]], quick: bool) -> Iterator[Case]:
    """Every variant × size × dtype; ``quick``: only those that differ from the plainest in one of the three."""
    for op in ops:
        plain = next(iter(op.variants))
        found = sizes(op)
        for size in found:
            for variant in op.variants:
                for dtype in (torch.bfloat16, torch.float32):
                    apart = (size is not found[0]) + (variant != plain) + (dtype != torch.bfloat16)
                    if apart < 2 or not quick:
                        yield Case(op, variant, dtype, size)


def passes(case: Case, draw: Draw) -> Iterator[tuple[str, Callable[[], object]]]:
    """The passes of a call, to be run in this order; a backward pass sees cotangents in the outputs' memory format."""
    args, kwargs = case.op.inputs(draw, **case.dims, **case.op.variants[case.variant])
    outputs: list[Tensor] = []
    yield "forward", lambda: outputs.extend(t for t in tree_leaves(case.op.fn(*args, **kwargs)) if t.requires_grad)
    if not case.op.differentiable:
        return
    wanted = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor) and t.requires_grad]
    # Not 1, which an operator may find that it need not multiply by.
    cotangents = [torch.full_like(t, 0.5, memory_format=_memory_format(t)) for t in outputs]
    yield "backward", lambda: torch.autograd.grad(outputs, wanted, cotangents, allow_unused=True)


def _memory_format(t: Tensor) -> torch.memory_format:
    images = t.dim() == 4 and not t.is_contiguous() and t.is_contiguous(memory_format=torch.channels_last)
    return torch.channels_last if images else torch.contiguous_format


class Shapes(Draw):
    """Draws tensors that have a shape and no memory."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__(0, dtype, "meta")

    def tensor(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:  # noqa: D102 - as in Draw
        return torch.empty(shape, dtype=dtype or self.dtype, device="meta", requires_grad=True)

    weight = tensor

    def constant(self, *shape: int, low: float = -1.0, high: float = 1.0) -> Tensor:  # noqa: D102 - as in Draw
        return torch.empty(shape, dtype=self.dtype, device="meta")

    def integers(self, low: int, high: int, *shape: int) -> Tensor:  # noqa: D102 - as in Draw
        return torch.empty(shape, dtype=torch.int64, device="meta")

    def bytes(self, *shape: int) -> Tensor:  # noqa: D102 - as in Draw
        return torch.empty(shape, dtype=torch.uint8, device="meta")

    def permutation(self, n: int) -> Tensor:  # noqa: D102 - as in Draw
        return self.integers(0, n, n)

    def booleans(self, *shape: int, probability: float = 0.5) -> Tensor:  # noqa: D102 - as in Draw
        return torch.empty(shape, dtype=torch.bool, device="meta")


@contextmanager
def everything_in_triton() -> Iterator[None]:
    """Run the kernels even where an operator would avoid them: on meta tensors, and under a dispatch mode."""
    from ..triton import launch

    choice = dispatch.Choice("triton", "audited")
    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(dispatch, "choose", return_value=choice))
        stack.enter_context(mock.patch.object(launch, "_multiprocessors", return_value=MULTIPROCESSORS))
        stack.enter_context(mock.patch.object(launch, "limits_registers", True))
        # Of a meta tensor nothing is left out.
        stack.enter_context(mock.patch.object(torch.fx.experimental._config, "meta_nonzero_assume_all_nonzero", True))
        yield
