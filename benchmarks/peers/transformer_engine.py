"""NVIDIA's Transformer Engine 2: after the signature of its source; not run here, checked where it runs.

Its loss writes the gradient over the logits: it gets a copy, whose time counts. Its norms are modules that own their
parameters, and not functions.
"""

from __future__ import annotations

from torch import Tensor

from .peer import Peer


def _cross_entropy(x: Tensor, target: Tensor, _: None) -> Tensor:
    from transformer_engine.pytorch.cross_entropy import parallel_cross_entropy

    # (input [batch, sequence, classes], target, label_smoothing, reduce_loss, process group, ignored index)
    return parallel_cross_entropy(x.clone()[None], target[None], 0.0, True, None, -100).to(x.dtype)


TRANSFORMER_ENGINE = Peer(
    name="transformer_engine",
    module="transformer_engine",
    distribution="transformer-engine",
    functions={"cross_entropy": _cross_entropy},
)
