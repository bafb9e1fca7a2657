"""What each of two processes trains, under every strategy, for test_lightning_strategies.py."""

from __future__ import annotations

import copy
import datetime
import os
import traceback
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import EMAWeightAveraging
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

from braze.kernels import optim
from braze.lightning_ext import FabricFusedPrecision, FusedPrecision, prepare_for_sharding

from .lightning_net import QUIET, Block, Net, SaveInTheMiddle, batches, emulate_float8

PROCESSES = 2
CLIP = 0.05
#: The one line, the same under every strategy.
LINE = {"compile": "regional", "compile_kwargs": {"backend": "eager"}}
PRECISIONS = {
    "ddp": ("32-true", "bf16-mixed", "bf16-true"),
    "fsdp1": ("32-true", "bf16-mixed", "bf16-true"),
    "fsdp2": ("32-true", "bf16-mixed", "bf16-true"),
}
if torch.torch_version.TorchVersion(torch.__version__) < "2.15":
    del PRECISIONS["fsdp1"]  # torch 2.11's cannot give its state_dict on the CPU: it reads memory that it has freed


class Clipped(Net):
    """Takes large steps whose size is the norm that gradients are clipped to."""

    fused_optimizer = False

    def configure_optimizers(self) -> torch.optim.Optimizer:
        # With so large an epsilon the size of a step is that of the gradients; there is no fused SGD for DTensors.
        return torch.optim.Adam(self.parameters(), lr=3.0, eps=1.0, fused=self.fused_optimizer)


class ClippedByHand(Clipped):
    """The way round that Lightning's users take under FSDPStrategy, whose own plugin refuses to clip by norm."""

    def configure_gradient_clipping(self, optimizer: Any, gradient_clip_val: Any, gradient_clip_algorithm: Any) -> None:
        self.trainer.strategy.model.clip_grad_norm_(gradient_clip_val)


class Sharded(Clipped):
    def configure_model(self) -> None:
        mesh = self.device_mesh["data_parallel"]
        if not any(isinstance(p, dist.tensor.DTensor) for p in self.parameters()):
            for part in self.body:
                fully_shard(part, mesh=mesh)
            fully_shard(self.body, mesh=mesh)


class Prepared(Sharded):
    def configure_model(self) -> None:
        prepare_for_sharding(self)
        super().configure_model()


class TensorParallel(Clipped):
    """Whose norms are on the mesh of FSDP2 alone, and whose linear layers are on both."""

    def configure_model(self) -> None:
        mesh = self.device_mesh
        if any(isinstance(p, dist.tensor.DTensor) for p in self.parameters()):
            return
        for block in self.body[:2]:
            plan = {"up": ColwiseParallel(output_layouts=dist.tensor.Replicate())}
            parallelize_module(block, mesh["tensor_parallel"], plan)
            fully_shard(block, mesh=mesh["data_parallel"])
        fully_shard(self.body[2], mesh=mesh["data_parallel"])


class Stochastic(Sharded):
    def configure_optimizers(self) -> torch.optim.Optimizer:
        return optim.AdamW(self.parameters(), lr=3e-3, rounding="stochastic", max_norm=1.0)


class FSDPOnTheCPU(FSDPStrategy):
    """Lightning allows it on GPUs only, torch on both."""

    def _setup_model(self, model: nn.Module) -> nn.Module:
        return FullyShardedDataParallel(
            model, device_id=torch.device("cpu"), mixed_precision=self.mixed_precision_config, **self.kwargs
        )


def strategy(name: str) -> Any:
    if name == "ddp":
        return "ddp"
    if name == "fsdp1":
        return FSDPOnTheCPU(auto_wrap_policy={Block})
    return ModelParallelStrategy(
        data_parallel_size=PROCESSES, tensor_parallel_size=1, save_distributed_checkpoint=False
    )


def fit(
    name: str, precision: str, fused: bool, save: Path | None = None, resume: Path | None = None, **options: Any
) -> dict[str, Any]:
    kinds = {"ddp": Clipped, "fsdp1": Clipped if fused else ClippedByHand, "fsdp2": Sharded}
    torch.manual_seed(0)
    net = options.pop("model", kinds[name])()
    net.fused_optimizer = fused
    chosen = {"plugins": [FusedPrecision(precision, **options.pop("line", {}))]} if fused else {"precision": precision}
    settled = {"accumulate_grad_batches": 2, "max_epochs": 2, "use_distributed_sampler": False}
    options = {"gradient_clip_val": CLIP, **settled, **QUIET, **chosen, **options}
    callbacks = options.pop("callbacks", []) + ([] if save is None else [SaveInTheMiddle(save)])
    trainer = L.Trainer(accelerator="cpu", devices=PROCESSES, strategy=strategy(name), callbacks=callbacks, **options)
    every_second = slice(dist.get_rank(), None, PROCESSES)
    trainer.fit(net, batches(part=every_second), ckpt_path=resume)
    blocks = [part for part in net.modules() if isinstance(part, Block)]
    found = {
        "losses": net.losses,
        "steps": trainer.global_step,
        "ranks": trainer.world_size,
        "regions": sum("forward" in block.__dict__ for block in blocks),
        "float8": sum(type(part).__name__ == "Float8Linear" for part in net.modules()),
        "swapped": sum(type(part) is not nn.RMSNorm for part in net.modules() if isinstance(part, nn.RMSNorm)),
    }
    if save is not None and trainer.is_global_zero:
        checkpoint = torch.load(save, weights_only=True)
        states = checkpoint["optimizer_states"][0]["state"]
        found["keys"] = (list(checkpoint["state_dict"]), sorted(checkpoint), sorted(map(str, states)))
    return found


def evaluate(name: str, precision: str, fused: bool) -> tuple[float, list[float]]:
    """The validation loss and the predictions of a model that is not trained."""
    chosen = {"plugins": [FusedPrecision(precision, **LINE)]} if fused else {"precision": precision}
    options = {**QUIET, **chosen, "use_distributed_sampler": False}
    trainer = L.Trainer(accelerator="cpu", devices=PROCESSES, strategy=strategy(name), **options)
    torch.manual_seed(0)
    net = Sharded() if name == "fsdp2" else Net()
    untrained = copy.deepcopy(net)  # FSDP wraps the layers of a model for good
    (metrics,) = trainer.validate(net, batches(), verbose=False)
    predictions = trainer.predict(untrained, batches())
    assert fused == (type(untrained.body[0].second) is not nn.RMSNorm)
    return metrics["loss"], torch.cat(predictions).flatten().tolist()


def tensor_parallel() -> list[float]:
    """Both processes train on the same batches."""
    torch.manual_seed(0)
    net = TensorParallel()
    strategy = ModelParallelStrategy(data_parallel_size=1, tensor_parallel_size=PROCESSES)
    options = {"plugins": [FusedPrecision("32-true")], "gradient_clip_val": CLIP, "max_epochs": 2, **QUIET}
    options["use_distributed_sampler"] = False
    L.Trainer(accelerator="cpu", devices=PROCESSES, strategy=strategy, **options).fit(net, batches())
    return net.losses


def fabric(precision: str, fused: bool) -> dict[str, Any]:
    chosen = {"plugins": [FabricFusedPrecision(precision, **LINE)]} if fused else {"precision": precision}
    launched = L.Fabric(accelerator="cpu", devices=PROCESSES, strategy="ddp", **chosen)
    launched.launch()
    torch.manual_seed(0)
    net = Net().body
    net, optimizer = launched.setup(net, torch.optim.SGD(net.parameters(), lr=2.0, fused=fused))
    losses = []
    for x, y in launched.setup_dataloaders(batches()):
        loss = nn.functional.cross_entropy(net(x.double() if precision == "64-true" else x), y)
        losses.append(loss.item())
        launched.backward(loss)
        launched.clip_gradients(net, optimizer, max_norm=CLIP)
        optimizer.step()
        optimizer.zero_grad()
    return {"losses": losses}


def runs(folder: Path) -> Iterator[tuple[str, Callable[[], Any]]]:
    yield "exact", lambda: fit("ddp", "64-true", False)
    yield "unclipped", lambda: fit("ddp", "64-true", False, gradient_clip_val=None)
    for name, precisions in PRECISIONS.items():
        for precision in precisions:
            path = folder / f"{name} {precision}"
            yield f"{name} {precision} vanilla", partial(fit, name, precision, False, path.with_suffix(".vanilla"))
            # Tracing takes most of the time: with the line for two of the precisions.
            line = {} if precision == "bf16-true" else LINE
            yield (
                f"{name} {precision} fused",
                partial(fit, name, precision, True, path.with_suffix(".fused"), line=line),
            )
        for first, second in (("vanilla", "vanilla"), ("vanilla", "fused"), ("fused", "vanilla")):
            saved = folder / f"{name} 32-true.{first}"
            yield f"{name} {first} to {second}", partial(fit, name, "32-true", second == "fused", resume=saved)
    yield "fsdp2 prepared", lambda: fit("fsdp2", "32-true", True, model=Prepared)
    yield "fsdp2 stochastic", lambda: fit("fsdp2", "bf16-true", True, model=Stochastic, gradient_clip_val=None)
    yield "tensor parallel", tensor_parallel
    yield "fsdp2 channels_last", partial(convert_sharded, nn.Conv2d(2, 2, 1), memory_format="channels_last")
    yield "fsdp2 float8 sharded", partial(convert_sharded, nn.Linear(16, 16), fp8="tensorwise")
    yield "fsdp2 float8", partial(fit, "fsdp2", "bf16-true", True, model=Prepared, line={"fp8": "tensorwise"})
    for kind, fused, precision in (
        ("fused", True, "32-true"),
        ("vanilla", False, "32-true"),
        ("exact", False, "64-true"),
    ):
        yield f"averaged {kind}", partial(fit, "ddp", precision, fused, callbacks=[EMAWeightAveraging()])
        for name in PRECISIONS if kind != "exact" else ("ddp",):
            yield f"{name} evaluated {kind}", partial(evaluate, name, precision, fused)
    yield "fabric exact", lambda: fabric("64-true", False)
    yield "fabric vanilla", lambda: fabric("bf16-mixed", False)
    yield "fabric fused", lambda: fabric("bf16-mixed", True)


def convert_sharded(layer: nn.Module, **options: Any) -> None:
    net = nn.Sequential(layer)
    fully_shard(net, mesh=dist.device_mesh.init_device_mesh("cpu", (PROCESSES,)))
    FusedPrecision(**options).convert_module(net)


def train_all(rank: int, folder: str, results: Any) -> None:
    """As torchrun starts a process."""
    os.environ.update(
        {name: str(rank) for name in ("RANK", "LOCAL_RANK")}
        | {name: str(PROCESSES) for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE")}
        | {"GROUP_RANK": "0", "TORCHELASTIC_RUN_ID": "test"}
    )
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/rendezvous",
        rank=rank,
        world_size=PROCESSES,
        timeout=datetime.timedelta(seconds=60),
    )
    emulate_float8(setattr)
    try:
        for title, run in runs(Path(folder)):
            try:
                results[rank, title] = run()
            except Exception:  # told to the test that asks for it
                results[rank, title] = traceback.format_exc()
    finally:
        dist.destroy_process_group()
