"""Is the fused module as good as the original? Judged by numbers, against a float64 copy of the original.

    error(fused) ≤ 2 · (error(original) + one rounding step of the result's scale)

for the outputs and the gradient of every input and parameter; in float32 and in the module's own dtype, and with the
parameters in another dtype than the input; in training and in evaluation.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .sample import Draw, Exactly, Refused

SLACK = 2.0

#: The float64 copy must compute the same function as the float32 original, or it is no judge: an error of more rounding
#: steps than this says that it does not.
MOST_STEPS = 1000


@dataclass(frozen=True)
class Check:
    """What a verification found: its worst result, with error and budget as fractions of that result's scale."""

    error: float
    budget: float
    where: str
    results: int


class Result(NamedTuple):
    """One output or gradient."""

    name: str
    value: Tensor


def verify(
    original: nn.Module,
    fused: nn.Module,
    draws: Iterable[Draw],
    dtype: torch.dtype,
    prepare: Callable[[nn.Module], nn.Module],
) -> Check:
    """Compare float64 modules ``original`` and ``fused`` in the dtypes that matter to a model in ``dtype``.

    Raises:
        Refused: if fused is worse than its budget, or gives another dtype or shape.
    """
    draws = list(draws)
    worst, results = Check(0.0, 1.0, "", 0), 0
    for x_dtype, parameter_dtype in _dtypes(original, dtype):
        subjects = [copy.deepcopy(m).to(parameter_dtype) for m in (original, fused)]
        exact = prepare(copy.deepcopy(subjects[0])).double()
        for training in (True, False):
            for module in (*subjects, exact):
                module.train(training)
            # Every draw once in each dtype; one draw settles evaluation, and parameters of another dtype.
            for draw in draws if training and x_dtype == parameter_dtype else draws[:1]:
                where = f"{draw.label} {_short(x_dtype)} input, {'train' if training else 'eval'}"
                try:
                    found = list(_compare(*subjects, exact, draw, x_dtype, repeat=draw is draws[0]))
                except Refused as refused:
                    raise Refused(f"{refused} ({where})") from None
                results += len(found)
                for name, error, budget in found:
                    if error / budget > worst.error / worst.budget:
                        worst = Check(error, budget, f"{name}, {where}", 0)
    _check_autocast(original, fused, draws[0])
    worst = Check(worst.error, worst.budget, worst.where, results)
    if worst.error > worst.budget:
        raise Refused(f"it computes something else: error {worst.error:.1e}, budget {worst.budget:.1e} ({worst.where})")
    return worst


def _dtypes(module: nn.Module, own: torch.dtype) -> list[tuple[torch.dtype, torch.dtype]]:
    """(dtype of the input, dtype of the parameters)."""
    low = own if own in (torch.float16, torch.bfloat16) else torch.bfloat16
    same = [(torch.float32, torch.float32), (low, low)]
    mixed = [(low, torch.float32), (torch.float32, low)]
    return same + mixed if any(True for _ in module.parameters()) else same


def _compare(
    original: nn.Module, fused: nn.Module, exact: nn.Module, draw: Draw, dtype: torch.dtype, repeat: bool
) -> Iterator[tuple[str, float, float]]:
    inputs = [t.to(dtype) if t.is_floating_point() else t for t in draw.inputs]
    try:
        plain = _run(original, inputs)
    except Exception:
        return  # a mix of dtypes that the original does not take either
    if repeat:
        again = _run(original, inputs, seed=1)
        if any(not torch.equal(a.value, b.value) for a, b in zip(plain, again, strict=True)):
            raise Refused("its forward is random")
    with Exactly():
        truth = _run(exact, [t.double() if t.is_floating_point() else t for t in inputs])
    try:
        got = _run(fused, inputs)
    except Exception as error:
        raise Refused(f"the fused form fails: {error}") from error
    full = dtype == torch.float32 and all(p.dtype == dtype for p in original.parameters())
    for a, b, true in zip(plain, got, truth, strict=True):
        if a.value.shape != b.value.shape or a.value.dtype != b.value.dtype:
            raise Refused(f"{a.name} is {_describe(a.value)}, fused {_describe(b.value)}")
        scale = true.value.abs().max().item() if true.value.numel() else 0.0
        if not scale or not a.value.isfinite().all():
            continue
        step = torch.finfo(a.value.dtype).eps
        ours, theirs = ((v.value.double() - true.value).abs().max().item() / scale for v in (b, a))
        if full and theirs > MOST_STEPS * step:
            raise Refused(f"the original is too inaccurate to judge by: {a.name} has an error of {theirs:.1e}")
        yield a.name, ours if ours == ours else float("inf"), SLACK * (theirs + step)


def _run(module: nn.Module, inputs: list[Tensor], seed: int = 0) -> list[Result]:
    """Outputs, and gradients of the inputs and parameters against a fixed cotangent."""
    torch.manual_seed(seed)
    leaves = [t.detach().clone().requires_grad_(t.is_floating_point()) for t in inputs]
    outputs = module.forward(*leaves)
    outputs = list(outputs) if isinstance(outputs, (tuple, list)) else [outputs]
    named = [(f"gradient of input {i}", t) for i, t in enumerate(leaves) if t.requires_grad]
    named += [(f"gradient of {name}", p) for name, p in module.named_parameters()]
    generator = torch.Generator().manual_seed(2)
    # Multiples of 1/64 below 2: the same values in every dtype.
    cotangents = [(torch.randint(-127, 128, y.shape, generator=generator) / 64).to(y) for y in outputs]
    gradients = torch.autograd.grad(outputs, [t for _, t in named], cotangents, allow_unused=True)
    results = [Result("output", y.detach()) for y in outputs]
    for (name, leaf), gradient in zip(named, gradients, strict=True):
        results.append(Result(name, torch.zeros_like(leaf) if gradient is None else gradient))
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
