"""Apple's cut-cross-entropy 25.1, for 16-bit operands: after its documented signature; not run, checked where it runs.

By default it leaves out the gradients of unlikely classes, an approximation; ``filter_eps=None`` computes them.
"""

from __future__ import annotations

from torch import Tensor

from .peer import Peer


def _linear_cross_entropy(hidden: Tensor, weight: Tensor, target: Tensor, _: None, **others: None) -> Tensor:
    from cut_cross_entropy import linear_cross_entropy

    return linear_cross_entropy(hidden, weight, target, filter_eps=None)


CUT_CROSS_ENTROPY = Peer(
    name="cut_cross_entropy",
    module="cut_cross_entropy",
    distribution="cut-cross-entropy",
    functions={"linear_cross_entropy": _linear_cross_entropy},
)
