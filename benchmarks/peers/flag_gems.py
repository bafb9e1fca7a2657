"""FlagGems 5: those of its functions that autograd knows, after its source; not run here, checked where they run."""

from __future__ import annotations

from torch import Tensor

from .peer import Peer


def _rms_norm(x: Tensor, weight: Tensor, *, eps: float) -> Tensor:
    from flag_gems.ops import rms_norm

    return rms_norm(x, list(x.shape[-1:]), weight, eps)


def _cross_entropy(x: Tensor, target: Tensor, _: None) -> Tensor:
    from flag_gems.fused import cross_entropy_loss

    return cross_entropy_loss(x, target)


def _glu(gate: Tensor, up: Tensor, *, activation: str) -> Tensor:
    from flag_gems.fused import silu_and_mul

    assert activation == "silu"
    return silu_and_mul(gate, up)


FLAG_GEMS = Peer(
    name="flag_gems",
    module="flag_gems",
    distribution="flag-gems",
    functions={"cross_entropy": _cross_entropy, "glu": _glu, "rms_norm": _rms_norm},
)
