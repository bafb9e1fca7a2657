"""Softmax of scores: scaled, capped, masked, and beside a sink.

    s = scale·x, or softcap·tanh(scale·x / softcap) where there is a cap
    s = −∞ where masked out (or s + mask, for a floating-point mask)
    y = exp(s) / (Σ exp(s) + exp(sink))                       over one dim; without the last term if there is no sink

Source: ``torch.softmax``; masks as in ``torch.nn.functional.scaled_dot_product_attention``. The soft cap is Gemma 2's.
The sink is gpt-oss's: Xiao et al., Efficient Streaming Language Models with Attention Sinks (2023), as a learned logit
(Miller, Attention Is Off By One, 2023, has it at 0).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .. import dispatch
from ..autograd import Gradients, fused, vjp
from ..compiled import compiled, compiled_call
from ..op import Call, Draw, ErrorInput, Excess, Op, Traffic
from . import checks


def reference(
    x: Tensor, mask: Tensor | None, sink: Tensor | None, *, scale: float, softcap: float | None, causal: bool
) -> Tensor:
    """Softmax over the last dim in plain PyTorch: float32 (or wider) inside, the result in the dtype of ``x``."""
    s = x.to(torch.promote_types(x.dtype, torch.float32))
    if scale != 1.0:
        s = s * scale
    if softcap is not None:
        s = softcap * torch.tanh(s / softcap)
    if mask is not None and mask.dtype != torch.bool:
        s = s + mask.to(s.dtype)
    dropped = _dropped(x, mask, causal)
    if dropped is not None:
        s = s.masked_fill(dropped, float("-inf"))
    if sink is None:
        y = torch.softmax(s, -1)
    else:
        sink = sink.to(s.dtype)
        peak = torch.maximum(s.amax(-1, keepdim=True), sink).detach()
        e = (s - peak).exp()
        y = e / (e.sum(-1, keepdim=True) + (sink - peak).exp())
    if dropped is not None:
        # A constant: its cotangent, which may be infinite, must not meet the rest of the row.
        y = torch.where(dropped, y.detach(), y)
    return y.to(x.dtype)


def softmax(
    x: Tensor,
    *,
    mask: Tensor | None = None,
    sink: Tensor | None = None,
    scale: float = 1.0,
    softcap: float | None = None,
    causal: bool = False,
    dim: int = -1,
) -> Tensor:
    """Softmax of ``scale·x`` over ``dim``: capped, masked, and beside a sink.

    Computed in float32 and rounded once. The backward pass keeps y; x beside a sink, for a cap, and for a mask that
    requires a gradient. A masked-out entry is 0 and its gradient is 0, whatever x holds there and whatever its
    cotangent is; the entries of a row with nothing kept are NaN, as in ``torch.softmax``, and 0 beside a sink.

    Args:
        x: floating-point tensor [..., K]; [..., Q, K] for ``causal``.
        mask: broadcastable to x. Boolean: True where x may be attended to. Floating point: added to ``scale·x``, and
            differentiable. It is read through its strides, never expanded in memory.
        sink: broadcastable to x with a single element along ``dim``: a logit that takes its part of the sum and has no
            output, so that a row sums to less than 1. A learned logit of each head is [H, 1, 1] beside [B, H, Q, K].
            Differentiable; neither scaled nor capped.
        scale: factor of x.
        softcap: if given, ``scale·x`` is replaced by ``softcap·tanh(scale·x / softcap)``, before the mask.
        causal: keep entry (q, k) only if k ≤ q + (K − Q): the last query sees every key.
        dim: the dim that sums to 1. Any other than the last is moved there by a copy.

    Returns:
        like x.

    Raises:
        TypeError: if x or sink is not floating point, or mask is neither boolean nor floating point.
        ValueError: if x is a scalar, mask or sink does not broadcast to x, a sink is beside nothing, softcap is not
            positive, or causal is asked for without [..., Q, K] and the last dim.
        IndexError: if x has no such dim.
    """
    _check(x, causal, dim)
    _check_mask(x, mask)
    _check_sink(x, sink, dim)
    if softcap is not None and not softcap > 0.0:
        raise ValueError(f"softmax: softcap must be positive, got {softcap}; None is no cap")
    options = {"scale": float(scale), "softcap": None if softcap is None else float(softcap), "causal": bool(causal)}
    if dim in (-1, x.dim() - 1):
        return dispatch.run(SOFTMAX, x, mask, sink, **options)
    mask, sink = (t if t is None else t[(None,) * (x.dim() - t.dim())].movedim(dim, -1) for t in (mask, sink))
    return dispatch.run(SOFTMAX, x.movedim(dim, -1), mask, sink, **options).movedim(-1, dim)


class Softmax(torch.nn.Softmax):
    """Drop-in for ``torch.nn.Softmax``: same argument; runs :func:`softmax`."""

    def forward(self, x: Tensor) -> Tensor:
        """Any shape → the same shape and dtype, summing to 1 over ``dim``."""
        return super().forward(x) if self.dim is None else softmax(x, dim=self.dim)


def _check(x: Tensor, causal: bool, dim: int) -> None:
    checks.floating("softmax", x=x)
    if x.dim() == 0:
        raise ValueError("softmax: x must have at least one dimension to sum over, got a scalar")
    if not -x.dim() <= dim < x.dim():
        raise IndexError(f"softmax: dim must be in [{-x.dim()}, {x.dim() - 1}] for x {tuple(x.shape)}, got {dim}")
    if causal and (x.dim() < 2 or dim not in (-1, x.dim() - 1)):
        raise ValueError(
            f"softmax: causal needs x [..., Q, K] and dim=-1, got x {tuple(x.shape)} and dim={dim}; "
            "transpose x, or pass the triangle as mask"
        )


def _check_mask(x: Tensor, mask: Tensor | None) -> None:
    if mask is None:
        return
    if mask.dtype != torch.bool and not mask.is_floating_point():
        raise TypeError(f"softmax: mask must be boolean or floating point, got {mask.dtype}; e.g. mask.bool()")
    if not _broadcasts(mask.shape, x.shape):
        raise ValueError(
            f"softmax: mask must broadcast to the shape of x, {tuple(x.shape)}, got {tuple(mask.shape)}; "
            "insert dimensions of size 1, e.g. mask[:, None, None, :]"
        )


def _check_sink(x: Tensor, sink: Tensor | None, dim: int) -> None:
    if sink is None:
        return
    checks.floating("softmax", sink=sink)
    rows = list(x.shape)
    rows[dim] = 1
    if not _broadcasts(sink.shape, rows):
        raise ValueError(
            f"softmax: sink must broadcast to x with one element along dim {dim}, {tuple(rows)}, "
            f"got {tuple(sink.shape)}; a logit of each head of [B, H, Q, K] is sink.view(-1, 1, 1)"
        )
    if x.shape[dim] == 0:
        raise ValueError(f"softmax: beside a sink, x must have an element along dim {dim}, got {tuple(x.shape)}")


def _broadcasts(shape: Sequence[int], to: Sequence[int]) -> bool:
    fits = zip(reversed(shape), reversed(to), strict=False)
    return len(shape) <= len(to) and all(size in (1, wanted) for size, wanted in fits)


def _dropped(x: Tensor, mask: Tensor | None, causal: bool) -> Tensor | None:
    """True where an entry is masked out; None if none can be."""
    dropped = mask.logical_not() if mask is not None and mask.dtype == torch.bool else None
    if causal:
        Q, K = x.shape[-2:]
        future = torch.ones(Q, K, dtype=torch.bool, device=x.device).triu(K - Q + 1)
        dropped = future if dropped is None else dropped | future
    return dropped


def _keeps_x(mask: Tensor | None, sink: Tensor | None, softcap: float | None) -> bool:
    """Whether the gradients need x, and not y alone: those of the mask and the sink may be more precise than y is."""
    return softcap is not None or sink is not None or (mask is not None and mask.requires_grad)


def _triton(x: Tensor, mask: Tensor | None, sink: Tensor | None, **options: Any) -> Tensor:
    from ..triton import softmax as kernels

    keep_x = _keeps_x(mask, sink, options["softcap"])
    second = vjp(reference) if keep_x else _second
    return fused(partial(kernels.forward, keep_x=keep_x), kernels.backward, second, (x, mask, sink), options)


def _compiled(x: Tensor, mask: Tensor | None, sink: Tensor | None, **options: Any) -> Tensor:
    if _keeps_x(mask, sink, options["softcap"]):
        return compiled(reference)(x, mask, sink, **options)
    if _is_atens(mask, **options) and x.dtype == torch.float32:
        return torch.softmax(x, -1)
    return fused(_compiled_forward, _compiled_backward, _second, (x, mask, sink), options)


def _compiled_forward(x: Tensor, mask: Tensor | None, sink: None, **options: Any) -> Any:
    y = torch.softmax(x, -1) if _is_atens(mask, **options) else compiled_call(reference, (x, mask, sink), options)
    return y, (y, mask)


def _is_atens(mask: Tensor | None, *, scale: float, causal: bool, **_: Any) -> bool:
    """Whether ATen has a kernel for it, which on the CPU is faster than compiled code; it too rounds once."""
    return mask is None and scale == 1.0 and not causal


def _compiled_backward(grads: Any, saved: Any, needs: Any, **options: Any) -> Gradients:
    return compiled_call(_gradient, (*grads, *saved[:2]), options), None, None


def _second(grads: Any, saved: Any, needs: Any, **options: Any) -> Gradients:
    return _gradient(*grads, *saved[:2], **options), None, None


def _gradient(dy: Tensor, y: Tensor, mask: Tensor | None, *, scale: float, causal: bool, softcap: None) -> Tensor:
    """The gradient of x in terms of y, which carries its own graph; y comes rounded, p sums to 1."""
    p = y.to(torch.promote_types(y.dtype, torch.float32))
    dropped = _dropped(y, mask, causal)
    if dropped is not None:
        dy = dy.masked_fill(dropped, 0.0)
    # Both sums are of what is read, so that one loop over the row finds them. Σp is 1 but for a rounding error δ:
    # 1/Σp = 2 − Σp up to δ², without a division for each vector of the row.
    inverse, along = 2.0 - p.sum(-1, keepdim=True), (dy * p).sum(-1, keepdim=True)
    ds = p * inverse * (dy - along * inverse)
    if dropped is not None:
        ds = ds.masked_fill(dropped, 0.0)
    return (scale * ds).to(y.dtype)


def _aten(
    x: Tensor,
    *,
    mask: Tensor | None = None,
    sink: Tensor | None = None,
    scale: float = 1.0,
    softcap: float | None = None,
    causal: bool = False,
    dim: int = -1,
) -> Tensor:
    s = x if scale == 1.0 else x * scale
    if softcap is not None:
        s = softcap * torch.tanh(s / softcap)
    if mask is not None:
        s = s.masked_fill(mask.logical_not(), float("-inf")) if mask.dtype == torch.bool else s + mask
    if causal:
        s = s.masked_fill(
            torch.ones(s.shape[-2:], dtype=torch.bool, device=s.device).triu(1 + s.shape[-1] - s.shape[-2]),
            float("-inf"),
        )
    if sink is not None:
        K = s.shape[dim]
        s = torch.cat((s, sink.expand_as(s.narrow(dim, 0, 1))), dim)
        return torch.softmax(s, dim).narrow(dim, 0, K).to(x.dtype)
    return torch.softmax(s, dim).to(x.dtype)


def _inputs(draw: Draw, *, B: int, Q: int, K: int, mask: str | None = None, sink: bool = False, **options: Any) -> Call:
    x = draw.tensor(B, Q, K)
    if mask == "boolean":
        options["mask"] = draw.booleans(Q, K, probability=0.8)
    elif mask == "keys":
        options["mask"] = draw.booleans(B, 1, K)
    elif mask == "bias":
        options["mask"] = draw.weight(Q, K)
    if sink:
        options["sink"] = draw.weight(B, 1, 1)
    return Call((x,), options)


def _errors() -> Iterator[ErrorInput]:
    x = torch.zeros(2, 3, 8)
    yield ErrorInput(Call((x.long(),)), TypeError, r"x must be a floating-point.*int64")
    yield ErrorInput(Call((torch.tensor(1.0),)), ValueError, "at least one dimension")
    yield ErrorInput(Call((x,), {"dim": 3}), IndexError, r"dim must be in \[-3, 2\].*got 3")
    yield ErrorInput(Call((x,), {"causal": True, "dim": 1}), ValueError, r"causal needs x \[..., Q, K\] and dim=-1")
    yield ErrorInput(Call((x[0, 0],), {"causal": True}), ValueError, r"causal needs x \[..., Q, K\]")
    yield ErrorInput(Call((x,), {"mask": x.long()}), TypeError, "mask must be boolean or floating point, got.*int64")
    yield ErrorInput(Call((x,), {"softcap": 0.0}), ValueError, "softcap must be positive, got 0.0")
    yield ErrorInput(Call((x,), {"sink": x[..., :1].long()}), TypeError, "sink must be a floating-point.*int64")
    yield ErrorInput(Call((x,), {"sink": x[0, 0]}), ValueError, r"sink must broadcast.*\(2, 3, 1\), got \(8,\)")
    yield ErrorInput(Call((x[..., :0],), {"sink": x[..., :1]}), ValueError, "an element along dim -1")
    yield ErrorInput(Call((x,), {"mask": x[:, 0] > 0}), ValueError, r"mask must broadcast.*\(2, 3, 8\), got \(2, 8\)")


def _traffic(
    itemsize: int,
    *,
    B: int,
    Q: int,
    K: int,
    mask: str | None = None,
    sink: bool = False,
    softcap: float | None = None,
    causal: bool = False,
    **_: Any,
) -> Traffic:
    """x, mask, y forward; dy, y, dx backward, or dy, x, mask, dx and its own gradient. Causal: half is not read."""
    size = B * Q * K * itemsize
    read = B * sum(min(K, max(0, q + 1 + K - Q)) for q in range(Q)) * itemsize if causal else size
    mask_bytes = {None: 0, "boolean": Q * K, "keys": B * K, "bias": Q * K * itemsize}[mask]
    keeps_x = sink or softcap or mask == "bias"
    statistics = 8 * B * Q if keeps_x else 0
    sinks = B * itemsize if sink else 0
    masks = (mask_bytes if keeps_x else 0) + (mask_bytes if mask == "bias" else 0)
    return Traffic(
        forward=read + size + mask_bytes + sinks + statistics,
        backward=2 * read + size + masks + 2 * sinks + statistics,
    )


def _axes(*_: Tensor | None, causal: bool, **__: Any) -> str:
    """The last query sees every key: with causal a rank must know which of all queries its own are."""
    return "... Q K, ... Q K, ... Q I -> ... Q K" if causal else "... K, ... K, ... I -> ... K"


_EXCESS = {
    ("causal, padded keys", "forward"): Excess(1.25, "every row reads the one mask of its keys; caches serve it"),
    ("floating mask", "backward"): Excess(
        2.61, "the gradient of a mask that may broadcast is kept for each row in float32, then summed by PyTorch"
    ),
    ("dim 1", "forward"): Excess(2.01, "rows along another dim are copied together first"),
    ("dim 1", "backward"): Excess(1.68, "rows along another dim are copied together first"),
}

SOFTMAX = Op(
    name="softmax",
    replaces="`F.softmax` with scale, soft cap, mask, causal and sink",
    fn=softmax,
    reference=reference,
    impls={"triton": _triton, "compile": _compiled},
    inputs=_inputs,
    dims={"B": (0, 1, 3), "Q": (1, 2, 5, 33), "K": (1, 31, 32, 33, 127, 129, 1023, 1025, 16_384, 16_385)},
    bench=({"B": 128, "Q": 512, "K": 512}, {"B": 1, "Q": 4096, "K": 1024}, {"B": 1, "Q": 4096, "K": 4096}),
    audit=({"B": 1, "Q": 256, "K": 512}, {"B": 1, "Q": 1024, "K": 4096}, {"B": 1, "Q": 16, "K": 262_144}),
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
        "softcap": {"softcap": 2.0, "scale": 0.5, "mask": "boolean"},
        "sink": {"sink": True, "causal": True},
        "dim 1": {"dim": 1},
    },
    modules=(Softmax,),
    autocast_to_float32=frozenset({"cuda", "xpu"}),
)
