"""How an operator runs on the CPU: its reference and the reference's gradient, each compiled on its own.

``torch.compile`` of the differentiable reference would do both at once, but its backward cannot run a second time
(``retain_graph=True``) or be differentiated, which an eager operator must. So the forward pass is compiled without
autograd and saves only its inputs; the backward pass is compiled from ``torch.func.vjp`` and recomputes what it needs,
which for these operators is less work than fetching it from memory. An operator that compiles better from its own
formulas builds its ``impls["compile"]`` from :func:`compiled_call`.
"""

from __future__ import annotations

import functools
import itertools
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, _guards

from . import long_sums
from .autograd import Gradients, fused, vjp


@functools.cache
def compiled(reference: Callable[..., Any]) -> Callable[..., Any]:
    """The compiled form of ``reference``: the same arguments, results and derivatives."""

    def forward(*tensors: Tensor | None, **options: Any) -> tuple[Any, Sequence[Tensor | None]]:
        return compiled_call(reference, tensors, options), tensors

    def backward(
        grads: Sequence[Tensor], saved: Sequence[Tensor | None], needs: Sequence[bool], **options: Any
    ) -> Gradients:
        return compiled_call(pullback, (*grads, *saved), {"needs": tuple(needs), **options})

    def pullback(*tensors: Tensor | None, needs: tuple[bool, ...], **options: Any) -> Gradients:
        inputs = tensors[-len(needs) :]
        grads = tensors[: -len(needs)]
        wanted = [t for t, need in zip(inputs, needs, strict=True) if need]

        def outputs(*replaced: Tensor) -> Any:
            fresh = iter(replaced)
            return reference(*(next(fresh) if need else t for t, need in zip(inputs, needs, strict=True)), **options)

        found = iter(torch.func.vjp(outputs, *wanted)[1](grads if len(grads) > 1 else grads[0]))
        return [next(found) if need else None for need in needs]

    def run(*tensors: Tensor | None, **options: Any) -> Any:
        return fused(forward, backward, vjp(reference), tensors, options)

    return run


_launch: Callable[..., Any] | None = None


@contextmanager
def uncompiled(launch: Callable[..., Any]) -> Iterator[None]:
    """Compiled calls become ``launch(function, tensors)``, with the options bound."""
    global _launch
    _launch = launch
    try:
        yield
    finally:
        _launch = None


def plain_call(function: Callable[..., Any], tensors: Sequence[Tensor | None], options: Mapping[str, Any]) -> Any:
    """What :func:`compiled_call` does, of a function that has nothing to gain from the compiler: as it is."""
    if torch.is_grad_enabled():
        with torch.no_grad():
            return plain_call(function, tensors, options)
    return compiled_call(function, tensors, options) if _launch is not None else function(*tensors, **options)


def compiled_call(
    function: Callable[..., Any],
    tensors: Sequence[Tensor | None],
    options: Mapping[str, Any],
    *,
    recompute: bool = False,
) -> Any:
    """``function(*tensors, **options)``, compiled, with no record for autograd; the options become constants.

    ``recompute``: each loop works out anew what it takes from up to eight tensors, not four, before that is written to
    memory and read. Worth it where most of them have one element for a channel or a row.
    """
    if torch.is_grad_enabled():
        with torch.no_grad():
            return compiled_call(function, tensors, options, recompute=recompute)
    if _launch is not None:
        return _launch(functools.partial(function, **options), [None if t is None else t.detach() for t in tensors])
    constants = (
        function,
        recompute,
        torch.get_num_threads(),
        torch._C._get_deterministic_algorithms(),
        torch._C._is_any_autocast_enabled() and torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu"),
        *options,
        *options.values(),
    )
    present = []
    layouts: list[tuple[Any, ...] | None] = []
    for t in tensors:
        if t is None:
            layouts.append(None)
        else:
            present.append(t)
            layouts.append((t.dtype, t.device, t.shape, t.stride()))
    exact = (constants, *layouts)
    call = _exact_calls.get(exact)
    if call is None:
        call = _compile(function, tensors, options, exact, RECOMPUTE if recompute else OPTIONS)
    return call(present)


def _compile(
    function: Callable[..., Any],
    tensors: Sequence[Tensor | None],
    options: Mapping[str, Any],
    exact: tuple[Any, ...],
    config: dict[str, Any],
) -> Callable[..., Any]:
    """What takes a list of the tensors that are present: code for these shapes alone, or for any."""
    # Detached: Dynamo looks at .grad, which warns where a tensor is not a leaf.
    detached = [None if t is None else t.detach() for t in tensors]
    kind = (exact[0], *map(_described, tensors))
    widths = tuple(t.shape[-1] if t is not None and t.dim() > 1 else None for t in tensors)
    if not _few(_widths, kind, widths, MOST_WIDTHS):
        widths = ()
    elif _few(_shapes, (kind, widths), exact, MOST_SHAPES):
        code = _exact_calls[exact] = _compile_exactly(function, detached, options, config)
        return code
    flexible = functools.partial(_flexible(function, kind, widths, config), *detached, **options)

    def call(_: list[Tensor]) -> Any:
        if hash(exact) in _ran:
            return flexible()
        # It may have to compile, for another side of a boundary that the sizes are compared with, of which there may
        # be more than Dynamo's eight; options are constants.
        with torch._dynamo.config.patch(specialize_float=True, recompile_limit=MOST_VARIANTS):
            outputs = flexible()
        _ran.add(hash(exact))
        return outputs

    return call


def _described(t: Tensor | None) -> tuple[Any, ...] | None:
    # Dynamo guards on strides of 0 and 1: a few layouts of each of two tensors would be more recompiles than it allows
    # for one code object, and an error.
    return None if t is None else (t.dtype, t.device, *(min(stride, 2) for stride in t.stride()))


#: Shapes, with strides, that get compiled code of their own, for each kind of call and each width of rows: a training
#: run has few, and a model of several stages as many at each of them.
MOST_SHAPES = 2
#: Widths of rows for which there is such code, and code for any number of rows; further ones share code for any width.
#: With a constant width softmax of float32 [4096, 1024] took 2.7 ms, with a variable one 3.6 (two cores of an EPYC).
MOST_WIDTHS = 4
#: Variants of code for any size, by the boundaries between which its sizes lie.
MOST_VARIANTS = 100
_shapes: dict[tuple[Any, ...], set[Any]] = {}
_widths: dict[tuple[Any, ...], set[Any]] = {}
_exact_calls: dict[tuple[Any, ...], Callable[..., Any]] = {}
_flexible_calls: dict[tuple[Any, ...], Callable[..., Any]] = {}
#: Hashes of shapes, with all else that code depends on, that ran in such code.
_ran: set[int] = set()
_serial = itertools.count()
#: Products are added unrounded, which torch.compile leaves out to agree with eager code to the last bit. In bfloat16,
#: bias_act [3152, 3072] takes 5.7 ms for 7.4; layer_norm [2048, 1024], both ways, 2.5 for 3.1 (one core of an EPYC).
#: And what is rounded to be written stays rounded where it is used: a norm is of the sum that it returns.
#: Formulas of up to 200 operations, not 30, are worked out again where they are used twice, before they are written to
#: memory. Sizes are not asserted: code runs for those in its key, or under Dynamo's guards.
OPTIONS: dict[str, Any] = {
    "cpp.enable_floating_point_contract_flag": "fast",
    "emulate_precision_casts": True,
    "realize_opcount_threshold": 200,
    "size_asserts": False,
}
#: For ``recompute``.
RECOMPUTE = {**OPTIONS, "realize_reads_threshold": 8}


def _few(seen: dict[tuple[Any, ...], set[Any]], kind: tuple[Any, ...], sizes: Any, most: int) -> bool:
    """Whether these sizes are among the first of a kind of call."""
    known = seen.setdefault(kind, set())
    if len(known) < most:
        known.add(sizes)
    return sizes in known


def _compile_exactly(
    function: Callable[..., Any],
    tensors: Sequence[Tensor | None],
    options: Mapping[str, Any],
    config: dict[str, Any],
) -> Callable[..., Any]:
    """Code for these shapes and strides, of a list of the tensors that are present, which it empties.

    It runs without the guards of Dynamo, which would ask again what the key answers, and the wrappers of AOTAutograd,
    which have nothing to do here.
    """
    from torch._inductor.compile_fx import compile_fx_inner
    from torch._subclasses import FakeTensorMode
    from torch.fx.experimental.proxy_tensor import make_fx  # here: it imports Triton
    from torch.fx.experimental.symbolic_shapes import ShapeEnv

    several = False

    def outputs(*present: Tensor) -> Any:
        nonlocal several
        given = iter(present)
        found = function(*(t if t is None else next(given) for t in tensors), **options)
        several = isinstance(found, tuple | list)
        return found if several else (found,)

    present = [t for t in tensors if t is not None]
    # The compiler looks for code on disk, and keeps it there, only where it is told of symbols, though there are none.
    mode = FakeTensorMode(shape_env=ShapeEnv(), static_shapes=True)
    with _guards.tracing(_guards.TracingContext(mode)), _settings(config):
        graph = make_fx(outputs, tracing_mode="fake", decomposition_table=_decompositions(present))(*present)
        built: Any = compile_fx_inner(graph, [mode.from_tensor(t) for t in present], is_inference=True)
    code = built.current_callable
    return code if several else lambda present: code(present)[0]


def _flexible(
    function: Callable[..., Any], kind: tuple[Any, ...], widths: tuple[int | None, ...], config: dict[str, Any]
) -> Any:
    """Code for any number of rows of these widths, or for any width if there are none."""
    call = _flexible_calls.get((kind, widths))
    if call is None:
        call = _flexible_calls[kind, widths] = _compile_flexibly(function, widths, config)
    return call


def _compile_flexibly(
    function: Callable[..., Any], widths: tuple[int | None, ...], config: dict[str, Any]
) -> Callable[..., Any]:
    def call(*tensors: Tensor | None, **options: Any) -> Any:
        for t, width in zip(tensors, widths, strict=False):
            if t is not None and width is not None:
                torch._dynamo.mark_static(t, t.dim() - 1)
        return function(*tensors, **options)

    # Dynamo counts recompiles per code object. Each kind of call gets a code object of its own, so that only sizes can
    # recompile.
    code = call.__code__.replace(co_name=f"{function.__name__}_{next(_serial)}")
    copy = types.FunctionType(code, call.__globals__, call.__name__, None, call.__closure__)
    return torch.compile(copy, backend=functools.partial(_backend, config), dynamic=True, fullgraph=True)


def _backend(config: dict[str, Any], graph: Any, inputs: Any) -> Any:
    from torch._inductor.compile_fx import compile_fx

    with _settings(config):
        return compile_fx(graph, inputs, _kept_on_disk, decompositions=_decompositions(inputs))


def _kept_on_disk(graph: Any, inputs: Any, **options: Any) -> Any:
    """The compiler's inner step, without the table of decompositions, which the name of a file cannot be made of."""
    from torch._inductor.compile_fx import compile_fx_inner

    options.pop("get_decomp_fn", None)
    return compile_fx_inner(graph, inputs, **options)


@contextmanager
def _settings(config: dict[str, Any]) -> Iterator[None]:
    """The compiler's, for code of ours; what it kept of other formulas, or for another processor, is not found."""
    from torch._inductor.cpu_vec_isa import pick_vec_isa

    from . import special_functions  # here: it imports Triton

    key: Any = torch.compiler.config  # what it inherits is not in its type
    made_for = f"{special_functions.VERSION} {pick_vec_isa()} {torch.get_num_threads()}"
    with (
        torch._inductor.config.patch({**config, **special_functions.compiler_options()}),
        key.patch(cache_key_tag=key.cache_key_tag + made_for),
    ):
        yield


def _decompositions(operands: Sequence[Any]) -> dict[Any, Callable[..., Any]]:
    from torch._inductor.decomposition import select_decomp_table

    from . import special_functions  # here: it imports Triton

    half = any(isinstance(t, Tensor) and t.dtype.itemsize == 2 for t in operands)
    return {**select_decomp_table(), **long_sums.decompositions(half=half), **special_functions.DECOMPOSITIONS}


def tracing() -> bool:
    """Whether a function runs to be compiled, and not for its result."""
    from torch.fx.experimental.proxy_tensor import get_proxy_mode  # here: it imports Triton

    return torch.compiler.is_compiling() or get_proxy_mode() is not None


def known_shapes() -> bool:
    """Whether a function runs to be compiled for the shapes that it sees, and for no others."""
    if torch.compiler.is_compiling():
        return False
    from torch.fx.experimental.proxy_tensor import get_proxy_mode  # here: it imports Triton

    return get_proxy_mode() is not None
