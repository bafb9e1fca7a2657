"""Optimizer states in 8 bits: blocks of 256 elements, each with one float32 scale, its largest magnitude.

    x̂ = scale·(c / C)⁴·sign        c: 0 … C        C = 255 of what is never negative, else 127 beside the sign

Like the dynamic maps of the source it is finest near zero: c and c + 1 are 4 / c of their value apart, the smallest
value above zero is 2.4·10⁻¹⁰ of the scale (3.8·10⁻⁹ with a sign). Unlike them it needs no table: decoding is three
multiplications, encoding two square roots, and the largest element of a block is kept exactly.

To nearest, c = ⌊C·(|x| / scale)^¼ + ½⌋, so that an element with code c is off by at most scale·((c + ½)⁴ − c⁴) / C⁴.
What is above zero keeps a code above zero if there is no sign: a second moment is divided by. With 16 random bits x̂ is
one of the two neighbours of x, and right on average; without them a decay that is slower than half a step, such as that
of β₂ = 0.999, moves nothing but the scale.

A value that is not finite makes its whole block NaN.

Source: Dettmers et al., 8-bit Optimizers via Block-wise Quantization (2022).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from .. import sharding

#: Elements that share a scale.
BLOCK = 256
#: Parameters with fewer elements keep float32 states: they are a small part of all, and biases and norms are the most
#: sensitive.
LEAST = 4096
#: The state that holds the scales of another is called as that, and this.
SCALE = "_scale"
#: States that are never negative.
UNSIGNED = ("exp_avg_sq", "max_exp_avg_sq")


def code_dtype(name: str) -> torch.dtype:
    """Of the codes of the state with this name."""
    return torch.uint8 if name in UNSIGNED else torch.int8


def blocks(elements: int) -> int:
    """How many scales so many elements have."""
    return -(-elements // BLOCK)


def quantize(x: Tensor, dtype: torch.dtype, draws: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Codes of ``dtype`` (int8 has a sign, uint8 none) and scales of float32 x [N]; ``draws`` are 16 random bits."""
    own_draws = (None, None) if draws is None else _in_blocks(draws)
    parts = [_quantize(own, dtype, own_draw) for own, own_draw in zip(_in_blocks(x), own_draws, strict=True)]
    codes, scales = zip(*parts, strict=True)
    return torch.cat(codes), torch.cat(scales)


def _quantize(own: Tensor, dtype: torch.dtype, draws: Tensor | None) -> tuple[Tensor, Tensor]:
    magnitude = own.abs()
    scale = torch.where(own.isfinite(), magnitude, torch.inf).amax(1)
    usable = (scale > 0) & scale.isfinite()
    part = torch.where(usable[:, None], magnitude / scale[:, None], 0.0)
    last = torch.iinfo(dtype).max
    place = last * part.sqrt().sqrt()
    if draws is None:
        code = (place + 0.5).floor()
    else:
        code = place.floor().clamp(max=last - 1.0)
        low, high = (_fourth_power((code + up) * (1.0 / last)) for up in (0.0, 1.0))
        code = code + (draws.float() * 2.0**-16 * (high - low) < part - low)
    if dtype == torch.uint8:
        code = torch.where(part > 0, code.clamp(min=1.0), code)
    else:
        code = torch.where(own < 0, -code, code)
    return code.flatten().to(dtype), scale


def dequantize(codes: Tensor, scale: Tensor) -> Tensor:
    """Float32 [N] of codes [N]; there may be more scales than blocks."""
    whole = len(codes) // BLOCK
    parts = zip(_in_blocks(codes), (scale[:whole], scale[whole : whole + 1]), strict=False)
    return torch.cat([_dequantize(own, own_scale) for own, own_scale in parts])


def _dequantize(own: Tensor, scale: Tensor) -> Tensor:
    found = _fourth_power(own.float() * (1.0 / torch.iinfo(own.dtype).max))
    if own.dtype == torch.int8:
        found = torch.where(own < 0, -found, found)
    return (found * scale[:, None]).flatten()


def _fourth_power(u: Tensor) -> Tensor:
    square = u * u
    return square * square


def _in_blocks(x: Tensor) -> tuple[Tensor, Tensor]:
    """The whole blocks [N // BLOCK, BLOCK], and what is left as one [1, N % BLOCK], or as none.

    Padded to whole blocks, the last one came out wrong of torch 2.15's compiler where sizes are constants.
    """
    whole = len(x) // BLOCK * BLOCK
    return x[:whole].view(-1, BLOCK), x[whole:].view(-1, max(1, len(x) - whole))


def flat(t: Tensor) -> Tensor:
    """The elements of a dense tensor as they lie in memory."""
    return t.as_strided((t.numel(),), (1,))


# ------------------------------------------------------------------------------ states


def new_codes(p: Tensor, name: str) -> Tensor:
    """Zeros for the state of p with this name."""
    return torch.zeros_like(p, dtype=code_dtype(name))


def new_scales(p: Tensor) -> Tensor:
    """Zeros for every block of p. Blocks lie within shards, and shards of which p has more have as many scales."""
    if not sharding.is_sharded(p):
        return torch.zeros(blocks(p.numel()), device=p.device)
    from torch.distributed.tensor import DTensor, Replicate, Shard

    own = torch.zeros(shard_blocks(p), device=p.to_local().device)  # type: ignore[attr-defined]
    placements = [Shard(0) if placement.is_shard() else Replicate() for placement in p.placements]  # type: ignore[attr-defined]
    return DTensor.from_local(own, p.device_mesh, placements, run_check=False)  # type: ignore[attr-defined]


def shard_blocks(p: Tensor) -> int:
    """How many scales every process has of a DTensor: those of the first, whose shard is the largest."""
    shape = list(p.shape)
    for dim, placement in enumerate(p.placements):  # type: ignore[attr-defined]
        if placement.is_shard():
            shape[placement.dim] = -(-shape[placement.dim] // p.device_mesh.size(dim))  # type: ignore[attr-defined]
    return blocks(torch.Size(shape).numel())


def _own(t: Tensor) -> Tensor:
    """The part of t that this process holds."""
    return t.to_local() if sharding.is_sharded(t) else t  # type: ignore[attr-defined]


def check(optimizer: str, p: Tensor, state: Mapping[str, Any]) -> None:
    """Refuse scales that are not those of p's blocks.

    Raises:
        ValueError: then.
    """
    for name in states_in(state):
        scales = state[name + SCALE]
        wanted = shard_blocks(p) if sharding.is_sharded(p) else blocks(p.numel())
        if sharding.is_sharded(scales) != sharding.is_sharded(p) or len(_own(scales)) != wanted:
            raise ValueError(
                f"{optimizer}: {name} of a parameter {tuple(p.shape)} must have a scale for each of the {wanted} "
                f"blocks of a shard, got {len(_own(scales))}; it was saved from other shards: save "
                "braze.kernels.optim.dequantized(state_dict), which fits all"
            )


def write(x: Tensor, codes: Tensor, scales: Tensor) -> None:
    """Quantize x, which lies in memory as its codes do, into these."""
    own = flat(_own(codes))
    found, scale = quantize(flat(_own(x)).float(), codes.dtype)
    own.copy_(found)
    _own(scales)[: len(scale)].copy_(scale)


def read(codes: Tensor, scales: Tensor) -> Tensor:
    """The float32 state behind codes."""
    x = torch.zeros_like(codes, dtype=torch.float32)
    flat(_own(x)).copy_(dequantize(flat(_own(codes)), _own(scales)))
    return x


def states_in(state: Mapping[str, Any]) -> Iterator[str]:
    """The names of the states in 8 bits."""
    return (name for name in state if name + SCALE in state)


def dequantized(state_dict: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of an optimizer's ``state_dict`` whose states in 8 bits are float32, as ``torch.optim`` loads them.

    The reverse needs no call: an optimizer with ``state_dtype="8bit"`` quantizes the states that it loads.
    """
    found = {}
    for key, state in state_dict["state"].items():
        quantized = {name: read(state[name], state[name + SCALE]) for name in states_in(state)}
        found[key] = {
            name: quantized.get(name, value)
            for name, value in state.items()
            if name.removesuffix(SCALE) not in quantized or name in quantized
        }
    return {**state_dict, "state": found}
