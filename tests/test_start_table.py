"""The table at the start of a run: one, on rank zero, of the model and its loaders."""

from __future__ import annotations

import logging
from typing import Any

import pytest

pytest.importorskip("lightning", reason="needs the extra braze[lightning]")
from torch import Tensor, nn

from braze.kernels import fuse
from braze.layouts import channels_last
from braze.lightning_ext import FusedCallback, FusedPrecision, PrefetchCallback, compile_regions
from braze.lightning_ext.start_report import HEADER, start_table

from .lightning_net import WARNINGS, Net, batches, make_trainer

pytestmark = WARNINGS
TIMES = "×"  # noqa: RUF001 (the multiplication sign is meant)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up = nn.RMSNorm(8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.up(self.norm(x))


def test_rows_say_what_was_done_where_and_why() -> None:
    model = nn.Sequential(*(Block() for _ in range(3)))
    images = nn.Sequential(nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 3))
    fusion = fuse(model)
    table = start_table(
        {
            "modules": fusion,
            "compiled": compile_regions(nn.ModuleList([nn.ModuleList(model[:2]), Block()]), backend="eager"),
            "layout": channels_last(images),
            "precision": "bf16-mixed",
            "loaders": [("train: DataLoader", "on cuda:0, 2 batches ahead")],
            "regions of nothing": compile_regions(nn.Linear(1, 1)),
            "modules of nothing": fuse(nn.Identity()),
            "layout of nothing": channels_last(nn.Identity()),
            "what is off": None,
        },
        "title",
    )
    (check,) = {record.check for record in fusion if record.check is not None and record.path == "0.norm"}
    rows = {(row[0], row[1]): row[2:] for row in table.rows}
    assert table.header == tuple(name for name in HEADER if name != "time"), "nothing was timed"
    what, traffic, activations, why = rows["modules", f"*.norm {TIMES}3"]
    assert what == "RMSNorm → rms_norm"
    assert traffic.endswith("/token")
    assert activations.endswith("/token")
    assert f"/ {check.budget:.1e}" in why
    assert rows["compiled", f"*.* {TIMES}2"][0] == "Block compiled"
    assert ("", "1", "Block", "", "", "left: its structure occurs once") in table.rows
    assert rows["layout", f"* {TIMES}2"][0] == "channels_last: converted"
    assert rows["precision", ""][0] == "bf16-mixed"
    assert rows["loaders", "train: DataLoader"][0] == "on cuda:0, 2 batches ahead"
    assert rows["regions of nothing", ""][::3] == ("nothing to compile", "no block repeats")
    assert rows["modules of nothing", ""][::3] == ("nothing to swap", "no joint was found")
    assert rows["layout of nothing", ""][::3] == ("nothing to convert", "no 2-D convolution was found")
    assert rows["what is off", ""][0] == "off"
    assert table.notes == [*fusion.totals(), "0 of 0 joints fused"]


def tables(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [message for message in caplog.messages if "────" in message]


@pytest.mark.parametrize("kind", ["plugin", "callback"])
def test_model_and_loaders_are_in_one_table(kind: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="lightning.pytorch.utilities.rank_zero")
    options: dict[str, Any] = {"skip": ["*.second"], "memory_format": "channels_last"}
    plugin = FusedPrecision("bf16-mixed", **options) if kind == "plugin" else False
    callbacks = [PrefetchCallback(), *([] if plugin else [FusedCallback(**options)])]
    trainer, net = make_trainer("bf16-mixed", plugin, callbacks=callbacks, num_sanity_val_steps=0), Net()
    trainer.fit(net, batches(), batches())
    (table,) = tables(caplog)
    title = "FusedPrecision('bf16-mixed')" if plugin else "FusedCallback"
    lines = table.splitlines()
    assert lines[0] == f"{title}, PrefetchCallback"
    subjects = ["modules", "skipped", "compiled", "layout", "precision", "loaders"]
    assert [line.split()[0] for line in lines if line.split()[0] in subjects] == subjects
    for part in ("LayerNorm → layer_norm", "left, as skip says", "nothing to convert", "train: DataLoader"):
        assert part in table
    assert "validate: DataLoader" in table, "known although nothing has been validated yet"
    assert table.endswith("of activations")
    trainer.validate(net, batches(), verbose=False)
    assert tables(caplog)[1:] == [tables(caplog)[1]]
    assert "LayerNorm" not in tables(caplog)[1], "the model's part was told before"
    assert "validate: DataLoader" in tables(caplog)[1]


def test_without_prefetching_the_table_is_the_models(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="lightning.pytorch.utilities.rank_zero")
    plugin = FusedPrecision("bf16-mixed")
    make_trainer("bf16-mixed", plugin).fit(Net(), batches())
    assert tables(caplog) == [str(plugin.report)]
    assert "RMSNorm → rms_norm" in str(plugin.report)
    assert "loaders" not in str(plugin.report)
