"""Operators on DTensors: two processes, each with half of one dim, agree with one process that has all.

What is computed is held to the error budget of the contract; nothing may be communicated on the way.
"""

from __future__ import annotations

import tempfile
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from braze.kernels import OPS, dropout, layer_norm, use_backend
from braze.kernels.op import Op

from . import contract

PROCESSES = 2
DIMS = 5  # uneven on purpose: one process gets three, the other two

pytestmark = pytest.mark.xdist_group("sharding")


def _case(op: Op, variant: str) -> contract.Case:
    dims = {name: min((size for size in sizes if size >= DIMS), default=max(sizes)) for name, sizes in op.dims.items()}
    return contract.Case(op, dims, torch.float32, variant=variant)


def _check_all(rank: int, file: str, results: Any) -> None:
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=PROCESSES)
    try:
        mesh = dist.device_mesh.init_device_mesh("cpu", (PROCESSES,))
        for op in OPS:
            for variant in op.variants:
                results[rank, f"{op} {variant}"] = _outcome(contract.check_sharded, _case(op, variant), mesh)
        for check in (_dropout_differs_between_shards, _what_would_communicate_is_refused):
            results[rank, check.__name__] = _outcome(check, mesh)
    finally:
        dist.destroy_process_group()


def _outcome(check: Any, *arguments: Any) -> str:
    try:
        return str(check(*arguments))
    except Exception:  # told to the test that asks for it
        return traceback.format_exc()


def _dropout_differs_between_shards(mesh: Any) -> None:
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    x = torch.ones(4, 64)
    seed = torch.tensor(5)
    with use_backend("triton"):
        sharded = dropout(distribute_tensor(x, mesh, [Shard(0)]), p=0.5, seed=seed).full_tensor()
        copied = dropout(distribute_tensor(x, mesh, [Replicate()]), p=0.5, seed=seed).to_local()
        alone = dropout(x, p=0.5, seed=seed)
    assert not torch.equal(sharded[:2], sharded[2:])
    assert torch.equal(copied, alone)


def _what_would_communicate_is_refused(mesh: Any) -> None:
    from torch.distributed.tensor import Partial, Replicate, Shard, distribute_tensor

    x, w = torch.randn(4, 8), torch.randn(8)
    rows = distribute_tensor(x, mesh, [Shard(0)])
    whole = distribute_tensor(w, mesh, [Replicate()])
    with pytest.raises(ValueError, match=r"needs dim 1 of the first tensor whole, but mesh dim 0 shards it"):
        layer_norm(distribute_tensor(x, mesh, [Shard(1)]), whole)
    with pytest.raises(ValueError, match=r"must be \[Replicate\(\)\], got \[Shard\(dim=0\)\]"):
        layer_norm(rows, distribute_tensor(w, mesh, [Shard(0)]))
    with pytest.raises(ValueError, match=r"must be sharded or replicated, got P"):
        layer_norm(type(rows).from_local(x, mesh, [Partial()]), whole)
    with pytest.raises(TypeError, match=r"all DTensors or all plain ones, got DTensor, Parameter, None"):
        layer_norm(rows, torch.nn.Parameter(w))


@pytest.fixture(scope="module")
def outcomes() -> Iterator[dict[tuple[int, str], str]]:
    with tempfile.TemporaryDirectory() as folder, mp.Manager() as manager:
        results = manager.dict()
        mp.spawn(_check_all, (str(Path(folder) / "rendezvous"), results), nprocs=PROCESSES)
        yield dict(results)


@pytest.mark.parametrize("variant", [f"{op} {variant}" for op in OPS for variant in op.variants])
def test_halves_agree_with_the_whole(outcomes: dict[tuple[int, str], str], variant: str) -> None:
    found = {outcomes[rank, variant] for rank in range(PROCESSES)}
    if found == {"a view"}:
        pytest.skip("what is dispatched is a view of the argument: its dims are not the ones to shard")
    if found == {"a mask of its own"}:
        pytest.skip("every shard draws a mask of its own: the halves are not those of the whole")
    assert found == {"agreed"}


@pytest.mark.parametrize("check", [_dropout_differs_between_shards, _what_would_communicate_is_refused])
def test_between_shards(outcomes: dict[tuple[int, str], str], check: Any) -> None:
    assert {outcomes[rank, check.__name__] for rank in range(PROCESSES)} == {"None"}
