"""Rotary position embedding of a packed qkv: q and k turn, v passes through.

    [q | k | v] → [rope(q) | rope(k) | v]        one beside the other along the dim of 3, or along the heads

Source: Su et al., RoFormer (2021), as in :mod:`.rope`; the layouts are those of Dao's flash-attention.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from .. import dispatch, sharding
from ..autograd import Gradients, fused
from ..compiled import compiled_call
from ..op import Call, Draw, ErrorInput, Op, Traffic
from . import rope


def reference(
    qkv: Tensor, cos: Tensor, sin: Tensor, *, dim: int, turning: int, interleaved: bool, inplace: bool
) -> Tensor:
    """The first ``turning`` entries along ``dim`` rotated, in plain PyTorch."""
    qk = qkv.narrow(dim, 0, turning)
    turned = rope.reference(qk, cos, sin, interleaved=interleaved)
    if inplace:
        qk.copy_(turned)
        return qkv
    return torch.cat((turned, qkv.narrow(dim, turning, qkv.shape[dim] - turning)), dim)


def rope_qkv(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    *,
    num_heads: int | None = None,
    interleaved: bool = False,
    inplace: bool = False,
) -> Tensor:
    """Rotary position embedding of the queries and keys in a packed qkv; the values pass through.

    Computed in float32 and rounded once, q and k in one launch. ``inplace=True`` moves nothing but the elements that
    turn: two thirds of the bytes, on a GPU. qkv is then changed as ``x.mul_()`` changes x: it counts as modified for
    autograd, and one that overlaps in memory, or is a leaf that requires a gradient, is refused. Its gradient is a new
    tensor, as autograd may hand the same cotangent to others.

    The gradient flows to qkv. If cos or sin requires one too, the plain form runs.

    Args:
        qkv: floating-point tensor [..., S, 3, H, D]; or, with ``num_heads``, [..., S, H + 2·H_kv, D]: first the query
            heads, then those of the keys, then those of the values.
        cos: floating-point tensor that broadcasts to [..., S, R], R ≤ D and even, with a column for every element that
            turns. Its dtype may differ from qkv's. [S, R], or [B, S, R] where every sequence has its own positions.
        sin: likewise, with the same R.
        num_heads: query heads, where there may be fewer keys and values (grouped-query attention).
        interleaved: pair elements (2i, 2i + 1), not (i, i + R/2), as in :func:`rope`.
        inplace: write into qkv, and return it.

    Returns:
        qkv's shape and dtype.

    Raises:
        TypeError: if qkv, cos or sin is not floating point.
        ValueError: if qkv has not the shape above, R is odd or more than D, or cos or sin does not broadcast.
        RuntimeError: if qkv cannot be changed in place.
    """
    dim, turning = _layout(qkv, num_heads)
    rope.check("rope_qkv", "a head of qkv", qkv[..., 0, :] if dim == -2 else qkv[..., 0, 0, :], cos, sin)
    if inplace:
        _check_writable(qkv)
        if sharding.is_sharded(qkv):  # DTensor knows how to change itself in place; a kernel knows one rank's part
            return qkv.copy_(rope_qkv(qkv, cos, sin, num_heads=num_heads, interleaved=interleaved))
    cos, sin = _over_heads(cos, dim), _over_heads(sin, dim)
    options = {"dim": dim, "turning": turning, "interleaved": bool(interleaved), "inplace": bool(inplace)}
    return dispatch.run(ROPE_QKV, qkv, cos, sin, **options)


def _layout(qkv: Tensor, num_heads: int | None) -> tuple[int, int]:
    """The dim along which q, k and v lie, and how much of it is q and k."""
    if num_heads is None:
        if qkv.dim() < 4 or qkv.shape[-3] != 3 or qkv.shape[-2] == 0:
            raise ValueError(
                f"rope_qkv: qkv must be [..., S, 3, H, D], got {tuple(qkv.shape)}; "
                "pass num_heads for [..., S, H + 2·H_kv, D]"
            )
        return -3, 2
    if qkv.dim() < 3 or (qkv.shape[-2] - num_heads) % 2 or not 0 < num_heads < qkv.shape[-2]:
        raise ValueError(
            f"rope_qkv: qkv must be [..., S, num_heads + 2·H_kv, D] with num_heads={num_heads}, "
            f"got {tuple(qkv.shape)}; num_heads counts the queries alone"
        )
    return -2, (qkv.shape[-2] + num_heads) // 2


def _over_heads(table: Tensor, dim: int) -> Tensor:
    """[..., S, R] with the dims that every token has, and it is the same along, between the two."""
    return table[..., None, :] if dim == -2 else table[..., None, None, :]


def _check_writable(qkv: Tensor) -> None:
    if torch.is_grad_enabled() and qkv.requires_grad and qkv.is_leaf:
        raise RuntimeError(
            "rope_qkv: qkv must not be a leaf that requires a gradient when inplace=True, as autograd could not go "
            "back to its value; pass the output of a projection, or inplace=False"
        )
    if any(stride == 0 and size > 1 for size, stride in zip(qkv.shape, qkv.stride(), strict=True)):
        raise RuntimeError(
            f"rope_qkv: qkv must not overlap in memory when inplace=True, got strides {qkv.stride()} for "
            f"{tuple(qkv.shape)}; clone() it first"
        )


def _triton(qkv: Tensor, cos: Tensor, sin: Tensor, **options: Any) -> Tensor:
    if torch.is_grad_enabled() and (cos.requires_grad or sin.requires_grad):
        return reference(qkv, cos, sin, **options)
    from ..triton import rope as kernels

    return fused(kernels.packed_forward, kernels.packed_backward, _second, (qkv, cos, sin), options)


def _compiled(qkv: Tensor, cos: Tensor, sin: Tensor, **options: Any) -> Tensor:
    if torch.is_grad_enabled() and (cos.requires_grad or sin.requires_grad):
        return reference(qkv, cos, sin, **options)
    return fused(_compiled_forward, _compiled_backward, _second, (qkv, cos, sin), options)


def _compiled_forward(qkv: Tensor, cos: Tensor, sin: Tensor, **options: Any) -> Any:
    y = compiled_call(reference, (qkv, cos, sin), options)
    return qkv if options["inplace"] else y, (cos, sin)


def _compiled_backward(grads: Any, saved: Any, needs: Any, **options: Any) -> Gradients:
    return compiled_call(_turned_back, (*grads, *saved), options), None, None


def _second(grads: Any, saved: Any, needs: Any, **options: Any) -> Gradients:
    return _turned_back(*grads, *saved, **options), None, None


def _turned_back(
    dy: Tensor, cos: Tensor, sin: Tensor, *, dim: int, turning: int, interleaved: bool, inplace: bool
) -> Tensor:
    dqk, dv = dy.split((turning, dy.shape[dim] - turning), dim)
    return torch.cat((rope.turned_back(dqk, cos, sin, interleaved=interleaved), dv), dim)


def _aten(qkv: Tensor, cos: Tensor, sin: Tensor, *, num_heads: int | None = None, interleaved: bool = False) -> Tensor:
    dim, turning = _layout(qkv, num_heads)
    cos, sin = _over_heads(cos, dim), _over_heads(sin, dim)
    qk, v = qkv.split((turning, qkv.shape[dim] - turning), dim)
    return torch.cat((rope.aten(qk, cos, sin, interleaved=interleaved), v), dim)


def _inputs(
    draw: Draw,
    *,
    B: int,
    S: int,
    H: int,
    D: int,
    grouped: bool = False,
    interleaved: bool = False,
    partial: bool = False,
    own: bool = False,
) -> Call:
    R = rope.turning_elements(D, partial)
    table = (B, S, R) if own else (S, R)
    qkv = draw.tensor(B, S, 3 * H, D) if grouped else draw.tensor(B, S, 3, H, D)
    options: dict[str, Any] = {"interleaved": interleaved}
    if grouped:
        options["num_heads"] = 3 * H - 2 * _kv_heads(H)
    return Call((qkv, draw.constant(*table), draw.constant(*table)), options)


def _kv_heads(H: int) -> int:
    """Half of the heads where 3 · H are grouped, and so 2 · H are queries; at least one."""
    return max(1, H // 2)


def _errors() -> Iterator[ErrorInput]:
    qkv, table = torch.zeros(2, 5, 3, 4, 8), torch.zeros(5, 8)
    grouped = torch.zeros(2, 5, 8, 8)
    yield ErrorInput(Call((qkv.long(), table, table)), TypeError, r"rope_qkv: .* must be a floating-point.*int64")
    yield ErrorInput(Call((grouped, table, table)), ValueError, r"\[..., S, 3, H, D\], got \(2, 5, 8, 8\)")
    yield ErrorInput(Call((grouped, table, table), {"num_heads": 3}), ValueError, r"num_heads=3, got \(2, 5, 8, 8\)")
    yield ErrorInput(Call((grouped, table, table), {"num_heads": 8}), ValueError, r"counts the queries alone")
    yield ErrorInput(Call((qkv, table[:4], table)), ValueError, r"cos must broadcast to .*\(2, 5, 8\).*got \(4, 8\)")
    yield ErrorInput(Call((qkv, table, table[:, :4])), ValueError, r"same number of columns")
    leaf = torch.zeros(2, 5, 3, 4, 8, requires_grad=True)
    yield ErrorInput(Call((leaf, table, table), {"inplace": True}), RuntimeError, "must not be a leaf")
    shared = torch.zeros(1, 5, 3, 4, 8).expand(2, 5, 3, 4, 8)
    yield ErrorInput(Call((shared, table, table), {"inplace": True}), RuntimeError, "must not overlap.*clone")


def _traffic(
    itemsize: int, *, B: int, S: int, H: int, D: int, partial: bool = False, own: bool = False, **_: Any
) -> Traffic:
    """qkv, cos, sin and y; the backward pass the same."""
    moved = (2 * B * S * 3 * H * D + 2 * (B if own else 1) * S * rope.turning_elements(D, partial)) * itemsize
    return Traffic(forward=moved, backward=moved)


def _axes(*_: Tensor | None, dim: int, **__: Any) -> str:
    """Heads may be sharded where q, k and v lie along a dim of their own."""
    return "... I h D, ... I I R, ... I I R -> ... I h D" if dim == -3 else "... H D, ... I R, ... I R -> ... H D"


ROPE_QKV = Op(
    name="rope_qkv",
    replaces="the rotary embedding of q and k in a packed qkv, also in place",
    fn=rope_qkv,
    reference=reference,
    impls={"triton": _triton, "compile": _compiled},
    inputs=_inputs,
    dims={"B": (0, 1, 2, 3), "S": (0, 1, 2, 7, 33), "H": (1, 2, 5, 33), "D": (1, 2, 31, 64, 66, 128, 2048, 2100)},
    # GPT-NeoX-20B's heads, and Llama-2-7B's.
    bench=({"B": 1, "S": 2048, "H": 64, "D": 96}, {"B": 1, "S": 2048, "H": 32, "D": 128}),
    audit=({"B": 1, "S": 64, "H": 8, "D": 128}, {"B": 1, "S": 128, "H": 32, "D": 128}),
    traffic=_traffic,
    flops=lambda B, S, H, D: 6 * B * S * H * D,
    aten=_aten,
    axes=_axes,
    errors=_errors,
    # In place the same kernel gives the same bits: tests/test_identities_rotary.py compares them.
    variants={
        "default": {},
        "grouped": {"grouped": True},
        "interleaved, partial, own positions": {"interleaved": True, "partial": True, "own": True},
    },
)
