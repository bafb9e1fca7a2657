"""Log-probabilities of chosen classes behind a linear layer, with no logits in memory.

    p_n = log softmax((h_n·Wᵀ + b) / T)[t_n]

It is :func:`linear_cross_entropy` without its sign: what preference and policy losses are made of.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .linear_cross_entropy import linear_cross_entropy


def linear_log_probs(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None = None,
    *,
    temperature: float = 1.0,
    ignore_index: int = -100,
    softcap: float | None = None,
    memory_budget: int | None = None,
) -> Tensor:
    """``log_softmax(F.linear(hidden, weight, bias) / temperature)`` at the targets, with no logits in memory.

    The backward pass computes the logits again: four matrix products in all.

    Args:
        hidden: floating-point tensor [..., D].
        weight: of the linear layer, [C, D].
        target: integer class indices in [0, C) or ``ignore_index``, [...].
        bias: of the linear layer, [C], or None for none.
        temperature: T, positive.
        ignore_index: target value that marks a token as ignored.
        softcap: if given, the logits x are replaced by ``softcap·tanh(x / softcap)``, after the division by T.
        memory_budget: as in :func:`linear_cross_entropy`.

    Returns:
        The log-probabilities [...] in float32 or wider, 0 where ignored.

    Raises:
        TypeError: as :func:`linear_cross_entropy`.
        ValueError: if temperature is not positive; and as :func:`linear_cross_entropy`.
        IndexError: as :func:`linear_cross_entropy`.
    """
    if not temperature > 0.0:
        raise ValueError(f"linear_log_probs: temperature must be positive, got {temperature}")
    if temperature != 1.0:
        hidden, bias = hidden / temperature, None if bias is None else bias / temperature
    return -linear_cross_entropy(
        hidden,
        weight,
        target,
        bias,
        ignore_index=ignore_index,
        reduction="none",
        softcap=softcap,
        memory_budget=memory_budget,
        dtype=torch.promote_types(hidden.dtype, torch.float32),
    )
