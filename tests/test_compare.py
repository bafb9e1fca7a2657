"""``compare``: what is flagged, what is not, and that two commits really are what runs, with nothing left behind."""

from __future__ import annotations

import argparse
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from braze.benchmarks import compare, timing
from braze.benchmarks.checkout import PACKAGES, namespace
from braze.benchmarks.compare import AGAIN, BEFORE, HERE
from braze.benchmarks.compare_processes import Other, Refusal

ROOT = Path(__file__).parent.parent
IGNORED = shutil.ignore_patterns("__pycache__", "results")


def samples(factor: float, noise: float, seed: int, rounds: int = compare.ROUNDS) -> timing.Samples:
    """Log-normal noise on every sample, and a slowness of each round that all three share."""
    random = np.random.default_rng(seed)
    drift = np.exp(0.3 * random.standard_normal(rounds))
    prices = {BEFORE: 1e-3, AGAIN: 1e-3, HERE: factor * 1e-3}
    return timing.Samples({n: drift * p * np.exp(noise * random.standard_normal(rounds)) for n, p in prices.items()})


def verdicts(factor: float, noise: float) -> list[str]:
    return [compare.verdict(compare.figures(samples(factor, noise, seed)))["verdict"] for seed in range(40)]


def test_a_commit_against_itself_is_not_flagged() -> None:
    """The interval of one ratio must be beyond that of another of the same kind: both 95 %, so well below 1 in 20."""
    assert sum(verdict != "no change seen" for verdict in verdicts(1.0, 0.05)) <= 2


@pytest.mark.parametrize(("factor", "expected"), [(1.2, "slower"), (1 / 1.2, "faster")])
def test_a_change_far_outside_the_noise_is_flagged(factor: float, expected: str) -> None:
    """0.18 in the logarithm, where the median of 30 ratios is known to 1.25 · √2 · 0.05 / √30 = 0.016."""
    assert set(verdicts(factor, 0.05)) == {expected}


def test_the_margin_is_the_far_end_of_the_commit_against_itself() -> None:
    found = {"noise_ratio_low": 0.8, "noise_ratio_high": 1.1, "ratio_low": 1.2, "ratio_high": 1.5}
    assert compare.verdict(found) == {"margin": pytest.approx(0.25), "verdict": "no change seen"}
    assert compare.verdict({**found, "ratio_low": 1.26})["verdict"] == "slower"
    assert compare.verdict({**found, "ratio_low": 0.5, "ratio_high": 0.81})["verdict"] == "no change seen"
    assert compare.verdict({**found, "ratio_low": 0.5, "ratio_high": 0.79})["verdict"] == "faster"


class Repository:
    """This tree's packages in a repository of two commits: the first has no glu, in the second rms_norm sleeps."""

    def __init__(self, root: Path) -> None:
        self.root = root
        for package in PACKAGES:
            shutil.copytree(ROOT / package, root / package, ignore=IGNORED)
        self.git("init", "--quiet")
        names = root / "kernels" / "__init__.py"
        whole = names.read_text()
        names.write_text(whole + '\nOPS = tuple(op for op in OPS if op.name != "glu")\n')
        self.commit("no glu")
        names.write_text(whole)
        norm = root / "kernels" / "ops" / "rms_norm.py"
        check = '    row_norm.check_affine("rms_norm", x, weight)\n'
        assert norm.read_text().count(check) == 1
        norm.write_text(norm.read_text().replace(check, f"    import time\n\n    time.sleep(0.1)\n{check}"))
        self.commit("rms_norm sleeps")

    def git(self, *words: str) -> str:
        named = ["git", "-C", str(self.root), "-c", "user.name=x", "-c", "user.email=x@example.org", *words]
        return subprocess.run(named, capture_output=True, text=True, check=True).stdout

    def commit(self, message: str) -> None:
        self.git("add", "--all")
        self.git("commit", "--quiet", "--message", message)

    def clean(self) -> bool:
        return len(self.git("worktree", "list").splitlines()) == 1 and not self.git("status", "--short")


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Repository]:
    (tmp_path / "temporary").mkdir()
    monkeypatch.setenv("TMPDIR", str(tmp_path / "temporary"))
    monkeypatch.setattr("tempfile.tempdir", None)
    monkeypatch.setenv("BRAZE_BACKEND", "eager")  # compilers would take the test's time
    monkeypatch.setenv("PYTHONDONTWRITEBYTECODE", "1")
    made = Repository(tmp_path / "repository")
    monkeypatch.setattr(compare, "ROOT", made.root)
    yield made
    assert made.clean()
    assert list((tmp_path / "temporary").glob("braze-compare-*")) == []


def arguments(revision: str, *ops: str) -> argparse.Namespace:
    return argparse.Namespace(revision=revision, op=list(ops), rounds=5, quick=True, device="cpu")


def test_a_planted_slowdown_is_flagged_and_a_missing_operator_is_said(
    repository: Repository, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """100 ms are planted in a call that takes about a tenth of one."""
    tiny = [
        compare.Case(op, {"N": 8, "D": 64}, "float32", backward)
        for op in ("rms_norm", "glu")
        for backward in (False, True)
    ]
    monkeypatch.setattr(compare, "cases", lambda ops, quick: iter(tiny))
    found = {(r["op"], r["pass"]): r for r in compare.run(arguments("HEAD~1", "rms_norm", "glu"))}
    for which in ("forward", "forward+backward"):
        assert found["rms_norm", which]["verdict"] == "slower"
        assert found["rms_norm", which]["here_ms"] > 100
        assert found["glu", which]["status"] == "unavailable before: LookupError: there is no operator glu"
    assert found["rms_norm", "forward"]["revision"] == repository.git("rev-parse", "HEAD~1").strip()
    assert "2 slower and 0 faster, beyond the margin, of 2 timed" in capsys.readouterr().out


def test_a_revision_that_is_none_is_named(repository: Repository) -> None:
    for name in ("nonsense", "--all", "HEAD:kernels"):
        with pytest.raises(SystemExit, match=f"compare: '{name}' names no commit of the repository"):
            compare.run(arguments(name, "glu"))


def test_a_failure_leaves_nothing_behind(repository: Repository, monkeypatch: pytest.MonkeyPatch) -> None:
    """The commit's package cannot be imported."""
    (repository.root / "kernels" / "__init__.py").write_text("raise RuntimeError('broken')\n")
    repository.commit("broken")
    with pytest.raises(SystemExit, match="the process 'before' cannot start: RuntimeError: broken"):
        compare.run(arguments("HEAD", "glu"))


def test_ctrl_c_leaves_nothing_behind(repository: Repository, tmp_path: Path) -> None:
    code = f"""
import argparse, signal
from pathlib import Path
from braze.benchmarks import compare
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell ignores it in what it starts in the background
compare.ROOT = Path({str(repository.root)!r})
with compare.processes(compare.ROOT, "HEAD", "cpu"):
    print("started", flush=True)
    __import__("time").sleep(600)
"""
    running = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert running.stdout is not None
    assert running.stdout.readline() == "started\n"
    assert not repository.clean()
    running.send_signal(signal.SIGINT)
    assert "KeyboardInterrupt" in running.communicate(timeout=60)[1]
    assert repository.clean()


def test_a_process_that_finds_another_braze_is_refused(tmp_path: Path) -> None:
    """A folder without packages: an installed braze is not taken in their place."""
    (tmp_path / "empty").mkdir()
    refused = pytest.raises(Refusal, match=r"the process 'before' cannot start: (ModuleNotFound|Import)Error: ")
    with Other("before", namespace(tmp_path / "empty", tmp_path / "path"), "cpu") as other, refused:
        other.started()


def test_a_process_that_dies_is_named(tmp_path: Path) -> None:
    with Other("here", namespace(ROOT, tmp_path / "path"), "cpu") as other:
        other._process.kill()
        with pytest.raises(Refusal, match="the process 'here' ended by itself, with status -9"):
            other.started()


def test_cases_are_the_smallest_sizes() -> None:
    found = list(compare.cases([op for op in compare.OPS if op.name == "rms_norm"], quick=False))
    assert {tuple(case.dims.items()) for case in found} == {(("N", 2048), ("D", 1024))}
    assert len(found) == 4
    assert len(list(compare.cases([op for op in compare.OPS if op.name == "image_normalize"], quick=True))) == 1


def test_usual_operators_exist() -> None:
    assert set(compare.USUAL) <= {op.name for op in compare.OPS}
