"""Exponentials, tanh, the sigmoid and GELU of float32, for code that the compiler makes for the CPU.

Its own are calls of functions, which it takes for so dear that what two loops read of them is written to memory. As
formulas they are a part of the loop.

The compiler meets them as operators of ours that it can lower. As decompositions they would double with each function
of a function, for what a formula uses twice is traced twice: the gradient of a capped cross-entropy, exp of tanh, took
minutes to compile.
"""

from __future__ import annotations

import functools
import hashlib
import math
import os
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._inductor import config, cpp_builder, cpu_vec_isa
from torch._inductor.lowering import make_pointwise, register_lowering
from torch._inductor.virtualized import ops

#: 2·exp r for |r| ≤ ½·log 2 as a polynomial of the least relative error, 8e-9.
EXP = (2.0, 2.00000008, 0.999999842, 0.333328394, 0.0833364574, 0.01674971414, 0.0027673588)
#: log 2 in two parts (Cody and Waite): n times the first is exact.
LN_2 = (0.693359375, -2.12194440e-4)
#: Added to a float32, rounds it to a whole number n, and leaves n + 126 in its last bits: the exponent of 2ⁿ⁻¹.
SHIFT = 1.5 * 2**23 + 126
#: The bits of SHIFT + 129, whose exponent is that of ∞.
LARGEST = 0x4B400000 + 126 + 129
#: exp is 0 below, before 2ⁿ⁻¹ leaves the normal numbers.
SMALLEST = -86.9
#: Φ(−a)·exp(a²/2) for 0 ≤ a as a ratio of polynomials with no negative coefficient, so that nothing cancels; relative
#: error 5e-8 to a = 5.5, and 6e-4 further on, to where all is 0.
MILLS_ABOVE = (0.499999974, 0.332680371, 0.103477763, 0.0134157527)
MILLS_BELOW = (1.0, 1.46324217, 0.874484174, 0.258793634, 0.0336506697)
LAST = 15.0
#: tanh(x) / x for x² < SERIES as a polynomial of x², where 1 − 2 / (1 + exp 2|x|) cancels.
TANH, SERIES = (1.0, -1 / 3, 2 / 15, -17 / 315, 62 / 2835), 0.0625
#: What GCC needs to be told about registers, by their bits, so that it copies arrays in whole ones: what is read whole
#: behind copies of halves waits for all of them. With 256 bits: cross_entropy, bfloat16 [1024, 32000], took 18 ms for
#: 39 (two cores of an EPYC with AVX2). With 512 it had better not use the upper sixteen, too: where these hold
#: something, a fault of a page costs 0.8 µs more, of 4 (two cores of a virtual Xeon), and results beyond 32 MB come in
#: fresh pages: the gradient of log_softmax, bfloat16 [2048, 50304], took a fifth more.
WHOLE_REGISTERS = {
    256: "-mmove-max=256 -mstore-max=256",  # from GCC 12 on
    512: "-mprefer-vector-width=512 --param max-completely-peel-times=32 "
    + " ".join(f"-ffixed-xmm{register}" for register in range(16, 32)),
}

#: Changes with this file: the compiler's cache knows of graphs, and not of what their operators are lowered to.
VERSION = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()

_LIBRARY = torch.library.Library(f"{__name__.partition('.')[0]}_cpu", "DEF")


@functools.cache
def compiler_options() -> dict[str, Any]:
    """Settings with which the compiler makes quick code of formulas."""
    # The only one of torch's that reaches its command line.
    return {"cpp.march": f"native {_flags()}"} if quick_bits() else {}


@functools.cache
def quick_bits() -> bool:
    """Whether 2ⁿ is made of its bits in registers: the compiler copies them in arrays, which GCC can do without."""
    flags = _flags().split()
    if not flags or getattr(config.cpp, "march", "") is not None or not cpp_builder.is_gcc():
        return False  # torch 2.11 has no such setting
    empty = [cpp_builder.get_cpp_compiler(), *flags, "-fsyntax-only", "-x", "c++", os.devnull]
    return subprocess.run(empty, capture_output=True, check=False).returncode == 0


def _flags() -> str:
    return WHOLE_REGISTERS.get(cpu_vec_isa.pick_vec_isa().bit_width(), "")


def _exp(x: Any) -> Any:
    """2ⁿ·exp r, where x = n·log 2 + r; or else 2ˣ´ with x´ = x / log 2, as wrong as if x were rounded once more."""
    if not quick_bits():
        return ops.exp2(x * _number(math.log2(math.e)))
    shifted = ops.to_dtype_bitcast(x * _number(math.log2(math.e)) + _number(SHIFT), torch.int32, torch.float32)
    bits = ops.minimum(shifted, ops.constant(LARGEST, torch.int32))
    n = ops.to_dtype_bitcast(bits, torch.float32, torch.int32) - _number(SHIFT)
    r = x - n * _number(LN_2[0]) - n * _number(LN_2[1])
    half = ops.to_dtype_bitcast(bits << ops.constant(23, torch.int32), torch.float32, torch.int32)
    return ops.where(x < _number(SMALLEST), _number(0.0), _polynomial(EXP, r) * half)


def _sigmoid(x: Any) -> Any:
    one = _number(1.0)
    return one / (one + _exp(-x))


def _tanh(x: Any) -> Any:
    """Of |x|, where 2 / (1 + exp 2|x|) is small, and its rounding too: the gradient needs 1 − tanh²."""
    one, q = _number(1.0), x * x
    far = one - _number(2.0) / (one + _exp(_number(2.0) * ops.abs(x)))
    signed = ops.where(x < _number(0.0), -far, far)
    return ops.where(q < _number(SERIES), x * _polynomial(TANH, q), signed)


def _gelu(x: Any, *, approximate: str = "none") -> Any:
    return x * (_normal(x)[1] if approximate == "none" else _gate(x))


def _gelu_backward(dy: Any, x: Any, *, approximate: str = "none") -> Any:
    if approximate == "none":
        e, cdf = _normal(x)
        return dy * (cdf + x * e * _number(1 / math.sqrt(2 * math.pi)))
    s, one = _gate(x), _number(1.0)
    slope = _number(2 * math.sqrt(2 / math.pi)) * (one + _number(3 * 0.044715) * x * x)
    return dy * (s + x * (s * (one - s)) * slope)


def _normal(x: Any) -> tuple[Any, Any]:
    """exp(−x²/2) and Φ(x)."""
    e = _exp(x * x * _number(-0.5))
    a = ops.minimum(ops.abs(x), _number(LAST))
    outside = e * (_polynomial(MILLS_ABOVE, a) / _polynomial(MILLS_BELOW, a))
    return e, ops.where(x < _number(0.0), outside, _number(1.0) - outside)


def _gate(x: Any) -> Any:
    """(1 + tanh z) / 2 = σ(2z) of GELU's z = √(2/π)·(x + 0.044715·x³): accurate where 1 + tanh z cancels."""
    one = _number(1.0)
    return one / (one + _exp(_number(-2 * math.sqrt(2 / math.pi)) * x * (one + _number(0.044715) * x * x)))


def _number(value: float) -> Any:
    return ops.constant(value, torch.float32)


def _polynomial(coefficients: Sequence[float], x: Any) -> Any:
    *others, last = map(_number, coefficients)
    total = x * last + others.pop()
    while others:
        total = total * x + others.pop()
    return total


def _registered(op: Any, formula: Callable[..., Any]) -> Callable[..., Any]:
    """What takes ATen's operator to one of ours, which does the same and which the compiler lowers to the formula."""
    name = op._schema.name.partition("::")[2]
    _LIBRARY.define(str(op._schema).partition("::")[2])
    _LIBRARY.impl(name, op, "CompositeExplicitAutograd")
    mine = getattr(getattr(torch.ops, _LIBRARY.ns), name).default

    def lowering(*operands: Any, **options: Any) -> Any:
        return make_pointwise(functools.partial(formula, **options))(*operands)

    def decomposition(*operands: Tensor, **options: Any) -> Any:
        ours = operands[0].dtype == torch.float32 and operands[0].device.type == "cpu"
        return mine(*operands, **options) if ours else NotImplemented

    register_lowering(mine)(lowering)
    return decomposition


_FORMULAS: dict[Any, Callable[..., Any]] = {
    torch.ops.aten.exp.default: _exp,
    torch.ops.aten.sigmoid.default: _sigmoid,
    torch.ops.aten.tanh.default: _tanh,
    torch.ops.aten.gelu.default: _gelu,
    torch.ops.aten.gelu_backward.default: _gelu_backward,
}
#: What the operators' special functions are taken apart by.
DECOMPOSITIONS = {op: _registered(op, formula) for op, formula in _FORMULAS.items()}
