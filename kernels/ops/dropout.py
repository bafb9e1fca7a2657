"""Dropout whose mask is a function of a seed and a place, so that nothing has to remember it.

    y[n, d] = x[n, d] / (1 − p)  if kept(seed, n, d)  else 0        n a row, d an element of the last dim

kept is true with probability 1 − p: a keyed integer hash of d is compared with p. The rows' two keys k₁, k₂ are hashes
of the 64-bit seed and row number, and the bits of an element are mix(mix(d ⊕ k₁) ⊕ k₂), on 32 bits:

    mix(b):  b ⊕= b ≫ 15;  b ·= 2c1b3c6d₁₆;  b ⊕= b ≫ 12;  b ·= 297a2d39₁₆;  b ⊕= b ≫ 15

About 18 integer instructions an element, as many as Philox takes when all four of its outputs are used; but here each
element stands alone, whatever the tile that it is computed in. Both constants are below 2³¹, so that plain PyTorch
computes the same bits in int64 with no overflow.

Source: Srivastava et al., Dropout: A Simple Way to Prevent Neural Networks from Overfitting (2014);
``torch.nn.functional.dropout``. The mixer is of the family that C. Wellons searched (Prospecting for Hash Functions,
2018); ``tests/test_identities_dropout.py`` looks for bias and for correlations.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .. import dispatch
from ..autograd import Gradients, fused
from ..compiled import compiled_call
from ..op import Call, Draw, ErrorInput, Op, Traffic
from . import checks

#: The low 32 bits of an int64.
LOW = 0xFFFF_FFFF


def reference(x: Tensor, seed: Tensor | int, *, threshold: int, scale: float) -> Tensor:
    """Dropout in plain PyTorch: float32 (or wider) inside, the result in the dtype of ``x``."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return torch.where(kept(seed, x.shape, threshold), wide * scale, 0.0).to(x.dtype)


def constants(p: float) -> dict[str, Any]:
    """What a dropout with probability ``p`` computes with.

    ``threshold`` is how many of the 2³¹ values that an element's bits can take drop it, ``scale`` what the
    others are multiplied by.
    """
    return {"threshold": round(p * 2**31), "scale": 1.0 / (1.0 - p) if p < 1.0 else 0.0}


def kept(seed: Tensor | int, shape: Sequence[int], threshold: int) -> Tensor:
    """The mask of dropout: boolean, of ``shape``; rows are counted in the order of a contiguous tensor.

    Of a seed that is a number, by NumPy on the CPU: a third of the time, where calls cost more than what they do.
    """
    if isinstance(seed, int):
        return torch.from_numpy(_kept_of_few(seed, torch.Size(shape[:-1]).numel(), shape[-1], threshold)).view(shape)
    k1, k2 = row_keys(seed, torch.arange(torch.Size(shape[:-1]).numel(), device=seed.device))
    d = torch.arange(shape[-1], device=seed.device)
    bits = mix(mix(d ^ k1) ^ k2)
    return ((bits >> 1) >= threshold).view(shape)


def _kept_of_few(seed: int, N: int, D: int, threshold: int) -> Any:
    """The mask [N, D], as an array: its unsigned integers wrap."""
    first = mix(seed & LOW)
    second = mix(first ^ ((seed >> 32) & LOW))
    n, d = np.arange(N, dtype=np.uint32)[:, None], np.arange(D, dtype=np.uint32)
    k1, k2 = mix(mix(n ^ first) ^ second), mix(mix(n + second) ^ first)
    return mix(mix(d ^ k1) ^ k2) >> 1 >= threshold


def row_keys(seed: Tensor, n: Tensor) -> tuple[Tensor, Tensor]:
    """The two keys [N, 1] of each row number in ``n``. Two, so that rows that share one do not share a mask."""
    first = _computed_once(mix(seed & LOW))
    second = _computed_once(mix(first ^ ((seed >> 32) & LOW)))
    low, high = n & LOW, n >> 32
    k1 = mix(_computed_once(mix(low ^ first)) ^ high ^ second)
    k2 = mix(_computed_once(mix((low + second) & LOW)) ^ high ^ first)
    return _computed_once(k1).unsqueeze(-1), _computed_once(k2).unsqueeze(-1)


def _computed_once(keys: Tensor) -> Tensor:
    """The keys; the compiler keeps them in memory, where it would hash them again for every element, and trace that.

    A mix uses its operand twice in each of three steps: the compiler, which traces what it fuses once for each use,
    took four to ten times as long.
    """
    return keys.as_strided(keys.shape, keys.stride())


def mix(b: Any) -> Any:
    """A hash of 32 bits, of int64 tensors, uint32 arrays or Python integers."""
    b = b ^ (b >> 15)
    b = (b * 0x2C1B3C6D) & LOW
    b = b ^ (b >> 12)
    b = (b * 0x297A2D39) & LOW
    return b ^ (b >> 15)


def new_seed(device: torch.device) -> Tensor:
    """A seed from PyTorch's own generator of that device: ``torch.manual_seed`` makes it, and all masks, repeatable."""
    return torch.randint(2**62, (), device=device)


def small(reference: Callable[..., Any]) -> Callable[..., Any]:
    """The plain form of an operator whose last tensor is a seed, for few elements on the CPU."""

    def run(*tensors: Tensor | None, **options: Any) -> Any:
        *operands, seed = tensors
        return reference(*operands, None if seed is None else int(seed), **options)

    return run


def drawn(x: Tensor, p: float, training: bool, seed: Tensor | None) -> tuple[Tensor | None, dict[str, Any]]:
    """The seed and the constants of a dropout of x inside another operator; no seed where nothing is dropped."""
    if not training or p == 0.0:
        return None, constants(0.0)
    return new_seed(x.device) if seed is None else seed, constants(p)


def dropout(x: Tensor, *, p: float = 0.5, training: bool = True, seed: Tensor | None = None) -> Tensor:
    """Dropout: each element is zero with probability ``p``, and ``1 / (1 − p)`` times itself otherwise.

    The mask is a function of the seed and of an element's place. It is computed again in the backward pass and never
    stored, and it is the same on every device and in every implementation.

    Args:
        x: floating-point tensor of any shape.
        p: probability of a zero.
        training: False returns x as it is.
        seed: int64 scalar tensor on x's device, for a mask that can be asked for again; None draws one from PyTorch's
            generator.

    Returns:
        like x.

    Raises:
        TypeError: if x is not floating point.
        ValueError: if p is not in [0, 1], or the seed is not an int64 scalar.
    """
    checks.floating("dropout", x=x)
    checks.dropout("dropout", p, seed)
    if not training or p == 0.0:
        return x
    if x.dim() == 0:
        return dropout(x.view(1), p=p, seed=seed).view(())
    return dispatch.run(DROPOUT, x, new_seed(x.device) if seed is None else seed, **constants(p))


class Dropout(torch.nn.Dropout):
    """Drop-in for ``torch.nn.Dropout``: same arguments; runs :func:`dropout`, which keeps no mask.

    ``inplace=True`` is accepted and computed out of place: there is no mask whose memory it would save.
    """

    def forward(self, input: Tensor) -> Tensor:
        """Any shape → the same shape and dtype."""
        return dropout(input, p=self.p, training=self.training)


def _triton(x: Tensor, seed: Tensor, **options: Any) -> Tensor:
    from ..triton import dropout as kernels

    return fused(kernels.forward, kernels.backward, _second, (x, seed), options)


def _compiled(x: Tensor, seed: Tensor, **options: Any) -> Tensor:
    return fused(_compiled_forward, _compiled_backward, _second, (x, seed), options)


def _compiled_forward(x: Tensor, seed: Tensor, **options: Any) -> Any:
    return compiled_call(reference, (x, seed), options), (seed,)


def _compiled_backward(grads: Any, saved: Any, needs: Any, **options: Any) -> Gradients:
    return compiled_call(reference, (*grads, *saved), options), None


def _second(grads: Any, saved: Any, needs: Any, **options: Any) -> Gradients:
    return reference(*grads, *saved, **options), None


def _aten(x: Tensor, *, p: float, training: bool = True, seed: Tensor | None = None) -> Tensor:
    return F.dropout(x, p, training)


def _inputs(draw: Draw, *, N: int, D: int, p: float = 0.1) -> Call:
    return Call((draw.tensor(N, D),), {"p": p, "seed": draw.integers(0, 2**62)})


def _errors() -> Iterator[ErrorInput]:
    x = torch.zeros(2, 8)
    yield ErrorInput(Call((x.long(),)), TypeError, r"x must be a floating-point.*int64")
    yield ErrorInput(Call((x,), {"p": 1.5}), ValueError, "p must be a probability.*got 1.5")
    yield ErrorInput(
        Call((x,), {"seed": torch.zeros(1)}), ValueError, r"seed must be a scalar.*\(1,\) of torch.float32"
    )


def _traffic(itemsize: int, *, N: int, D: int, **_: Any) -> Traffic:
    """x and y; dy and dx; the seed."""
    return Traffic(forward=2 * N * D * itemsize + 8, backward=2 * N * D * itemsize + 8)


DROPOUT = Op(
    name="dropout",
    replaces="`F.dropout`, with no mask in memory",
    fn=dropout,
    reference=reference,
    impls={"triton": _triton, "compile": _compiled},
    small=small(reference),
    inputs=_inputs,
    dims={"N": (0, 1, 2, 33, 129), "D": (0, 1, 31, 32, 33, 127, 1023, 1025, 2048, 2049)},
    bench=({"N": 2048, "D": 1024}, {"N": 4096, "D": 4096}),
    audit=({"N": 16, "D": 1024}, {"N": 64, "D": 4096}),
    traffic=_traffic,
    flops=lambda N, D: 20 * N * D,
    aten=_aten,
    axes="... d, seed -> ... d",
    errors=_errors,
    variants={"default": {}, "everything dropped": {"p": 1.0}},
    random=True,
    modules=(Dropout,),
)
