"""One line of FusedPrecision, unchanged, on two processes: DDP, FSDP, ModelParallelStrategy (FSDP2) and Fabric.

Gradients are accumulated over two batches and clipped by norm in all runs; fused runs step with a fused optimizer,
release gradients early and, but for bf16-true, compile regions.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp

pytest.importorskip("lightning", reason="needs the extra braze[lightning]")
from . import lightning_ranks as ranks
from .lightning_net import WARNINGS, assert_same_curve, batches, distance, make_trainer

pytestmark = [*WARNINGS, pytest.mark.xdist_group("lightning strategies")]
CASES = [(name, precision) for name, precisions in ranks.PRECISIONS.items() for precision in precisions]
Outcomes = dict[tuple[int, str], Any]


@pytest.fixture(scope="module")
def outcomes() -> Iterator[Outcomes]:
    with tempfile.TemporaryDirectory() as folder, mp.Manager() as manager:
        results = manager.dict()
        mp.spawn(ranks.train_all, (folder, results), nprocs=ranks.PROCESSES)
        yield dict(results)


def of(outcomes: Outcomes, title: str, rank: int = 0) -> Any:
    found = outcomes[rank, title]
    assert not isinstance(found, str), found
    return found


def test_clipping_decides_the_exact_curve(outcomes: Outcomes) -> None:
    assert distance(of(outcomes, "exact")["losses"], of(outcomes, "unclipped")["losses"]) > 0.1


def test_the_exact_curve_is_a_single_devices(outcomes: Outcomes) -> None:
    """So that runs held to it below are held to clipping by the norm of whole gradients."""
    torch.manual_seed(0)
    net = ranks.Clipped()
    options = {"gradient_clip_val": ranks.CLIP, "accumulate_grad_batches": 2}
    make_trainer("64-true", False, **options).fit(net, batches(ranks.PROCESSES * 8))
    curves = [of(outcomes, "exact", rank)["losses"] for rank in range(ranks.PROCESSES)]
    means = [sum(losses) / ranks.PROCESSES for losses in zip(*curves, strict=True)]
    float32 = distance(of(outcomes, "ddp 32-true vanilla")["losses"], curves[0])
    assert distance(means, net.losses) <= 1e-6 * float32, "float64 rounds 2⁻²⁹ as much"


@pytest.mark.parametrize(("name", "precision"), CASES)
def test_loss_curve_is_vanillas_on_two_devices(outcomes: Outcomes, name: str, precision: str) -> None:
    for rank in range(ranks.PROCESSES):
        fused, vanilla = (of(outcomes, f"{name} {precision} {kind}", rank) for kind in ("fused", "vanilla"))
        exact = of(outcomes, "exact", rank)["losses"]
        # How far vanilla is from it is a matter of luck: each strategy adds up in an order of its own.
        vanillas = [of(outcomes, f"{one} {precision} vanilla", rank)["losses"] for one, p in CASES if p == precision]
        assert_same_curve(fused["losses"], max(vanillas, key=lambda losses: distance(losses, exact)), exact)
        assert fused["steps"] == vanilla["steps"] == 6
        assert fused["ranks"] == ranks.PROCESSES
        assert fused["regions"] == (0 if precision == "bf16-true" else 2), "the two blocks"


@pytest.mark.parametrize("name", ranks.PRECISIONS)
def test_return_value_that_ddp_discards_is_not_needed(outcomes: Outcomes, name: str) -> None:
    assert of(outcomes, f"{name} 32-true fused")["swapped"] == 2
    assert of(outcomes, f"{name} 32-true vanilla")["swapped"] == 0


@pytest.mark.parametrize(("name", "precision"), CASES)
def test_renamed_keys_there_are_none(outcomes: Outcomes, name: str, precision: str) -> None:
    fused, vanilla = (of(outcomes, f"{name} {precision} {kind}")["keys"] for kind in ("fused", "vanilla"))
    assert fused == vanilla


@pytest.mark.parametrize("name", ranks.PRECISIONS)
@pytest.mark.parametrize(("first", "second"), [("vanilla", "fused"), ("fused", "vanilla")])
def test_resumes_in_the_middle_of_an_epoch(outcomes: Outcomes, name: str, first: str, second: str) -> None:
    resumed = of(outcomes, f"{name} {first} to {second}")
    reference = of(outcomes, f"{name} vanilla to vanilla")
    assert resumed["steps"] == reference["steps"] == 6
    assert len(resumed["losses"]) == 8, "the last two batches of the first epoch and all of the second"
    # Vanilla's own noise is its distance from float64, and fused may have twice as much: three times between them. What
    # resumes is compared with vanilla resumed, not with float64: FSDPStrategy resumes otherwise than DDP.
    noise = distance(of(outcomes, f"{name} 32-true vanilla")["losses"], of(outcomes, "exact")["losses"])
    assert distance(resumed["losses"], reference["losses"]) <= 3 * noise


def test_replacing_modules_after_fsdp2_sharding_and_before_is_the_same(outcomes: Outcomes) -> None:
    prepared, after, exact = (
        of(outcomes, name)["losses"] for name in ("fsdp2 prepared", "fsdp2 32-true fused", "exact")
    )
    assert_same_curve(prepared, after, exact)


def test_stochastic_rounding_learns_under_fsdp2(outcomes: Outcomes) -> None:
    losses = of(outcomes, "fsdp2 stochastic")["losses"]
    assert sum(losses[6:]) < sum(losses[:6]), "the second epoch is the first one's batches again"


def test_norm_over_two_meshes_is_a_single_devices(outcomes: Outcomes) -> None:
    """Lightning 2.6.6 refuses to add norms up where tensor parallelism holds a part of the layers."""
    curves = []
    for precision, clip in (("32-true", ranks.CLIP), ("64-true", ranks.CLIP), ("64-true", None)):
        torch.manual_seed(0)
        net = ranks.Clipped()
        make_trainer(precision, False, gradient_clip_val=clip).fit(net, batches())
        curves.append(net.losses)
    vanilla, exact, unclipped = curves
    assert distance(exact, unclipped) > 0.1
    for rank in range(ranks.PROCESSES):
        assert_same_curve(of(outcomes, "tensor parallel", rank), vanilla, exact)


def test_channels_last_with_fsdp2_is_refused(outcomes: Outcomes) -> None:
    assert "memory_format must be None for parameters sharded by fully_shard" in outcomes[0, "fsdp2 channels_last"]


def test_averages_are_vanillas_on_two_devices(outcomes: Outcomes) -> None:
    fused, vanilla, exact = (of(outcomes, f"averaged {kind}")["losses"] for kind in ("fused", "vanilla", "exact"))
    assert_same_curve(fused, vanilla, exact)


@pytest.mark.parametrize("name", ranks.PRECISIONS)
def test_validation_and_predict_alone_run_fused_on_two_devices(outcomes: Outcomes, name: str) -> None:
    titles = (f"{name} evaluated fused", f"{name} evaluated vanilla", "ddp evaluated exact")
    for rank in range(ranks.PROCESSES):
        (fused, ours), (vanilla, theirs), (exact, truth) = (of(outcomes, title, rank) for title in titles)
        # A rounding step of the loss, and of the largest prediction, which either may be nearer by luck.
        assert abs(fused - exact) <= 2 * (abs(vanilla - exact) + 2.0**-24 * exact)
        step = 2.0**-24 * max(map(abs, truth))
        assert distance(ours, truth) <= 2 * (distance(theirs, truth) + step)


def test_float8_with_fsdp2_is_for_models_that_are_prepared(outcomes: Outcomes) -> None:
    pytest.importorskip("torchao", reason="needs the extra braze[fp8]")
    assert "call prepare_for_sharding(self) in configure_model" in outcomes[0, "fsdp2 float8 sharded"]
    found = of(outcomes, "fsdp2 float8")
    assert found["float8"] == 2
    assert sum(found["losses"][6:]) < sum(found["losses"][:6]), "the second epoch is the first one's batches again"


def test_fabric_trains_what_vanilla_trains(outcomes: Outcomes) -> None:
    fused, vanilla, exact = (of(outcomes, f"fabric {kind}")["losses"] for kind in ("fused", "vanilla", "exact"))
    assert_same_curve(fused, vanilla, exact)
