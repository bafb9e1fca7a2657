"""PrefetchCallback: the same batches in Lightning's loops, resumed exactly, and the user's hooks as ever."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

L = pytest.importorskip("lightning", reason="needs the extra braze[lightning]")
import torch  # noqa: E402  (after the skip)
from torch import Tensor, nn  # noqa: E402
from torch.utils.data import DataLoader, DistributedSampler, IterableDataset, TensorDataset  # noqa: E402
from torchdata.stateful_dataloader import StatefulDataLoader  # noqa: E402

from braze.layouts import PinnedLoader  # noqa: E402
from braze.lightning_ext import PrefetchCallback  # noqa: E402
from braze.lightning_ext.prefetch import Prefetched, StatefulPrefetched  # noqa: E402

from .test_pinned_resume import EagerStream  # noqa: E402

pytestmark = [
    pytest.mark.filterwarnings("ignore::lightning.fabric.utilities.warnings.PossibleUserWarning"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*is deprecated:FutureWarning"),
    # torchdata 0.11 calls it.
    pytest.mark.filterwarnings("ignore:'set_vital' is deprecated:UserWarning"),
]
BATCHES = 8


class Net(L.LightningModule):
    def __init__(self, fails_at: int | None = None) -> None:
        super().__init__()
        self.layer = nn.Linear(1, 1)
        self.fails_at = fails_at
        self.seen: list[list[float]] = []
        self.validated: list[list[float]] = []

    def training_step(self, batch: Any, index: int) -> Tensor:
        (x,) = batch
        if len(self.seen) == self.fails_at:
            raise LookupError("as a machine may")
        self.seen.append(x.flatten().tolist())
        return self.layer(x.reshape(-1, 1).to(self.layer.weight.dtype)).mean()

    def validation_step(self, batch: Any, index: int) -> None:
        self.validated.append(batch[0].flatten().tolist())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Predicts(Net):
    def predict_step(self, batch: Any, index: int) -> Tensor:
        return batch[0]


class Stream(IterableDataset):
    def __iter__(self) -> Iterator[tuple[Tensor]]:
        yield from ((torch.tensor([float(i)]),) for i in range(2 * BATCHES))


NUMBERS = TensorDataset(torch.arange(2.0 * BATCHES)[:, None])


def plain(seed: int = 0) -> DataLoader:
    return DataLoader(NUMBERS, batch_size=2, shuffle=True, generator=torch.Generator().manual_seed(seed))


def stateful(seed: int = 0) -> DataLoader:
    return StatefulDataLoader(NUMBERS, batch_size=2, shuffle=True, generator=torch.Generator().manual_seed(seed))


def unsized(seed: int = 0) -> DataLoader:
    return DataLoader(Stream(), batch_size=2)


LOADERS = {"plain": plain, "stateful": stateful, "unsized": unsized}


def trainer(*callbacks: L.Callback, **options: Any) -> L.Trainer:
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    quiet["enable_checkpointing"] = False
    return L.Trainer(accelerator="cpu", devices=1, callbacks=list(callbacks), **{"max_epochs": 1, **quiet, **options})


@pytest.fixture(params=["host", "device"])
def copies(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Batches are passed on, as on the CPU, or copied ahead, as on a GPU."""
    if request.param == "device":
        monkeypatch.setattr("braze.layouts.pinned.loader.copy_stream", lambda device: EagerStream())


class Save(L.Callback):
    def __init__(self, path: Path, hook: str, step: int) -> None:
        self.path, self.step = path, step
        setattr(self, hook, self.save)

    def save(self, trainer: L.Trainer, *args: Any) -> None:
        if trainer.global_step == self.step and not trainer.sanity_checking and not self.path.exists():
            trainer.save_checkpoint(self.path)


@pytest.mark.usefixtures("copies")
@pytest.mark.parametrize("hook", ["on_train_batch_end", "on_validation_end"])
@pytest.mark.parametrize("kind", LOADERS)
def test_prefetch_with_any_loader_resumes_with_the_next_batch(kind: str, hook: str, tmp_path: Path) -> None:
    """State of what was delivered, not fetched: from a loader that copies two ahead, and a loop that fetches one."""
    options = {"val_check_interval": 5, "num_sanity_val_steps": 0, "limit_val_batches": 2}
    net = Net()
    whole = trainer(PrefetchCallback(2), Save(tmp_path / "at 5", hook, 5), **options)
    whole.fit(net, LOADERS[kind](), plain())
    assert sorted(number for batch in net.seen for number in batch) == list(range(2 * BATCHES))
    resumed = Net()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer(PrefetchCallback(2), **options).fit(resumed, LOADERS[kind](7), plain(), ckpt_path=tmp_path / "at 5")
    assert resumed.seen == net.seen[5:]
    assert not any("not resumable" in str(one.message) for one in caught)


@pytest.mark.usefixtures("copies")
@pytest.mark.parametrize("kind", ["plain", "unsized"])
def test_a_batch_that_was_not_trained_on_is_had_again(kind: str, tmp_path: Path) -> None:
    class SaveWhatIsLeft(L.Callback):
        def on_exception(self, trainer: L.Trainer, *args: Any) -> None:
            trainer.save_checkpoint(tmp_path / "failed.ckpt")

    net = Net(fails_at=5)
    first = trainer(PrefetchCallback(2), SaveWhatIsLeft())
    with pytest.raises(LookupError):
        first.fit(net, LOADERS[kind]())
    assert len(net.seen) == 5
    whole, resumed = Net(), Net()
    trainer().fit(whole, LOADERS[kind]())
    trainer(PrefetchCallback(2)).fit(resumed, LOADERS[kind](7), ckpt_path=tmp_path / "failed.ckpt")
    assert net.seen + resumed.seen == whole.seen


@pytest.mark.usefixtures("copies")
@pytest.mark.parametrize("limit", [None, 5])
@pytest.mark.parametrize("hook", ["on_train_batch_end", "on_train_epoch_end"])
@pytest.mark.parametrize("kind", ["plain", "unsized"])
def test_a_checkpoint_at_the_end_of_an_epoch_starts_the_next(
    kind: str, hook: str, limit: int | None, tmp_path: Path
) -> None:
    batches = limit or BATCHES
    save = Save(tmp_path / "end", hook, batches)
    trainer(PrefetchCallback(2), save, limit_train_batches=limit).fit(Net(), LOADERS[kind]())
    resumed = Net()
    again = trainer(PrefetchCallback(2), max_epochs=2, limit_train_batches=limit)
    again.fit(resumed, LOADERS[kind](), ckpt_path=tmp_path / "end")
    assert len(resumed.seen) == batches
    assert len({number for batch in resumed.seen for number in batch}) == 2 * batches


@pytest.mark.parametrize("kind", ["plain", "stateful"])
@pytest.mark.parametrize("saved_by", ["prefetch", "vanilla"])
def test_checkpoints_are_read_with_and_without_prefetch(kind: str, saved_by: str, tmp_path: Path) -> None:
    first, second = ([PrefetchCallback(2)], []) if saved_by == "prefetch" else ([], [PrefetchCallback(2)])
    trainer(*first, Save(tmp_path / "at 5", "on_train_batch_end", 5)).fit(Net(), LOADERS[kind]())
    states = torch.load(tmp_path / "at 5", weights_only=True)["callbacks"]
    assert ("PrefetchCallback" in states) == (saved_by == "prefetch" and kind == "plain")
    resumed, again = Net(), trainer(*second)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        again.fit(resumed, LOADERS[kind](), ckpt_path=tmp_path / "at 5")
    # Lightning's warning stands where it holds: there is no state of a plain loader to go on from.
    assert any("not resumable" in str(one.message) for one in caught) == (kind == "plain")
    assert again.global_step == BATCHES
    assert len(resumed.seen) == BATCHES - 5


def test_batches_are_those_without_prefetch_for_two_epochs_and_validation() -> None:
    seen = []
    for callbacks in ([], [PrefetchCallback()]):
        net = Net()
        torch.manual_seed(0)
        trainer(*callbacks, max_epochs=2).fit(net, plain(), DataLoader(NUMBERS, batch_size=4))
        seen.append((net.seen, net.validated))
    assert seen[0] == seen[1]


def test_validation_alone_is_prefetched_and_leaves_no_state_for_a_later_fit(tmp_path: Path) -> None:
    trainer(PrefetchCallback(), Save(tmp_path / "at 5", "on_train_batch_end", 5)).fit(Net(), plain())
    net, prefetch = Net(), PrefetchCallback()
    run = trainer(prefetch)
    run.validate(net, DataLoader(NUMBERS, batch_size=4), ckpt_path=tmp_path / "at 5", verbose=False)
    assert net.validated == [[float(i + k) for k in range(4)] for i in range(0, 2 * BATCHES, 4)]
    assert prefetch.report == [("validate: DataLoader", "passed on")]
    prefetch.load_state_dict(torch.load(tmp_path / "at 5", weights_only=True)["callbacks"]["PrefetchCallback"])
    run.predict(Predicts(), DataLoader(NUMBERS, batch_size=4))
    trainer(prefetch).fit(net, plain())
    assert len(net.seen) == BATCHES


def test_set_epoch_reaches_the_sampler_also_when_resumed(tmp_path: Path) -> None:
    def loader() -> DataLoader:
        return DataLoader(NUMBERS, batch_size=2, sampler=DistributedSampler(NUMBERS, 1, 0, seed=3))

    net, vanilla, resumed = Net(), Net(), Net()
    trainer(PrefetchCallback(), Save(tmp_path / "c", "on_train_batch_end", 11), max_epochs=3).fit(net, loader())
    trainer(max_epochs=3).fit(vanilla, loader())
    assert net.seen == vanilla.seen
    assert net.seen[:BATCHES] != net.seen[BATCHES : 2 * BATCHES]
    trainer(PrefetchCallback(), max_epochs=3).fit(resumed, loader(), ckpt_path=tmp_path / "c")
    assert resumed.seen == net.seen[11:]


@pytest.mark.parametrize("hook", ["on_before_batch_transfer", "transfer_batch_to_device"])
@pytest.mark.parametrize("of", ["model", "datamodule"])
def test_overridden_transfer_hooks_get_the_batch_on_the_host(hook: str, of: str) -> None:
    calls = []

    def overridden(self: Any, batch: Any, *args: Any, **kwargs: Any) -> Any:
        calls.append(batch)
        return batch

    net, data = Net(), L.LightningDataModule()
    data.train_dataloader = plain
    owner = net if of == "model" else data
    owner.__class__ = type("Own", (type(owner),), {hook: overridden})
    prefetch = PrefetchCallback()
    fit = trainer(prefetch)
    fit.fit(net, plain() if of == "model" else None, datamodule=data if of == "datamodule" else None)
    assert len(calls) == BATCHES
    assert type(fit.train_dataloader) is DataLoader
    expected = ("train: DataLoader", f"left: Own.{hook} is overridden and expects it on the host")
    assert prefetch.report == [expected]


def test_overridden_hook_after_the_transfer_runs_once_on_a_prefetched_batch() -> None:
    class Doubled(Net):
        def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
            return [2 * batch[0]]

    net, prefetch = Doubled(), PrefetchCallback()
    fit = trainer(prefetch)
    fit.fit(net, DataLoader(NUMBERS, batch_size=2))
    assert type(fit.train_dataloader) is Prefetched
    assert net.seen == [[4.0 * i, 4.0 * i + 2] for i in range(BATCHES)]


def test_page_locking_is_undone() -> None:
    prefetch, loader = PrefetchCallback(), plain()
    assert prefetch._pin(loader, torch.device("cuda")) == "page-locked only"
    assert loader.pin_memory
    prefetch.teardown(trainer(), Net(), "fit")
    assert not loader.pin_memory
    assert prefetch._pin(plain(), torch.device("cpu")) == "left"


def test_loaders_are_wrapped_once() -> None:
    net, prefetch = Net(), PrefetchCallback()
    fit = trainer(prefetch, max_epochs=2, reload_dataloaders_every_n_epochs=1)
    fit.fit(net, plain(), DataLoader(NUMBERS, batch_size=4))
    assert type(fit.train_dataloader) is Prefetched
    assert type(fit.train_dataloader.pinned.loader) is DataLoader
    own = PinnedLoader(plain(), device="cpu")
    fit = trainer(prefetch)
    fit.fit(net, own)
    assert fit.train_dataloader is own
    assert prefetch.report == [("train: PinnedLoader", "wrapped already")]


@pytest.mark.parametrize("fails", [False, True])
def test_strategy_is_as_it_was_after_a_run(fails: bool) -> None:
    fit = trainer(PrefetchCallback())
    before = dict(vars(fit.strategy))
    if fails:
        with pytest.raises(LookupError):
            fit.fit(Net(fails_at=2), plain())
    else:
        fit.fit(Net(), plain())
    assert vars(fit.strategy).keys() == before.keys()


def test_what_lightning_sets_on_a_loader_reaches_it() -> None:
    """Such as worker_init_fn for seeds, or a new _iterator once persistent workers have been shut down."""
    loader = plain()
    wrapped = Prefetched(PinnedLoader(loader, device="cpu"), None)
    wrapped.worker_init_fn = print
    assert loader.worker_init_fn is print
    assert wrapped.sampler is loader.sampler
    assert wrapped.batch_sampler is loader.batch_sampler
    assert len(wrapped) == BATCHES


def test_only_a_loader_with_a_state_shows_one_to_lightning() -> None:
    from lightning.pytorch.utilities.combined_loader import CombinedLoader

    loaders = [Prefetched(PinnedLoader(plain(), device="cpu"), None)]
    loaders.append(StatefulPrefetched(PinnedLoader(stateful(), device="cpu"), None))
    both = CombinedLoader(loaders)
    iter(both)
    assert len(both._state_dicts()) == 1


def test_cast_of_bf16_true_comes_after_the_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lightning casts what the loader yields: on the host without prefetch, on the device with it."""
    order = []

    class Watched(EagerStream):
        def copy(self, sources: Any) -> Any:
            order.extend(str(source.dtype) for source in sources)
            return super().copy(sources)

    monkeypatch.setattr("braze.layouts.pinned.loader.copy_stream", lambda device: Watched())
    net = Net()
    fit = trainer(PrefetchCallback(), precision="bf16-true")
    convert = fit.precision_plugin.convert_input
    monkeypatch.setattr(fit.precision_plugin, "convert_input", lambda batch: order.append("cast") or convert(batch))
    fit.fit(net, plain())
    assert order[:4] == ["torch.float32"] * 3 + ["cast"]  # three under way at depth two
    assert net.layer.weight.dtype == torch.bfloat16


def test_images_become_channels_last() -> None:
    class Look(Net):
        def training_step(self, batch: Any, index: int) -> Tensor:
            assert batch[0].is_contiguous(memory_format=torch.channels_last)
            return super().training_step([batch[0][:, 0, 0, 0]], index)

    images = TensorDataset(torch.arange(4.0)[:, None, None, None].expand(4, 3, 2, 2).contiguous())
    net = Look()
    trainer(PrefetchCallback(memory_format="channels_last")).fit(net, DataLoader(images, batch_size=2))
    assert net.seen == [[0.0, 1.0], [2.0, 3.0]]


@pytest.mark.gpu
def test_batches_arrive_on_a_gpu() -> None:
    class Look(Net):
        def training_step(self, batch: Any, index: int) -> Tensor:
            assert batch[0].is_cuda
            return super().training_step(batch, index)

    net, prefetch = Look(), PrefetchCallback()
    fit = L.Trainer(accelerator="gpu", devices=1, callbacks=[prefetch], max_epochs=1, logger=False,
                    enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False)  # fmt: skip
    fit.fit(net, plain())
    assert len(net.seen) == BATCHES
    assert fit.train_dataloader.pinned.report().steps == BATCHES


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match="depth must be 0 or more, got -1"):
        PrefetchCallback(-1)
    with pytest.raises(ValueError, match="memory_format must be 'channels_last' or None, got 'nhwc'"):
        PrefetchCallback(memory_format="nhwc")
