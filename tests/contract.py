"""The contract that every implementation of every operator is held to.

**The error budget.** Let ``truth`` be the reference in float64 on the same inputs, and ``plain`` the reference in the
dtype under test. An implementation may be wrong by

    slack · (the error of plain + one rounding step of the result's scale)

elementwise, for every output and every input gradient, where the scale is the largest magnitude in that result.
The error of ``plain`` is a random number, and on a small tensor sometimes zero by luck; it is therefore the largest
of a few runs on rescaled copies of the inputs and cotangents, and of more where few put an implementation over its
budget. The order in which a product of matrices is added up depends on its shape, which an implementation may choose:
there the error may also be what one rounding step of each operand makes of the truth, and where its terms overflow, a
result need only be no finite number. Nothing else is tunable: there is no tolerance to widen.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from braze.benchmarks import ops_case
from braze.kernels import dispatch, sharding, use_backend
from braze.kernels.op import Call, Draw, Op

from .poison import poisoned_allocations

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

RESCALED = (1.0, 0.9, 1.1, 1.3)
IN_DOUBT = tuple(0.5 + i / 13 for i in range(13))


@dataclass(frozen=True)
class Case:
    """One drawn call of one operator."""

    op: Op
    dims: dict[str, int]
    dtype: torch.dtype
    weight_dtype: torch.dtype | None = None
    variant: str = "default"
    layout: str = "contiguous"
    cotangent_layout: str = "contiguous"
    regime: str = "ordinary"
    seed: int = 0
    device: str = "cpu"

    def call(self) -> Call:
        draw = Draw(self.seed, self.dtype, self.device, self.layout, self.regime, self.weight_dtype)
        return self.op.inputs(draw, **self.dims, **self.op.variants[self.variant])

    def cotangents(self, outputs: Sequence[Tensor]) -> list[Tensor]:
        draws = [Draw(self.seed + 1 + i, y.dtype, self.device, self.cotangent_layout) for i, y in enumerate(outputs)]
        return [draw.tensor(*y.shape).detach() for draw, y in zip(draws, outputs, strict=True)]


@dataclass(frozen=True)
class Results:
    """Outputs, then the gradients of the differentiable inputs; by name, for messages."""

    values: dict[str, Tensor]
    dtypes: dict[str, torch.dtype] = field(default_factory=dict)


def check_against_reference(case: Case, backend: str | None) -> None:
    """``backend`` (None: what runs by default) is within the error budget, special values and dtypes included."""
    call = case.call()
    with use_backend(backend) if backend else nullcontext(), _poisoned(case, backend):
        outputs, leaves = _run(case.op.fn, call)
        cotangents = case.cotangents(outputs)
        got = _gradients(outputs, leaves, cotangents)
    _compare(case, call, cotangents, got, _gradients)


def check_second_order(case: Case, backend: str) -> None:
    """The gradient of a functional of the gradients, within the error budget.

    The first operand is computed from the others, so that a gradient which flows on into an operand's history, and is
    counted twice, shows.
    """
    case = dataclasses.replace(case, op=dataclasses.replace(case.op, fn=_entangled(case.op.fn)))
    call = case.call()
    with use_backend(backend):
        outputs, leaves = _run(case.op.fn, call)
        cotangents = case.cotangents(outputs)
        got = _second_gradients(outputs, leaves, cotangents)
    _compare(case, call, cotangents, got, _second_gradients)


def check_deterministic(case: Case, backend: str) -> None:
    """The same bits twice."""
    results = []
    for _ in range(2):
        with use_backend(backend):
            outputs, leaves = _run(case.op.fn, case.call())
            results.append(_gradients(outputs, leaves, case.cotangents(outputs)))
    for name, value in results[0].values.items():
        again = results[1].values[name]
        assert torch.equal(value.flatten().view(torch.uint8), again.flatten().view(torch.uint8)), name


def check_result_dtype(case: Case, *, autocast: bool) -> None:
    """Shapes and dtypes as the ATen counterpart gives them, with or without autocast."""
    call = case.call()
    with torch.autocast(case.device, torch.bfloat16, enabled=autocast):
        ours = _tensors(case.op.fn(*call.args, **call.kwargs))
        aten = _tensors(case.op.aten(*call.args, **call.kwargs))
    assert [(y.shape, y.dtype) for y in ours] == [(y.shape, y.dtype) for y in aten]


def check_sharded(case: Case, mesh: DeviceMesh) -> str:
    """Over a mesh of one dim, each dim that may be sharded is, in turn; nothing is communicated that need not be."""
    from torch.distributed.tensor import Replicate, distribute_tensor
    from torch.distributed.tensor.debug import CommDebugMode

    call = case.call()
    with _dispatched_calls() as calls:
        outputs, _ = _run(case.op.fn, call)
    cotangents = case.cotangents(outputs)
    ((tensors, options),) = calls
    if {id(t) for t in pytree.tree_leaves(call) if isinstance(t, Tensor)} != {id(t) for t in tensors if t is not None}:
        return "not as passed"
    if any(t is not None and t.dtype == torch.int64 and t.dim() == 0 for t in tensors):
        return "drawn"  # from a seed of each shard's own
    names, _ = sharding.parse(case.op.axes if isinstance(case.op.axes, str) else case.op.axes(*tensors, **options))
    sizes = dict(zip(sharding.axes(names[0], tensors[0].dim()), tensors[0].shape, strict=True))
    for t, own in zip(tensors[1:], names[1:], strict=True):
        named = zip(sharding.axes(own, t.dim()), t.shape, strict=True) if t is not None else ()
        sizes.update((axis, size) for axis, size in named if axis.endswith("+"))

    def distribute(t: Tensor, placements: list[Any]) -> Tensor:
        return distribute_tensor(t.detach(), mesh, placements).requires_grad_(t.requires_grad)

    for axis in (a for a, size in sizes.items() if not a.isupper() and size >= mesh.size()):
        there = {
            id(t): distribute(t, sharding.layout(n, t.shape, sizes, [axis])[0])
            for t, n in zip(tensors, names, strict=True)
            if t is not None
        }
        sharded_call = pytree.tree_map_only(Tensor, lambda t: there[id(t)], call)  # noqa: B023 - called at once
        with use_backend("triton"):
            outputs, leaves = _run(case.op.fn, sharded_call)
            lie = [[p if p.is_shard() else Replicate() for p in y.placements] for y in outputs]
            own_cotangents = [distribute(*c) for c in zip(cotangents, lie, strict=True)]
            got = _gradients(outputs, leaves, own_cotangents)
        whole = Results({name: value.full_tensor() for name, value in got.values.items()})
        _compare(case, call, cotangents, whole, _gradients)
        if axis.endswith("+"):  # communicated over; test_vocab_parallel.py counts
            continue
        with CommDebugMode() as communication:
            outputs, leaves = _run(case.op.fn, sharded_call)
            _gradients(outputs, leaves, own_cotangents)
        # A mean over all shards is two numbers added up over the ranks.
        assert communication.get_total_counts() <= (0 if outputs[0].dim() else 2)
    return "agreed"


def check_in_parts(
    case: Case, part: Callable[[Call], Call], whole: Callable[[Tensor, Tensor], Tensor], backend: str
) -> None:
    """A process that computes with ``part`` of the call has the whole result, and its part of each gradient.

    ``whole`` makes the gradient of an operand of that, and of the parts that other processes have.
    """
    call = case.call()
    with use_backend(backend), _poisoned(case, backend):
        outputs, leaves = _run(case.op.fn, part(call))
        cotangents = case.cotangents(outputs)
        parts = torch.autograd.grad(outputs, leaves, cotangents)
    operands = [t for t in pytree.tree_leaves(call) if isinstance(t, Tensor) and t.requires_grad]
    gradients = [whole(t, g) for t, g in zip(operands, parts, strict=True)]
    _compare(case, call, cotangents, _results(outputs, gradients, operands), _gradients)


def _poisoned(case: Case, backend: str | None) -> AbstractContextManager[None]:
    """Compiled code has its own memory filled, by conftest, and would be other code."""
    compiled = backend == "compile" or (backend is None and case.device == "cpu")
    return nullcontext() if compiled else poisoned_allocations()


def _run(fn: Callable[..., Any], call: Call) -> tuple[list[Tensor], list[Tensor]]:
    leaves = [t for t in pytree.tree_leaves(call) if isinstance(t, Tensor) and t.requires_grad]
    outputs = _tensors(fn(*call.args, **call.kwargs))
    assert leaves or not any(y.requires_grad for y in outputs)
    return outputs, leaves


def _gradients(outputs: list[Tensor], leaves: list[Tensor], cotangents: list[Tensor]) -> Results:
    gradients = torch.autograd.grad(outputs, leaves, cotangents, allow_unused=True) if leaves else ()
    return _results(outputs, gradients, leaves)


def _second_gradients(outputs: list[Tensor], leaves: list[Tensor], cotangents: list[Tensor]) -> Results:
    first = torch.autograd.grad(outputs, leaves, cotangents, create_graph=True, allow_unused=True) if leaves else ()
    functional = [g for g in first if g is not None and g.requires_grad]
    if not functional:  # linear: there is no second derivative
        return _results(outputs, first, leaves)
    directions = [torch.linspace(-1, 1, g.numel(), dtype=g.dtype, device=g.device).view(g.shape) for g in functional]
    second = torch.autograd.grad(functional, leaves, directions, allow_unused=True)
    return _results([], second, leaves)


def _entangled(fn: Callable[..., Any]) -> Callable[..., Any]:
    def entangled(first: Tensor, *others: Any, **options: Any) -> Any:
        for other in others:
            if isinstance(other, Tensor) and other.requires_grad and other.numel():
                first = first + other.flatten()[0]
        return fn(first, *others, **options)

    return entangled


def _results(outputs: Sequence[Tensor], gradients: Sequence[Tensor | None], leaves: Sequence[Tensor]) -> Results:
    values = {f"output {i}": y.detach() for i, y in enumerate(outputs)}
    for i, (leaf, gradient) in enumerate(zip(leaves, gradients, strict=True)):
        # An input that the result does not depend on may have no gradient or a zero one.
        gradient = torch.zeros_like(leaf) if gradient is None else gradient.detach()
        assert gradient.dtype == leaf.dtype
        values[f"gradient of input {i} {tuple(leaf.shape)}"] = gradient
    return Results(values)


def _compare(case: Case, call: Call, cotangents: list[Tensor], got: Results, derive: Callable[..., Results]) -> None:
    runs = [_reference_runs(case, call, cotangents, derive, s) for s in RESCALED]
    truth, plain = runs[0]
    for name, value in got.values.items():
        wanted = truth.values[name]
        twin = plain.values[name]
        assert value.shape == twin.shape, f"{name}: shape {tuple(value.shape)}, the reference has {tuple(twin.shape)}"
        assert value.dtype == twin.dtype, f"{name}: dtype {value.dtype}, the reference has {twin.dtype}"
        special = ~twin.isfinite()
        finite = ~special & wanted.isfinite()
        assert torch.equal(value.isfinite(), ~special), f"{name}: not finite in other places than the reference"
        if _multiplies_matrices(case.op):  # of terms that overflow, the order decides between inf, -inf and NaN
            special = special & ~wanted.isfinite()
        assert torch.equal(value[special], twin[special]) or (
            torch.equal(value[special].isnan(), twin[special].isnan())
            and torch.equal(value[special].nan_to_num(0.0), twin[special].nan_to_num(0.0))
        ), f"{name}: other special values than the reference"
        if not finite.any():
            continue
        info = torch.finfo(value.dtype)
        step = info.eps * wanted[finite].abs().max().item() + info.smallest_normal * info.eps
        error = _error(value, wanted)
        own_error = max(_error(p.values[name], t.values[name]) for t, p in runs)
        if error > case.op.slack * (own_error + step) and len(runs) == len(RESCALED):
            runs += [_reference_runs(case, call, cotangents, derive, s) for s in IN_DOUBT]
            if _multiplies_matrices(case.op):
                runs += [(truth, _rounded_truth(case, call, cotangents, derive, seed)) for seed in range(4)]
            own_error = max(_error(p.values[name], t.values[name]) for t, p in runs)
        budget = case.op.slack * (own_error + step)
        assert error <= budget, (
            f"{name}: error {error:.3g} is over the budget {budget:.3g} "
            f"(reference's own {own_error:.3g}, rounding step {step:.3g})"
        )


def _error(value: Tensor, wanted: Tensor) -> float:
    difference = (value.double() - wanted.double())[value.isfinite() & wanted.isfinite()].abs()
    return difference.max().item() if difference.numel() else 0.0


def _reference_runs(
    case: Case, call: Call, cotangents: list[Tensor], derive: Callable[..., Results], scale: float
) -> tuple[Results, Results]:
    """The reference in float64 and in the dtype under test, with ``scale`` times the inputs and cotangents.

    Without the cotangents the gradient of a bias, which is a sum of them, would have the same error each time.
    """
    if scale != 1.0:
        cotangents = [c * scale for c in cotangents]  # no longer in the drawn layout
    plain_call = _map(call, lambda t: (t.detach() * scale).requires_grad_(t.requires_grad) if t.requires_grad else t)
    with _reference_runs_with() as options:
        plain = derive(*_run(case.op.fn, plain_call), cotangents)
    wide_call = _map(plain_call, lambda t: t.detach().double().requires_grad_(t.requires_grad))
    with _reference_runs_with(_widened(options)):
        truth = derive(*_run(case.op.fn, wide_call), [c.double() for c in cotangents])
    return truth, plain


def _multiplies_matrices(op: Op) -> bool:
    bench = ops_case.Case(op, op.bench[0], torch.float32, torch.device("cpu"))
    return bench.matmul_flops(ops_case.FORWARD) is not None


def _rounded_truth(
    case: Case, call: Call, cotangents: list[Tensor], derive: Callable[..., Results], seed: int
) -> Results:
    """The truth about operands that are each off by up to one rounding step."""
    generator = torch.Generator(case.device).manual_seed(seed)

    def rounded(t: Tensor) -> Tensor:
        off = torch.empty_like(t, dtype=torch.float64).uniform_(-1.0, 1.0, generator=generator)
        return (t.detach().double() * (1.0 + torch.finfo(t.dtype).eps * off)).requires_grad_(t.requires_grad)

    with _reference_runs_with() as options:
        derive(*_run(case.op.fn, call), cotangents)
    with _reference_runs_with(_widened(options)):
        return derive(*_run(case.op.fn, _map(call, rounded)), [c.double() for c in cotangents])


def _widened(options: dict[str, Any]) -> dict[str, Any]:
    """The same eps, which may depend on the dtype; a dtype that is itself an option is as wide as the operands."""
    return {name: torch.float64 if isinstance(o, torch.dtype) else o for name, o in options.items()}


@contextmanager
def _reference_runs_with(options: dict[str, Any] | None = None) -> Iterator[dict[str, Any]]:
    """Every operator runs its reference; yields the options of the last call, or imposes those given."""
    seen: dict[str, Any] = {}

    def run(op: Op, *tensors: Tensor | None, **own: Any) -> Any:
        seen.update(own)
        return op.reference(*tensors, **(own if options is None else options))

    before, dispatch.run = dispatch.run, run
    try:
        yield seen
    finally:
        dispatch.run = before


@contextmanager
def _dispatched_calls() -> Iterator[list[tuple[tuple[Tensor | None, ...], dict[str, Any]]]]:
    """The tensors and options of every dispatch inside the block."""
    calls: list[tuple[tuple[Tensor | None, ...], dict[str, Any]]] = []

    def run(op: Op, *tensors: Tensor | None, **options: Any) -> Any:
        calls.append((tensors, options))
        return before(op, *tensors, **options)

    before, dispatch.run = dispatch.run, run
    try:
        yield calls
    finally:
        dispatch.run = before


def _map(call: Call, change: Callable[[Tensor], Tensor]) -> Call:
    return pytree.tree_map_only(Tensor, lambda t: change(t) if t.is_floating_point() else t, call)


def _tensors(outputs: Any) -> list[Tensor]:
    return [outputs] if isinstance(outputs, Tensor) else list(outputs)
