"""One contract, every operator × implementation × dtype. A new operator is found here with no edit."""

from __future__ import annotations

import dataclasses
import itertools
import math

import hypothesis.strategies as st
import pytest
import torch
import torch._dynamo.testing
from hypothesis import assume, given, settings

from braze.kernels import OPS, use_backend
from braze.kernels.dispatch import SMALLEST_COMPILED
from braze.kernels.op import LAYOUTS, REGIMES, Draw, Op

from .contract import (
    Case,
    check_against_reference,
    check_deterministic,
    check_result_dtype,
    check_second_order,
)
from .poison import poisoned_allocations

every_op = pytest.mark.parametrize("op", OPS, ids=str)
every_differentiable_op = pytest.mark.parametrize("op", [op for op in OPS if op.differentiable], ids=str)

DTYPES = {
    "float32": (torch.float32, None),
    "float16": (torch.float16, None),
    "bfloat16": (torch.bfloat16, None),
    "bfloat16 with float32 weights": (torch.bfloat16, torch.float32),
}
every_dtype = pytest.mark.parametrize("dtypes", DTYPES.values(), ids=DTYPES)


def cases(op: Op, dtypes: tuple[torch.dtype, torch.dtype | None], device: str) -> st.SearchStrategy[Case]:
    """Dims, strides, value regimes and a seed; never elements."""
    return st.builds(
        Case,
        op=st.just(op),
        dims=st.fixed_dictionaries({name: st.sampled_from(sizes) for name, sizes in op.dims.items()}).filter(_small),
        dtype=st.just(dtypes[0]),
        weight_dtype=st.just(dtypes[1]),
        variant=st.sampled_from(sorted(op.variants)),
        layout=st.sampled_from(LAYOUTS),
        cotangent_layout=st.sampled_from(LAYOUTS),
        regime=st.sampled_from(REGIMES),
        seed=st.integers(0, 2**16),
        device=st.just(device),
    )


def _small(dims: dict[str, int]) -> bool:
    """A second of the interpreter's time at most: every size is drawn, but not all the largest together."""
    return math.prod(dims.values()) <= 150_000


#: Elements of an example of which only the shape matters: few enough that nothing is compiled for it.
FEW = 2_000


def example(
    op: Op, variant: str = "default", dtype: torch.dtype = torch.float32, *, most: int = 50_000, **fields: object
) -> Case:
    """An ordinary case: of the test sizes up to 129, those that make the most elements, ``most`` at the most."""
    small = ([size for size in sizes if size <= 129] for sizes in op.dims.values())
    fitting = (sizes for sizes in itertools.product(*small) if math.prod(sizes) <= most)
    dims = dict(zip(op.dims, max(fitting, key=math.prod), strict=True))
    return Case(op, dims, dtype, variant=variant, **fields)  # type: ignore[arg-type]


every_variant = pytest.mark.parametrize(
    ("op", "variant"), [pytest.param(op, v, id=f"{op}-{v}") for op in OPS for v in op.variants]
)


@every_op
@every_dtype
def test_triton_is_within_the_error_budget(op: Op, dtypes: tuple, device: str) -> None:
    @given(case=cases(op, dtypes, device))
    def check(case: Case) -> None:
        check_against_reference(case, "triton")

    check()


@every_op
@pytest.mark.skipif(
    settings.get_current_profile_name() != "deep", reason="compiles for minutes: HYPOTHESIS_PROFILE=deep"
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_compiled_is_within_the_error_budget_at_any_size(op: Op, dtype: torch.dtype, device: str) -> None:
    """Dims, values and seeds; not strides and variants, each of which would be a compilation of its own."""

    @given(case=cases(op, (dtype, None), device))
    @settings(max_examples=500)
    def check(case: Case) -> None:
        plain = {"variant": "default", "layout": "contiguous", "cotangent_layout": "contiguous"}
        check_against_reference(dataclasses.replace(case, **plain), "compile")

    check()


@every_variant
def test_compiled_is_within_the_error_budget(op: Op, variant: str, device: str) -> None:
    check_against_reference(example(op, variant, device=device), "compile")


@every_op
def test_compiled_code_of_the_deterministic_mode_is_within_the_error_budget(op: Op, device: str) -> None:
    with poisoned_allocations():
        check_against_reference(example(op, device=device), "compile")


@every_op
@pytest.mark.parametrize(
    ("dtypes", "layout"),
    [(DTYPES["float16"], "padded"), (DTYPES["bfloat16 with float32 weights"], "strided")],
    ids=["half, padded", "mixed, strided"],
)
def test_the_default_is_within_the_error_budget(
    op: Op, dtypes: tuple[torch.dtype, torch.dtype | None], layout: str, device: str
) -> None:
    dtype, weight_dtype = dtypes
    layouts = {"layout": layout, "cotangent_layout": "strided"}
    check_against_reference(example(op, dtype=dtype, weight_dtype=weight_dtype, device=device, **layouts), None)


@pytest.mark.parametrize("op", [op for op in OPS if op.small], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_the_form_for_small_tensors_is_within_the_error_budget(op: Op, dtype: torch.dtype) -> None:
    @given(case=cases(op, (dtype, None), "cpu"))
    def check(case: Case) -> None:
        tensors = [t for t in torch.utils._pytree.tree_leaves(case.call()) if isinstance(t, torch.Tensor)]
        assume(max(t.numel() for t in tensors) < SMALLEST_COMPILED)
        check_against_reference(case, None)

    check()


@every_differentiable_op
def test_second_derivatives_are_right(op: Op, device: str) -> None:
    @given(case=cases(op, (torch.float32, None), device))
    @settings(max_examples=15)
    def check(case: Case) -> None:
        check_second_order(case, "triton")

    check()


@every_differentiable_op
def test_compiled_second_derivatives_are_right(op: Op, device: str) -> None:
    check_second_order(example(op, device=device), "compile")


@every_variant
def test_same_input_gives_the_same_bits(op: Op, variant: str, device: str) -> None:
    for backend in ("triton", "compile"):
        check_deterministic(example(op, variant, device=device), backend)


@every_differentiable_op
@pytest.mark.parametrize("backend", ["triton", "compile"])
def test_backward_runs_twice_on_a_retained_graph(op: Op, backend: str, device: str) -> None:
    call = example(op, device=device).call()
    leaf = call.args[0]
    with use_backend(backend):
        outputs = torch.utils._pytree.tree_leaves(op.fn(*call.args, **call.kwargs))
        total = sum(y.sum() for y in outputs)
        (first,) = torch.autograd.grad(total, leaf, retain_graph=True)
        (second,) = torch.autograd.grad(total, leaf)
    assert torch.equal(first, second)


@every_variant
@pytest.mark.parametrize("autocast", [False, True], ids=["plain", "autocast"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("backend", ["eager", "triton"])
@pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight")  # ATen's remark on its own slow path
def test_shapes_and_dtypes_are_those_of_aten(
    op: Op, variant: str, autocast: bool, dtype: torch.dtype, backend: str, device: str
) -> None:
    with use_backend(backend):
        for weight_dtype in (None, torch.float32):
            case = example(op, variant, dtype, most=FEW, weight_dtype=weight_dtype, device=device)
            check_result_dtype(case, autocast=autocast)


@every_variant
def test_compiles_without_graph_break_or_recompile(op: Op, variant: str, device: str) -> None:
    frames = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    torch._dynamo.reset()
    compiled = torch.compile(op.fn, fullgraph=True, backend=frames, dynamic=True)
    dims = example(op, most=FEW).dims
    counts = []
    for factor in (17, 19):  # a batch as large as another dim would be taken for the same symbol
        first = next(iter(dims))
        case = Case(op, {**dims, first: factor * dims[first]}, torch.float32, variant=variant, device=device)
        call = case.call()
        with use_backend("eager"):
            expected = op.fn(*call.args, **call.kwargs)
        torch.testing.assert_close(compiled(*call.args, **call.kwargs), expected)
        counts.append(frames.frame_count)
    assert counts[0] == counts[1]  # tracing may restart within the first call, for a float that it makes a constant


@every_variant
def test_exports(op: Op, variant: str) -> None:
    call = example(op, variant, most=FEW).call()
    leaves, structure = torch.utils._pytree.tree_flatten((call.args, dict(call.kwargs)))
    tensors = tuple(leaf for leaf in leaves if isinstance(leaf, torch.Tensor))

    class Module(torch.nn.Module):
        def forward(self, *tensors: torch.Tensor) -> object:
            # Not every constant is an input that export takes: a memory format is none.
            given = iter(tensors)
            filled = [next(given) if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves]
            args, kwargs = torch.utils._pytree.tree_unflatten(filled, structure)
            return op.fn(*args, **kwargs)

    exported = torch.export.export(Module(), tensors)
    torch.testing.assert_close(exported.module()(*tensors), op.fn(*call.args, **call.kwargs))


@every_variant
@pytest.mark.parametrize("device_type", ["cpu", "cuda"])
def test_fake_tensors(op: Op, variant: str, device_type: str) -> None:
    case = example(op, variant, most=FEW)
    real = torch.utils._pytree.tree_leaves(op.fn(*case.call().args, **case.call().kwargs))
    with torch._subclasses.FakeTensorMode() as mode:
        call = torch.utils._pytree.tree_map_only(
            torch.Tensor, lambda t: mode.from_tensor(t).to(device_type), case.call()
        )
        fake = torch.utils._pytree.tree_leaves(op.fn(*call.args, **call.kwargs))
    assert [(y.shape, y.dtype) for y in fake] == [(y.shape, y.dtype) for y in real]
    assert all(y.device.type == device_type for y in fake)


@every_variant
def test_meta_tensors(op: Op, variant: str) -> None:
    case = example(op, variant, most=FEW)
    real = torch.utils._pytree.tree_leaves(op.fn(*case.call().args, **case.call().kwargs))
    call = torch.utils._pytree.tree_map_only(torch.Tensor, lambda t: t.to("meta"), case.call())
    meta = torch.utils._pytree.tree_leaves(op.fn(*call.args, **call.kwargs))
    assert [(y.shape, y.dtype, y.device.type) for y in meta] == [(y.shape, y.dtype, "meta") for y in real]


@every_op
def test_errors_teach(op: Op) -> None:
    found = list(op.errors())
    assert found
    for error in found:
        with pytest.raises(error.exception, match=error.match):
            op.fn(*error.call.args, **error.call.kwargs)


@every_op
def test_traffic_and_flops_are_positive(op: Op) -> None:
    for dims in op.bench:
        for options in op.variants.values():
            forward, backward = op.traffic(2, **dims, **options)
            assert forward > 0
            assert (backward > 0) == op.differentiable
        assert op.flops(**dims) > 0


class OnTheDevice(Draw):
    """Draws operands where they are used: in float64 on the host, as elsewhere, 2³¹ elements take 17 GB."""

    def tensor(self, *shape: int) -> torch.Tensor:
        generator = torch.Generator(self.device).manual_seed(0)
        return torch.randn(shape, generator=generator, dtype=self.dtype, device=self.device).requires_grad_()


@every_op
@pytest.mark.gpu
def test_more_elements_than_32_bits_count(op: Op) -> None:
    """Rows past element 2³¹ come out as they do alone."""
    first = next(iter(op.dims))
    dims = dict(op.bench[0])
    elements = sum(t.numel() for t in _example_tensors(op, dims)[:1])
    dims[first] *= -(-(2**31 + 2**20) // elements)
    call = op.inputs(OnTheDevice(0, torch.bfloat16, "cuda"), **dims, **op.variants["default"])
    with torch.no_grad(), use_backend("triton"):
        whole = torch.utils._pytree.tree_leaves(op.fn(*call.args, **call.kwargs))
    with torch.no_grad(), use_backend("eager"):
        tail = torch.utils._pytree.tree_map_only(
            torch.Tensor, lambda t: t[-4:] if t.shape[:1] == call.args[0].shape[:1] else t, call
        )
        wanted = torch.utils._pytree.tree_leaves(op.fn(*tail.args, **tail.kwargs))
    for ours, plain in zip(whole, wanted, strict=True):
        if ours.dim():
            torch.testing.assert_close(ours[-4:], plain)


def _example_tensors(op: Op, dims: dict[str, int]) -> list[torch.Tensor]:
    call = op.inputs(Draw(0, device="meta"), **dims, **op.variants["default"])
    return [t for t in torch.utils._pytree.tree_leaves(call) if isinstance(t, torch.Tensor)]
