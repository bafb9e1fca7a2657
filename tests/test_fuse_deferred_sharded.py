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
from braze.kernels.fuse import heads
from braze.kernels.fuse.deferred import DeferredLogits

PROCESSES, C, D, S = 2, 80, 8, 6

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
    """The best classes, and whether the logits came deferred."""
    x = batch(rank)
    outputs = wrapped(x, x if inside else None)
    logits = outputs["logits"]
    deferred = isinstance(logits, DeferredLogits) and logits._logits.value is None
    loss = outputs["loss"] if inside else loss_of(logits, x)
    best = logits.argmax(-1)  # FSDP frees the weight in the backward pass
    loss.backward()
    return best, deferred


def _expected(inside):
    plain = model()
    labels = [step(plain, inside, rank)[0] for rank in range(PROCESSES)]
    return labels, {name: p.grad / PROCESSES for name, p in plain.named_parameters() if p.grad is not None}


def _compare(wrapped, inside, rank, defers):
    labels, gradients = _expected(inside)
    for _ in range(2):  # a static graph has a first time
        wrapped.zero_grad()
        found, deferred = step(wrapped, inside, rank)
        assert torch.equal(found, labels[rank])
    assert deferred == defers
    for name, parameter in wrapped.named_parameters():
        name = name.removeprefix("module.")
        assert (parameter.grad is not None) == (name in gradients), name
        if parameter.grad is not None:
            grad = parameter.grad.full_tensor() if hasattr(parameter.grad, "full_tensor") else parameter.grad
            torch.testing.assert_close(grad, gradients[name], msg=lambda text, name=name: f"{name}: {text}")


def _fused():
    fused = model()
    assert [record.path for record in fuse(fused).fused] == ["head"]
    return fused


def _ddp(inside, rank, defers, **options):
    _compare(DistributedDataParallel(_fused(), **options), inside, rank, defers)


def _fsdp(inside, rank, defers, *wrapped):
    from torch.distributed.fsdp import fully_shard

    fused = _fused()
    for name in wrapped:
        fully_shard(fused.get_submodule(name))
    fully_shard(fused)
    _compare(fused, inside, rank, defers)


#: And whether logits are deferred: DDP copies outputs to look for unused parameters, FSDP frees a head of its own.
CASES = {
    "DDP": lambda *case: _ddp(*case, True),
    "DDP, unused parameters": lambda *case: _ddp(*case, False, find_unused_parameters=True),
    "DDP, static graph": lambda *case: _ddp(*case, True, static_graph=True),
    "FSDP": lambda *case: _fsdp(*case, True),
    "FSDP, head by itself": lambda *case: _fsdp(*case, False, "head"),
}


def _check_all(rank, folder, results):
    heads.SMALLEST = 0  # in this process, which is the test's own
    dist.init_process_group("gloo", init_method=f"file://{folder}", rank=rank, world_size=PROCESSES)
    for name, check in CASES.items():
        for inside in (True, False):
            try:
                check(inside, rank)
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
    for rank in range(PROCESSES):
        assert not results[rank, name, inside], results[rank, name, inside]
