"""The search for launch parameters: on known costs, on kernels in the interpreter, and what it leaves behind."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import math
import random
import types
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed: no kernel to launch")

from triton.runtime.jit import JITFunction

from braze.benchmarks import __main__ as benchmarks
from braze.benchmarks import timing, tune
from braze.benchmarks.ops_case import Case
from braze.benchmarks.timing import Ratio
from braze.benchmarks.tune_case import Subject, _spilled
from braze.benchmarks.tune_search import MARGIN, Choice, Proof, neighbours, objection, walk
from braze.kernels import OPS
from braze.kernels.triton import launch_table
from braze.kernels.triton.launch_table import Ask

from . import contract

in_the_interpreter = pytest.mark.skipif(torch.cuda.is_available(), reason="puts a price on launches in the interpreter")
without_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens where there is none")

ASK = Ask("glu._forward", (torch.bfloat16,), (("BLOCK_N", 4), ("num_warps", 4), ("programs", 4)), (("BLOCK_D", 512),))
BEST: Choice = (("BLOCK_N", 16), ("num_warps", 8), ("programs", 2))


def cost(choice: Choice) -> float:
    """A tenth more for each doubling away from the best."""
    return math.prod(1.1 ** abs(math.log2(n / best)) for (_, n), (_, best) in zip(choice, BEST, strict=True))


def exactly(first: Choice, others: Sequence[Choice]) -> list[Ratio]:
    return [Ratio(*[cost(choice) / cost(first)] * 3) for choice in others]


def test_a_walk_finds_the_best() -> None:
    found = walk(ASK, lambda choice: None, exactly)
    assert found.best == BEST
    assert found.refused == {}


def test_a_walk_goes_around_what_is_refused() -> None:
    found = walk(ASK, lambda choice: "wrong: output 0" if choice == BEST else None, exactly)
    assert found.best != BEST
    assert cost(found.best) == pytest.approx(1.1)
    assert found.refused == {BEST: "wrong: output 0"}


def test_a_walk_stays_where_no_difference_is_proven() -> None:
    found = walk(ASK, lambda choice: None, lambda first, others: [Ratio(0.9, 0.8, 1.0) for _ in others])
    assert found.best == ASK.free
    assert found.timed == len(neighbours(ASK, ASK.free))


def test_neighbours_stay_within_bounds() -> None:
    seen = {ASK.free}
    for _ in range(12):
        seen |= {n for choice in seen for n in neighbours(ASK, choice)}
    assert {dict(choice)["BLOCK_N"] for choice in seen} == {1, 2, 4, 8, 16}
    assert {dict(choice)["num_warps"] for choice in seen} == {1, 2, 4, 8, 16, 32}
    assert {dict(choice)["programs"] for choice in seen} == {1, 2, 4, 8, 16, 32}


FASTER = Ratio(0.95, 0.94, 0.96)
EQUAL = Ratio(1.0, 0.99, 1.01)
HARDLY = Ratio(0.985, 0.98, 0.99)
UNCERTAIN = Ratio(1.0, 0.9, 1.1)
SLOWER = Ratio(1.05, 1.04, 1.06)


@pytest.mark.parametrize(
    ("proofs", "said"),
    [
        ([Proof(FASTER, EQUAL)], None),
        ([Proof(FASTER, UNCERTAIN), Proof(EQUAL, EQUAL)], None),
        ([Proof(HARDLY, HARDLY)], "more than 2 % faster"),
        ([Proof(FASTER, FASTER), Proof(SLOWER, EQUAL)], "less than 2 % slower on every shape"),
        ([Proof(FASTER, FASTER), Proof(UNCERTAIN, EQUAL)], "less than 2 % slower on every shape"),
        ([Proof(FASTER, SLOWER)], "less than 2 % slower on every shape"),
    ],
    ids=["faster", "faster or equal", "within the margin", "slower elsewhere", "unknown elsewhere", "slower when cold"],
)
def test_what_is_proposed(proofs: list[Proof], said: str | None) -> None:
    assert MARGIN == 0.02
    found = objection(proofs)
    assert (found is None) if said is None else (found is not None and said.replace(" %", "%") in found)


Launch = tuple[tuple[int, ...], dict[str, Any]]
Price = Callable[[tuple[int, ...], dict[str, Any]], float]


class PricedClock:
    """Charges a work the price of its launches, by the shape of the first tensor and by the constants, and noise."""

    def __init__(self, launches: list[Launch], price: Price, noise: float) -> None:
        self.launches, self.price, self.noise = launches, price, noise
        self.prices: dict[timing.Work, float] = {}
        self.random = random.Random(0)

    def __call__(self, work: timing.Work, repetitions: int) -> float:
        if work not in self.prices:
            (call,) = timing.ready(work, 1)
            self.launches.clear()
            call()
            self.prices[work] = sum(self.price(*launch) for launch in self.launches)
        return repetitions * self.prices[work] * math.exp(self.random.gauss(0.0, self.noise))


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[Launch]:
    """What is launched, as it comes."""
    from triton.runtime.interpreter import InterpretedFunction

    found: list[Launch] = []
    run = InterpretedFunction.run

    def noted(self: Any, *args: Any, **meta: Any) -> Any:
        found.append((tuple(args[0].shape), meta))
        return run(self, *args, **meta)

    monkeypatch.setattr(InterpretedFunction, "run", noted)
    return found


def tuned(
    launches: list[Launch], price: Price, *sizes: dict[str, int], noise: float = 0.005, backward: bool = False
) -> list[tune.Result]:
    """The search on ``l2_normalize`` of these sizes, in the interpreter, at these prices; of one size a quick one."""
    (op,) = (op for op in OPS if op.name == "l2_normalize")
    cpu = torch.device("cpu")

    def clocks(device: torch.device) -> timing.Clocks:
        clock = PricedClock(launches, price, noise)
        return timing.Clocks(clock, clock)

    op = dataclasses.replace(op, bench=sizes, differentiable=backward)
    return list(tune.tune([op], cpu, len(sizes) == 1, subject=lambda case: Subject(case, clocks)))


def best_of_64(shape: tuple[int, ...], meta: dict[str, Any]) -> float:
    return 1e-3 * (1.0 + 0.1 * abs(math.log2(meta["BLOCK_N"] / 64)))


SIZE = {"N": 48, "D": 32}


@in_the_interpreter
def test_the_search_finds_what_is_faster(launches: list[Launch]) -> None:
    found = tuned(launches, best_of_64, SIZE, backward=True)
    assert [r.records[0]["pass"] for r in found] == ["forward", "backward"]
    for result in found:
        assert result.ask is not None
        assert dict(result.ask.free) == {"BLOCK_N": 128, "num_warps": 8, "programs": 4}
        assert result.choice is not None
        assert dict(result.choice)["BLOCK_N"] == 64
        (record,) = (r for r in result.records if r["status"] == "proposed")
        assert record["ratio_low"] <= 1 / 1.1 <= record["ratio_high"]
        assert record["reasoned"] == "BLOCK_N=128 num_warps=8 programs=4"
        assert record["measured"].startswith("BLOCK_N=64 ")


@in_the_interpreter
def test_a_tie_under_noise_is_left_as_reasoned(launches: list[Launch]) -> None:
    found = tuned(launches, lambda shape, meta: 1e-3, SIZE, noise=0.1)
    assert [r.choice for r in found] == [None] * len(found)
    assert all(r["status"].startswith("kept: ") for result in found for r in result.records)


@in_the_interpreter
@pytest.mark.parametrize("slow", [None, 96, 3], ids=["nowhere", "another size of the benchmark", "fewer rows"])
def test_a_choice_that_is_slower_at_another_size_is_none(
    launches: list[Launch], slow: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tune, "DTYPES", (torch.float32,))
    monkeypatch.setattr(Subject, "refusal", lambda *_: None)  # the other tests look at that

    def price(shape: tuple[int, ...], meta: dict[str, Any]) -> float:
        return 2e-3 - best_of_64(shape, meta) if shape[0] == slow else best_of_64(shape, meta)

    (result,) = (r for r in tuned(launches, price, SIZE, {"N": 96, "D": 32}) if ("BLOCK_D", 32) in r.ask.fixed)
    assert {r["shape"] for r in result.records} == {"N=48 D=32", "N=96 D=32", "N=3 D=32", "N=6 D=32"}
    assert (result.choice is None) == (slow is not None)


def compiled(kernel: Any, *, BLOCK_N: int) -> types.SimpleNamespace:
    """What Triton returns from a launch, as far as it is looked at."""
    return types.SimpleNamespace(metadata=types.SimpleNamespace(name="_forward"), n_spills=12 if BLOCK_N == 64 else 4)


def corrupted(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have the fastest blocks of a forward pass give wrong, changing or no results, or spill as compiled kernels do."""
    from braze.kernels.triton import l2_normalize

    launch = l2_normalize.launch
    count = [0]
    if kind == "spills":
        monkeypatch.setattr(JITFunction, "run", compiled)

    def broken(kernel: Any, grid: Any, *arguments: Any, **meta: Any) -> None:
        launch(kernel, grid, *arguments, **meta)
        if kind == "spills":
            JITFunction.run(kernel, BLOCK_N=meta["BLOCK_N"])
            return
        if meta["BLOCK_N"] != 64:
            return
        if kind == "fails":
            raise RuntimeError("out of resource: shared memory\nand more")
        _, y, *_ = arguments
        count[0] += 1
        if kind == "wrong":
            y.add_(0.1)
        else:
            y.view(torch.int16)[0, 0] ^= count[0] % 2

    monkeypatch.setattr(l2_normalize, "launch", broken)


@in_the_interpreter
@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("wrong", "wrong: output 0: error"),
        ("changes", "not the same bits twice"),
        ("fails", "failed: RuntimeError: out"),
        ("spills", "spills registers: {'_forward': 8}"),
    ],
)
def test_the_fastest_is_refused_if_it_is_not_right(
    launches: list[Launch], kind: str, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    corrupted(kind, monkeypatch)
    refusals: list[str] = []
    judged = Subject.refusal

    def noted(self: Subject, which: str, ask: Ask, choice: Choice) -> str | None:
        why = judged(self, which, ask, choice)
        assert (why is not None) == (dict(choice)["BLOCK_N"] == 64)
        refusals.extend([why] if why else [])
        return why

    monkeypatch.setattr(Subject, "refusal", noted)
    (result,) = tuned(launches, best_of_64, SIZE)
    assert result.choice is None
    assert all(record["refusals"].startswith("BLOCK_N=64 ") for record in result.records)
    assert refusals
    assert all(why.startswith(said) for why in refusals)


@pytest.mark.gpu
def test_the_search_runs_on_a_gpu() -> None:
    op = dataclasses.replace(next(op for op in OPS if op.name == "rms_norm"), bench=({"N": 512, "D": 1024},))
    device = torch.device("cuda", torch.cuda.current_device())
    subject = Subject(Case(op, op.bench[0], torch.bfloat16, device))
    (ask,) = subject.asks("forward")
    assert subject.refusal("forward", ask, ask.free) is None
    with _spilled() as spills:
        subject._run("forward", lambda ask: None)
    assert spills == {"_forward": 0}
    found = list(tune.tune([op], device, quick=True))
    assert [result.ask is not None for result in found] == [True, True]
    for result in found:
        if result.choice is not None:
            answers = {result.ask: dict(result.choice)}
            with launch_table.answering(answers.get):
                contract.check_against_reference(
                    contract.Case(op, dict(op.bench[0]), torch.bfloat16, device="cuda"), "triton"
                )


def proposal(choice: Choice | None = BEST, ask: Ask = ASK) -> tune.Result:
    record = {name: name for name in tune.EVIDENCE} | {"status": "proposed" if choice else "kept: none was faster"}
    return tune.Result([record, {"status": "kept: another choice is faster"}], ask, choice)


def choices(table: Path) -> dict[Ask, dict[str, int]]:
    """What a launch finds."""
    return {ask: entry["measured"] for ask, entry in launch_table.read(table).items()}


OTHER = ASK._replace(operands=(torch.float32, None, float))


def test_a_table_comes_back_as_it_was_written(tmp_path: Path) -> None:
    file = tmp_path / "launches" / "a-device.json"
    tune.store(file, "A Device", proposal())
    tune.store(file, "A Device", proposal((("BLOCK_N", 8), ("num_warps", 4), ("programs", 4)), OTHER))
    assert choices(file) == {ASK: dict(BEST), OTHER: {"BLOCK_N": 8, "num_warps": 4, "programs": 4}}
    entry = launch_table.read(file)[ASK]
    assert entry["torch"] == importlib.metadata.version("torch")
    assert entry["date"]
    assert entry["shapes"] == [{name: name for name in tune.EVIDENCE}]


def test_measuring_again_replaces_what_was_measured_and_nothing_else(tmp_path: Path) -> None:
    file = tmp_path / "a-device.json"
    tune.store(file, "A Device", proposal(None))
    assert not file.exists()  # there is nothing to say
    tune.store(file, "A Device", proposal(ask=OTHER))
    tune.store(file, "A Device", proposal())
    tune.store(file, "A Device", proposal((("BLOCK_N", 2), ("num_warps", 4), ("programs", 4))))
    assert choices(file) == {OTHER: dict(BEST), ASK: {"BLOCK_N": 2, "num_warps": 4, "programs": 4}}
    tune.store(file, "A Device", proposal(None))
    assert choices(file) == {OTHER: dict(BEST)}


def test_a_table_is_replaced_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "a-device.json"
    tune.store(file, "A Device", proposal())
    before = file.read_text()

    def torn(self: Path, text: str) -> int:
        with self.open("w") as opened:
            opened.write(text[: len(text) // 2])
        raise OSError("no space left")

    monkeypatch.setattr(Path, "write_text", torn)
    with pytest.raises(OSError, match="no space"):
        tune.store(file, "A Device", proposal(ask=OTHER))
    assert file.read_text() == before
    assert list(tmp_path.iterdir()) == [file]


def test_results_are_shown_and_are_json(capsys: pytest.CaptureFixture[str]) -> None:
    case = Case(next(op for op in OPS if op.name == "glu"), {"N": 8, "D": 16}, torch.bfloat16, torch.device("cpu"))
    figures = {
        "reasoned_ms": 0.123, "measured_ms": 0.1, "ratio": 0.813, "ratio_low": 0.805, "ratio_high": 0.821,
    }  # fmt: skip
    place = tune.Place(case, "forward", searched=True)
    shown = [
        tune._record(place, ASK, BEST, status="proposed", **figures),
        tune._record(place, ASK, status="kept: none of 9 choices was faster"),
        tune._record(place, None, status="skipped: no room"),
    ]
    tune.show(shown)
    printed = capsys.readouterr().out
    assert "0.813 (0.805 … 0.821)" in printed
    assert "0.123 → 0.1" in printed
    assert "skipped: no room" in printed
    assert json.loads(json.dumps(shown)) == shown


def fails(words: Sequence[str], capsys: pytest.CaptureFixture[str]) -> Iterator[object]:
    """The exit status, and what was said."""
    with pytest.raises(SystemExit) as stopped:
        benchmarks.main(["tune", *words])
    code = stopped.value.code
    yield from (1, code) if isinstance(code, str) else (code, capsys.readouterr().err)


@pytest.mark.parametrize(
    ("name", "hint"),
    [("rms_nrom", "did you mean rms_norm"), ("zzz", "there are add_layer_norm, ")],
    ids=["close", "far"],
)
def test_an_unknown_operator_is_named_with_those_like_it(
    name: str, hint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    status, said = fails([name], capsys)
    assert status == 2
    assert f"there is no operator '{name}'; {hint}" in str(said)


@without_gpu
def test_without_a_gpu_that_is_what_it_says(capsys: pytest.CaptureFixture[str]) -> None:
    assert tuple(fails(["rms_norm"], capsys)) == (1, "tune: needs a GPU, and there is none here")


def test_a_quick_look_is_not_written(capsys: pytest.CaptureFixture[str]) -> None:
    status, said = fails(["rms_norm", "--quick", "--write"], capsys)
    assert status == 1
    assert "leave it out to --write" in str(said)


def test_a_folder_that_cannot_be_written_to_is_named_before_anything_is_measured(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setattr(launch_table, "FOLDER", tmp_path / "file" / "launches")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "A Device")
    status, said = fails(["rms_norm", "--write"], capsys)
    assert status == 1
    assert f"--write puts the table into {tmp_path}" in str(said)
    assert "which cannot be written to: Not a directory" in str(said)


def test_a_run_on_a_stand_in_for_a_gpu(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Proposals go where the launches of that device look, and only with --write."""
    monkeypatch.setattr(launch_table, "FOLDER", tmp_path / "launches")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *device: "A Device (80 GB)")
    shown = {"op": "glu", "dtype": "bfloat16", "shape": "N=8", "pass": "forward"}
    result = proposal()
    figures = dict.fromkeys(tune.EVIDENCE[4:], 0.9)
    result = result._replace(records=[{**figures, **shown, "status": "proposed"}])
    monkeypatch.setattr(tune, "tune", lambda *_: iter([result]))
    table = tmp_path / "launches" / "a-device-80-gb.json"
    kept = tmp_path / "tune.json"
    assert benchmarks.main(["tune", "glu", "--json", str(kept)]) == 0
    assert "nothing is written without --write" in capsys.readouterr().out
    assert not table.exists()
    assert benchmarks.main(["tune", "glu", "--write", "--json", str(kept)]) == 0
    assert f"written to {table}" in capsys.readouterr().out
    assert choices(table) == {ASK: dict(BEST)}
    assert json.loads(kept.read_text())["records"] == result.records
