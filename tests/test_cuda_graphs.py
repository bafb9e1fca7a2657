"""CUDAGraphCallback: what is captured, what is left and why; on a stand-in for graphs, whose memory is static, too."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("lightning", reason="needs the extra braze[lightning]")
import lightning as L
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from braze.lightning_ext import CUDAGraphCallback, FusedPrecision, cuda_graphs

from .lightning_net import QUIET, WARNINGS, Net, assert_same_curve, batches, make_trainer

pytestmark = WARNINGS


class Replayed:
    """Calls a module on inputs, outputs and gradients that stay where they are, as the graphs of torch do."""

    def __init__(self, module: nn.Module, samples: tuple[Tensor, ...]) -> None:
        self.run, self.inputs, self.replays = module.forward, samples, 0
        self.parameters = tuple(p for p in module.parameters() if p.requires_grad)
        self.run(*samples)  # as the warm-up does, with what it changes
        self.outputs: list[Tensor] | None = None
        self.grads: list[Tensor] | None = None

    def __call__(self, *args: Tensor) -> Any:
        replay, spec = self, None

        class Graphed(torch.autograd.Function):
            @staticmethod
            def forward(ctx: Any, *tensors: Tensor) -> tuple[Tensor, ...]:
                nonlocal spec
                replay.replays += 1
                with torch.no_grad():
                    for static, new in zip(replay.inputs, tensors, strict=False):
                        static.copy_(new)
                with torch.enable_grad():
                    leaves, spec = torch.utils._pytree.tree_flatten(replay.run(*replay.inputs))
                ctx.leaves = leaves
                replay.outputs = static_copy(replay.outputs, leaves)
                return tuple(one.detach() for one in replay.outputs)

            @staticmethod
            def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
                found = torch.autograd.grad(ctx.leaves, replay.parameters, grads)
                replay.grads = static_copy(replay.grads, found)
                return (*(None for _ in replay.inputs), *(grad.detach() for grad in replay.grads))

        flat = Graphed.apply(*args, *self.parameters)
        return torch.utils._pytree.tree_unflatten(flat, spec)


def static_copy(before: list[Tensor] | None, new: Any) -> list[Tensor]:
    if before is None:
        return [one.detach().clone() for one in new]
    for static, one in zip(before, new, strict=True):
        static.copy_(one.detach())
    return before


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> list[Replayed]:
    made: list[Replayed] = []

    def make(module: nn.Module, samples: tuple[Tensor, ...]) -> Callable[..., Any]:
        made.append(Replayed(module, samples))
        return made[-1]

    monkeypatch.setattr(cuda_graphs, "make_graphed", make)
    monkeypatch.setattr(cuda_graphs, "has_graphs", lambda device: True)
    return made


def train(callback: CUDAGraphCallback | None, model: Callable[[], Net] = Net, **options: Any) -> Net:
    torch.manual_seed(0)
    net = model()
    callbacks = [] if callback is None else [callback]
    plugin = options.pop("plugin", False)
    make_trainer(options.pop("precision", "32-true"), plugin, callbacks=callbacks, **options).fit(net, batches())
    return net


def assert_same(net: Net, other: Net) -> None:
    assert net.losses == other.losses
    for ours, theirs in zip(net.parameters(), other.parameters(), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize(
    "options", [{}, {"accumulate_grad_batches": 3}, {"gradient_clip_val": 0.1}, {"limit_train_batches": 7}]
)
def test_trains_what_is_trained_without_graphs(options: dict[str, Any], graphs: list[Replayed]) -> None:
    callback = CUDAGraphCallback(warmup=2)
    net = train(callback, **options)
    assert callback.report == [("body", "captured")]
    assert graphs[0].replays == len(net.losses) - 2
    assert_same(net, train(None, **options))
    assert "forward" not in vars(net.body), "the model is as it was"
    assert not any(p._backward_hooks for p in net.parameters())


def test_with_fused_precision_and_its_autocast(graphs: list[Replayed]) -> None:
    callback = CUDAGraphCallback(warmup=2)
    net = train(callback, plugin=FusedPrecision("bf16-mixed"))
    assert graphs[0].replays == len(net.losses) - 2
    assert_same(net, train(None, plugin=FusedPrecision("bf16-mixed")))


class Many(nn.Module):
    """Has its outputs in a dict."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.head = nn.BatchNorm1d(16), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> dict[str, Any]:
        h = self.norm(x)
        return {"logits": self.head(h), "hidden": [h]}


class Keeps(Net):
    def __init__(self) -> None:
        super().__init__()
        self.body = Many()
        self.kept: list[Tensor] = []
        self.seen: list[Tensor] = []

    def training_step(self, batch: list[Tensor], index: int) -> Tensor:
        found = self.body(batch[0])
        self.kept.append(found["hidden"][0].detach())
        self.seen.append(self.kept[-1].clone())
        loss = self.loss(found["logits"], batch[1])
        self.losses.append(loss.item())
        return loss


def test_cuda_graphs_clone_dict_outputs(graphs: list[Replayed]) -> None:
    """What a step keeps is not overwritten by the next; statistics do not count what capturing runs."""
    net = train(CUDAGraphCallback(warmup=2), Keeps)
    assert graphs[0].replays == len(net.losses) - 2
    assert all(map(torch.equal, net.kept, net.seen))
    plain = train(None, Keeps)
    assert_same(net, plain)
    assert torch.equal(net.body.norm.running_mean, plain.body.norm.running_mean)
    assert net.body.norm.num_batches_tracked == len(net.losses)


class Recomputed(Net):
    reentrant = False

    def __init__(self) -> None:
        super().__init__()
        self.body = Inside(self.body, self.reentrant)


class Inside(nn.Module):
    def __init__(self, body: nn.Module, reentrant: bool) -> None:
        super().__init__()
        self.body, self.reentrant = body, reentrant

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.body, x.requires_grad_(), use_reentrant=self.reentrant)


class Reentrant(Recomputed):
    reentrant = True


class Marked(Net):
    def __init__(self) -> None:
        super().__init__()
        self.body[0].gradient_checkpointing = True


class Hooked(Net):
    def __init__(self) -> None:
        super().__init__()
        self.body[1].register_forward_hook(lambda *args: None)


class Compiled(Net):
    def __init__(self) -> None:
        super().__init__()
        self.body.compile(backend="eager")


class Twice(Net):
    def training_step(self, batch: list[Tensor], index: int) -> Tensor:
        return super().training_step(batch, index) + self.body(batch[0]).sum()


class Named(nn.Sequential):
    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        return super().forward(x) * scale


class WithOptions(Net):
    def __init__(self) -> None:
        super().__init__()
        self.body = Named(*self.body)

    def training_step(self, batch: list[Tensor], index: int) -> Tensor:
        loss = self.loss(self.body(batch[0], scale=2.0), batch[1])
        self.losses.append(loss.item())
        return loss


class Grows(Net):
    def training_step(self, batch: list[Tensor], index: int) -> Tensor:
        return super().training_step([one[: 1 + index] for one in batch], index)


class OwnAutocast(Net):
    def training_step(self, batch: list[Tensor], index: int) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return super().training_step(batch, index)


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (Recomputed, "activations are recomputed in it"),
        (Reentrant, "activations are recomputed in it"),
        (Marked, "activations of 0 are recomputed"),
        (Hooked, "hooks of 1 would run when it is captured"),
        (Compiled, "(itself) is compiled"),
        (Twice, "a batch must call it once, got 2 calls"),
        (WithOptions, "its arguments must be tensors, by position"),
        (Grows, "its inputs must stay the same"),
        (OwnAutocast, "it is called under an autocast of its own"),
    ],
)
def test_cuda_graphs_are_refused_with_activation_checkpointing_and(
    model: type[Net], reason: str, graphs: list[Replayed]
) -> None:
    callback = CUDAGraphCallback(warmup=2)
    net = train(callback, model, max_epochs=1)
    ((path, what),) = callback.report
    assert path == "body"
    assert what.startswith(f"left: {reason}")
    assert not graphs
    assert_same(net, train(None, model, max_epochs=1))


@pytest.mark.parametrize("change", ["frozen", "moved"])
def test_calls_that_cannot_be_replayed_run_as_before(change: str, graphs: list[Replayed]) -> None:
    class Changes(Net):
        """A short batch, a batch that calls twice, an evaluation in training, and another parameter."""

        def training_step(self, batch: list[Tensor], index: int) -> Tensor:
            if index == 4:
                batch = [one[:3] for one in batch]
            if index == 6:
                with torch.no_grad():
                    self.body(batch[0])
            if index == 8:
                weight = self.body[0].up.weight
                if change == "frozen":
                    weight.requires_grad_(False)
                else:
                    weight.data = weight.data.clone()
            again = self.body(batch[0]).sum() if index == 5 else 0.0
            return super().training_step(batch, index) + again

    net = train(CUDAGraphCallback(warmup=2), Changes, max_epochs=1)
    replayed = {2, 3, 5, 7}  # in batch 5 the first call; in 6 the first has no gradients
    assert graphs[0].replays == len(replayed)
    assert_same(net, train(None, Changes, max_epochs=1))


def test_runs_that_cannot_be_captured_say_why() -> None:
    callback = CUDAGraphCallback()
    with pytest.warns(UserWarning, match="nothing is captured: the device must be a CUDA GPU, got cpu"):
        net = train(callback)
    assert callback.report == [("(the model)", "left: the device must be a CUDA GPU, got cpu")]
    assert_same(net, train(None))
    with pytest.raises(ValueError, match="warmup must be at least 1, got 0"):
        CUDAGraphCallback(0)


def test_manual_optimization_is_refused(graphs: list[Replayed]) -> None:
    class ByHand(Net):
        automatic_optimization = False

        def training_step(self, batch: list[Tensor], index: int) -> None:
            optimizer = self.optimizers()
            optimizer.zero_grad()
            self.manual_backward(super().training_step(batch, index))
            optimizer.step()

    with pytest.warns(UserWarning, match="nothing is captured: optimization must be automatic"):
        train(CUDAGraphCallback(), ByHand)
    assert not graphs


def test_a_failed_capture_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(module: nn.Module, samples: tuple[Tensor, ...]) -> None:
        module(*samples)
        raise RuntimeError("operation not permitted when stream is capturing\nand more")

    monkeypatch.setattr(cuda_graphs, "make_graphed", fails)
    monkeypatch.setattr(cuda_graphs, "has_graphs", lambda device: True)
    callback = CUDAGraphCallback(warmup=2)
    net = train(callback, Keeps)
    reason = "left: it cannot be captured: operation not permitted when stream is capturing"
    assert callback.report == [("body", reason)]
    assert_same(net, train(None, Keeps))


@pytest.mark.parametrize(
    ("devices", "anomaly", "reason"),
    [
        (2, False, "the strategy must be for one device, got 2"),
        (1, True, "detect_anomaly must be off"),
        (1, False, ""),
    ],
)
def test_runs_on_several_devices_and_under_anomaly_detection_are_refused(
    devices: int, anomaly: bool, reason: str, graphs: list[Replayed]
) -> None:
    trainer = SimpleNamespace(strategy=SimpleNamespace(root_device=torch.device("cuda")), world_size=devices)
    with torch.autograd.set_detect_anomaly(anomaly):
        found = cuda_graphs._unsafe_run(trainer, Net())
    assert found.startswith(reason)
    assert bool(found) == bool(reason)


@pytest.mark.gpu
@pytest.mark.parametrize("model", [Net, Keeps])
def test_loss_curve_on_a_gpu_is_the_one_without_graphs(model: type[Net]) -> None:
    curves = []
    for precision, callbacks in (("32-true", [CUDAGraphCallback(warmup=2)]), ("32-true", []), ("64-true", [])):
        torch.manual_seed(0)
        net = model()
        options = {"callbacks": callbacks, "precision": precision, "max_epochs": 2, **QUIET}
        L.Trainer(accelerator="gpu", devices=1, **options).fit(net, batches())
        curves.append(net.losses)
        if callbacks:
            assert callbacks[0].report == [("body", "captured")]
    assert_same_curve(*curves)
