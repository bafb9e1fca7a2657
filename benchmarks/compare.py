"""``python -m braze.benchmarks compare REV``: which operators became slower or faster since a commit.

Three processes stay alive side by side: the commit, the commit once more, and the working tree. Each imports braze from
a throw-away folder of its own; the timing code is the working tree's in all three. They take turns, as providers do in
``timing.py``, so that a ratio is of samples of one round.

The commit against itself says what the noise of this session does to a ratio. The far end of that ratio's 95 % interval
is the margin: a case is flagged where the whole interval of its own ratio is farther from 1 than that.
"""

from __future__ import annotations

import argparse
import math
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich import box
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from braze.kernels import OPS
from braze.kernels.op import Op

from . import tables, timing
from .checkout import namespace
from .compare_processes import Other, Refusal
from .records import Record

ROOT = Path(__file__).resolve().parents[1]
BEFORE, AGAIN, HERE = "before", "before, again", "here"
#: The operators that most models spend their time in: what is compared unless ``--op`` says otherwise.
USUAL = (
    "rms_norm", "add_rms_norm", "layer_norm", "rope", "glu", "cross_entropy", "linear_cross_entropy", "softmax",
    "qk_norm_rope", "bias_act",
)  # fmt: skip
ROUNDS, QUICK_ROUNDS = 30, 10


class Case(NamedTuple):
    """One operator on one shape, as every process is asked for it."""

    op: str
    dims: dict[str, int]
    dtype: str
    backward: bool

    def record(self) -> Record:
        """The fields that name it."""
        which = "forward+backward" if self.backward else "forward"
        shape = " ".join(f"{name}={size}" for name, size in self.dims.items())
        return {"benchmark": "compare", "op": self.op, "pass": which, "dtype": self.dtype, "shape": shape}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the commit, ``--op``, ``--rounds`` and ``--device``."""
    names = [op.name for op in OPS]
    parser.add_argument("revision", metavar="REV", help="the commit to compare the working tree with")
    parser.add_argument(
        "--op", action="append", choices=names, metavar="NAME", help=f"only this (default: {', '.join(USUAL)})"
    )
    parser.add_argument("--rounds", type=int, metavar="N", help=f"turns (default: {ROUNDS}; --quick: {QUICK_ROUNDS})")
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", choices=("cpu", "cuda"), default=default, help="where to run (%(default)s)")


def run(arguments: argparse.Namespace) -> list[Record]:
    """Compare, print the table, and return one record for each case."""
    rounds = arguments.rounds or (QUICK_ROUNDS if arguments.quick else ROUNDS)
    if rounds < 2:
        sys.exit(f"compare: --rounds must be 2 or more, for an interval, got {rounds}")
    chosen = [op for op in OPS if op.name in (arguments.op or USUAL)]
    todo = list(cases(chosen, quick=arguments.quick))
    columns = (TextColumn("{task.description:44}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    found: list[Record] = []
    try:
        with processes(ROOT, arguments.revision, arguments.device) as (commit, others), Progress(*columns) as bar:
            for case in bar.track(todo, description=f"{commit[:12]} and the working tree"):
                found.append({**measure(case, others, rounds), "revision": commit, "device": arguments.device})
    except Refusal as refusal:
        sys.exit(f"compare: {refusal}")
    show(found, commit)
    return found


def cases(ops: Sequence[Op], *, quick: bool) -> Iterator[Case]:
    """The smallest benchmark size of each operator, which shows most of what a call costs; float32 alone if quick."""
    for op in ops:
        dims = min(op.bench, key=lambda dims: op.traffic(4, **op.variants["default"], **dims).forward)
        for dtype in ("float32",) if quick else ("float32", "bfloat16"):
            for backward in (False, True) if op.differentiable else (False,):
                yield Case(op.name, dict(dims), dtype, backward)


@contextmanager
def processes(root: Path, revision: str, device: str) -> Iterator[tuple[str, dict[str, Other]]]:
    """The commit's full name, and the three processes; what was made for them is gone afterwards, whatever happens."""
    commit = _resolved(root, revision)
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="braze-compare-")))
        tree = folder / "tree"
        stack.callback(_git, root, "worktree", "prune")
        stack.callback(_git, root, "worktree", "remove", "--force", str(tree))
        added = _git(root, "worktree", "add", "--detach", str(tree), commit)
        if added.returncode:
            raise Refusal(f"git could not check out {revision!r}: {added.stderr.strip()}")
        roots = {BEFORE: tree, AGAIN: tree, HERE: root}
        others = {
            name: stack.enter_context(Other(name, namespace(own, folder / f"path {i}"), device))
            for i, (name, own) in enumerate(roots.items())
        }
        for other in others.values():
            other.started()
        yield commit, others


def _resolved(root: Path, revision: str) -> str:
    done = _git(root, "rev-parse", "--verify", "--quiet", "--end-of-options", f"{revision}^{{commit}}")
    if done.returncode:
        raise Refusal(f"{revision!r} names no commit of the repository {root}; see git log")
    return done.stdout.strip()


def _git(root: Path, *words: str) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(["git", "-C", str(root), *words], capture_output=True, text=True)
    except FileNotFoundError as error:
        raise Refusal("git must be installed, for the commit has to be checked out") from error


def measure(case: Case, others: dict[str, Other], rounds: int) -> Record:
    """Time one case in all processes, in turns; or say which of them cannot run it, and why."""
    record = case.record()
    for name, other in others.items():
        problem = other.prepare(case._asdict())
        if problem:
            return {**record, "status": f"unavailable {name}: {problem}"}
    found = figures(timing.compare(dict(others), _asked, rounds))
    return {**record, "status": "ok", "rounds": rounds, **found, **verdict(found)}


def _asked(work: Any, repetitions: int) -> float:
    return work.seconds(repetitions)


def figures(samples: timing.Samples) -> dict[str, float]:
    """Milliseconds before and here, the ratio of the two, and that of the commit to itself."""
    found = {f"{name}_ms": 1e3 * samples.quartiles(name).median for name in (BEFORE, HERE)}
    for prefix, name in (("", HERE), ("noise_", AGAIN)):
        ratio = samples.ratio(name, BEFORE)
        found |= {f"{prefix}ratio": ratio.value, f"{prefix}ratio_low": ratio.low, f"{prefix}ratio_high": ratio.high}
    return found


def verdict(found: Mapping[str, float]) -> dict[str, Any]:
    """The margin, and whether the ratio is beyond it; see the head of this file."""
    margin = max(abs(math.log(found["noise_ratio_low"])), abs(math.log(found["noise_ratio_high"])))
    slower, faster = math.log(found["ratio_low"]) > margin, math.log(found["ratio_high"]) < -margin
    word = "slower" if slower else "faster" if faster else "no change seen"
    return {"margin": math.exp(margin) - 1, "verdict": word}


def show(records: Sequence[Record], commit: str) -> None:
    """Print a row for each case, and how many are flagged."""
    console = tables.console()
    table = Table(box=box.SIMPLE, title=f"Time here ÷ at {commit[:12]}: above 1, it became slower")
    for name in ("op", "shape", "dtype", "pass"):
        table.add_column(name, no_wrap=True)
    for name in ("ms before", "ms here", "ratio (95 % interval)", "margin", "verdict"):
        table.add_column(name, justify="right")
    colors = {"slower": "[bold red]", "faster": "[green]", "no change seen": "[dim]"}
    for r in records:
        names = (r["op"], r["shape"], r["dtype"], r["pass"])
        if r["status"] != "ok":
            table.add_row(*names, "-", "-", "-", "-", r["status"])
            continue
        times = (f"{r[f'{BEFORE}_ms']:.3g}", f"{r[f'{HERE}_ms']:.3g}")
        table.add_row(*names, *times, tables.ratio(r), f"{r['margin']:.1%}", f"{colors[r['verdict']]}{r['verdict']}[/]")
    console.print(table)
    timed = [r["verdict"] for r in records if r["status"] == "ok"]
    slower, faster = (timed.count(name) for name in ("slower", "faster"))
    console.print(f"{slower} slower and {faster} faster, beyond the margin, of {len(timed)} timed", highlight=False)
