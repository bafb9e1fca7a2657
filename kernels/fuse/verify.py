"""Is the fused module as good as the original? Judged by numbers, against a float64 copy of the original.

    error(fused) ≤ 2 · (error(original) + one rounding step of the result's scale)

for the outputs and the gradient of every input and parameter; in float32 and in the module's own dtype, and with the
parameters in another dtype than the input; in training and in evaluation.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .sample import Draw, Exactly, Refused

SLACK = 2.0

#: The largest error of one draw is partly luck. Where the fused form is over its budget, both are measured again on so
#: many further draws, each scaled down a little more, because an example's are all the same. The largest errors of all
#: of them are compared.
REPEATS = 7

#: The float64 copy must compute the same function as the original, or it is no judge: an error of more rounding steps
#: than this says that it does not. In bfloat16, of outputs only (1.6 was the most seen, on hand-written norms); float16
#: overflows inside norms that square their input, and is no worse fused.
MOST_STEPS = {torch.float32: 1000, torch.bfloat16: 16}


@dataclass(frozen=True)
class Check:
    """What a verification found: its worst result, with error and budget as fractions of that result's scale."""

    error: float
    budget: float
    where: str
    results: int


class Result(NamedTuple):
    """One output or gradient; and the narrowest dtype of what it was computed from."""

    name: str
    value: Tensor
    narrowest: torch.dtype


class Measure(NamedTuple):
    """Error and budget of one result, as fractions of its scale."""

    name: str
    error: float
    budget: float


def verify(
    original: nn.Module,
    fused: nn.Module,
    draws: Callable[[], Sequence[Draw]],
    dtype: torch.dtype,
    prepare: Callable[[nn.Module], nn.Module] = lambda module: module,
    slack: float = SLACK,
) -> Check:
    """Compare float64 modules ``original`` and ``fused`` in the dtypes that matter to a model in ``dtype``.

    Raises:
        Refused: if fused is worse than its budget, or gives another dtype or shape.
    """
    worst, results, first = Check(0.0, 1.0, "", 0), 0, draws()
    for x_dtype, parameter_dtype in _dtypes(original, dtype):
        subjects = [copy.deepcopy(m).to(parameter_dtype) for m in (original, fused)]
        exact = prepare(copy.deepcopy(subjects[0])).double()
        for training in (True, False):
            for module in (*subjects, exact):
                module.train(training)
            # Every draw once in each dtype; one draw settles evaluation, and parameters of another dtype.
            for i in range(len(first)) if training and x_dtype == parameter_dtype else (0,):
                where = f"{first[i].label} {_short(x_dtype)} input, {'train' if training else 'eval'}"
                try:
                    if i == 0:
                        _check_random(subjects[0], first[i], x_dtype)
                    measures = _compare(subjects, exact, first[i], x_dtype, slack)
                    if any(m.error > m.budget for m in measures):
                        others = [draws()[i].scaled(1.0 - k / 16) for k in range(1, 1 + REPEATS)]
                        again = [_compare(subjects, exact, other, x_dtype, slack) for other in others]
                        measures = [_pool(same) for same in zip(measures, *again, strict=True)]
                except Refused as refused:
                    raise Refused(f"{refused} ({where})") from None
                results += len(measures)
                for m in measures:
                    if m.error / m.budget > worst.error / worst.budget:
                        worst = Check(m.error, m.budget, f"{m.name}, {where}", 0)
    _check_autocast(original, fused, first[0])
    worst = replace(worst, results=results)
    if worst.error > worst.budget:
        raise Refused(f"it computes something else: error {worst.error:.1e}, budget {worst.budget:.1e} ({worst.where})")
    return worst


def _dtypes(module: nn.Module, own: torch.dtype) -> list[tuple[torch.dtype, torch.dtype]]:
    """(dtype of the input, dtype of the parameters)."""
    low = own if own in (torch.float16, torch.bfloat16) else torch.bfloat16
    same = [(torch.float32, torch.float32), (low, low)]
    mixed = [(low, torch.float32), (torch.float32, low)]
    return same + mixed if any(True for _ in module.parameters()) else same


def _check_random(original: nn.Module, draw: Draw, dtype: torch.dtype) -> None:
    inputs = [t.to(dtype) if t.is_floating_point() else t for t in draw.inputs]
    try:
        runs = [_run(original, inputs, seed) for seed in (0, 1)]
    except Exception:
        return
    if any(not torch.equal(a.value, b.value) for a, b in zip(*runs, strict=True)):
        raise Refused("its forward is random")


def _compare(
    subjects: list[nn.Module], exact: nn.Module, draw: Draw, dtype: torch.dtype, slack: float
) -> list[Measure]:
    original, fused = subjects
    inputs = [t.to(dtype) if t.is_floating_point() else t for t in draw.inputs]
    try:
        plain = _run(original, inputs)
    except Exception as error:
        if all(t.dtype == torch.float32 for t in (*inputs, *original.parameters()) if t.is_floating_point()):
            raise Refused(f"it fails on drawn inputs: {error}") from error
        return []  # a dtype, or a mix of dtypes, that the original does not take either
    with Exactly():
        truth = _run(exact, [t.double() if t.is_floating_point() else t for t in inputs])
    try:
        got = _run(fused, inputs)
    except Exception as error:
        raise Refused(f"the fused form fails: {error}") from error
    return [measure(*same, slack) for same in zip(plain, got, truth, strict=True)]


def measure(plain: Result, got: Result, truth: Result, slack: float) -> Measure:
    """Error and budget of ``got``.

    Raises:
        Refused: if it has another dtype or shape than ``plain``, or plain is too inaccurate to judge by.
    """
    if plain.value.shape != got.value.shape or plain.value.dtype != got.value.dtype:
        raise Refused(f"{plain.name} is {_describe(plain.value)}, fused {_describe(got.value)}")
    if not truth.value.numel() or not plain.value.isfinite().all():
        return Measure(plain.name, 0.0, 1.0)
    if not plain.value.is_floating_point():
        return Measure(plain.name, float(not torch.equal(plain.value, got.value)), 0.5)
    scale = truth.value.abs().max().item() or 1.0
    step = torch.finfo(plain.value.dtype).eps
    error, own = ((r.value.double() - truth.value).abs().max().item() / scale for r in (got, plain))
    most = MOST_STEPS.get(plain.narrowest, math.inf) * torch.finfo(plain.narrowest).eps
    if own > most and (plain.name == "output" or plain.narrowest == torch.float32):
        raise Refused(f"the original is too inaccurate to judge by: {plain.name} has an error of {own:.1e}")
    return Measure(plain.name, error if error == error else float("inf"), slack * (own + step))


def _pool(same: Sequence[Measure]) -> Measure:
    return Measure(same[0].name, max(m.error for m in same), max(m.budget for m in same))


def _run(module: nn.Module, inputs: list[Tensor], seed: int = 0) -> list[Result]:
    """Outputs, and gradients of the inputs and parameters against a fixed cotangent."""
    # Seeding a CUDA that is not initialized keeps the call, with a trace of the stack: two thirds of this function.
    on_cpu = all(t.device.type == "cpu" for t in inputs)
    (torch.default_generator.manual_seed if on_cpu else torch.manual_seed)(seed)
    if any(True for _ in module.buffers()):
        module = copy.deepcopy(module)  # what a run changes is none of the next run's business
    leaves = [t.detach().clone().requires_grad_(t.is_floating_point()) for t in inputs]
    outputs = module.forward(*leaves)
    outputs = list(outputs) if isinstance(outputs, (tuple, list)) else [outputs]
    named = [(f"gradient of input {i}", t) for i, t in enumerate(leaves) if t.requires_grad]
    named += [(f"gradient of {name}", p) for name, p in module.named_parameters()]
    generator = torch.Generator().manual_seed(2)
    # Multiples of 1/64 below 2: the same values in every dtype.
    differentiable = [y for y in outputs if y.requires_grad]
    cotangents = [(torch.randint(-127, 128, y.shape, generator=generator) / 64).to(y) for y in differentiable]
    gradients = torch.autograd.grad(differentiable, [t for _, t in named], cotangents, allow_unused=True)
    narrowest = max((t.dtype for _, t in named), key=lambda dtype: torch.finfo(dtype).eps)
    results = [Result("output", y.detach(), narrowest) for y in outputs]
    results += [Result(f"{name}, afterwards", b, narrowest) for name, b in module.named_buffers() if b.numel()]
    for (name, leaf), gradient in zip(named, gradients, strict=True):
        results.append(Result(name, torch.zeros_like(leaf) if gradient is None else gradient, narrowest))
    return results


def _check_autocast(original: nn.Module, fused: nn.Module, draw: Draw) -> None:
    """Under autocast too, the fused module returns the dtype that the original returns."""
    modules = [copy.deepcopy(m).float() for m in (original, fused)]
    for dtype in (torch.float32, torch.bfloat16):
        inputs = [t.to(dtype) if t.is_floating_point() else t for t in draw.inputs]
        with torch.no_grad(), torch.autocast(inputs[0].device.type, torch.bfloat16):
            try:
                expected = modules[0].forward(*inputs)
            except Exception:
                continue
            got = modules[1].forward(*inputs)
        if _dtypes_of(expected) != _dtypes_of(got):
            raise Refused(f"under autocast it returns {_dtypes_of(expected)}, fused {_dtypes_of(got)}")


def _dtypes_of(outputs: Any) -> list[str]:
    return [_short(y.dtype) for y in (outputs if isinstance(outputs, (tuple, list)) else [outputs])]


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _describe(tensor: Tensor) -> str:
    return f"{_short(tensor.dtype)} {list(tensor.shape)}"
