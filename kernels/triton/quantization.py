"""States in 8 bits, as ``optim/quantization.py`` defines them: a tile of whole blocks, in and out of float32.

x̂ = scale·(c / C)⁴·sign        C = 127 with a sign, 255 without
"""

from __future__ import annotations

import triton
import triton.language as tl

#: Elements that share a scale.
BLOCK = tl.constexpr(256)


@triton.jit
def _spread(scale, TILE: tl.constexpr):
    """The scale of each element of a tile."""
    return tl.reshape(tl.broadcast_to(scale[:, None], (TILE // BLOCK, BLOCK)), (TILE,))


@triton.jit
def _fourth_power(u):
    square = u * u
    return square * square


@triton.jit
def dequantized(codes, scale, SIGNED: tl.constexpr, TILE: tl.constexpr):
    """Float32 of codes [TILE], which are float32 too, with the scales of their blocks."""
    u = codes * (1.0 / 127.0 if SIGNED else 1.0 / 255.0)
    x = _fourth_power(u)
    if SIGNED:
        x = tl.where(u < 0.0, -x, x)
    return x * _spread(scale, TILE)


@triton.jit
def quantized(x, draws, SIGNED: tl.constexpr, STOCHASTIC: tl.constexpr, TILE: tl.constexpr):
    """Codes of x [TILE] and the scales of their blocks; ``draws`` are 16 random bits for each element."""
    C: tl.constexpr = 127.0 if SIGNED else 255.0
    magnitude = tl.abs(x)
    # NaN is not below infinity, and becomes it.
    bounded = tl.where(magnitude < float("inf"), magnitude, float("inf"))
    scale = tl.max(tl.reshape(bounded, (TILE // BLOCK, BLOCK)), 1)
    usable = (scale > 0.0) & (scale < float("inf"))
    divisor = _spread(tl.where(usable, scale, 1.0), TILE)
    part = tl.where(_spread(tl.where(usable, 1.0, 0.0), TILE) > 0.0, magnitude / divisor, 0.0)
    place = C * tl.sqrt(tl.sqrt(part))
    if STOCHASTIC:
        code = tl.minimum(tl.floor(place), C - 1.0)
        low = _fourth_power(code * (1.0 / C))
        high = _fourth_power((code + 1.0) * (1.0 / C))
        code += tl.where(draws.to(tl.float32) * 0.0000152587890625 * (high - low) < part - low, 1.0, 0.0)
    else:
        code = tl.minimum(tl.floor(place + 0.5), C)
    code = tl.where(x < 0.0, -code, code) if SIGNED else tl.where((part > 0.0) & (code < 1.0), 1.0, code)
    return code, scale
