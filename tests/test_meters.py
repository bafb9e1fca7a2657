"""MetersCallback and its tables: on a clock that only data, steps and validation advance."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import pytest

L = pytest.importorskip("lightning", reason="needs the extra braze[lightning]")
import torch  # noqa: E402  (after the skip)
from torch import Tensor, nn  # noqa: E402
from torch.utils._python_dispatch import _get_current_dispatch_mode  # noqa: E402
from torch.utils.data import DataLoader, Dataset  # noqa: E402

from braze.lightning_ext import MetersCallback, compile_regions  # noqa: E402
from braze.lightning_ext.measured import Window, draw, summary  # noqa: E402
from braze.lightning_ext.peaks import PEAKS, peak_flops  # noqa: E402
from braze.lightning_ext.table import Table  # noqa: E402

pytestmark = [
    pytest.mark.filterwarnings("ignore::lightning.fabric.utilities.warnings.PossibleUserWarning"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*is deprecated:FutureWarning"),
    # torch's compiler looks whether an input has a gradient.
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"),
]
WIDTH, ROWS = 16, 4
#: Seconds on the clock below.
SAMPLE, STEP, VALIDATION = 0.25, 2.0, 100.0


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def perf_counter(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr("braze.lightning_ext.meters.time", clock)
    return clock


class Data(Dataset):
    def __init__(self, clock: Any = None, tokens: bool = False) -> None:
        self.clock, self.tokens = clock or Clock(), tokens

    def __len__(self) -> int:
        return 9 * ROWS

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        self.clock.now += SAMPLE
        return {"x": torch.ones(WIDTH), **({"ids": torch.arange(5)} if self.tokens else {})}


class Net(L.LightningModule):
    def __init__(self, clock: Any = None, fails_at: int = -1) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH))
        self.clock, self.fails_at = clock or Clock(), fails_at

    def training_step(self, batch: dict[str, Tensor], index: int) -> Tensor:
        if index == self.fails_at:
            raise LookupError("as a machine may")
        self.clock.now += STEP
        return self.layers(batch["x"]).sum()

    def validation_step(self, batch: dict[str, Tensor], index: int) -> None:
        self.clock.now += VALIDATION

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


QUIET: dict[str, Any] = {
    "max_epochs": 1, "logger": False, "enable_progress_bar": False, "enable_model_summary": False,
    "enable_checkpointing": False,
}  # fmt: skip


def train(meters: MetersCallback, net: Net, data: Data, validate: bool = False, **options: Any) -> L.Trainer:
    trainer = L.Trainer(accelerator="cpu", devices=1, callbacks=[meters], **{**QUIET, **options})
    trainer.fit(net, DataLoader(data, batch_size=ROWS), DataLoader(data, batch_size=ROWS) if validate else None)
    return trainer


#: Of one batch: each layer's product, the gradients of its weights, and of the second layer's input.
FLOPS = 2 * ROWS * WIDTH * WIDTH * (2 + 2 + 1)


def test_readings_are_those_of_the_clock_and_leave_validation_out(clock: Clock) -> None:
    meters = MetersCallback(4, device_peak=1e6)
    train(meters, Net(clock), Data(clock), validate=True, val_check_interval=3)
    wait = ROWS * SAMPLE
    seconds = wait + STEP
    assert [window.step for window in meters.windows] == [5, 9]  # the first batch is counted, not measured
    for window in meters.windows:
        assert window.seconds == seconds
        assert window.wait == wait
        assert window.rate == pytest.approx(ROWS / seconds)
        assert window.flops == pytest.approx(FLOPS / seconds)
        assert window.mfu == pytest.approx(FLOPS / seconds / 1e6)
        assert window.memory > 2**20


def test_compiled_regions_count_as_many_operations(clock: Clock) -> None:
    net = Net(clock)
    net.layers = nn.Sequential(
        *(nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Identity(), nn.LayerNorm(WIDTH)) for _ in "ab")
    )
    compile_regions(net, backend="aot_eager")
    meters = MetersCallback(4)
    with pytest.MonkeyPatch.context():
        train(meters, net, Data(clock))
    assert meters.windows[-1].flops == pytest.approx(FLOPS / meters.windows[-1].seconds)


def test_unknown_device_has_no_mfu(clock: Clock) -> None:
    meters = MetersCallback(4)
    train(meters, Net(clock), Data(clock))
    assert meters.windows[0].mfu is None
    assert "mfu" not in meters.windows[0].metrics("samples")
    assert "the peak of this device is not known" in str(meters.summary())


def test_tokens_are_the_elements_of_the_first_integers(clock: Clock) -> None:
    meters = MetersCallback(4, unit="tokens")
    train(meters, Net(clock), Data(clock, tokens=True))
    assert meters.windows[0].rate == pytest.approx(5 * ROWS / meters.windows[0].seconds)
    assert meters.count({"x": torch.ones(3)}) is None
    assert MetersCallback().count(["no tensor"]) is None


def test_a_batch_with_nothing_to_count_leaves_the_rate_out(clock: Clock) -> None:
    meters = MetersCallback(4, unit="tokens")
    train(meters, Net(clock), Data(clock))
    assert meters.windows[0].rate is None
    assert "tokens_per_s" not in str(meters.summary())


def test_metrics_reach_the_progress_bar_and_the_logger(clock: Clock) -> None:
    from lightning.pytorch.loggers.logger import DummyLogger

    logged: list[dict[str, float]] = []

    class Logger(DummyLogger):
        def log_metrics(self, metrics: dict[str, float], step: int) -> None:
            logged.append({"step": step, **metrics})

    logger = Logger()
    trainer = train(MetersCallback(4, device_peak=1e6), Net(clock), Data(clock), logger=logger, log_every_n_steps=1)
    names = {"step_ms", "wait_ms", "samples_per_s", "tflops", "mfu", "peak_gib"}
    assert names <= set(trainer.progress_bar_metrics)
    assert trainer.progress_bar_metrics["step_ms"] == pytest.approx(3000)
    assert [row["step"] for row in logged if "step_ms" in row] == [4, 8]
    assert names <= set(logged[-1])


def test_summary_page_and_picture_are_written(tmp_path: Path, capsys: pytest.CaptureFixture[str], clock: Clock) -> None:
    train(MetersCallback(2, folder=str(tmp_path / "new")), Net(clock), Data(clock))
    text = (tmp_path / "new" / "summary.txt").read_text()
    assert "cpu, 32-true, processes: 1" in text
    assert "waiting for data took 33.3% of the time" in text
    assert "step_ms" in capsys.readouterr().out
    assert (tmp_path / "new" / "summary.png").read_bytes().startswith(b"\x89PNG")


def test_summary_leaves_the_first_window_out_and_pictures_of_one_window_draw(tmp_path: Path) -> None:
    slow = Window(step=2, seconds=9.0, wait=1.0, rate=None, flops=None, mfu=None, memory=1)
    steady = [Window(step=n, seconds=n / 10, wait=0.1, rate=5.0, flops=1e12, mfu=0.5, memory=2**30) for n in (4, 6, 8)]
    page = summary([slow, *steady], "samples", "title")
    assert ("step_ms", "600", "400", "800") in page.rows
    assert ("mfu", "0.5", "0.5", "0.5") in page.rows
    assert ("step_ms", "9000", "9000", "9000") in summary([slow], "samples", "").rows
    for number, windows in enumerate(([slow], [slow, *steady])):
        draw(windows, "samples", "title", tmp_path / f"{number}.png")
        assert (tmp_path / f"{number}.png").exists()


def test_chrome_trace_holds_the_steps(tmp_path: Path) -> None:
    train(MetersCallback(2, folder=str(tmp_path), trace_steps=2), Net(), Data())
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    steps = {event["name"] for event in events if event.get("name", "").startswith("ProfilerStep")}
    assert steps == {"ProfilerStep#3", "ProfilerStep#4"}


def test_a_run_too_short_for_a_trace_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for batches, said in ((1, "has 0 of 2 steps"), (4, "has 1 of 2 steps"), (5, "")):
        caplog.clear()
        with caplog.at_level("INFO"):
            train(MetersCallback(2, folder=str(tmp_path), trace_steps=2), Net(), Data(), limit_train_batches=batches)
        assert said in caplog.text
        assert ("the trace has" in caplog.text) == bool(said)


@pytest.mark.parametrize("fails_at", [0, 3])
def test_nothing_is_left_behind_by_a_failure(fails_at: int) -> None:
    meters = MetersCallback()
    trainer = L.Trainer(accelerator="cpu", callbacks=[meters], **QUIET)
    with pytest.raises(LookupError):
        trainer.fit(Net(fails_at=fails_at), DataLoader(Data(), batch_size=ROWS))
    assert _get_current_dispatch_mode() is None
    assert not {"start", "stop"} & vars(trainer.profiler).keys()
    assert pickle.loads(pickle.dumps(meters)).every_n_steps == 20


def test_an_epoch_that_a_hook_ends_at_once_stops_the_count() -> None:
    class Skips(Net):
        def on_train_batch_start(self, batch: Any, index: int) -> int:
            return -1

        def on_train_epoch_end(self) -> None:
            modes.append(_get_current_dispatch_mode())

    modes: list[Any] = []
    train(MetersCallback(), Skips(), Data(), max_epochs=2)
    assert modes == [None, None]


def test_a_batch_in_which_a_hook_ends_the_epoch_is_left_out(clock: Clock) -> None:
    class Ends(Net):
        def on_train_batch_start(self, batch: Any, index: int) -> int | None:
            return -1 if index == 4 else None

    meters = MetersCallback(2)
    train(meters, Ends(clock), Data(clock), validate=True, max_epochs=2)
    assert [window.seconds for window in meters.windows] == [STEP + ROWS * SAMPLE] * 3
    assert [window.wait for window in meters.windows] == [ROWS * SAMPLE] * 3


def test_losses_are_the_same_with_meters() -> None:
    weights = []
    for every in (1000, 2):
        torch.manual_seed(0)
        net = Net()
        train(MetersCallback(every), net, Data())
        weights.append(net.layers[0].weight)
    torch.manual_seed(0)
    net = Net()
    trainer = L.Trainer(
        accelerator="cpu", max_epochs=1, logger=False, enable_checkpointing=False, enable_progress_bar=False
    )
    trainer.fit(net, DataLoader(Data(), batch_size=ROWS))
    for weight in weights:
        torch.testing.assert_close(weight, net.layers[0].weight, rtol=0, atol=0)


@pytest.mark.gpu
def test_on_a_gpu_memory_is_of_tensors_and_mfu_of_a_known_peak() -> None:
    meters = MetersCallback(4)
    trainer = L.Trainer(accelerator="gpu", devices=1, callbacks=[meters], **QUIET)
    trainer.fit(Net(), DataLoader(Data(), batch_size=ROWS))
    known = peak_flops(torch.cuda.get_device_name(), "32-true") is not None
    for window in meters.windows:
        assert 0 < window.memory < 2**30
        assert (window.mfu is not None) == known
        assert window.flops == pytest.approx(FLOPS / window.seconds)


def test_bad_arguments_name_the_fix() -> None:
    with pytest.raises(ValueError, match="every_n_steps must be at least 1, got 0"):
        MetersCallback(0)
    with pytest.raises(ValueError, match="unit must be 'samples' or 'tokens', got 'words'"):
        MetersCallback(unit="words")
    with pytest.raises(ValueError, match="trace_steps must be 0, or more with a folder"):
        MetersCallback(trace_steps=3)
    with pytest.raises(RuntimeError, match="train for more than 20 batches"):
        MetersCallback().summary()


@pytest.mark.parametrize(
    ("name", "precision", "expected"),
    [
        ("NVIDIA H100 80GB HBM3", "bf16-mixed", 989.4e12),
        ("NVIDIA H200", "16-mixed", 989.4e12),
        ("NVIDIA A100-SXM4-80GB", "bf16-true", 312e12),
        ("NVIDIA L4", "bf16-mixed", 121e12),
        ("NVIDIA L40S", "bf16-mixed", 362.05e12),
        ("NVIDIA A100-SXM4-80GB", "32-true", 19.5e12),
        ("NVIDIA H100 NVL", "bf16-mixed", None),  # not in the list
        ("NVIDIA L40", "bf16-mixed", None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", "bf16-mixed", None),
        ("NVIDIA A100-SXM4-80GB", "64-true", None),
        ("NVIDIA H100 80GB HBM3", "transformer-engine", None),
    ],
)
def test_peaks_are_of_this_very_device(name: str, precision: str, expected: float | None) -> None:
    assert peak_flops(name, precision) == expected


def test_float32_products_count_as_tf32_where_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: "high")
    assert peak_flops("NVIDIA A100-SXM4-80GB", "32-true") == 156e12
    assert all(peak.source and peak.half >= peak.tf32 >= peak.float32 for peak in PEAKS.values())


def test_table_prints_with_and_without_rich(capsys: pytest.CaptureFixture[str]) -> None:
    rich = pytest.importorskip("rich", reason="needs rich")
    table = Table(("a", "b"), [("long enough", "1")], title="title", notes=["a note"])
    assert str(table) == "title\na            b\n──────────────\nlong enough  1\na note"
    rich.print(table)
    printed = capsys.readouterr().out
    assert all(word in printed for word in ("title", "long enough", "a note"))
