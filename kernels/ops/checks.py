"""Checks of arguments that several operators make, each with an error that teaches."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import dispatch
from .autocast import autocasting

REDUCTIONS = ("none", "mean", "sum")


def floating(name: str, **tensors: Tensor | None) -> None:
    """Raise unless every tensor is floating point."""
    for label, tensor in tensors.items():
        if tensor is not None and not tensor.is_floating_point():
            raise TypeError(
                f"{name}: {label} must be a floating-point tensor, got {tensor.dtype}; convert it, e.g. {label}.float()"
            )


def dropout(name: str, p: float, seed: Tensor | None, label: str = "p") -> None:
    """Raise unless p, which the operator calls ``label``, is a probability, and the seed an int64 scalar."""
    if not 0.0 <= p <= 1.0:
        raise ValueError(f"{name}: {label} must be a probability, between 0 and 1, got {p}")
    if seed is not None and (seed.dtype != torch.int64 or seed.dim()):
        raise ValueError(
            f"{name}: seed must be a scalar tensor of int64, got {tuple(seed.shape)} of {seed.dtype}; "
            "e.g. torch.tensor(1234, device=x.device)"
        )


def per_channel(name: str, x: Tensor, **parameters: Tensor | None) -> None:
    """Raise unless x has a last dim, and every parameter one element for each of its channels."""
    if x.dim() == 0:
        raise ValueError(f"{name}: x must have at least one dimension, its channels, got a scalar; e.g. x.view(1)")
    for label, parameter in parameters.items():
        if parameter is not None and parameter.shape != x.shape[-1:]:
            raise ValueError(
                f"{name}: {label} must have the shape of the last dim of x, ({x.shape[-1]},), "
                f"got {tuple(parameter.shape)}; build it with the width of the layer before"
            )


def like(name: str, x: Tensor, **tensors: Tensor | None) -> None:
    """Raise unless every tensor has the shape of x: nothing is broadcast."""
    for label, tensor in tensors.items():
        if tensor is not None and tensor.shape != x.shape:
            raise ValueError(
                f"{name}: {label} must have the shape of x, {tuple(x.shape)}, got {tuple(tensor.shape)}; "
                "expand it first if it should broadcast"
            )


def linear_operands(name: str, **tensors: tuple[Tensor | None, str]) -> None:
    """Raise unless tensors suit a linear layer: of one dtype, and each dim of the size that its letter has elsewhere.

    The first is [..., D], whatever its letters.
    """
    first, (x, _) = next(iter(tensors.items()))
    assert x is not None
    floating(name, **{label: tensor for label, (tensor, _) in tensors.items()})
    if x.dim() == 0:
        raise ValueError(
            f"{name}: {first} must have at least one dimension, its features, got a scalar; e.g. {first}.view(1)"
        )
    sizes = {"D": x.shape[-1]}
    for label, (tensor, letters) in tensors.items():
        if tensor is None or tensor is x:
            continue
        if tensor.dtype != x.dtype and not autocasting(x.device.type):
            raise TypeError(
                f"{name}: {label} must have the dtype of {first}, {x.dtype}, got {tensor.dtype}; "
                "convert one, or use torch.autocast"
            )
        fits = tensor.dim() == len(letters) and all(
            sizes.setdefault(letter, size) == size for letter, size in zip(letters, tensor.shape, strict=True)
        )
        if not fits:
            wanted = ", ".join(f"{letter}={sizes[letter]}" if letter in sizes else letter for letter in letters)
            raise ValueError(
                f"{name}: {label} must be [{wanted}], got {tuple(tensor.shape)}; "
                "weights are [out, in], as in torch.nn.Linear"
            )


def each_token(name: str, hidden: Tensor, **tensors: Tensor | None) -> None:
    """Raise unless every tensor has an element for each token of hidden [..., D]."""
    for label, t in tensors.items():
        if t is not None and t.shape != hidden.shape[:-1]:
            raise ValueError(
                f"{name}: {label} must have one element for each token of hidden {tuple(hidden.shape)}, "
                f"{tuple(hidden.shape[:-1])}, got {tuple(t.shape)}"
            )


def loss_options(
    name: str,
    reduction: str,
    label_smoothing: float = 0.0,
    softcap: float | None = None,
    **constants: Tensor | None,
) -> None:
    """Raise unless the options of a loss are in range, and nobody wants a gradient of the constants."""
    for label, constant in constants.items():
        if constant is not None and constant.requires_grad:
            raise ValueError(f"{name}: no gradient flows to {label}, but it requires one; pass {label}.detach()")
    if reduction not in REDUCTIONS:
        raise ValueError(f"{name}: reduction must be one of {', '.join(REDUCTIONS)}, got {reduction!r}")
    if not 0.0 <= label_smoothing <= 1.0:
        raise ValueError(f"{name}: label_smoothing must be between 0 and 1, got {label_smoothing}")
    if softcap is not None and not softcap > 0.0:
        raise ValueError(f"{name}: softcap must be positive, got {softcap}; None is no cap")


def binary_targets(name: str, x: Tensor, target: Tensor) -> None:
    """Raise unless target has the shape of x and real numbers."""
    if target.is_complex():
        raise TypeError(f"{name}: target must be real, probabilities or labels 0 and 1, got {target.dtype}")
    like(name, x, target=target)


def broadcastable(name: str, x: Tensor, **weights: Tensor | None) -> None:
    """Raise unless every weight broadcasts to the shape of x."""
    for label, weight in weights.items():
        if weight is None:
            continue
        fits = all(size in (1, own) for size, own in zip(reversed(weight.shape), reversed(x.shape), strict=False))
        if weight.dim() > x.dim() or not fits:
            raise ValueError(
                f"{name}: {label} must broadcast to x {tuple(x.shape)}, got {tuple(weight.shape)}; "
                "a weight of each channel of images is (C, 1, 1)"
            )


def memory_budget(name: str, budget: int | None) -> None:
    """Raise unless the budget of a chunk is positive."""
    if budget is not None and budget <= 0:
        raise ValueError(f"{name}: memory_budget must be positive, in bytes, got {budget}; None is the default")


def class_indices(name: str, target: Tensor, classes: int | Tensor, ignore_index: int) -> None:
    """Raise if a target on the CPU is out of range. On a GPU the look would stall the stream."""
    if target.device.type != "cpu" or torch.compiler.is_compiling() or dispatch.seen_into([target]):
        return
    outside = ((target < 0) | (target >= classes)) & (target != ignore_index)
    if outside.any():
        raise IndexError(
            f"{name}: target must be in [0, {int(classes)}) or ignore_index ({ignore_index}), "
            f"got {target[outside][0].item()}; check the vocabulary size and the padding value"
        )


def rows_of_groups(name: str, x: Tensor, **tensors: Tensor | None) -> list[Tensor | None]:
    """The tensors, each of which has a row for every sample of x [B, ..., D] or for every token, with the dims of x.

    Raises:
        ValueError: unless they are all [B, D], or all [B, ..., D] with dims of size 1 from some dim on.
    """
    first, shape = next((label, t.shape) for label, t in tensors.items() if t is not None)
    lead = _lead(x, shape)
    shared = [m == n for m, n in zip(lead, x.shape[:-1], strict=False)]
    own = shared.index(False) if False in shared else len(shared)
    if len(lead) != x.dim() - 1 or shape[-1] != x.shape[-1] or any(m != 1 for m in lead[own:]):
        raise ValueError(
            f"{name}: {first} must have a row for each sample of x {tuple(x.shape)}, as (B, D) or (B, 1, D), or for "
            f"each token, as (B, S, D); got {tuple(shape)}"
        )
    for label, t in tensors.items():
        if t is not None and t.shape != shape:
            raise ValueError(
                f"{name}: {label} must have the shape of {first}, {tuple(shape)}, got {tuple(t.shape)}; "
                "expand it first if it should broadcast"
            )
    return [None if t is None else t.view(*lead, t.shape[-1]) for t in tensors.values()]


def _lead(x: Tensor, shape: torch.Size) -> tuple[int, ...]:
    """The dims before the last of such a tensor; [B, D] stands for [B, 1, ..., 1, D]."""
    return (shape[0], *[1] * (x.dim() - 2)) if len(shape) == 2 < x.dim() else tuple(shape[:-1])
