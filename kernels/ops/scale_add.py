"""The tail of a residual block with LayerScale and stochastic depth.

    y[b, …, d] = residual[b, …, d] + (γ[d]·x[b, …, d] / (1 − p)  if sample b is kept  else 0)

A sample is an index of the first dim; it is kept with probability 1 − p: ``kept(seed, b, 0)`` of dropout.py.

Sources: Touvron et al., Going Deeper with Image Transformers (2021), for γ; Huang et al., Deep Networks with Stochastic
Depth (2016); ``LayerScale`` and ``DropPath`` in timm.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .. import dispatch
from ..autograd import Gradients, fused
from ..by_rows import Factors, by_rows
from ..compiled import compiled_call
from ..op import Call, Draw, ErrorInput, Op, Traffic
from . import checks
from .dropout import constants, kept, new_seed, small


def reference(
    x: Tensor,
    residual: Tensor | None,
    scale: Tensor | None,
    seed: Tensor | int | None,
    *,
    threshold: int,
    keep_scale: float,
) -> Tensor:
    """The sum in plain PyTorch: float32 (or wider) inside, one rounding. No seed is no dropped sample."""
    narrow = x.dtype if residual is None else torch.promote_types(x.dtype, residual.dtype)
    h = _dropped(x.to(torch.promote_types(narrow, torch.float32)), seed, threshold, keep_scale)
    if scale is not None:
        h = h * scale.to(h.dtype)
    if residual is not None:
        h = h + residual.to(h.dtype)
    return h.to(narrow)


def _dropped(x: Tensor, seed: Tensor | int | None, threshold: int, keep_scale: float) -> Tensor:
    """x, its dropped samples replaced by 0: whatever they held, NaN too, is not read."""
    if seed is None:
        return x
    mask = kept(seed, (x.shape[0], 1), threshold).view(-1, *[1] * (x.dim() - 1))
    return torch.where(mask, x * keep_scale, 0.0)


def scale_add(
    x: Tensor,
    residual: Tensor | None = None,
    scale: Tensor | None = None,
    *,
    drop_path: float = 0.0,
    scale_by_keep: bool = True,
    training: bool = True,
    seed: Tensor | None = None,
) -> Tensor:
    """Residual add of scaled channels under stochastic depth: ``residual + drop_path(x * scale)``, in one pass.

    Computed in float32 and rounded once. The x of a dropped sample is not read, so what it holds has no effect. Which
    samples are dropped is a function of the seed; the backward pass keeps x only where there is a scale.

    Args:
        x: floating-point tensor [B, ..., D]; the first dim counts samples.
        residual: of x's shape; its dtype may differ. None is none.
        scale: γ [D], a factor of each channel, or None for none.
        drop_path: probability that a sample's ``x * scale`` is dropped.
        scale_by_keep: whether the other samples are multiplied by ``1 / (1 − drop_path)``.
        training: False is drop_path = 0.
        seed: int64 scalar tensor on x's device, for a choice that can be asked for again; None draws one from PyTorch's
            generator.

    Returns:
        [B, ..., D] in the dtype that ``x + residual`` promotes to, or x's.

    Raises:
        TypeError: if a tensor is not floating point.
        ValueError: if x is a scalar, residual has another shape, scale is not [D], drop_path is not in [0, 1] or finds
            no dim of samples, or the seed is not an int64 scalar.
    """
    checks.floating("scale_add", x=x, residual=residual, scale=scale)
    checks.per_channel("scale_add", x, scale=scale)
    checks.like("scale_add", x, residual=residual)
    checks.dropout("scale_add", drop_path, seed, label="drop_path")
    if drop_path and x.dim() == 1:
        raise ValueError(
            f"scale_add: drop_path needs x [B, ..., D], got {tuple(x.shape)}; unsqueeze the dim of samples"
        )
    if not training or drop_path == 0.0:
        if residual is None and scale is None:
            return x
        return dispatch.run(SCALE_ADD, x, residual, scale, None, threshold=0, keep_scale=1.0)
    found = constants(drop_path)
    keep_scale = found["scale"] if scale_by_keep else 1.0
    seed = new_seed(x.device) if seed is None else seed
    return dispatch.run(SCALE_ADD, x, residual, scale, seed, threshold=found["threshold"], keep_scale=keep_scale)


class LayerScale(torch.nn.Module):
    """Drop-in for timm's ``LayerScale``: same arguments and ``state_dict``; runs :func:`scale_add` with a scale alone.

    The result has x's dtype, also where gamma's is wider. ``inplace=True`` is accepted and computed out of place.

    Args:
        dim: size of the last dim.
        init_values: what every element of gamma starts as.
        inplace: has no effect.
        device: of gamma.
        dtype: of gamma.
    """

    def __init__(
        self,
        dim: int,
        init_values: float = 1e-5,
        inplace: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.init_values, self.inplace = init_values, inplace
        self.gamma = torch.nn.Parameter(torch.empty(dim, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set gamma to its initial value."""
        torch.nn.init.constant_(self.gamma, self.init_values)

    def forward(self, x: Tensor) -> Tensor:
        """[..., dim] → the same shape and dtype."""
        return scale_add(x, scale=self.gamma)

    def extra_repr(self) -> str:
        """The arguments."""
        return f"{self.gamma.shape[0]}, init_values={self.init_values}"


class DropPath(torch.nn.Module):
    """Drop-in for timm's ``DropPath``: same arguments; runs :func:`scale_add` with stochastic depth alone.

    Args:
        drop_prob: probability that a sample is dropped.
        scale_by_keep: whether the other samples are multiplied by ``1 / (1 − drop_prob)``.
    """

    def __init__(self, drop_prob: float = 0.0, scale_by_keep: bool = True) -> None:
        super().__init__()
        self.drop_prob, self.scale_by_keep = drop_prob, scale_by_keep

    def forward(self, x: Tensor) -> Tensor:
        """[B, ...] → the same shape and dtype."""
        return scale_add(x, drop_path=self.drop_prob, scale_by_keep=self.scale_by_keep, training=self.training)

    def extra_repr(self) -> str:
        """The arguments."""
        return f"drop_prob={self.drop_prob}, scale_by_keep={self.scale_by_keep}"


def _triton(*tensors: Tensor | None, **options: Any) -> Tensor:
    from ..triton import scale_add as kernels

    return fused(kernels.forward, kernels.backward, _second, tensors, options)


def _compiled(*tensors: Tensor | None, **options: Any) -> Tensor:
    return fused(_compiled_forward, _compiled_backward, _second, tensors, options)


def _compiled_forward(
    x: Tensor, residual: Tensor | None, scale: Tensor | None, seed: Tensor | None, **options: Any
) -> tuple[Tensor, Any]:
    y = compiled_call(reference, (x, residual, scale, seed), options)
    kept_x = x.new_empty(0) if scale is None else x
    return y, (kept_x, None if residual is None else residual.new_empty(0), scale, seed)


def _compiled_backward(grads: Any, saved: Any, needs: Any, **options: Any) -> Gradients:
    return compiled_call(_gradients, (*grads, *saved), {"needs": needs, **options})


def _second(grads: Any, saved: Any, needs: Any, **options: Any) -> Gradients:
    return _gradients(*grads, *saved, needs=needs, **options)


def _gradients(
    dy: Tensor,
    x: Tensor,
    residual: Tensor | None,
    scale: Tensor | None,
    seed: Tensor | None,
    *,
    needs: tuple[bool, bool, bool, bool],
    threshold: int,
    keep_scale: float,
) -> Gradients:
    """The gradients of x, residual and scale; residual is empty, and so is x without a scale: they name dtypes."""
    g = _dropped(dy.to(torch.promote_types(dy.dtype, torch.float32)), seed, threshold, keep_scale)
    dresidual = None if residual is None else dy.to(residual.dtype)
    if scale is None:
        return g.to(x.dtype), dresidual, None, None
    rows = g, _dropped(x.to(g.dtype), seed, threshold, 1.0)
    (dx,), (dscale,) = by_rows(partial(_gradients_of_rows, dtype=x.dtype, needs_scale=needs[2]), rows, (scale,))
    return dx, dresidual, dscale, None


def _gradients_of_rows(
    g: Tensor, x: Tensor, scale: Tensor, *, dtype: torch.dtype, needs_scale: bool
) -> tuple[tuple[Tensor], tuple[Factors | None]]:
    return ((g * scale.to(g.dtype)).to(dtype),), ((g, x) if needs_scale else None,)


def _aten(
    x: Tensor,
    residual: Tensor | None = None,
    scale: Tensor | None = None,
    *,
    drop_path: float = 0.0,
    seed: Tensor | None = None,
) -> Tensor:
    h = x if scale is None else (x * scale).to(x.dtype)
    if drop_path:
        h = h * h.new_empty(h.shape[0], *[1] * (h.dim() - 1)).bernoulli_(1.0 - drop_path) / (1.0 - drop_path)
    return h if residual is None else residual + h


#: The seed of drawn calls, so that the traffic knows how many samples are kept.
_SEED = 7


def _inputs(
    draw: Draw, *, B: int, T: int, D: int, residual: bool = True, scale: bool = True, drop_path: float = 0.0
) -> Call:
    added = draw.tensor(B, T, D) if residual else None
    options = {"drop_path": drop_path, "seed": draw.integers(_SEED, _SEED)} if drop_path else {}
    return Call((draw.tensor(B, T, D), added, draw.weight(D) if scale else None), options)


def _errors() -> Iterator[ErrorInput]:
    x, scale = torch.zeros(2, 8), torch.ones(8)
    yield ErrorInput(Call((x.long(),)), TypeError, r"x must be a floating-point.*int64")
    yield ErrorInput(Call((x, x.long())), TypeError, r"residual must be a floating-point.*int64")
    yield ErrorInput(Call((x, x, scale.long())), TypeError, r"scale must be a floating-point.*int64")
    yield ErrorInput(Call((torch.tensor(1.0),)), ValueError, "at least one dimension")
    yield ErrorInput(Call((x, scale)), ValueError, r"residual must have the shape of x, \(2, 8\), got \(8,\)")
    yield ErrorInput(Call((x, x, scale[:7])), ValueError, r"scale must have the shape.*\(8,\), got \(7,\)")
    yield ErrorInput(Call((x,), {"drop_path": 2.0}), ValueError, "drop_path must be a probability.*got 2.0")
    yield ErrorInput(Call((scale,), {"drop_path": 0.5}), ValueError, r"drop_path needs x \[B, ..., D\], got \(8,\)")


def _traffic(
    itemsize: int, *, B: int, T: int, D: int, residual: bool = True, scale: bool = True, drop_path: float = 0.0
) -> Traffic:
    """x where it is kept, residual, y forward; dy and with a scale x where kept, dx backward; scale, its gradient."""
    size = B * T * D
    kept_size = size
    if drop_path:
        mask = kept(torch.tensor(_SEED), (B, 1), constants(drop_path)["threshold"])
        kept_size = int(mask.sum()) * T * D
    return Traffic(
        forward=(kept_size + (1 + residual) * size + scale * D) * itemsize,
        backward=((1 + scale) * kept_size + size + 2 * scale * D) * itemsize,
    )


def _axes(*tensors: Tensor | None, **_: Any) -> str:
    """All shards of a sample must agree on whether it is dropped, so that only samples may be sharded."""
    return "... d, ... d, d, seed -> ... d" if tensors[3] is None else "b *, b *, D, seed -> b *"


SCALE_ADD = Op(
    name="scale_add",
    replaces="timm's `residual + drop_path(layer_scale(x))`, or a part of it",
    fn=scale_add,
    reference=reference,
    impls={"triton": _triton, "compile": _compiled},
    small=small(reference),
    inputs=_inputs,
    dims={"B": (0, 1, 2, 9), "T": (1, 2, 33), "D": (0, 1, 31, 32, 33, 127, 256, 257, 1025)},
    # ViT-B and ViT-L at 224 pixels.
    bench=({"B": 64, "T": 197, "D": 768}, {"B": 64, "T": 197, "D": 1024}),
    audit=({"B": 16, "T": 32, "D": 128}, {"B": 8, "T": 197, "D": 768}),
    traffic=_traffic,
    flops=lambda B, T, D: 2 * B * T * D,
    aten=_aten,
    axes=_axes,
    errors=_errors,
    variants={
        "default": {},
        "a block's tail": {"drop_path": 0.25},
        "scale alone": {"residual": False},
        "stochastic depth alone": {"residual": False, "scale": False, "drop_path": 0.5},
    },
    modules=(LayerScale, DropPath),
)
