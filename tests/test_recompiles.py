"""What made torch compile a region again, what the user is told, and the compile cache."""

from __future__ import annotations

import dataclasses
import inspect
import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters

from braze.lightning_ext import compile_regions, load_compile_cache, save_compile_cache
from braze.lightning_ext.recompiles import CAUSES

from .test_regional import WIDTH, Block, _no_graphs, batch, blocks, eager  # noqa: F401  (a fixture)

pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")


def causes(report: Any) -> set[str]:
    return {one.cause for region in report for one in region.recompiles}


def test_ragged_last_batch_warns_once_with_what_to_change() -> None:
    model = blocks(3)
    report = eager(model, budget=9)
    model(batch(4))
    with pytest.warns(UserWarning, match=r"Block .*another batch size .*expected 4, actual 3.*drop_last=True"):
        model(batch(3))
    with torch.no_grad():
        model(batch(2))
    assert {"batch size", "grad mode"} <= causes(report)


def test_ragged_last_batch_needs_no_graph_with_a_dynamic_batch() -> None:
    model = blocks(3)
    report = eager(model, dynamic_batch=True)
    for rows in (4, 3, 2):
        model(batch(rows))
    assert report.frames == 2
    assert "batch size" not in causes(report)


@pytest.mark.filterwarnings("ignore:compile_regions")
class Dropped(Block):
    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.dropout(super().forward(x), 0.5, self.training)


CHANGES = {
    "grad mode": lambda block, x: torch.no_grad()(block)(x),
    "global state": lambda block, x: torch.autocast("cpu", torch.bfloat16)(block)(x),
    "training mode": lambda block, x: block.eval()(x),
    "batch size": lambda block, x: block(x[:2]),
    "shape": lambda block, x: block(x[:, :3]),
    "dtype": lambda block, x: block.double()(x.double()),
    "number of dimensions": lambda block, x: block(x[0]),
    "memory layout": lambda block, x: block(x.transpose(0, 1).contiguous().transpose(0, 1)),
    "frozen parameter": lambda block, x: block.requires_grad_(False)(x),
}


@pytest.mark.filterwarnings("ignore:compile_regions")
@pytest.mark.parametrize("cause", CHANGES)
def test_causes_are_told_from_torchs_guard_failures(cause: str) -> None:
    model = nn.Sequential(Dropped(), Dropped())
    report = eager(model)
    x = torch.randn(4, 6, WIDTH, requires_grad=True)
    model[0](x)
    CHANGES[cause](model[0], x)
    if cause == "frozen parameter" and report.frames == 1:
        pytest.skip("this torch makes no graph of its own for frozen parameters")
    assert causes(report) == {cause}


def test_float_attributes_and_optional_arguments_are_told() -> None:
    class Dropped(Block):
        def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
            return nn.functional.dropout(super().forward(x, mask), self.rate)

    model = nn.Sequential(Dropped(rate=0.1), Dropped(rate=0.2))
    report = eager(model)
    model(batch().requires_grad_())
    assert causes(report) == {"float attribute"}
    assert "rate == 0.1" in str(report)
    model = nn.Sequential(Block(), Block())
    report = eager(model)
    model[1](model[0](batch().requires_grad_(), mask=None), mask=torch.ones(WIDTH))
    assert causes(report) == {"optional argument"}


@pytest.mark.parametrize(
    ("name", "values", "cause"),
    [("heads", (2, 4), "int attribute"), ("name", ("a", "b"), "attribute"), ("flag", (True, False), "attribute")],
)
def test_attributes_that_differ_are_told(name: str, values: tuple[Any, Any], cause: str) -> None:
    class Chooses(Block):
        heads, name, flag = 2, "a", True

        def forward(self, x: Tensor) -> Tensor:
            heads = x.reshape(x.shape[0], self.heads, -1).softmax(-1).flatten(1)
            return self.linear(heads) if self.flag and self.name == "a" else self.norm(heads)

    model = nn.Sequential(Chooses(), Chooses())
    for block, value in zip(model, values, strict=True):
        setattr(block, name, value)
    report = eager(model)
    model(batch().requires_grad_())
    assert causes(report) == {cause}
    assert f"module.{name} ==" in str(report)


@pytest.mark.skipif(
    "recompile_limit" not in inspect.signature(torch.compile).parameters, reason="this torch has one limit for all"
)
@pytest.mark.filterwarnings("ignore:compile_regions")
def test_blocks_with_rates_of_their_own_are_all_compiled() -> None:
    """Stochastic depth: torch specializes on each rate, and would run the ninth block eagerly, or refuse."""

    class Dropped(Block):
        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.dropout(super().forward(x), self.rate)

    model = nn.Sequential(*(Dropped(rate=index / 20) for index in range(1, 10)))
    report = eager(model)
    model(batch().requires_grad_())
    assert report.frames == 9


def test_budget_warning_lists_causes_and_changes() -> None:
    model = nn.Sequential(Block(), Block())
    report = eager(model, budget=1)
    x = batch().requires_grad_()
    model(x)
    told = r"compiled 2 times; its budget is 1:\n  grad mode: .*validation"
    with torch.no_grad(), pytest.warns(UserWarning, match=told):
        model[0](x)
    model(x)
    assert report.frames == 2


def test_a_graph_break_is_told() -> None:
    class Broken(Block):
        def forward(self, x: Tensor) -> Tensor:
            x = super().forward(x)
            torch._dynamo.graph_break()
            return x + 1

    model = nn.Sequential(Broken(), Broken())
    report = compile_regions(model, backend="eager")
    model(batch())
    assert report.regions[0].breaks
    assert "fullgraph=True" in str(report)


def test_report_pickles_without_the_users_functions() -> None:
    report = compile_regions(blocks(2), backend=lambda graph, inputs: graph.forward)
    assert str(pickle.loads(pickle.dumps(report))) == str(report)


def test_report_is_plain_values() -> None:
    model = blocks(3)
    model.append(nn.Sequential())
    report = eager(model)
    model(batch())
    found = json.loads(json.dumps(report.as_dicts()))
    assert found[0]["kind"] == "Block"
    assert found[0]["frames"] == 2
    assert found[0]["recompiles"] == [dataclasses.asdict(one) for one in report.regions[0].recompiles]


def test_every_cause_says_what_to_change() -> None:
    assert all(cause and change for _, cause, change in CAUSES)


def test_bad_arguments_change_nothing() -> None:
    with pytest.raises(TypeError, match=r"module must be a torch.nn.Module, got list"):
        compile_regions([Block()])
    model = blocks(2)
    with pytest.raises(ValueError, match="budget must be at least 1, got 0"):
        compile_regions(model, budget=0)
    with pytest.raises(TypeError, match="no_such"):
        compile_regions(model, no_such=1)
    assert "forward" not in vars(model[1])
    lazy = nn.Sequential(nn.LazyLinear(3))
    with pytest.raises(ValueError, match=r"0\.weight has none yet; run one batch"):
        compile_regions(lazy)


# The compile cache


def test_cache_of_one_run_serves_the_next(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The next run stands for a fresh machine: torch's memory, its folder and the counts are new."""
    from torch.compiler._cache import CacheArtifactManager

    found = []
    for run in ("first", "second"):
        monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / run))
        CacheArtifactManager.clear()
        torch._dynamo.reset()
        counters.clear()
        loaded = load_compile_cache(tmp_path / "cache")
        model = nn.Sequential(*(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)) for _ in range(2)))
        compile_regions(model)
        with torch.no_grad():
            model(torch.ones(2, 4))
        inductor = counters["inductor"]
        found.append((loaded, inductor["fxgraph_cache_hit"], inductor["fxgraph_cache_miss"]))
        assert save_compile_cache(tmp_path / "cache")
    assert found == [(False, 0, 1), (True, 1, 0)]


def test_cache_needs_its_folder(tmp_path: Path) -> None:
    assert not load_compile_cache(tmp_path / "nothing")
    with pytest.raises(FileNotFoundError, match="the folder of path must exist"):
        save_compile_cache(tmp_path / "no" / "cache")
