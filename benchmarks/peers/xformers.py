"""xformers' SwiGLU: after its documented signature; not run here, checked where it runs. Its norms have no gradient."""

from __future__ import annotations

from torch import Tensor

from .peer import Peer


def _gated_mlp(x: Tensor, w_gate: Tensor, w_up: Tensor, w_down: Tensor, *, activation: str) -> Tensor:
    from xformers.ops import swiglu

    assert activation == "silu"
    return swiglu(x, w_gate, None, w_up, None, w_down, None)


XFORMERS = Peer(name="xformers", module="xformers", distribution="xformers", functions={"gated_mlp": _gated_mlp})
