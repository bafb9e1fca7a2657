"""Deferred logits between processes: under DDP and FSDP losses and gradients are those of the unfused model."""

import copy
import tempfile
import traceback
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from braze.kernels import fuse

PROCESSES, C, D, S = 2, 40, 8, 6

pytestmark = pytest.mark.xdist_group("fuse_deferred_sharded")


class Model(nn.Module):
    """The loss inside where there are labels, and outside where not; one part is never used."""

    def __init__(self):
        super().__init__()
        self.embedding, self.hidden = nn.Embedding(C, D), nn.Linear(D, D)
        self.head, self.unused = nn.Linear(D, C), nn.Linear(D, D)

    def forward(self, x, labels=None):
        logits = self.head(torch.tanh(self.hidden(self.embedding(x))))
        return {"logits": logits, "loss": None if labels is None else loss_of(logits, labels)}


def loss_of(logits, labels):
    return F.cross_entropy(logits.view(-1, C), labels.view(-1))


def model():
    torch.manual_seed(0)
    made = Model()
    made.unused.requires_grad_(False)
    return made


def batch(rank):
    x = torch.arange(2 * S).view(2, S) * 7 % C
    return (x + rank) % C


def step(wrapped, inside, rank):
    x = batch(rank)
    outputs = wrapped(x, x if inside else None)
    loss = outputs["loss"] if inside else loss_of(outputs["logits"], x)
    loss.backward()
    return outputs["logits"].argmax(-1)


def _expected(inside):
    plain = model()
    labels = [step(plain, inside, rank) for rank in range(PROCESSES)]
    return labels, {name: p.grad / PROCESSES for name, p in plain.named_parameters() if p.grad is not None}


def _compare(wrapped, inside, rank):
    labels, gradients = _expected(inside)
    for _ in range(2):  # a static graph has a first time
        wrapped.zero_grad()
        assert torch.equal(step(wrapped, inside, rank), labels[rank])
    for name, parameter in wrapped.named_parameters():
        name = name.removeprefix("module.")
        assert (parameter.grad is not None) == (name in gradients), name
        if parameter.grad is not None:
            grad = parameter.grad.full_tensor() if hasattr(parameter.grad, "full_tensor") else parameter.grad
            torch.testing.assert_close(grad, gradients[name], msg=lambda text, name=name: f"{name}: {text}")


def _ddp(inside, rank, **options):
    fused = model()
    assert [record.path for record in fuse(fused).fused] == ["head"]
    _compare(DistributedDataParallel(fused, **options), inside, rank)


def _fsdp(inside, rank, *wrapped):
    from torch.distributed.fsdp import fully_shard

    fused = model()
    fuse(fused)
    for name in wrapped:
        fully_shard(fused.get_submodule(name))
    fully_shard(fused)
    _compare(fused, inside, rank)


CASES = {
    "DDP": (_ddp, (), {}),
    "DDP, unused parameters": (_ddp, (), {"find_unused_parameters": True}),
    "DDP, static graph": (_ddp, (), {"static_graph": True}),
    "FSDP": (_fsdp, (), {}),
    "FSDP, head by itself": (_fsdp, ("head",), {}),
}


def _check_all(rank, folder, results):
    dist.init_process_group("gloo", init_method=f"file://{folder}", rank=rank, world_size=PROCESSES)
    for name, (check, args, options) in CASES.items():
        for inside in (True, False):
            try:
                check(inside, rank, *args, **options)
                failure = ""
            except Exception:
                failure = traceback.format_exc()
            results[rank, name, inside] = failure
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def results():
    """What each process found, by case; the processes start once."""
    with tempfile.TemporaryDirectory() as folder, mp.Manager() as manager:
        found = manager.dict()
        mp.spawn(_check_all, (str(Path(folder) / "rendezvous"), found), nprocs=PROCESSES)
        return copy.deepcopy(dict(found))


@pytest.mark.parametrize("inside", [True, False], ids=["loss inside", "loss outside"])
@pytest.mark.parametrize("name", CASES)
def test_gradients_are_those_of_the_unfused_model(name, inside, results):
    assert [results[rank, name, inside] for rank in range(PROCESSES)] == [""] * PROCESSES
