"""What RMSNorm and LayerNorm share: the normalization of rows, with and without a residual add.

With h = x, or h = residual + mask·gate·x, over the last dim of D elements:

    μ = mean(h) if center else 0
    y = (h − μ) / √(mean((h − μ)²) + ε) · (weight + weight_offset) + bias

weight, bias and gate broadcast to x; gate and the mask of dropout, which a seed stands for, may be absent.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..autograd import Gradients, fused, vjp
from ..by_rows import Factors, by_rows
from ..compiled import compiled_call
from ..op import Traffic
from . import checks, dropout


def reference(x: Tensor, weight: Tensor | None, bias: Tensor | None, **options: Any) -> Tensor:
    """Row normalization in plain PyTorch: float32 (or wider) inside, the result in the dtype of ``x``."""
    return _forward(x, None, weight, bias, None, None, **options)[0]


def add_reference(x: Tensor, residual: Tensor, *others: Tensor | None, **options: Any) -> tuple[Tensor, Tensor]:
    """``h = residual + u``, rounded to the wider of the two dtypes; returns (row norm of h in x's dtype, h).

    u is x, times a gate, with dropout. ``others`` are weight, bias, gate and seed.
    """
    return _forward(x, residual, *others, **options)[:2]


def _forward(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    gate: Tensor | None,
    seed: Tensor | int | None,
    *,
    eps: float,
    weight_offset: float,
    center: bool,
    threshold: int = 0,
    scale: float = 1.0,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor, Tensor | None, Tensor]:
    """(y, h, the sums of the rows of h or None, those of their squares about the means, the means, their 1/√(…))."""
    h = x
    if residual is not None:
        branch = _branch(x, gate, _mask(seed, x, threshold), scale)
        h = (branch + residual).to(torch.promote_types(x.dtype, residual.dtype))
    n = h.to(torch.promote_types(h.dtype, torch.float32))
    total, squares = _sums(n, center)
    mean, rstd = _statistics(total, squares, n, eps)
    y = (n if mean is None else n - mean) * rstd
    if weight is not None:
        y = y * (weight.to(n.dtype) + weight_offset)
    if bias is not None:
        y = y + bias.to(n.dtype)
    return y.to(x.dtype), h, total, squares, mean, rstd


def statistics(n: Tensor, *, eps: float, center: bool) -> tuple[Tensor | None, Tensor]:
    """The means of rows of float32 or wider, None if they are not centred, and their 1/√(…)."""
    return _statistics(*_sums(n, center), n, eps)


def _sums(n: Tensor, center: bool) -> tuple[Tensor | None, Tensor]:
    total = n.sum(-1, keepdim=True) if center else None
    centred = n if total is None else n - total / n.shape[-1]
    return total, centred.square().sum(-1, keepdim=True)


def _statistics(total: Tensor | None, squares: Tensor, n: Tensor, eps: float) -> tuple[Tensor | None, Tensor]:
    D = n.shape[-1]
    return None if total is None else total / D, torch.rsqrt(squares / D + eps)


def _mask(seed: Tensor | int | None, like: Tensor, threshold: int) -> Tensor | None:
    return None if seed is None else dropout.kept(seed, like.shape, threshold)


def _branch(x: Tensor, gate: Tensor | None, mask: Tensor | None, scale: float) -> Tensor:
    """mask·gate·x, in float32 or wider if either is there. Linear in x: its transpose, for the gradient, is itself."""
    if gate is None and mask is None:
        return x
    u = x.to(torch.promote_types(x.dtype, torch.float32))
    if gate is not None:
        u = u * gate.to(u.dtype)
    return u if mask is None else torch.where(mask, u * scale, 0.0)


#: The mean of n is a rounding error, which in rows of fewer elements may be all that there is of a gradient (at D = 2
#: it is), and in others is no more than n itself is off.
FEW = 32


def compiled(*tensors: Tensor | None, **options: Any) -> Any:
    """The plain forms, compiled, of x, residual, weight, bias, gate and seed; with a residual they return (y, h)."""
    return fused(_compiled_forward, _compiled_backward, _second, tensors, options)


def _compiled_forward(x: Tensor, residual: Tensor | None, *others: Tensor | None, **options: Any) -> Any:
    weight, bias, gate, _ = others
    total, squares = None, None
    if _atens(x, residual, *others, **options):
        h = x if residual is None else x + residual
        # In float32 it returns statistics in float32.
        w, b = weight if weight is None else weight.float(), bias if bias is None else bias.float()
        y, mean, rstd = torch.native_layer_norm(h, h.shape[-1:], w, b, options["eps"])
    elif _large(x, options["center"]):
        y, h, total, squares = compiled_call(_keeping_sums, (x, residual, *others), options)
        mean, rstd = None, None
    else:
        y, h, mean, rstd = compiled_call(_keeping_statistics, (x, residual, *others), options)
    h = x if residual is None else h
    saved = (h, weight, bias, mean, rstd, None if gate is None else x, *others[2:], total, squares)
    return (y if residual is None else (y, h)), saved


def _atens(x: Tensor, residual: Tensor | None, *others: Tensor | None, center: bool, **_: Any) -> bool:
    """Whether ATen's LayerNorm runs forward: it reads a row once for both its moments.

    In float32, on one core of an EPYC, [4096, 4096] took 30 ms, compiled code 33. In bfloat16, [2048, 1024], it took
    0.66 ms with AVX-512, compiled code 0.34; with AVX2, on two cores, 1.31 for 1.62. Its backward pass took 0.96 ms for
    compiled code's 1.32, float32 [2048, 1024], but adds the gradients of the parameters up one row after the other:
    with some hundred rows that is over the error budget.
    """
    weight, bias, gate, seed = others
    if not center or gate is not None or seed is not None or (residual is not None and residual.dtype != x.dtype):
        return False
    single = x.dtype == torch.float32
    for p in (weight, bias):
        # One row of parameters for all rows, as ATen takes them.
        if p is not None and (p.dim() != 1 or (single and p.dtype != x.dtype)):
            return False
    return single or (
        x.dtype.itemsize == 2 and weight is not None and torch.backends.cpu.get_cpu_capability() == "AVX2"
    )


def _large(x: Tensor, center: bool) -> bool:
    """Whether to read rows again costs more than to work their statistics out for every few elements.

    On two cores of an EPYC with AVX2, of :func:`_keeping_sums` and :func:`_keeping_statistics`: LayerNorm of float32
    [4096, 4096] 13.0 and 20.2 ms, bfloat16 10.4 and 12.3, [4096, 1152] 2.7 and 2.6; RMSNorm of float32 [4096, 4096]
    11.9 and 14.5, bfloat16 6.8 and 6.9, [2048, 1024] 0.77 and 0.62.
    """
    if x.dtype.itemsize < 4:
        return center and x.nbytes > 16 * 2**20
    return x.nbytes > 4 * 2**20


def _keeping_statistics(
    x: Tensor, *others: Tensor | None, **options: Any
) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    """(y, h, mean, 1/√(…)): loops of their own for the statistics, after each of which rows are read once more."""
    y, h, _, _, mean, rstd = _forward(x, *others, **options)
    return y, h, mean, rstd


def _keeping_sums(x: Tensor, *others: Tensor | None, **options: Any) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    """(y, h, sums, squares): rows are read once."""
    return _forward(x, *others, **options)[:4]


def _compiled_backward(grads: Any, saved: Any, needs: Any, **options: Any) -> Gradients:
    dy, dh_out = grads if len(grads) == 2 else (*grads, None)
    *saved, total, squares = saved
    if squares is not None:
        saved[3:5] = _statistics(total, squares, saved[0], options["eps"])
    dx, dh, *dshared = compiled_call(gradients, (dy, dh_out, *saved), {"needs": needs[:5], **options})
    return (dh if dx is None else dx), dh, *dshared, None


def gradients(
    dy: Tensor,
    dh_out: Tensor | None,
    h: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor | None,
    rstd: Tensor,
    x: Tensor | None,
    gate: Tensor | None,
    seed: Tensor | None,
    *,
    threshold: int = 0,
    **options: Any,
) -> Gradients:
    """The gradients of x (None where it is that of h), h, weight, bias and gate in closed form.

    Autograd through the reference would have the compiler add dy·n up along whole columns, one by one: on one core of
    an EPYC, float32 [2048, 1024], that took 6.4 ms for 4.0, and its rounding error was four times as large.
    """
    rows = (dy, dh_out, h, mean, rstd, x, _mask(seed, h, threshold))
    (dx, dh), dshared = by_rows(partial(_gradients_of_rows, **options), rows, (weight, bias, gate))
    return dx, dh, *dshared


def _gradients_of_rows(
    dy: Tensor,
    dh_out: Tensor | None,
    h: Tensor,
    mean: Tensor | None,
    rstd: Tensor,
    x: Tensor | None,
    mask: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    gate: Tensor | None,
    *,
    needs: tuple[bool, ...],
    weight_offset: float,
    scale: float = 1.0,
    **_: Any,
) -> tuple[tuple[Tensor | None, Tensor | None], Sequence[Factors | None]]:
    """The gradients of x and h, and the factors of those of weight, bias and gate: what :func:`.by_rows` adds up."""
    n, g = h.to(rstd.dtype), dy.to(rstd.dtype)
    if mean is not None:
        n = n - mean
    n = n * rstd
    dweight = (g, n) if weight is not None and needs[2] else None
    dbias = (g,) if bias is not None and needs[3] else None
    if not (needs[0] or needs[1] or needs[4]):
        return (None, None), (dweight, dbias, None)
    if weight is not None:
        g = g * (weight.to(rstd.dtype) + weight_offset)
    mean_gn = (g * n).mean(-1, keepdim=True)
    dh = g - n * mean_gn
    if mean is not None:
        mean_dh = g.mean(-1, keepdim=True)
        if n.shape[-1] < FEW:
            mean_dh = mean_dh - mean_gn * n.mean(-1, keepdim=True)
        dh = dh - mean_dh
    dh = dh * rstd
    if dh_out is not None:
        dh = dh + dh_out
    dx, dgate = None, None
    if gate is not None and needs[4]:
        assert x is not None
        # As it is returned: the compiler would write it in float32 besides, to read that here.
        dh = dh.to(h.dtype)
        dgate = dh.to(rstd.dtype), x.to(rstd.dtype)
    if needs[0] and (gate is not None or mask is not None):
        dx = _branch(dh, gate, mask, scale).to(dy.dtype)
    return (dx, dh.to(h.dtype)), (dweight, dbias, dgate)


def triton(*tensors: Tensor | None, **options: Any) -> Any:
    """The Triton kernels of x, residual, weight, bias, gate and seed; with a residual they return (y, h)."""
    from ..triton import norm

    return fused(norm.forward, norm.backward, _second, tensors, options)


def _second(grads: Any, saved: Any, needs: Any, **options: Any) -> Gradients:
    h, _, _, _, _, x, gate, seed, *_ = saved
    threshold, scale = options.pop("threshold", 0), options.pop("scale", 1.0)
    dh, dweight, dbias = vjp(reference)([grads[0].to(h.dtype)], saved, (True, *needs[2:4]), **options)
    assert dh is not None
    if len(grads) == 2:
        dh = dh + grads[1]
    dgate = (dh * x).sum_to_size(gate.shape).to(gate.dtype) if gate is not None and needs[4] else None
    dx = _branch(dh, gate, _mask(seed, dh, threshold), scale).to(grads[0].dtype)
    return dx, dh, dweight, dbias, dgate, None


def small(x: Tensor, residual: Tensor | None, *others: Tensor | None, **options: Any) -> Any:
    """The plain forms by ATen's norms, which keep the host busy for less than half the time, in float32 as accurate."""
    weight, bias, gate, seed = others
    number = None if seed is None else int(seed)
    # The gradient of a row of one number is 0, which is not what ATen's LayerNorm finds, ...
    if x.shape[-1] == 1 or any(t is not None and t.dtype != torch.float32 for t in (x, residual, weight, bias, gate)):
        y, h, *_ = _forward(x, residual, weight, bias, gate, number, **options)
    else:
        h = x
        if residual is not None:
            mask = _mask(number, x, options.get("threshold", 0))
            h = _branch(x, gate, mask, options.get("scale", 1.0)) + residual
        # ... nor is that of its weight for rows of equal numbers: so without parameters.
        y = (F.layer_norm if options["center"] else F.rms_norm)(h, h.shape[-1:], eps=options["eps"])
        if weight is not None:
            offset = options["weight_offset"]
            y = y * (weight + offset if offset else weight)
        if bias is not None:
            y = y + bias
    return y if residual is None else (y, h)


def check_affine(name: str, x: Tensor, weight: Tensor | None, bias: Tensor | None = None) -> None:
    """Raise unless x is a floating-point tensor with rows, and weight and bias fit them."""
    checks.floating(name, x=x)
    if x.dim() == 0:
        raise ValueError(f"{name}: x must have at least one dimension to normalize over, got a scalar")
    last = x.shape[-1:]
    for label, parameter in (("weight", weight), ("bias", bias)):
        if parameter is not None and parameter.shape != last:
            raise ValueError(
                f"{name}: {label} must have the shape of the last dim of x, {tuple(last)}, "
                f"got {tuple(parameter.shape)}; build the module with the model's hidden size"
            )


def check_residual(name: str, x: Tensor, residual: Tensor) -> None:
    """Raise unless the residual can be added to x without broadcasting."""
    if residual.shape != x.shape:
        raise ValueError(
            f"{name}: residual must have the shape of x, {tuple(x.shape)}, got {tuple(residual.shape)}; "
            "expand it first if it should broadcast"
        )


def traffic(
    itemsize: int, parameters: int, *, N: int, D: int, residual: bool, statistics: int = 1, dropped: bool = False
) -> Traffic:
    """x, (residual, h,) y forward; dy, h, (dh_out,) dx backward; the rows' statistics and the parameters once.

    Where x is dropped from, its gradient is not the residual's, and a seed is read.
    """
    passes = N * D * itemsize
    seed = 8 if dropped else 0
    return Traffic(
        forward=(4 if residual else 2) * passes + parameters * D * itemsize + 4 * statistics * N + seed,
        backward=(3 + residual + dropped) * passes + 2 * parameters * D * itemsize + 4 * statistics * N + seed,
    )
