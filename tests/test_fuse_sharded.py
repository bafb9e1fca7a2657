"""fuse with data-parallel and sharded training, before and after wrapping: the losses of the unfused model."""

import copy
import tempfile
import traceback
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.nn.parallel import DistributedDataParallel

from braze.kernels import fuse, use_backend
from braze.kernels.fuse.joint import fusion

from .fusible import tiny_llama

pytest.importorskip("transformers")

PROCESSES, STEPS, VOCABULARY = 2, 3, 97

# Torch's advice to users of FSDP1.
pytestmark = [pytest.mark.xdist_group("fuse_sharded"), pytest.mark.filterwarnings("ignore:.*FSDP.*:FutureWarning")]


class Images(nn.Module):
    """Convolution, BatchNorm and activation; LayerNorm; a gated MLP."""

    def __init__(self):
        super().__init__()
        self.convolution, self.norm, self.act = nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU()
        self.last, self.gate, self.up = nn.LayerNorm(8), nn.Linear(8, 16, bias=False), nn.Linear(8, 16, bias=False)
        self.down = nn.Linear(16, 4)

    def forward(self, x):
        x = self.last(self.act(self.norm(self.convolution(x))).mean((2, 3)))
        return self.down(nn.functional.silu(self.gate(x)) * self.up(x))


def images():
    torch.manual_seed(0)
    return Images().double()


def language_model():
    return tiny_llama(hidden_size=16, intermediate_size=24, vocab_size=VOCABULARY)


def image_loss(model, rank, step):
    generator = torch.Generator().manual_seed(10 * step + rank)
    x = torch.randn(4, 3, 8, 8, generator=generator, dtype=torch.float64)
    return model(x).square().mean()


def language_loss(model, rank, step):
    tokens = (torch.arange(20).view(2, 10) * 7 + 31 * rank + step) % VOCABULARY
    return model(input_ids=tokens, labels=tokens).loss


MODELS = {"images": (images, image_loss), "language": (language_model, language_loss)}


def shard(model):
    for layer in model.model.layers if hasattr(model, "model") else ():
        fully_shard(layer)
    return fully_shard(model)


WRAPPERS = {
    "DDP": DistributedDataParallel,
    "FSDP1": lambda model: FullyShardedDataParallel(model, use_orig_params=True, device_id=torch.device("cpu")),
    "FSDP2": shard,
}


def train(wrapped, loss, rank):
    """The losses of three steps."""
    optimizer = torch.optim.AdamW(wrapped.parameters(), lr=1e-2)
    losses = []
    for step in range(STEPS):
        value = loss(wrapped, rank, step)
        value.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(value.item())
    return losses


def case(name, wrapper, first, rank):
    """The losses of the unfused model and of the fused, and how many modules are fused while it trains."""
    make, loss = MODELS[name]
    wrap = WRAPPERS[wrapper]
    plain, model = wrap(make()), make()
    if first == "fuse":
        fuse(model)
    wrapped = wrap(model)
    if first == "wrap":
        fuse(wrapped)
    return train(plain, loss, rank), train(wrapped, loss, rank), how_many(wrapped)


def how_many(model):
    return sum(fusion(module) is not None for module in model.modules())


CASES = [(name, wrapper, first) for name in MODELS for wrapper in WRAPPERS for first in ("fuse", "wrap")]


def _run_all(rank, folder, results):
    dist.init_process_group("gloo", init_method=f"file://{folder}", rank=rank, world_size=PROCESSES)
    with use_backend("eager"):  # what is compiled is the same with and without wrappers, and takes a minute
        for which in CASES:
            try:
                results[rank, which] = case(*which, rank)
            except Exception:
                results[rank, which] = traceback.format_exc()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def results():
    """What each process found, by case; the processes start once."""
    with tempfile.TemporaryDirectory() as folder, mp.Manager() as manager:
        found = manager.dict()
        mp.spawn(_run_all, (str(Path(folder) / "rendezvous"), found), nprocs=PROCESSES)
        return copy.deepcopy(dict(found))


@pytest.mark.parametrize("which", CASES, ids=[", ".join(which) + " first" for which in CASES])
def test_losses_are_those_of_the_unfused_model(which, results):
    alone = MODELS[which[0]][0]()
    fuse(alone)
    all_of_them = how_many(alone)
    for rank in range(PROCESSES):
        found = results[rank, which]
        assert not isinstance(found, str), found
        expected, losses, fused = found
        assert fused == all_of_them
        dtype = next(alone.parameters()).dtype  # whose tolerance is torch's
        torch.testing.assert_close(*(torch.tensor(of, dtype=dtype) for of in (losses, expected)))
