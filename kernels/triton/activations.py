"""Activations and their derivatives, in float32, for kernels to apply on their way."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def sigmoid(x):
    """σ(x): exp overflows to inf for x < −88, and 1 / inf is the 0 that σ rounds to."""
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def tanh(x):
    """tanh to about 3 ulp, and its derivative; from exp(−2|x|), which cannot overflow.

    Near 0, where 1 − exp cancels, five terms of the series: the first one left out is below 1e-8 of x.
    """
    e = tl.exp(-2.0 * tl.abs(x))
    far = (1.0 - e) / (1.0 + e)
    q = x * x
    near = x + x * q * (-1.0 / 3.0 + q * (2.0 / 15.0 + q * (-17.0 / 315.0 + q * (62.0 / 2835.0))))
    t = tl.where(tl.abs(x) < 0.25, near, tl.where(x < 0.0, -far, far))
    return t, 4.0 * e / ((1.0 + e) * (1.0 + e))


@triton.jit
def log1p(z):
    """log(1 + z) for z in [0, 1], relatively accurate at 0 too: 2·artanh(z / (2 + z)) as seven terms of its series.

    The first one left out is below 2e-8 of the sum; and it is fused multiplications where a logarithm is a call.
    """
    y = z / (2.0 + z)
    q = y * y
    series = 1.0 / 9.0 + q * (1.0 / 11.0 + q * (1.0 / 13.0))
    return 2.0 * y * (1.0 + q * (1.0 / 3.0 + q * (1.0 / 5.0 + q * (1.0 / 7.0 + q * series))))


@triton.jit
def act(x, dout, ACTIVATION: tl.constexpr, SLOPE: tl.constexpr = 0.0):
    """act(x) and dout·act'(x); NaN, and the NaN of 0·∞, come out where PyTorch has them. SLOPE is leaky_relu's."""
    if ACTIVATION == "silu":
        s = sigmoid(x)
        return x * s, dout * (s * (1.0 + x * (1.0 - s)))
    elif ACTIVATION == "gelu":
        cdf = 0.5 * (1.0 + tl.math.erf(x * 0.7071067811865476))
        return x * cdf, dout * (cdf + x * (tl.exp(-0.5 * x * x) * 0.3989422804014327))
    elif ACTIVATION == "gelu_tanh":
        # (1 + tanh z) / 2 = σ(2z), which keeps its relative accuracy where 1 + tanh z cancels.
        s = sigmoid(1.5957691216057308 * x * (1.0 + 0.044715 * x * x))
        slope = 1.5957691216057308 * (1.0 + 0.134145 * x * x)
        return x * s, dout * (s + x * (s * (1.0 - s)) * slope)
    elif ACTIVATION == "quick_gelu":
        s = sigmoid(1.702 * x)
        return x * s, dout * (s + 1.702 * x * (s * (1.0 - s)))
    elif ACTIVATION == "relu":
        # Selected, not multiplied: 0, not NaN, where dout is infinite.
        return tl.where(x <= 0.0, 0.0, x), tl.where(x <= 0.0, 0.0, dout)
    elif ACTIVATION == "relu6":
        low, high = x <= 0.0, x >= 6.0
        return tl.where(low, 0.0, tl.where(high, 6.0, x)), tl.where(low | high, 0.0, dout)
    elif ACTIVATION == "leaky_relu":
        return tl.where(x > 0.0, x, SLOPE * x), tl.where(x > 0.0, dout, SLOPE * dout)
    elif ACTIVATION == "hardswish":
        low, high = x <= -3.0, x >= 3.0
        gate = tl.where(low, 0.0, tl.where(high, 1.0, x * (1.0 / 6.0) + 0.5))
        return x * gate, dout * tl.where(low, 0.0, tl.where(high, 1.0, x * (1.0 / 3.0) + 0.5))
    elif ACTIVATION == "relu_squared":
        r = tl.where(x <= 0.0, 0.0, x)
        return r * r, 2.0 * r * tl.where(x <= 0.0, 0.0, dout)
    else:
        tl.static_assert(ACTIVATION == "sigmoid")
        s = sigmoid(x)
        return s, dout * (s * (1.0 - s))
