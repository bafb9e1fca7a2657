"""``make gpu``, as far as a machine without a GPU can follow it: the plan, its budget, and what a cut-off run keeps."""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest
import torch

from braze.benchmarks import __main__ as benchmarks
from braze.benchmarks import budget, compare, gpu, records
from braze.benchmarks.budget import Step
from braze.benchmarks.checkout import namespace
from braze.kernels import OPS

ROOT = Path(__file__).parent.parent
without_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens where there is none")


def python(code: str) -> list[str]:
    return [sys.executable, "-S", "-c", code]


def rows(summary: Path) -> dict[str, dict[str, str]]:
    head, *lines = (line.split("\t") for line in summary.read_text().splitlines())
    return {line[0]: dict(zip(head, line, strict=True)) for line in lines}


def run(steps: list[Step], seconds: float, folder: Path) -> dict[str, dict[str, str]]:
    budget.run(steps, seconds, folder / "run.tsv", folder / "logs", dict(os.environ), lambda step: None)
    return rows(folder / "run.tsv")


def test_every_step_has_its_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(budget, "LEAST_SECONDS", 0.0)
    steps = [
        Step("good", python("print('all is well\\n')"), 60),
        Step("bad", python("raise SystemExit(3)"), 60),
        Step("crashed", python("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)"), 60),
        Step("long", python("import time; time.sleep(600)"), 0.5),
        Step("unable", ["no such program"], 60, status="cannot run: no such file"),
        Step("after", python("print('still here')"), 60),
    ]
    found = run(steps, 100, tmp_path)
    assert {name: row["status"] for name, row in found.items()} == {
        "good": "exit 0", "bad": "exit 3", "crashed": "exit -11", "long": "ended at its limit of 0 s",
        "unable": "cannot run: no such file", "after": "exit 0",
    }  # fmt: skip
    assert found["good"]["last line"] == "all is well"
    assert found["good"]["start"] <= found["good"]["end"] <= found["bad"]["start"]
    assert found["unable"]["start"] == ""


def test_a_limit_ends_the_children_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(budget, "LEAST_SECONDS", 0.0)
    sleeper = "import subprocess, sys, time; p = subprocess.Popen([sys.executable, '-S', '-c', 'input()'], stdin=-1)"
    run([Step("parent", python(f"{sleeper}; print(p.pid, flush=True); time.sleep(600)"), 2)], 100, tmp_path)
    child = int((tmp_path / "logs" / "parent.log").read_text())
    for _ in range(100):
        if not Path(f"/proc/{child}").exists() or "Z" in Path(f"/proc/{child}/stat").read_text().split()[2]:
            return
        time.sleep(0.05)
    raise AssertionError("the child of a step outlived it")


def test_what_does_not_fit_any_more_is_listed_as_not_run(tmp_path: Path) -> None:
    steps = [Step("first", python("pass"), 60), Step("second", python("pass"), 60)]
    assert [row["status"] for row in run(steps, budget.LEAST_SECONDS - 1, tmp_path).values()] == ["not run", "not run"]


def test_a_run_that_is_killed_leaves_its_table(tmp_path: Path) -> None:
    """While the second step runs, the file tells of the first, of the second, and of what was never begun."""
    code = f"""
import sys
from pathlib import Path
from braze.benchmarks import budget
folder = Path({str(tmp_path)!r})
steps = [budget.Step("one", [sys.executable, "-S", "-c", "pass"], 60),
         budget.Step("two", [sys.executable, "-S", "-c", "import time; time.sleep(30)"], 60),
         budget.Step("three", [sys.executable, "-S", "-c", "pass"], 60)]
budget.run(steps, 100, folder / "run.tsv", folder / "logs", {{}}, lambda step: None)
"""
    process = subprocess.Popen([sys.executable, "-c", code], start_new_session=True)
    try:
        while not (tmp_path / "logs" / "two.log").exists():
            assert process.poll() is None
            time.sleep(0.05)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    found = rows(tmp_path / "run.tsv")
    assert [row["status"] for row in found.values()] == ["exit 0", "running", "not run"]


def test_records_are_replaced_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "ops.json"
    records.write(path, "ops", [{"op": "glu"}])
    before = path.read_text()

    def torn(self: Path, text: str) -> int:
        with self.open("w") as file:
            file.write(text[: len(text) // 2])
        raise OSError("no space left")

    monkeypatch.setattr(Path, "write_text", torn)
    with pytest.raises(OSError, match="no space"):
        records.write(path, "ops", [{"op": "glu"}, {"op": "rope"}])
    assert path.read_text() == before
    assert list(tmp_path.iterdir()) == [path]


def test_a_command_may_keep_what_it_has_so_far(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Crashing:
        @staticmethod
        def add_arguments(parser: argparse.ArgumentParser) -> None:
            pass

        @staticmethod
        def run(arguments: argparse.Namespace) -> list:
            arguments.keep([{"op": "first"}])
            raise RuntimeError("the GPU fell off the bus")

    monkeypatch.setattr(benchmarks, "_load", lambda name: Crashing)
    path = tmp_path / "ops.json"
    for words in (["ops"], ["ops", "--json", str(path)]):
        with pytest.raises(RuntimeError, match="fell off"):
            benchmarks.main(words)
    assert json.loads(path.read_text())["records"] == [{"op": "first"}]


def test_every_command_of_the_plan_parses_and_every_file_exists(tmp_path: Path) -> None:
    for quick in (False, True):
        steps = gpu.plan(tmp_path, quick)
        assert [problem for step in steps if (problem := gpu.problem(step.command))] == []
        assert len({step.name for step in steps}) == len(steps)
        assert all(("--quick" in step.command) == quick for step in steps if "braze.benchmarks" in step.command)
    timed = [step.command[step.command.index("--op") + 1] for step in steps if "--op" in step.command]
    assert sorted(timed) == sorted(op.name for op in OPS)
    assert timed[: len(compare.USUAL)] == list(compare.USUAL)
    names = [step.name for step in steps]
    assert names[:3] == ["contract", "large tensors", "other GPU tests"]
    assert (
        names.index(f"ops {compare.USUAL[-1]}") < names.index("losses") < names.index("optim") < names.index("loaders")
    )


def test_what_the_plan_counts_on_fits_into_its_budget(tmp_path: Path) -> None:
    steps = gpu.plan(tmp_path, quick=False)
    until = next(i for i, step in enumerate(steps) if step.name == "loaders")
    assert sum(step.limit for step in steps[: until + 1]) <= gpu.SECONDS


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["-m", "braze.benchmarks", "ops", "--no-such-flag"], "unrecognized arguments: --no-such-flag"),
        (["-m", "braze.benchmarks", "ops", "--op", "no_such_operator"], "invalid choice: 'no_such_operator'"),
        (["-m", "pytest", str(ROOT / "tests" / "test_gone.py")], "there is no .*test_gone.py"),
    ],
)
def test_a_step_that_cannot_run_says_why(words: list[str], said: str) -> None:
    problem = gpu.problem([sys.executable, *words])
    assert problem is not None
    assert problem.startswith("cannot run: ")
    with pytest.raises(AssertionError, match=said):
        raise AssertionError(problem)


def test_expressions_choose_tests_of_the_contract() -> None:
    """Every part of the -k expressions names tests that exist: one that was renamed would be left out, silently."""
    source = (ROOT / "tests" / "test_ops.py").read_text()
    for part in f"{gpu.CONTRACT} or {gpu.LARGE}".split(" or "):
        assert any(part in line for line in source.splitlines() if line.startswith("def test_")), part


def test_wheels_are_unpacked_one_by_one(tmp_path: Path) -> None:
    """One of another machine does not keep the others away."""
    wheels = [tmp_path / "good-1.0-py3-none-any.whl", tmp_path / "bad-1.0-cp27-cp27m-win32.whl"]
    for wheel in wheels:
        name = wheel.name.split("-")[0]
        folder = f"{name}-1.0.dist-info"
        with zipfile.ZipFile(wheel, "w") as file:
            file.writestr(f"{name}.py", "")
            file.writestr(f"{folder}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
            file.writestr(f"{folder}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
            file.writestr(f"{folder}/RECORD", "")
    done = gpu.unpack(wheels, tmp_path / "unpacked")
    assert [step.status for step in done] == ["exit 0", "cannot be unpacked here"]
    assert "not a supported wheel" in done[1].last_line
    assert (tmp_path / "unpacked" / "good.py").exists()


@without_gpu
def test_make_gpu_says_that_there_is_none(tmp_path: Path) -> None:
    done = subprocess.run(
        ["make", "gpu", f"PYTHON={sys.executable}"], cwd=ROOT, capture_output=True, text=True,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
    )  # fmt: skip
    assert done.returncode != 0
    count = len(gpu.plan(tmp_path, quick=False))
    assert f"{count} of {count} steps have every file and flag that they need" in done.stderr
    assert "sees no GPU on this machine, so nothing was run" in done.stderr
    assert not (ROOT / "benchmarks" / "results" / "no-gpu").exists()


def test_without_torch_that_is_what_it_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "_torch", lambda: None)
    monkeypatch.setattr(gpu, "_environment", lambda: {})
    with pytest.raises(SystemExit, match=r"has no torch; set PYTHON to one that has torch>=2\.11"):
        gpu.run(argparse.Namespace(seconds=1.0, quick=False, dry_run=False))


def test_a_run_on_a_stand_in_for_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With two real steps in the place of the plan: results in the device's folder, and what failed is said."""
    monkeypatch.setattr(gpu, "_device", lambda environment: "NVIDIA Stand-In 80GB")
    monkeypatch.setattr(gpu, "ROOT", tmp_path)
    monkeypatch.setattr(gpu, "BUILD", tmp_path / "build")
    steps = [Step("writes", python("print('written')"), 60), Step("fails", python("raise SystemExit(2)"), 60)]
    monkeypatch.setattr(gpu, "plan", lambda *_: steps)
    with pytest.raises(SystemExit, match="1 steps did not end well: fails"):
        gpu.run(argparse.Namespace(seconds=100.0, quick=True, dry_run=False))
    found = rows(tmp_path / "benchmarks" / "results" / "nvidia-stand-in-80gb" / "run.tsv")
    assert [row["status"] for row in found.values()] == ["exit 0", "exit 2"]


def test_a_checkout_is_importable_without_installation(tmp_path: Path) -> None:
    folder = namespace(ROOT, tmp_path / "path")
    namespace(ROOT, folder)  # again
    code = "import braze.layouts, braze.benchmarks; print(braze.layouts.__file__)"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True,
        env={**os.environ, "PYTHONPATH": str(folder)},
    )  # fmt: skip
    assert done.stdout.strip() == str(folder / "braze" / "layouts" / "__init__.py"), done.stderr
