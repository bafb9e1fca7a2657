"""Softmax of scaled, masked scores.

    s = scale·x, and −∞ where x is masked out (or scale·x + mask, for a floating-point mask)
    y = exp(s − max s) / Σ exp(s − max s)                     over one dim

Source: ``torch.softmax``; masks as in ``torch.nn.functional.scaled_dot_product_attention``.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from .. import dispatch
from ..autograd import Gradients, fused
from ..compiled import compiled_call
from ..op import Call, Draw, ErrorInput, Excess, Op, Traffic


def reference(x: Tensor, mask: Tensor | None, *, scale: float, causal: bool) -> Tensor:
    """Softmax over the last dim in plain PyTorch."""
    s = x.to(torch.promote_types(x.dtype, torch.float32)) * scale
    if mask is not None and mask.dtype != torch.bool:
        s = s + mask.to(s.dtype)
    dropped = _dropped(x, mask, causal)
    if dropped is not None:
        s = s.masked_fill(dropped, float("-inf"))
    return torch.softmax(s, -1).to(x.dtype)


def softmax(
    x: Tensor, *, mask: Tensor | None = None, scale: float = 1.0, causal: bool = False, dim: int = -1
) -> Tensor:
    """Softmax of ``scale·x`` over ``dim``, masked.

    Computed in float32 and rounded once. The backward pass keeps y and not x. A masked-out entry is 0 and its gradient
    is 0, whatever x holds there; the entries of a row with nothing kept are NaN, as in ``torch.softmax``.

    Args:
        x: floating-point tensor [..., K]; [..., Q, K] for ``causal``.
        mask: broadcastable to x. Boolean: True where x may be attended to. Floating point: added to ``scale·x``, and
            differentiable. It is read through its strides, never expanded in memory.
        scale: factor of x.
        causal: keep entry (q, k) only if k ≤ q + (K − Q): the last query sees every key.
        dim: the dim that sums to 1. Any other than the last is moved there by a copy.

    Returns:
        like x.

    Raises:
        TypeError: if x is not floating point, or mask is neither boolean nor floating point.
        ValueError: if x is a scalar, mask does not broadcast to x, or causal is asked for without [..., Q, K] and the
            last dim.
        IndexError: if x has no such dim.
    """
    _check(x, mask, causal, dim)
    options = {"scale": float(scale), "causal": bool(causal)}
    if dim in (-1, x.dim() - 1):
        return dispatch.run(SOFTMAX, x, mask, **options)
    if mask is not None:
        mask = mask[(None,) * (x.dim() - mask.dim())].movedim(dim, -1)
    return dispatch.run(SOFTMAX, x.movedim(dim, -1), mask, **options).movedim(-1, dim)


class Softmax(torch.nn.Softmax):
    """Drop-in for ``torch.nn.Softmax``: same argument; runs :func:`softmax`."""

    def forward(self, x: Tensor) -> Tensor:
        """Any shape → the same shape and dtype, summing to 1 over ``dim``."""
        return super().forward(x) if self.dim is None else softmax(x, dim=self.dim)


def _check(x: Tensor, mask: Tensor | None, causal: bool, dim: int) -> None:
    if not x.is_floating_point():
        raise TypeError(f"softmax: x must be a floating-point tensor, got {x.dtype}; convert it, e.g. x.float()")
    if x.dim() == 0:
        raise ValueError("softmax: x must have at least one dimension to sum over, got a scalar")
    if not -x.dim() <= dim < x.dim():
        raise IndexError(f"softmax: dim must be in [{-x.dim()}, {x.dim() - 1}] for x {tuple(x.shape)}, got {dim}")
    if causal and (x.dim() < 2 or dim not in (-1, x.dim() - 1)):
        raise ValueError(
            f"softmax: causal needs x [..., Q, K] and dim=-1, got x {tuple(x.shape)} and dim={dim}; "
            "transpose x, or pass the triangle as mask"
        )
    if mask is None:
        return
    if mask.dtype != torch.bool and not mask.is_floating_point():
        raise TypeError(f"softmax: mask must be boolean or floating point, got {mask.dtype}; e.g. mask.bool()")
    fits = zip(reversed(mask.shape), reversed(x.shape), strict=False)
    if mask.dim() > x.dim() or any(m not in (1, size) for m, size in fits):
        raise ValueError(
            f"softmax: mask must broadcast to the shape of x, {tuple(x.shape)}, got {tuple(mask.shape)}; "
            "insert dimensions of size 1, e.g. mask[:, None, None, :]"
        )


def _dropped(x: Tensor, mask: Tensor | None, causal: bool) -> Tensor | None:
    """True where an entry is masked out; None if none can be."""
    dropped = mask.logical_not() if mask is not None and mask.dtype == torch.bool else None
    if causal:
        Q, K = x.shape[-2:]
        future = torch.ones(Q, K, dtype=torch.bool, device=x.device).triu(K - Q + 1)
        dropped = future if dropped is None else dropped | future
    return dropped


def _triton(x: Tensor, mask: Tensor | None, **options: Any) -> Tensor:
    from ..triton import softmax as kernels

    return fused(kernels.forward, kernels.backward, _second, (x, mask), options)


def _compiled(x: Tensor, mask: Tensor | None, **options: Any) -> Tensor:
    return fused(_compiled_forward, _compiled_backward, _second, (x, mask), options)


def _compiled_forward(x: Tensor, mask: Tensor | None, **options: Any) -> Any:
    y = compiled_call(reference, (x, mask), options)
    return y, (y, mask)


def _compiled_backward(grads: Any, saved: Any, needs: Any, **options: Any) -> Gradients:
    return compiled_call(_gradients, (*grads, *saved), {"needs": needs, **options})


def _second(grads: Any, saved: Any, needs: Any, **options: Any) -> Gradients:
    return _gradients(*grads, *saved, needs=needs, **options)


def _gradients(
    dy: Tensor, y: Tensor, mask: Tensor | None, *, needs: tuple[bool, bool], scale: float, causal: bool
) -> Gradients:
    """The gradients of x and of the mask in terms of y, which carries its own graph; y comes rounded, p sums to 1."""
    p = y.to(torch.promote_types(y.dtype, torch.float32))
    p = p / p.sum(-1, keepdim=True)
    ds = p * (dy - (dy * p).sum(-1, keepdim=True))
    dropped = _dropped(y, mask, causal)
    if dropped is not None:
        ds = ds.masked_fill(dropped, 0.0)
    dmask = ds.sum_to_size(mask.shape).to(mask.dtype) if mask is not None and needs[1] else None
    return (scale * ds).to(y.dtype), dmask


def _aten(x: Tensor, *, mask: Tensor | None = None, scale: float = 1.0, causal: bool = False, dim: int = -1) -> Tensor:
    s = x if scale == 1.0 else x * scale
    if mask is not None:
        s = s.masked_fill(mask.logical_not(), float("-inf")) if mask.dtype == torch.bool else s + mask
    if causal:
        s = s.masked_fill(
            torch.ones(s.shape[-2:], dtype=torch.bool, device=s.device).triu(1 + s.shape[-1] - s.shape[-2]),
            float("-inf"),
        )
    return torch.softmax(s, dim).to(x.dtype)


def _inputs(draw: Draw, *, B: int, Q: int, K: int, mask: str | None = None, **options: Any) -> Call:
    x = draw.tensor(B, Q, K)
    if mask == "boolean":
        options["mask"] = draw.booleans(Q, K, probability=0.8)
    elif mask == "keys":
        options["mask"] = draw.booleans(B, 1, K)
    elif mask == "bias":
        options["mask"] = draw.weight(Q, K)
    return Call((x,), options)


def _errors() -> Iterator[ErrorInput]:
    x = torch.zeros(2, 3, 8)
    yield ErrorInput(Call((x.long(),)), TypeError, r"x must be a floating-point.*int64")
    yield ErrorInput(Call((torch.tensor(1.0),)), ValueError, "at least one dimension")
    yield ErrorInput(Call((x,), {"dim": 3}), IndexError, r"dim must be in \[-3, 2\].*got 3")
    yield ErrorInput(Call((x,), {"causal": True, "dim": 1}), ValueError, r"causal needs x \[..., Q, K\] and dim=-1")
    yield ErrorInput(Call((x[0, 0],), {"causal": True}), ValueError, r"causal needs x \[..., Q, K\]")
    yield ErrorInput(Call((x,), {"mask": x.long()}), TypeError, "mask must be boolean or floating point, got.*int64")
    yield ErrorInput(Call((x,), {"mask": x[:, 0] > 0}), ValueError, r"mask must broadcast.*\(2, 3, 8\), got \(2, 8\)")


def _traffic(
    itemsize: int, *, B: int, Q: int, K: int, mask: str | None = None, causal: bool = False, **_: Any
) -> Traffic:
    """x, mask, y forward; dy, y, dx and a floating-point mask's gradient backward. Causal: half is not read."""
    size = B * Q * K * itemsize
    read = B * sum(min(K, max(0, q + 1 + K - Q)) for q in range(Q)) * itemsize if causal else size
    mask_bytes = {None: 0, "boolean": Q * K, "keys": B * K, "bias": Q * K * itemsize}[mask]
    return Traffic(forward=read + size + mask_bytes, backward=2 * read + size + (mask_bytes if mask == "bias" else 0))


def _axes(*, causal: bool, **_: Any) -> str:
    """The last query sees every key: with causal a rank must know which of all queries its own are."""
    return "... Q K, ... Q K -> ... Q K" if causal else "... K, ... K -> ... K"


_EXCESS = {
    ("causal, padded keys", "forward"): Excess(1.25, "every row reads the one mask of its keys; caches serve it"),
    ("floating mask", "backward"): Excess(
        3.01, "the gradient of a mask that may broadcast is kept for each row in float32, then summed by PyTorch"
    ),
    ("dim 1", "forward"): Excess(2.01, "rows along another dim are copied together first"),
    ("dim 1", "backward"): Excess(1.68, "rows along another dim are copied together first"),
}

SOFTMAX = Op(
    name="softmax",
    replaces="`F.softmax` with scale, mask and causal",
    fn=softmax,
    reference=reference,
    impls={"triton": _triton, "compile": _compiled},
    inputs=_inputs,
    dims={"B": (0, 1, 3), "Q": (1, 2, 5, 33), "K": (1, 31, 32, 33, 127, 129, 1023, 1025, 16_384, 16_385)},
    bench=({"B": 128, "Q": 512, "K": 512}, {"B": 1, "Q": 4096, "K": 1024}, {"B": 1, "Q": 4096, "K": 4096}),
    audit=({"B": 1, "Q": 256, "K": 512}, {"B": 1, "Q": 4096, "K": 4096}, {"B": 1, "Q": 64, "K": 262_144}),
    traffic=_traffic,
    excess=_EXCESS,
    flops=lambda B, Q, K: 5 * B * Q * K,
    aten=_aten,
    axes=_axes,
    errors=_errors,
    variants={
        "default": {},
        "scaled": {"scale": 0.125},
        "causal": {"causal": True, "scale": 0.125},
        "boolean mask": {"mask": "boolean"},
        "causal, padded keys": {"mask": "keys", "causal": True},
        "floating mask": {"mask": "bias", "scale": 0.5},
        "dim 1": {"dim": 1},
    },
    module=Softmax,
    autocast_to_float32=frozenset({"cuda", "xpu"}),
)
