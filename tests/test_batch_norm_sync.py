"""batch_norm_act with a group: processes with parts of a batch agree with ``torch.nn.functional`` on all of it.

What is compared is of about unit size and computed in float32, the other side in float64: the default tolerances of
float32 are the right ones.
"""

from __future__ import annotations

import copy
import datetime
import tempfile
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch import Tensor

from braze.kernels import BatchNormAct2d, batch_norm_act, use_backend

PROCESSES = 2
C = 3

pytestmark = pytest.mark.xdist_group("batch_norm_sync")


def _drawn(N: int) -> tuple[Tensor, ...]:
    """x, residual, cotangent [N, C, 5, 7], weight, bias, running mean and variance [C]; far from zero mean."""
    generator = torch.Generator().manual_seed(0)
    images = (torch.randn(N, C, 5, 7, generator=generator, dtype=torch.float64) for _ in range(3))
    channels = (torch.rand(C, generator=generator, dtype=torch.float64) + 0.5 for _ in range(4))
    x, *others = images
    return 3.0 * x + 2.0, *others, *channels


def _whole(N: int) -> dict[str, Tensor]:
    """By torch, on the whole batch."""
    x, residual, dy, weight, bias, mean, var = _drawn(N)
    leaves = [t.requires_grad_() for t in (x, residual, weight, bias)]
    y = F.relu(F.batch_norm(x, mean, var, weight, bias, training=True) + residual)
    return {"y": y.detach(), **_derivatives(y, leaves, dy), "mean": mean, "var": var}


FIRST = ("dx", "dresidual", "dweight", "dbias")
#: Every process has a share of these.
OF_PARAMETERS = ("dweight", "dbias", "ddweight")


def _derivatives(y: Tensor, leaves: list[Tensor], dy: Tensor) -> dict[str, Tensor]:
    first = torch.autograd.grad(y, leaves, dy, create_graph=True)
    second = torch.autograd.grad(first[0], (leaves[0], leaves[2]), dy)
    return dict(zip((*FIRST, "ddx", "ddweight"), (*first, *second), strict=True))


def _agrees_with_the_whole(rank: int, sizes: tuple[int, int], backends: tuple[str, str], channels_last: bool) -> None:
    wanted = {name: t.float() for name, t in _whole(sum(sizes)).items()}
    own = slice(sum(sizes[:rank]), sum(sizes[: rank + 1]))
    *images, weight, bias, mean, var = (t.float() for t in _drawn(sum(sizes)))
    x, residual, dy = (t[own].contiguous(memory_format=_format(channels_last)) for t in images)
    leaves = [t.requires_grad_() for t in (x, residual, weight, bias)]
    options: dict[str, Any] = {"training": True, "activation": "relu", "group": dist.group.WORLD}
    with use_backend(backends[rank]):
        y = batch_norm_act(x, mean, var, weight, bias, residual, **options)
        first = torch.autograd.grad(y, leaves, dy, retain_graph=True)
        got = {"y": y.detach(), **_derivatives(y, leaves, dy), "mean": mean, "var": var}
    assert y.is_contiguous(memory_format=_format(channels_last))
    for name, value in [*got.items(), *zip(FIRST, first, strict=True)]:
        if name in OF_PARAMETERS:
            value = value.detach().clone()
            dist.all_reduce(value)
        torch.testing.assert_close(value.detach(), wanted[name][own] if value.dim() > 1 else wanted[name])


def _format(channels_last: bool) -> torch.memory_format:
    return torch.channels_last if channels_last else torch.contiguous_format


def _compiles_without_graph_break(rank: int) -> None:
    wanted = {name: t.float() for name, t in _whole(4).items()}
    own = slice(2 * rank, 2 * rank + 2)
    *images, weight, bias, mean, var = (t.float() for t in _drawn(4))
    x, residual, dy = (t[own] for t in images)
    x.requires_grad_()
    compiled = torch.compile(batch_norm_act, backend="aot_eager", fullgraph=True)
    options = {"training": True, "activation": "relu", "group": dist.group.WORLD}
    y = compiled(x, mean, var, weight, bias, residual, **options)
    (dx,) = torch.autograd.grad(y, x, dy)
    torch.testing.assert_close(y.detach(), wanted["y"][own])
    torch.testing.assert_close(dx, wanted["dx"][own])
    torch.testing.assert_close(var, wanted["var"])


def _a_pass_sends_one_message(rank: int) -> None:
    from torch.distributed.tensor.debug import CommDebugMode

    x = torch.randn(2, C, 5, 7, requires_grad=True)
    for backend in ("triton", "compile"):
        with use_backend(backend):
            with CommDebugMode() as forward:
                y = batch_norm_act(x, None, None, training=True, group=dist.group.WORLD)
            with CommDebugMode() as backward:
                y.sum().backward()
        assert forward.get_total_counts() == backward.get_total_counts() == 1


def _module_is_synchronized_in_training_only(rank: int) -> None:
    x = _drawn(4)[0].float()
    own = x[2 * rank : 2 * rank + 2]
    ours = BatchNormAct2d(C, momentum=None, process_group=dist.group.WORLD)
    theirs = torch.nn.BatchNorm2d(C, momentum=None)
    for _ in range(2):
        torch.testing.assert_close(ours(own), theirs(x)[2 * rank : 2 * rank + 2])
    torch.testing.assert_close(dict(ours.state_dict()), dict(theirs.state_dict()))
    assert copy.deepcopy(ours).process_group is ours.process_group
    if rank == 0:  # nobody else is waited for
        torch.testing.assert_close(ours.eval()(own), theirs.eval()(own))
        untracked = BatchNormAct2d(C, track_running_stats=False, process_group=dist.group.WORLD).eval()
        torch.testing.assert_close(
            untracked(own), F.batch_norm(own, None, None, untracked.weight, untracked.bias, True)
        )


def _what_is_no_group_is_refused(rank: int) -> None:
    from torch.distributed.tensor import Replicate, distribute_tensor

    x = torch.randn(2, C)
    outside = dist.new_group([1 - rank])
    for group in ("world", outside):
        with pytest.raises(TypeError, match=r"group must be a .*ProcessGroup with this process in it, got"):
            batch_norm_act(x, None, None, training=True, group=group)
    mesh = dist.device_mesh.init_device_mesh("cpu", (PROCESSES,))
    with pytest.raises(TypeError, match="group is for plain tensors"):
        batch_norm_act(distribute_tensor(x, mesh, [Replicate()]), None, None, training=True, group=dist.group.WORLD)


#: Batches of different sizes, one of them empty; backends of which one may wait for the other's message.
CASES: dict[str, tuple[Callable[..., None], tuple[Any, ...]]] = {
    "triton": (_agrees_with_the_whole, ((3, 2), ("triton", "triton"), False)),
    "triton, channels last": (_agrees_with_the_whole, ((3, 2), ("triton", "triton"), True)),
    "triton, an empty batch": (_agrees_with_the_whole, ((5, 0), ("triton", "triton"), False)),
    "compiled, channels last, beside plain": (_agrees_with_the_whole, ((3, 2), ("compile", "eager"), True)),
    "one image beside plain": (_agrees_with_the_whole, ((1, 4), ("triton", "eager"), False)),
    "torch.compile": (_compiles_without_graph_break, ()),
    "messages": (_a_pass_sends_one_message, ()),
    "module": (_module_is_synchronized_in_training_only, ()),
    "errors": (_what_is_no_group_is_refused, ()),
}


def _check_all(rank: int, file: str, results: Any) -> None:
    # A check that fails in one process leaves the other waiting, and so does one that compiles, on busy cores.
    init = {"init_method": f"file://{file}", "timeout": datetime.timedelta(minutes=4)}
    dist.init_process_group("gloo", rank=rank, world_size=PROCESSES, **init)
    try:
        for name, (check, arguments) in CASES.items():
            try:
                check(rank, *arguments)
                results[rank, name] = "passed"
            except Exception:  # told to the test that asks for it
                results[rank, name] = traceback.format_exc()
    finally:
        dist.destroy_process_group()


@pytest.fixture(scope="module")
def outcomes() -> Iterator[dict[tuple[int, str], str]]:
    with tempfile.TemporaryDirectory() as folder, mp.Manager() as manager:
        results = manager.dict()
        mp.spawn(_check_all, (str(Path(folder) / "rendezvous"), results), nprocs=PROCESSES)
        yield dict(results)


@pytest.mark.parametrize("case", CASES)
def test_parts_agree_with_the_whole(outcomes: dict[tuple[int, str], str], case: str) -> None:
    for rank in range(PROCESSES):
        assert outcomes[rank, case] == "passed", outcomes[rank, case]
