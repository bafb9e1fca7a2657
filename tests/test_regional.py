"""Regional compilation: which blocks are found, how many graphs they need, and that nothing else of a model changes."""

from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.utils.data import DataLoader, TensorDataset

from braze.lightning_ext import compile_regions, uncompile_regions

# torch's compiler looks whether an input has a gradient, and means to hide what autograd says to that.
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
WIDTH = 8


class Block(nn.Module):
    def __init__(self, layer_idx: int = 0, rate: float = 0.5) -> None:
        super().__init__()
        self.layer_idx, self.rate = layer_idx, rate
        self.norm, self.linear = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        y = self.linear(self.norm(x)) * (self.layer_idx + 1)
        return x + (y if mask is None else y * mask)


class Stage(nn.Module):
    def __init__(self, width: int, depth: int) -> None:
        super().__init__()
        for index in range(depth):
            setattr(self, f"block{index}", nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.LayerNorm(width)))
        self.depth = depth

    def forward(self, x: Tensor) -> Tensor:
        for index in range(self.depth):
            x = getattr(self, f"block{index}")(x)
        return x


@pytest.fixture(autouse=True)
def _no_graphs() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def blocks(count: int = 12) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(WIDTH, WIDTH), *(Block(index) for index in range(count)))


def batch(rows: int = 4) -> Tensor:
    return torch.randn(rows, WIDTH, generator=torch.Generator().manual_seed(1))


def eager(model: nn.Module, **options: Any) -> Any:
    """Compile with no code generation, which leaves every count of graphs as it is."""
    return compile_regions(model, backend="eager", fullgraph=True, **options)


def gradients(model: nn.Module, x: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(model(x).square().sum(), list(model.parameters())))


def paths(report: Any) -> list[list[str]]:
    return [region.paths for region in report]


# Counts of graphs


@pytest.mark.parametrize("count", [2, 3, 12])
def test_int_layer_idx_needs_two_graphs_for_any_number_of_blocks(count: int) -> None:
    model = blocks(count)
    report = eager(model)
    for _ in range(3):
        model(batch()).sum().backward()
    assert len(report) == 1
    assert report.frames == 2
    assert not torch._dynamo.config.allow_unspec_int_on_nn_module


def test_equal_blocks_need_one_graph() -> None:
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), *(Block() for _ in range(12)))
    report = eager(model)
    model(batch())
    assert report.frames == 1


def test_values_and_gradients_are_those_without_regions() -> None:
    plain, model = blocks(), blocks()
    eager(model)
    for ours, theirs in zip(gradients(model, batch()), gradients(plain, batch()), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


@pytest.fixture
def fit() -> Any:
    """Trains a model whose training_step logs, on one device; the graphs that were compiled."""
    lightning = pytest.importorskip("lightning", reason="needs the extra braze[lightning]")

    class Net(lightning.LightningModule):
        def __init__(self, logs: int) -> None:
            super().__init__()
            self.logs, self.body = logs, blocks(4)

        def training_step(self, data: list[Tensor], index: int) -> Tensor:
            loss = self.body(data[0]).square().mean()
            for number in range(self.logs):
                self.log(f"loss {number}", loss)
            return loss

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=1e-3)

    def run(logs: int, compile_by: Any) -> int:
        torch._dynamo.reset()
        counters.clear()
        net = Net(logs)
        compile_by(net)
        trainer = lightning.Trainer(
            max_steps=4, accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False,
            enable_checkpointing=False,
        )  # fmt: skip
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Lightning's advice
            trainer.fit(net, DataLoader(TensorDataset(batch(16)), batch_size=4))
        return counters["stats"]["unique_graphs"]

    return run


def test_self_log_breaks_no_graph(fit: Any) -> None:
    assert [fit(logs, lambda net: compile_regions(net, backend="eager")) for logs in (0, 1, 3)] == [2, 2, 2]


def test_regions_are_compiled_where_lightning_module_compile_compiles_nothing(fit: Any) -> None:
    def both(net: nn.Module) -> None:
        net.compile(backend="eager")
        compile_regions(net, backend="eager")

    assert fit(0, lambda net: net.compile(backend="eager")) == 0
    assert fit(0, both) == 2


def test_kinds_of_one_class_do_not_share_a_limit() -> None:
    """Nine widths of one class: torch would stop at eight graphs of one forward, and run the others eagerly."""
    model = nn.ModuleList(Stage(4 + width, 2) for width in range(9))
    report = eager(model)
    with torch.no_grad():
        for width, stage in enumerate(model):
            stage(torch.randn(2, 4 + width))
    assert [region.frames for region in report] == [1] * 9


# What is found


MODELS = {
    "vit_tiny_patch16_224": {"img_size": 32},
    "mixer_s32_224": {"img_size": 64},
    "resnet34": {},
    "convnext_atto": {},
    "efficientnet_b0": {},
    "regnety_002": {},
}


@pytest.mark.parametrize("name", MODELS)
def test_timm_models_without_a_module_list_of_blocks(name: str) -> None:
    timm = pytest.importorskip("timm", reason="needs the extra braze[vision]")
    model = timm.create_model(name, num_classes=2, **MODELS[name]).eval()
    lists = [part for part in model.modules() if isinstance(part, nn.ModuleList)]
    assert not any(len(part) > 1 and len({type(child) for child in part}) == 1 for part in lists)
    size = MODELS[name].get("img_size", 32)
    images = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        before = model(images)
        report = eager(model)
        torch.testing.assert_close(model(images), before, rtol=0, atol=0)
    assert len(report) > 0
    for region in report:
        assert len(region.paths) > 1
        assert 1 <= region.frames <= 2


def test_torchvision_models() -> None:
    models = pytest.importorskip("torchvision.models", reason="needs the extra braze[vision]")
    assert ["layer1.0", "layer1.1"] in paths(eager(models.resnet18()))
    vit = models.VisionTransformer(32, 16, 3, 1, WIDTH, WIDTH, num_classes=2)
    assert paths(eager(vit)) == [[f"encoder.layers.encoder_layer_{index}" for index in range(3)]]


def test_numbered_attributes_in_nested_stages() -> None:
    model = nn.ModuleDict({"a": Stage(4, 3), "b": Stage(8, 2)})
    assert paths(eager(model)) == [["a.block0", "a.block1", "a.block2"], ["b.block0", "b.block1"]]


def test_the_outermost_unit_is_taken() -> None:
    model = nn.Sequential(*(nn.Sequential(Block(), nn.Linear(WIDTH, 3), nn.Linear(3, WIDTH)) for _ in range(3)))
    assert paths(eager(model)) == [["0", "1", "2"]]


def test_layers_of_twin_encoders_are_taken_for_the_encoders() -> None:
    model = nn.ModuleDict({"query": blocks(4), "key": blocks(4)})
    assert paths(eager(model)) == [[f"{twin}.{index}" for twin in ("query", "key") for index in range(1, 5)]]


def test_blocks_of_other_shapes_and_lone_layers_are_left() -> None:
    model = nn.Sequential(Stage(4, 1), Stage(5, 1), *(nn.Linear(4, 4) for _ in range(3)))
    assert len(eager(model)) == 0
    model = nn.Sequential(Block(), Block(), Block())
    model[2].linear = nn.Linear(WIDTH, WIDTH, bias=False)
    report = eager(model)
    assert paths(report) == [["0", "1"]]
    assert [(left.path, left.reason) for left in report.left] == [("2", "its structure occurs once")]
    assert "left: Block 2: its structure occurs once" in str(report)


def test_a_block_at_two_places_is_one_block() -> None:
    block = Block()
    assert len(eager(nn.Sequential(block, block))) == 0
    model = nn.ModuleDict({"a": nn.Sequential(block, Block()), "b": nn.Sequential(block, nn.Identity())})
    assert paths(eager(model)) == [["a.0", "a.1"]]


def test_what_the_user_compiled_or_replaced_is_left() -> None:
    model = blocks(4)
    model[1].compile(backend="eager")
    model[2].forward = lambda x: x
    report = eager(model)
    assert paths(report) == [["3", "4"]]
    assert {left.path: left.reason for left in report.left} == {
        "1": "it is compiled already",
        "2": "its forward was replaced by something else",
    }


# What stays as it was


def test_no_key_gains_orig_mod_and_undo_leaves_nothing() -> None:
    model = blocks()
    keys, classes, contents = list(model.state_dict()), list(map(type, model.modules())), [*map(set, map(vars, model))]
    eager(model)
    model(batch())
    assert list(model.state_dict()) == keys
    assert list(map(type, model.modules())) == classes
    uncompile_regions(model)
    assert [*map(set, map(vars, model))] == contents
    counters.clear()
    model(batch(5))
    assert not counters["stats"]


def test_a_second_call_compiles_nothing_anew() -> None:
    model = blocks()
    first = eager(model)
    model(batch())
    counters.clear()
    second = eager(model)
    model(batch())
    assert not counters["stats"]
    assert second.regions == first.regions
    with pytest.raises(
        ValueError, match=r"arguments must be those .*'budget': 4.* got .*'budget': 5.*uncompile_regions"
    ):
        eager(model, budget=5)


def test_deepcopy_runs_its_own_weights_in_the_same_graphs() -> None:
    model = blocks()
    report = eager(model)
    before = model(batch())
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
    assert not torch.equal(twin(batch()), before)
    torch.testing.assert_close(model(batch()), before, rtol=0, atol=0)
    assert report.frames == 2
    uncompile_regions(twin)
    assert "forward" not in vars(twin[1])
    assert "forward" in vars(model[1])


def test_pickle_reads_back_a_model_without_regions() -> None:
    model = blocks()
    report = eager(model)
    before = model(batch())
    counters.clear()
    read, kept = pickle.loads(pickle.dumps((model, report)))
    torch.testing.assert_close(read(batch()), before, rtol=0, atol=0)
    assert not counters["stats"]
    assert kept.frames == report.frames == 2
    assert str(kept) == str(report)
    assert paths(eager(read)) == paths(report)


def test_compiling_the_whole_model_later_takes_the_blocks_in() -> None:
    model = blocks(3)
    report = eager(model)
    counters.clear()
    whole = torch.compile(model, backend="eager", fullgraph=True)
    whole(batch())
    assert counters["stats"]["unique_graphs"] == 1
    assert report.frames == 0
    for grad in (True, False):  # the regions by themselves, compiled twice: none of the whole model's business
        with torch.set_grad_enabled(grad):
            model[1](batch())
    assert report.frames == 2
    counters.clear()
    whole(batch())
    assert not counters["stats"]


def test_options_stay_the_users() -> None:
    """torch.compile takes ``guard_filter_fn`` out of the dict that it gets, and the second kind would go without."""
    seen = []
    options = {"guard_filter_fn": lambda guards: [seen.append(len(guards)) or True for _ in guards]}
    model = nn.ModuleDict({"a": Stage(4, 2), "b": Stage(8, 2)})
    compile_regions(model, backend="eager", options=options)
    assert list(options) == ["guard_filter_fn"]
    model["a"](torch.randn(2, 4))
    count = len(seen)
    model["b"](torch.randn(2, 8))
    assert 0 < count < len(seen)


@pytest.fixture
def one_process(tmp_path: Path) -> Iterator[Any]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield dist.device_mesh.init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


@pytest.mark.parametrize("order", ["shard first", "compile first"])
def test_sequential_blocks_under_fsdp2_are_compiled(order: str, one_process: Any) -> None:
    from torch.distributed.fsdp import fully_shard

    stage = Stage(WIDTH, 3)
    expected = gradients(copy.deepcopy(stage), batch())
    reports = [] if order == "shard first" else [eager(stage)]
    for part in [*stage.children(), stage]:
        fully_shard(part, mesh=one_process)
    reports += [eager(stage)] if order == "shard first" else []
    stage(batch()).square().sum().backward()
    assert 1 <= reports[0].frames <= 2
    for parameter, gradient in zip(stage.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad.full_tensor(), gradient, rtol=0, atol=0)
