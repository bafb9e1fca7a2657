"""``make gpu``: on a machine with a GPU and perhaps no network, the contract, then the timings, within 20 minutes.

Nothing is installed into the machine's Python: it needs torch, triton, pytest, hypothesis and rich, and finds braze in
this checkout. Wheels in the folder ``wheels/`` (what is missing, or libraries to compare with) are unpacked beside it.
Steps run in the order of their importance, each in a process of its own, which a kernel may crash without harm to the
others. Results go to ``benchmarks/results/<device>/`` as they come, with ``run.tsv``, a line for each step.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import importlib.util
import io
import os
import subprocess
import sys
from pathlib import Path

from .checkout import namespace

ROOT = Path(__file__).resolve().parents[1]
BUILD = ROOT / "build" / "gpu"
WHEELS = ROOT / "wheels"
#: The budget that the limits of the steps are made for; a larger one stretches them.
SECONDS = 1200
NEEDED = ("triton", "pytest", "hypothesis", "rich", "numpy")

CONTRACT = "triton or same_input or second_derivatives or retained_graph"
LARGE = "more_elements_than_32_bits"
#: Bound by memory, each in another way: rows in registers, rows read in blocks, nothing but elements.
TUNED = ("rms_norm", "cross_entropy", "glu")
#: Flags of pytest where a plugin that pyproject.toml configures is not installed.
WITHOUT_TIMEOUT = ["-o", "addopts=", "-W", "ignore::pytest.PytestConfigWarning"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the budget, ``--quick`` and ``--dry-run``."""
    seconds = float(os.environ.get("GPU_SECONDS") or SECONDS)
    parser.add_argument(
        "--seconds", type=float, default=seconds, help="the budget (default: GPU_SECONDS, or %(default).0f)"
    )
    parser.add_argument("--quick", action="store_true", help="every benchmark with its own --quick")
    parser.add_argument("--dry-run", action="store_true", help="check every command and file, list them, run nothing")


def run(arguments: argparse.Namespace) -> None:
    """Check, then run all steps; ends with a message and status 1 where that cannot be done."""
    environment = _environment()
    torch = _torch()
    device = _device(environment) if torch else ""
    if not torch:
        sys.exit(f"make gpu: {sys.executable} has no torch; set PYTHON to one that has torch>=2.11 and triton>=3.6")
    from braze.kernels.triton.launch_table import slug

    from . import budget

    results = ROOT / "benchmarks" / "results" / (slug(device) if device else "no-gpu")
    unpacked = [] if arguments.dry_run or not device else unpack(sorted(WHEELS.glob("*.whl")), BUILD / "wheels")
    steps = unpacked + plan(results, arguments.quick, max(1.0, arguments.seconds / SECONDS))
    for step in steps:
        step.status = problem(step.command) or step.status
    unable = [f"  {step.name}: {step.status}" for step in steps if step.status.startswith("cannot")]
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if arguments.dry_run:
        print("\n".join(f"{step.name:28} {step.limit:5.0f} s  {' '.join(step.command[1:])}" for step in steps))
    report = f"{len(steps) - len(unable)} of {len(steps)} steps have every file and flag that they need"
    report += "".join(f"\n{line}" for line in unable)
    report += f"\nnot installed: {', '.join(missing)} (put their wheels into {WHEELS})" if missing else ""
    if arguments.dry_run:
        print(report)
        sys.exit(1 if unable else 0)
    if not device:
        sys.exit(
            f"{report}\nmake gpu: torch {torch} sees no GPU on this machine, so nothing was run; run it on one that has"
        )
    print(f"{device}: {report}\nresults: {results}; logs: {BUILD / 'logs'}")
    results.mkdir(parents=True, exist_ok=True)
    budget.run(steps, arguments.seconds, results / "run.tsv", BUILD / "logs", environment, _tell)
    print("\n".join(f"{step.name:28} {step.status:30} {step.last_line[:100]}" for step in steps))
    failed = [step.name for step in steps if step.status not in ("exit 0", "not run")]
    if failed:
        sys.exit(f"make gpu: {len(failed)} steps did not end well: {', '.join(failed)}; see {results / 'run.tsv'}")


def plan(results: Path, quick: bool, stretch: float = 1.0) -> list:
    """All steps, the most important first."""
    from braze.kernels import OPS

    from .budget import Step
    from .compare import USUAL

    def tests(name: str, limit: float, *words: str) -> Step:
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *_plugins(), *words]
        return Step(name, command, stretch * limit)

    def benchmark(name: str, limit: float, *words: str, file: str = "") -> Step:
        quickly = ["--quick"] if quick else []
        kept = ["--json", str(results / f"{file or name}.json")]
        return Step(
            f"{name} {file.removeprefix(name + '-')}".strip(),
            [sys.executable, "-m", "braze.benchmarks", name, *words, *quickly, *kept],
            stretch * limit,
        )

    def operator(name: str) -> Step:
        return benchmark("ops", 45, "--device", "cuda", "--op", name, file=f"ops-{name}")

    cuda = ("--device", "cuda")
    contract = str(ROOT / "tests" / "test_ops.py")
    others = [op.name for op in OPS if op.name not in USUAL]
    plot = ("--plot", str(BUILD / "scaling.png"))
    ends = {"models": (150, cuda), "losses": (60, cuda), "optim": (60, cuda), "loaders": (45, ())}
    later = {"scaling": (120, (*cuda, *plot)), "channels_last": (120, cuda)}
    return [
        tests("contract", 240, contract, "-k", CONTRACT),
        tests("large tensors", 90, contract, "-k", LARGE),
        tests("other GPU tests", 60, str(ROOT / "tests"), "-m", "gpu", "-k", f"not {LARGE}",
              "--continue-on-collection-errors"),
        *map(operator, USUAL),
        *(benchmark(name, limit, *words) for name, (limit, words) in ends.items()),
        *map(operator, others),
        *(benchmark(name, limit, *words) for name, (limit, words) in later.items()),
        *(benchmark("tune", 90, name, file=f"tune-{name}") for name in TUNED),
        tests("contract, compiled", 600, contract, "-k", f"not ({CONTRACT} or {LARGE})"),
    ]  # fmt: skip


def unpack(wheels: list[Path], folder: Path) -> list:
    """Unpack each wheel, before anything is imported from them; one that is of another machine harms no other."""
    from .budget import Step

    done = []
    for wheel in wheels:
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--upgrade"]
        step = Step(f"unpack {wheel.name}", [*command, "--target", str(folder), str(wheel)], 60)
        found = subprocess.run(step.command, capture_output=True, text=True)
        step.status = "cannot be unpacked here" if found.returncode else "exit 0"
        step.last_line = next((line for line in found.stderr.splitlines() if "ERROR" in line), "")
        done.append(step)
    importlib.invalidate_caches()
    return done


def problem(command: list[str]) -> str | None:
    """Why a step cannot run: a file that is not there, a flag that the command does not take, a package it lacks."""
    words = command[1:]
    absent = [word for word in words if word.startswith(str(ROOT / "tests")) and not Path(word).exists()]
    if absent:
        return f"cannot run: there is no {', '.join(absent)}"
    if words[:2] != ["-m", "braze.benchmarks"]:
        return None
    from .__main__ import parser_of

    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            parser_of(words[2])[0].parse_args(words[3:])
    except (SystemExit, ImportError) as error:
        return "cannot run: " + (said.getvalue().strip().split("\n")[-1] or str(error))
    return None


def _plugins() -> list[str]:
    found = [] if importlib.util.find_spec("pytest_timeout") else WITHOUT_TIMEOUT
    # Kernels are compiled on the CPU, test by test: processes share that work.
    return [*found, *(["-n", "8"] if importlib.util.find_spec("xdist") else [])]


def _environment() -> dict[str, str]:
    folders = [str(BUILD / "wheels"), str(namespace(ROOT, BUILD / "path"))]
    paths = [*folders, *filter(None, [os.environ.get("PYTHONPATH")])]
    sys.path[:0] = [path for path in folders if path not in sys.path]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}


def _torch() -> str | None:
    try:
        import torch
    except ImportError:
        return None
    return torch.__version__


def _device(environment: dict[str, str]) -> str:
    """The name of the first GPU, asked in a process that ends, and with it its memory on the GPU."""
    ask = "import torch; print(torch.cuda.get_device_name() if torch.cuda.is_available() else '')"
    return subprocess.run([sys.executable, "-c", ask], env=environment, capture_output=True, text=True).stdout.strip()


def _tell(step: object) -> None:
    from .budget import Step

    assert isinstance(step, Step)
    print(f"{step.start}  {step.name}: {step.status} {step.last_line}", flush=True)


if __name__ == "__main__":
    given = argparse.ArgumentParser("make gpu", description=__doc__)
    add_arguments(given)
    run(given.parse_args())
