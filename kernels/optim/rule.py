"""What one step does to one parameter, in plain PyTorch: the rule of an optimizer, and what may happen around it.

    x = p + c                     c: what rounding took from p before ("kahan")
    x, s = rule(x, g·factor, s)   s: the states, such as the momentum; in float32 or wider
    a ← a + (1 − decay)·(x − a)   a running average of the parameter ("average")
    p ← round(x),  c ← x − p      round: to nearest, or stochastic

Stochastic rounding of x between its neighbours l < u in bfloat16 gives u with probability (x − l) / (u − l), so that
its expectation is x: Gupta et al., Deep Learning with Limited Numerical Precision (2015); Zamirai et al., Revisiting
BFloat16 Training (2020), who also compensate as Kahan (1965) does.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from ..ops.dropout import LOW, mix
from . import quantization

Scalars = Sequence[Any]
Group = Mapping[str, Any]


class FusedCall(NamedTuple):
    """What PyTorch's fused CPU kernels take: parameters of one group, all at their first step or none.

    Attributes:
        params: updated in place.
        grads: divided by ``scale``, in place.
        states: a list for each state, in the order of the rule's.
        steps: incremented already.
        hyper: the hyperparameters, in the order of the Triton kernel.
        options: what the rule does.
        first: whether it is the first step.
        scale: None for 1.
    """

    params: list[Tensor]
    grads: list[Tensor]
    states: list[list[Tensor]]
    steps: list[Tensor]
    hyper: tuple[Any, ...]
    options: tuple[str, ...]
    first: bool
    scale: Tensor | None


@dataclass(frozen=True, eq=False)
class Rule:
    """An optimizer's mathematics.

    Attributes:
        name: as the Triton kernels know it.
        reference: ``(p, g, states, scalars, options, first) -> (p, *states)``, all tensors in float32 or wider.
        states: of a group, the names of the states that the reference updates.
        hyper: of a group, the hyperparameters in the order of the Triton kernel.
        scalars: of hyperparameters and the number of the step, what the reference computes with.
        options: of a group, the names of what the rule does.
        aten: PyTorch's own fused CPU kernel.
        direction: what takes the place of the gradients before, if they are more than elements (``muon.py``).
        direction_states: of a parameter, the names and shapes of the states that it updates.
        impls: the backends beside the plain form.
    """

    name: str
    reference: Callable[..., tuple[Tensor, ...]]
    states: Callable[[Group], tuple[str, ...]]
    hyper: Callable[[Group], tuple[Any, ...]]
    scalars: Callable[[tuple[Any, ...], Any], tuple[Any, ...]]
    options: Callable[[Group], tuple[str, ...]]
    aten: Callable[[FusedCall], None] | None = None
    direction: Callable[..., list[Tensor]] | None = None
    direction_states: Callable[[Tensor], Mapping[str, tuple[int, ...]]] = lambda p: {}
    impls: ClassVar[Mapping[str, Any]] = {"triton": None, "compile": None}


def update(
    p: Tensor,
    g: Tensor,
    s1: Tensor | None,
    s2: Tensor | None,
    s3: Tensor | None,
    q1: Tensor | None,
    q2: Tensor | None,
    q3: Tensor | None,
    average: Tensor | None,
    lost: Tensor | None,
    scalars: Tensor,
    factor: Tensor | None,
    keys: Tensor | None,
    *,
    reference: Callable[..., tuple[Tensor, ...]],
    options: tuple[str, ...],
    first: bool,
    weight: float,
) -> None:
    """A step of one parameter, in place; ``scalars`` is what the rule makes of its group, ``weight`` 1 − decay.

    States with scales q are in 8 bits, and like everything else one row.
    """
    wide = torch.promote_types(p.dtype, torch.float32)
    states = [s for s in (s1, s2, s3) if s is not None]
    scales = [q for q in (q1, q2, q3) if q is not None]
    before = [quantization.dequantize(s, q) for s, q in zip(states, scales, strict=True)] if scales else states
    x, d = p.to(wide), g.to(wide)
    if factor is not None:
        d = d * factor
    if "maximize" in options:
        d = -d
    if lost is not None:
        x = x + lost.to(wide)
    x, *found = reference(x, d, [s.to(wide) for s in before], scalars.unbind(), options, first)
    if average is not None:
        average.add_(x.to(average.dtype) - average, alpha=weight)
    draws: Sequence[Tensor | None] = (None, None, None)
    if keys is not None:
        bits = random_bits(keys, p)
        more = mix(bits)
        draws = own_draws = (bits >> 16, more & 0xFFFF, more >> 16)
        if p.dtype == torch.bfloat16:
            x = rounded(x, bits & 0xFFFF)
        if states and states[0].dtype == torch.bfloat16:
            found = [rounded(s, draw) for s, draw in zip(found, own_draws, strict=False)]
    if lost is not None:
        # In bits: the compiler leaves out a conversion to bfloat16 and back.
        nearest = rounded(x, 0x7FFF + ((x.view(torch.int32) >> 16) & 1))
        lost.copy_(x - nearest)
        x = nearest
    p.copy_(x)
    if scales:
        for i, scale in enumerate(scales):
            found[i], new_scale = quantization.quantize(found[i].float(), states[i].dtype, draws[i])
            scale[: len(new_scale)].copy_(new_scale)
    for state, new in zip(states, found, strict=True):
        state.copy_(new)
    if "clear" in options:
        g.zero_()


def decay(weight_decay: Any, p: Tensor) -> Tensor:
    """What weight decay adds to the gradient; without one nothing, even of an infinite p."""
    return torch.where(torch.as_tensor(weight_decay != 0), weight_decay * p, 0.0)


def key(seed: int, number: int) -> int:
    """32 bits for the parameter with this number."""
    hashed: int = mix(mix(seed) ^ number)
    return hashed


def random_keys(seed: int, number: int, step: Any) -> tuple[Any, Any]:
    """Two times 32 bits for the parameter with this number, at this step."""
    low = mix(key(seed, number) ^ step)
    return low, mix((mix(low ^ 0x5BD1E995) + step) & LOW)


def random_bits(keys: Tensor, p: Tensor) -> Tensor:
    """32 random bits for each element of p, which depend on its place alone."""
    low, high = keys.unbind()
    n = torch.arange(p.numel(), device=p.device) & LOW
    bits: Tensor = mix(mix(n ^ low) ^ high)
    return bits.view(p.shape)


def rounded(x: Tensor, bits: Tensor) -> Tensor:
    """Float32 x, each element at one of its two neighbours in bfloat16, chosen by 16 bits: at random, or the nearer."""
    raw = x.view(torch.int32)
    finite = (raw & 0x7F800000) != 0x7F800000
    return torch.where(finite, (raw + bits.to(torch.int32)) & -65536, raw).view(torch.float32)
