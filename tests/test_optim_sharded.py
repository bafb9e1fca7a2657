"""Optimizers of sharded parameters: two processes with FSDP2 agree with one that has the whole model."""

from __future__ import annotations

import copy
import datetime
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

from braze.kernels import optim, use_backend

PROCESSES = 2
BACKENDS = ("default", "eager", "triton")

pytestmark = pytest.mark.xdist_group("optimizers sharded")


def _model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 33), nn.Tanh(), nn.Linear(33, 5))


def _train(model: nn.Module, optimizer: Any) -> None:
    for step in range(3):
        x = torch.randn(4, 6, generator=torch.Generator().manual_seed(step))
        model(x).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()


def _whole() -> tuple[dict[str, Any], list[Any]]:
    model = _model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    norms = []
    optimizer.register_step_pre_hook(lambda *_: norms.append(nn.utils.clip_grad_norm_(model.parameters(), 0.5)))
    _train(model, optimizer)
    return model.state_dict(), norms


def _eight_bit() -> None:
    """A shard is updated as a parameter of its own, in blocks; and a checkpoint resumes with the same bits."""
    from torch.distributed.fsdp import fully_shard

    def model() -> nn.Module:
        torch.manual_seed(0)
        layer = nn.Linear(256, 41)  # 21 and 20 blocks
        fully_shard(layer)
        return layer

    def differentiated(layer: nn.Module, step: int) -> list[nn.Parameter]:
        x = torch.randn(4, 256, generator=torch.Generator().manual_seed(step))
        layer.zero_grad()
        layer(x).square().sum().backward()
        return list(layer.parameters())

    arguments = {"state_dtype": "8bit", "rounding": "stochastic"}
    layer, other = model(), model()
    optimizer, resumed = (optim.AdamW(each.parameters(), **arguments) for each in (layer, other))
    own = [nn.Parameter(p.detach().to_local().clone()) for p in layer.parameters()]
    plain = optim.AdamW(own, **arguments)
    for step in range(3):
        for q, p in zip(own, differentiated(layer, step), strict=True):
            q.grad = p.grad.to_local().clone()
        optimizer.step()
        plain.step()
    weight = layer.weight
    torch.testing.assert_close(weight.detach().to_local(), own[0].detach(), rtol=0, atol=0)
    assert optimizer.state[weight]["exp_avg"].dtype == torch.int8
    assert len(optimizer.state[weight]["exp_avg_scale"].to_local()) == 21
    wide = optim.dequantized(optimizer.state_dict())["state"][0]["exp_avg"]
    torch.testing.assert_close(wide.to_local(), optim.dequantized(plain.state_dict())["state"][0]["exp_avg"])
    other.load_state_dict(layer.state_dict())
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for each, its in ((layer, optimizer), (other, resumed)):
        differentiated(each, 3)
        its.step()
    torch.testing.assert_close(other.weight.to_local(), weight.to_local(), rtol=0, atol=0)


def _agrees(rank: int, rendezvous: str, results: Any) -> None:
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor

    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{rendezvous}",
        rank=rank,
        world_size=PROCESSES,
        timeout=datetime.timedelta(seconds=120),
    )
    try:
        expected, norms = _whole()
        for backend in BACKENDS:
            sharded = _model()
            fully_shard(sharded)
            optimizer = optim.AdamW(sharded.parameters(), lr=0.1, max_norm=0.5, ema_decay=0.5)
            seen: list[Any] = []
            optimizer.register_step_post_hook(lambda optimizer, *_, seen=seen: seen.append(optimizer.gradient_norm))
            if backend == "default":
                _train(sharded, optimizer)
            else:
                with use_backend(backend):
                    _train(sharded, optimizer)
            found = {name: t.full_tensor() for name, t in sharded.state_dict().items()}
            torch.testing.assert_close(found, expected)
            torch.testing.assert_close(seen, norms)
            states = [state for p in sharded.parameters() for state in (optimizer.state[p]["exp_avg"], p.grad)]
            assert all(state is None or isinstance(state, DTensor) for state in states)
            with optimizer.averaged():
                assert not torch.equal(copy.deepcopy(next(sharded.parameters())).full_tensor(), found["0.weight"])
            results[rank, backend] = "agreed"
        for of in (optim.Muon, optim.Adafactor):
            whole, sharded = _model(), _model()
            fully_shard(sharded)
            for model in (whole, sharded):
                _train(model, of(model.parameters(), lr=0.1, max_norm=0.5))
            # What they compute of whole matrices is the same; only the norm is summed up in another order.
            found = {name: t.full_tensor() for name, t in sharded.state_dict().items()}
            torch.testing.assert_close(found, whole.state_dict())
            results[rank, of.__name__] = "agreed"
        _eight_bit()
        results[rank, "8 bit"] = "agreed"
    finally:
        dist.destroy_process_group()


@pytest.fixture(scope="module")
def outcomes() -> dict[tuple[int, str], str]:
    with tempfile.TemporaryDirectory() as folder, mp.Manager() as manager:
        results = manager.dict()
        mp.spawn(_agrees, (str(Path(folder) / "rendezvous"), results), nprocs=PROCESSES)
        return dict(results)


@pytest.mark.parametrize("run", [*BACKENDS, "Muon", "Adafactor", "8 bit"])
def test_shards_are_updated_as_the_whole(outcomes: dict[tuple[int, str], str], run: str) -> None:
    assert {outcomes[rank, run] for rank in range(PROCESSES)} == {"agreed"}
