"""Who computes an operator: PyTorch in its several ways, braze, and other libraries of kernels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from braze.kernels import dispatch
from braze.kernels.op import Call

from . import peers
from .ops_case import Case, Function

BASELINE = "braze"
ATEN, COMPILED, AUTOTUNED, TORCH = "aten", "compiled", "max-autotune", "torch"
#: In the order of the tables.
NAMES = (ATEN, TORCH, COMPILED, AUTOTUNED, *(peer.name for peer in peers.PEERS), BASELINE)


class Provider(NamedTuple):
    """A function that is called as the operator's public one is, and what runs inside of it.

    ``keeps_time``: outside of the error budget, too. PyTorch's forms are what people use, and are only marked there; a
    time of anybody else's wrong results would be no time.
    """

    function: Function
    implementation: str
    keeps_time: bool


class Absent(NamedTuple):
    """Why a provider is not there."""

    reason: str


def providers(case: Case, call: Call, only: Sequence[str] = ()) -> dict[str, Provider | Absent]:
    """All that offer this operator, by name; of ``only`` these, and the baseline."""
    found = {name: _make(name, case, call) for name in NAMES if _wanted(name, case, only)}
    return {name: provider for name, provider in found.items() if provider is not None}


def _wanted(name: str, case: Case, only: Sequence[str]) -> bool:
    if name == BASELINE or name in only:
        return True
    # On a CPU the search finds what the default found, minutes later.
    return not only and (name != AUTOTUNED or case.device.type == "cuda")


def _make(name: str, case: Case, call: Call) -> Provider | Absent | None:
    """None: it does not offer this operator."""
    if name == ATEN:
        return Provider(case.op.aten, "eager", keeps_time=True)
    if name == TORCH:
        return _torch(case)
    if name == COMPILED:
        return _compiled(case, None)
    if name == AUTOTUNED:
        # Its CUDA graphs would overwrite the results of one call with those of the next: graphs are the clock's to use.
        return _compiled(case, "max-autotune-no-cudagraphs")
    if name == BASELINE:
        return Provider(case.op.fn, _backend(case, call), keeps_time=False)
    return _peer(case, next(peer for peer in peers.PEERS if peer.name == name))


def _compiled(case: Case, mode: str | None) -> Provider | Absent:
    missing = dispatch.unavailable(case.op, "compile", case.device.type, case.dtype)
    if missing:
        return Absent(f"unavailable: {missing}")
    implementation = "torch.compile of the eager form" + (f", {mode}" if mode else "")
    return Provider(torch.compile(case.op.aten, dynamic=False, mode=mode), implementation, keeps_time=True)


def _peer(case: Case, peer: peers.Peer) -> Provider | Absent | None:
    if case.op.name not in peer.functions:
        return None
    missing = peer.missing(case.device.type)
    if missing:
        return Absent(f"skipped: {missing}")
    return Provider(peer.functions[case.op.name], peer.version(), keeps_time=False)


def _torch(case: Case) -> Provider | Absent | None:
    """PyTorch's fused form of an operator, where its plain call is another one."""
    if case.op.name != "linear_cross_entropy":
        return None
    if not hasattr(F, "linear_cross_entropy"):
        return Absent("unavailable: this torch has no F.linear_cross_entropy")
    return Provider(_linear_cross_entropy, "F.linear_cross_entropy, in chunks", keeps_time=True)


def _linear_cross_entropy(hidden: Tensor, weight: Tensor, target: Tensor, bias: Tensor | None, **_: None) -> Tensor:
    options = torch.nn.LinearCrossEntropyOptions()
    return F.linear_cross_entropy(hidden, weight, target, linear_bias=bias, options=options)


def _backend(case: Case, call: Call) -> str:
    chosen: list[dispatch.Choice] = []

    def choose(*arguments: Any) -> dispatch.Choice:
        chosen.append(before(*arguments))
        return chosen[-1]

    before, dispatch.choose = dispatch.choose, choose
    try:
        case.op.fn(*call.args, **call.kwargs)
    finally:
        dispatch.choose = before
    return chosen[0].backend
