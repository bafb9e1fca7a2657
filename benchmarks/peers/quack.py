"""quack-kernels 0.6, for Hopper and newer: after the signatures of its source; not run here, checked where it runs."""

from __future__ import annotations

from torch import Tensor

from .peer import Peer


def _rms_norm(x: Tensor, weight: Tensor, *, eps: float) -> Tensor:
    from quack import rmsnorm

    return rmsnorm(x, weight, eps=eps)


def _add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, *, eps: float) -> tuple[Tensor, Tensor]:
    from quack import rmsnorm

    return rmsnorm(x, weight, residual=residual, eps=eps, prenorm=True)


def _softmax(x: Tensor) -> Tensor:
    from quack import softmax

    return softmax(x.flatten(0, -2)).view(x.shape)


def _cross_entropy(x: Tensor, target: Tensor, _: None) -> Tensor:
    from quack import cross_entropy

    return cross_entropy(x, target)


def _linear_cross_entropy(hidden: Tensor, weight: Tensor, target: Tensor, _: None, **others: None) -> Tensor:
    from quack.linear_cross_entropy import chunked_linear_cross_entropy

    return chunked_linear_cross_entropy(hidden, weight, target)


QUACK = Peer(
    name="quack",
    module="quack",
    distribution="quack-kernels",
    functions={
        "add_rms_norm": _add_rms_norm,
        "cross_entropy": _cross_entropy,
        "linear_cross_entropy": _linear_cross_entropy,
        "rms_norm": _rms_norm,
        "softmax": _softmax,
    },
)
