"""PinnedLoader around any loader: the same batches on the device, and nothing left behind however the loop ends."""

from __future__ import annotations

import dataclasses
import gc
import multiprocessing
import pickle
import subprocess
import sys
import textwrap
import weakref
from collections import OrderedDict, UserDict, namedtuple
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, SequentialSampler

from braze.layouts import PinnedLoader, SlabCollate
from braze.layouts.pinned import parcel, transfer

from .slow_copies import SlowStream, poisoned

Pair = namedtuple("Pair", ["first", "second"])


@dataclasses.dataclass(frozen=True)
class Packed:
    tokens: Tensor
    longest: int
    extra: Any = None


class Mover:
    """What moves itself."""

    def __init__(self, where: str = "host") -> None:
        self.where = where

    def to(self, device: torch.device) -> Mover:
        return Mover(f"on {device}")


class Image(Tensor):
    """A tensor of a user's class."""


class Numbers(Dataset):
    def __init__(self, count: int = 8, size: int = 3, fails_at: int | None = None) -> None:
        self.count, self.size, self.fails_at = count, size, fails_at

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, i: int) -> Tensor:
        if i == self.fails_at:
            raise LookupError("no such sample")
        return torch.full((self.size,), float(i))


@pytest.fixture
def stream() -> SlowStream:
    return SlowStream()


BATCHES: dict[str, Any] = {
    "tensor": torch.arange(6.0),
    "list": [torch.ones(2), torch.zeros(1)],
    "tuple": (torch.ones(2), "name", 3, None),
    "named tuple": Pair(torch.ones(2), {"deep": [torch.zeros(3)]}),
    "ordered": OrderedDict(b=torch.ones(1), a=torch.zeros(2)),
    "user's mapping": UserDict(x=torch.ones(2)),
    "dataclass": Packed(torch.arange(4), 3),
    "subclass": {"image": torch.ones(2).as_subclass(Image)},
    "sparse": torch.eye(3).to_sparse(),
    "empty": torch.empty(0, 3),
    "channels_last": torch.rand(2, 3, 4, 5).contiguous(memory_format=torch.channels_last),
    "expanded": torch.arange(3.0).expand(2, 3),
    "every other": torch.arange(20)[::2],
}


def assert_same(ours: Any, theirs: Any) -> None:
    assert type(ours) is type(theirs)
    if isinstance(ours, Tensor):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)
        assert ours.layout != torch.strided or ours.stride() == torch.empty_like(theirs).stride()
    elif dataclasses.is_dataclass(ours):
        assert_same(vars(ours), vars(theirs))
    elif isinstance(ours, dict | UserDict):
        assert list(ours) == list(theirs)
        assert all(assert_same(ours[key], theirs[key]) is None for key in ours)
    elif isinstance(ours, list | tuple):
        assert all(assert_same(x, y) is None for x, y in zip(ours, theirs, strict=True))
    else:
        assert ours == theirs


@pytest.mark.parametrize("kind", BATCHES)
@pytest.mark.parametrize("depth", [0, 2])
def test_batches_keep_their_type(kind: str, depth: int, stream: SlowStream) -> None:
    with poisoned():
        batches = list(PinnedLoader([BATCHES[kind]] * 4, device=stream, depth=depth))
        stream.synchronize()
        for batch in batches:
            assert_same(batch, BATCHES[kind])
            assert batch is not BATCHES[kind] or kind == "sparse"  # which is on this device already
    assert stream.errors == []


def test_objects_move_themselves_and_shared_tensors_stay_shared(stream: SlowStream) -> None:
    x = torch.ones(2)
    ((mover, (first, second)),) = PinnedLoader([(Mover(), [x, x])], device=stream)
    assert mover.where == "on cpu"
    assert first is second is not x


def test_on_the_cpu_batches_are_passed_on() -> None:
    x, y = torch.ones(2), [torch.zeros(1)]
    passed = list(PinnedLoader([x, y], device="cpu"))
    assert passed[0] is x
    assert passed[1] is y


def test_transform_runs_on_the_device_when_a_batch_is_handed_out(stream: SlowStream) -> None:
    seen = []

    def transform(batch: Tensor) -> Tensor:
        assert all(event.waited_for for event in stream.events_of(batch))
        seen.append(batch.data_ptr())
        return batch.float()

    iterator = iter(PinnedLoader([torch.arange(3)] * 5, device=stream, depth=3, transform=transform))
    assert next(iterator).dtype == torch.float32
    assert len(seen) == 1
    on_cpu = list(PinnedLoader([torch.arange(3)], device="cpu", transform=lambda x: x * 2))
    assert on_cpu[0].tolist() == [0, 2, 4]


@pytest.mark.parametrize("depth", range(4))
def test_as_many_batches_are_ahead_as_depth_says(depth: int, stream: SlowStream) -> None:
    fetched = []

    def source() -> Iterator[Tensor]:
        for i in range(9):
            fetched.append(i)
            yield torch.tensor([i])

    for step, batch in enumerate(PinnedLoader(source(), device=stream, depth=depth)):
        assert len(fetched) == min(9, step + depth + 1)
        assert stream.on_device <= depth + 1
        del batch
    assert step == 8


def test_attributes_of_the_loader_are_at_hand() -> None:
    inner = DataLoader(Numbers(), batch_size=3, num_workers=0)
    loader = PinnedLoader(inner, device="cpu")
    assert len(loader) == 3
    assert isinstance(loader.sampler, SequentialSampler)
    assert (loader.dataset, loader.batch_sampler, loader.batch_size) == (inner.dataset, inner.batch_sampler, 3)
    assert not hasattr(loader, "nonsense")
    with pytest.raises(TypeError, match="has no len"):
        len(PinnedLoader(iter([]), device="cpu"))
    twin = pickle.loads(pickle.dumps(loader))
    assert [batch.shape for batch in twin] == [(3, 3), (3, 3), (2, 3)]


def test_bad_arguments_are_refused() -> None:
    with pytest.raises(TypeError, match="loader must be iterable, got int"):
        PinnedLoader(3)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="depth must be 0 or more, got -1"):
        PinnedLoader([], depth=-1)


@pytest.mark.parametrize("workers", [0, 1])
def test_an_exception_comes_in_its_turn(workers: int, stream: SlowStream) -> None:
    source = DataLoader(Numbers(fails_at=5), batch_size=2, num_workers=workers, collate_fn=SlabCollate())
    loader = PinnedLoader(source, device=stream, depth=4)
    had = 0
    with pytest.raises(LookupError, match="no such sample"):  # noqa: PT012
        for _ in loader:
            had += 1
    assert had == 2
    gc.collect()  # torch's traceback holds its iterator
    parcel.forget_ended_workers()
    assert_nothing_left(loader, stream)


def assert_nothing_left(loader: PinnedLoader, stream: SlowStream) -> None:
    """No copy under way, no slab lent, no worker alive, no memory of one mapped."""
    assert stream.errors == []
    assert stream.under_way == 0
    assert loader._transfer is not None
    assert not any(one.lent for one in loader._transfer.staging.slabs)
    assert multiprocessing.active_children() == []
    assert parcel._mapped == {}


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("how", ["break", "raise", "interrupt", "close"])
def test_nothing_is_left_behind(workers: int, how: str, stream: SlowStream) -> None:
    with poisoned():
        source = DataLoader(Numbers(40), batch_size=2, num_workers=workers, collate_fn=SlabCollate())
        loader = PinnedLoader(source, device=stream, depth=3)
        iterator = iter(loader)
        try:
            for step, _ in enumerate(iterator):
                if step == 5:
                    if how == "break":
                        break
                    if how == "close":
                        iterator.close()  # type: ignore[attr-defined]
                    if how in ("raise", "interrupt"):
                        raise RuntimeError if how == "raise" else KeyboardInterrupt
        except (RuntimeError, KeyboardInterrupt):
            pass
        del iterator
        assert_nothing_left(loader, stream)
        assert len(list(loader)) == 20  # and it can be used again


#: Signals are the whole process's: these tests have one of their own.
ENDINGS = {
    "interrupt": ("os.kill(os.getpid(), signal.SIGINT)", "KeyboardInterrupt"),
    # What it had sent in memory not mapped yet cannot be had from a dead worker: then torch's reading fails first.
    "death of a worker": (
        "os.kill(multiprocessing.active_children()[0].pid, signal.SIGKILL)",
        "(RuntimeError, OSError, EOFError)",
    ),
}


@pytest.mark.parametrize("how", ENDINGS)
def test_a_signal_ends_the_loop_and_its_workers(how: str) -> None:
    signalled, expected = ENDINGS[how]
    code = f"""
    import gc, multiprocessing, os, signal, torch
    from torch.utils.data import DataLoader
    from braze.layouts import PinnedLoader, SlabCollate
    from tests.slow_copies import SlowStream
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell ignores it in what it starts in the background
    stream = SlowStream()
    source = DataLoader(list(torch.eye(64)), batch_size=2, num_workers=2, collate_fn=SlabCollate())
    loader = PinnedLoader(source, device=stream, depth=3)
    try:
        try:
            for step, _ in enumerate(loader):
                if step == 3:
                    {signalled}
        finally:  # torch's handler raises at every later end of a worker, too
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    except BaseException as error:
        print(isinstance(error, {expected}))
    gc.collect()  # torch's traceback holds its iterator
    print(stream.under_way, stream.errors, len(multiprocessing.active_children()))
    print(any(one.lent for one in loader._transfer.staging.slabs))
    """
    root = Path(__file__).parent.parent
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], cwd=root, capture_output=True, text=True, timeout=120
    )
    assert done.stdout.splitlines() == ["True", "0 [] 0", "False"], done.stderr


def test_workers_that_stay_serve_another_epoch_after_a_break(stream: SlowStream) -> None:
    source = DataLoader(
        Numbers(20), batch_size=2, num_workers=2, persistent_workers=True, collate_fn=SlabCollate(slabs=3)
    )
    loader = PinnedLoader(source, device=stream, depth=1)
    for step, _ in enumerate(loader):
        if step == 3:
            break
    for _ in range(2):
        batches = list(loader)
        stream.synchronize()
        assert [int(batch.max()) for batch in batches] == list(range(1, 20, 2))
    mapped = [one for slabs in parcel._mapped.values() for one in slabs.values()]
    assert len(mapped) <= 6
    del source, loader, batches
    gc.collect()
    parcel.forget_ended_workers()


def test_the_loop_alone_holds_a_batch(stream: SlowStream) -> None:
    for device in (stream, "cpu"):
        iterator = iter(PinnedLoader(([torch.ones(3)] for _ in range(3)), device=device, depth=1))
        batch = next(iterator)
        gone = weakref.ref(batch[0])
        del batch
        assert gone() is None


def test_bytes_decide_the_way(stream: SlowStream, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transfer, "LEAST_STAGED", 1000)
    batch = {
        "large": torch.zeros(2000, dtype=torch.uint8),
        "small": torch.zeros(10),
        "sparse": torch.eye(2).to_sparse(),
    }
    loader = PinnedLoader([batch] * 3, device=stream, depth=1)
    assert str(loader.report()) == "no batch yet"
    list(loader)
    report = loader.report()
    assert report.tensors == {"staged": 3, "direct": 3, "present": 3}
    assert report.nbytes["staged"] == 6000
    assert report.nbytes["direct"] == 120
    assert report.steps == len(report.waits) == 3
    assert report.seconds == pytest.approx(sum(report.waits))
    assert (report.lendings, report.refusals) == (3, 0)
    assert report.slabs == report.made <= 3
    assert "staged" in str(report)
    assert "lent 3 times" in str(report)


def test_batches_of_slab_collate_are_copied_from_where_they_are(stream: SlowStream) -> None:
    with poisoned():
        source = DataLoader(Numbers(20), batch_size=2, collate_fn=SlabCollate())
        loader = PinnedLoader(source, device=stream, depth=1)
        list(loader)
    report = loader.report()
    assert report.tensors == {"staged": 1, "slab": 9}  # the first batch tells what a batch needs
    assert report.reuse > 0.5
    assert report.slab_bytes > 0


def test_copies_that_end_late_are_counted(stream: SlowStream) -> None:
    loader = PinnedLoader([torch.ones(2)] * 6, device=stream, depth=2)
    for _ in loader:
        stream.advance()
    assert 0 < loader.report().late <= 6


def test_memory_that_cannot_be_locked_is_copied_directly(stream: SlowStream, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream, "pin", lambda memory: None)
    with poisoned():
        loader = PinnedLoader([torch.ones(20)] * 3, device=stream)
        batches = list(loader)
        stream.synchronize()
        assert all(int(batch.min()) == 1 for batch in batches)
    assert loader.report().tensors == {"direct": 3}


def test_locked_memory_is_unlocked_with_the_slab(stream: SlowStream) -> None:
    with poisoned():
        loader = PinnedLoader([torch.ones(20)] * 3, device=stream)
        list(loader)
    assert stream.locked > 0
    del loader
    assert stream.locked == 0


def test_batches_outlive_the_loader(stream: SlowStream) -> None:
    with poisoned():
        batches = list(PinnedLoader([torch.full((20,), float(i)) for i in range(9)], device=stream, depth=4))
    assert [batch.unique().tolist() for batch in batches] == [[float(i)] for i in range(9)]


class Stream(IterableDataset):
    def __iter__(self) -> Iterator[Tensor]:
        yield from torch.arange(7)


# Lightning 2.6 makes a class of torch.utils._pytree that later versions of torch deprecate.
@pytest.mark.filterwarnings("ignore:.*LeafSpec.*is deprecated:FutureWarning")
def test_combined_loader() -> None:
    combined = pytest.importorskip("lightning.pytorch.utilities.combined_loader", reason="needs braze[lightning]")
    loaders = {
        "numbers": PinnedLoader(DataLoader(Numbers(6), batch_size=2, collate_fn=SlabCollate()), device="cpu"),
        "stream": PinnedLoader(DataLoader(Stream(), batch_size=2), device="cpu"),
    }
    both = combined.CombinedLoader(loaders, mode="max_size")
    had = [(batch["numbers"], batch["stream"]) for batch, _, _ in both]
    assert [None if x is None else int(x.max()) for x, _ in had] == [1, 3, 5, None]
    assert [int(x.max()) for _, x in had] == [1, 3, 5, 6]
    assert len(both._state_dicts()) == 2


@pytest.mark.gpu
@pytest.mark.parametrize("workers", [0, 2])
def test_on_a_gpu(workers: int) -> None:
    """The real stream: images by slab, small fields, a slow consumer, kept batches, a break and another epoch."""
    source = DataLoader(Numbers(64, size=300_000), batch_size=4, num_workers=workers, collate_fn=SlabCollate())
    loader = PinnedLoader(source, device="cuda", depth=2, transform=lambda x: x.double())
    kept = []
    for batch in loader:
        torch.cuda._sleep(10_000_000)
        kept.append(batch)
    assert [batch.unique().tolist() for batch in kept] == [[4.0 * k + i for i in range(4)] for k in range(16)]
    for step, _ in enumerate(loader):
        if step == 3:
            break
    report = loader.report()
    assert report.tensors["slab"] > 0
    assert report.refusals == 0
