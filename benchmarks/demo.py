"""``python -m braze.benchmarks demo``: real models trained under Lightning, vanilla and fused, side by side."""

from __future__ import annotations

import argparse
import multiprocessing
import os
from collections import Counter
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import fmean, median
from typing import Any, get_args

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from .records import Record
from .result import BLOCK, PROFILED, Precision, Result
from .tasks import TASKS, Task

#: Steps whose mean is "the final train loss".
LAST = 10


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare what only this command takes."""
    parser.add_argument("--precision", choices=get_args(Precision), help="default: what suits the CPU")
    parser.add_argument(
        "--models", nargs="+", choices=TASKS, default=list(TASKS), metavar="MODEL", help=", ".join(TASKS)
    )
    parser.add_argument("--plot", type=Path, default=Path("demo.png"), metavar="FILE", help="where the loss curves go")


def run(arguments: argparse.Namespace) -> list[Record]:
    """Train everything, print the table, draw the curves, and return one record for each run."""
    precision = arguments.precision or _suitable_precision()
    console = Console()
    # The profiler's notes, on GPUs that are not there and memory from before its time, would tear up the progress bars.
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    # Threads that spin while they wait take the cores from whoever computes: on a busy machine, the Llama's steps
    # took 2.5 s spinning and 0.6 s sleeping.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    runs: dict[str, tuple[Result, Result]] = {}
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, TextColumn("{task.fields[loss]}"), console=console) as progress:
        for name in arguments.models:
            steps = TASKS[name].steps // 5 if arguments.quick else TASKS[name].steps
            runs[name] = _train_pair(name, precision, steps, progress)
    console.print(_table(runs, precision))
    _plot(runs, precision, arguments.plot)
    console.print(f"loss curves: {arguments.plot}")
    return [record for name, pair in runs.items() for record in _records(name, pair, precision)]


def _suitable_precision() -> Precision:
    """Mixed precision where the CPU multiplies bfloat16 in hardware; elsewhere that is slower than float32.

    On an AMD EPYC with AVX512-BF16, two cores, a step of the Llama took 116 ms for 178 in float32.
    """
    flags = Path("/proc/cpuinfo")
    return "bf16-mixed" if flags.exists() and "avx512_bf16" in flags.read_text() else "32-true"


def _train_pair(name: str, precision: Precision, steps: int, progress: Progress) -> tuple[Result, Result]:
    """Train vanilla and fused in a process each, in turns of ``BLOCK`` steps, so that they meet the same noise."""
    # One process imports Lightning, and the runs are forked from it before it has computed anything.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["braze.benchmarks.training", "transformers.models.llama.modeling_llama"])
    pair = []
    for label, fused in (("vanilla", False), ("fused", True)):
        bar = progress.add_task(f"{TASKS[name].title} · {label}", total=steps, loss="starting")
        mine, theirs = context.Pipe()
        process = context.Process(target=_run, args=(theirs, name, precision, fused, steps), daemon=True)
        process.start()
        theirs.close()
        pair.append((mine, process, bar))
    results: dict[bool, Result] = {}
    turns = -(-steps // BLOCK)
    try:
        for turn in range(turns):
            # Whoever went second goes first next time: a machine that slows down slows both.
            for fused in (False, True) if turn % 2 else (True, False):
                connection, process, bar = pair[fused]
                if turn == 0:
                    _receive(connection)
                progress.update(bar, loss="compiling" if turn == 0 else "training")
                connection.send("go")
                answer = _receive(connection)
                if turn < turns - 1:
                    progress.update(bar, completed=answer)
                else:
                    process.join()
                    results[fused] = answer
                    progress.update(bar, completed=steps, loss=f"validation loss {answer.validation_loss:.3f}")
    finally:
        for _, process, _ in pair:
            process.kill()
    return results[False], results[True]


def _run(*arguments: Any) -> None:
    from . import training

    training.run(*arguments)


def _receive(connection: Connection) -> Any:
    try:
        message = connection.recv()
    except EOFError:
        raise RuntimeError("a training process ended without a word; was it killed for its memory?") from None
    if isinstance(message, str):
        raise RuntimeError(f"a training process failed:\n{message}")
    return message


def _steady(result: Result) -> list[float]:
    """Step seconds without the warm-up block and without the steps under the profiler."""
    return result.seconds[BLOCK:-PROFILED]


def _paired_ratios(vanilla: Result, fused: Result) -> list[float]:
    """Fused ÷ vanilla step time of every pair of turns, in rising order."""
    before, after = _steady(vanilla), _steady(fused)
    blocks = [slice(i, i + BLOCK) for i in range(0, len(before), BLOCK)]
    return sorted(median(after[block]) / median(before[block]) for block in blocks)


def _figures(task: Task, result: Result) -> dict[str, float]:
    step = median(_steady(result))
    return {
        "step, ms": step * 1e3,
        f"{task.unit}/s": task.batch * task.items / step,
        "peak tensor memory, MiB": result.tensor_bytes / 2**20,
        "peak process memory, MiB": result.process_bytes / 2**20,
        "start to first step done, s": result.set_up + result.seconds[0],
        "final train loss": fmean(result.losses[-LAST:]),
        "final validation loss": result.validation_loss,
    }


def _swapped(result: Result) -> str:
    """Such as "swapped 9 LlamaRMSNorm, 4 LlamaMLP; left 1 CrossEntropyLoss: why"."""
    swapped = Counter(was for was, status, _ in result.joints if status == "fused")
    left = Counter((was, reason) for was, status, reason in result.joints if status == "left")
    listing = ", ".join(f"{count} {was}" for was, count in swapped.most_common())
    parts = [f"swapped {listing}" if listing else "nothing swapped"]
    parts += [f"left {count} {was}: {reason}" for (was, reason), count in left.most_common()]
    return "; ".join(parts)


def _table(runs: dict[str, tuple[Result, Result]], precision: Precision) -> Table:
    table = Table(
        title=f"One training run each, {precision}, {torch.get_num_threads()} CPU threads",
        caption="Step: forward, backward and optimizer; median. Turn by turn: the two runs alternate, so this ratio of "
        "neighbours is the one to trust; median (least … most). Tensor memory: parameters, gradients, optimizer state "
        "and what one step allocates. Process memory also holds the libraries and, fused, the compiler. The start: "
        "set-up, checks of the swaps, two validation batches, compilation.",
    )
    table.add_column("")
    for heading in ("vanilla", "fused", "fused ÷ vanilla"):
        table.add_column(heading, justify="right")
    for name, (vanilla, fused) in runs.items():
        task = TASKS[name]
        table.add_row(f"[bold]{task.title}", "", _swapped(fused), "")
        after = _figures(task, fused)
        for figure, before in _figures(task, vanilla).items():
            table.add_row(f"  {figure}", _number(before), _number(after[figure]), f"{after[figure] / before:.3f}")
        ratios = _paired_ratios(vanilla, fused)
        table.add_row("  step, turn by turn", "", "", f"{median(ratios):.3f} ({ratios[0]:.2f} … {ratios[-1]:.2f})")
        table.add_section()
    return table


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.4g}"


def _plot(runs: dict[str, tuple[Result, Result]], precision: Precision, path: Path) -> None:
    import matplotlib

    matplotlib.use("agg")  # no display needed
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(runs), figsize=(5 * len(runs), 4), squeeze=False, layout="constrained")
    for axis, (name, (vanilla, fused)) in zip(axes[0], runs.items(), strict=True):
        axis.plot(vanilla.losses, color="tab:blue", alpha=0.4, linewidth=4, label="vanilla")
        axis.plot(fused.losses, color="tab:red", linewidth=1, label="fused")
        axis.set(title=TASKS[name].title, xlabel="step", ylabel="train loss")
        axis.legend()
    figure.suptitle(f"Same seed, same data, {precision}")
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def _records(name: str, pair: tuple[Result, Result], precision: Precision) -> list[Record]:
    task = TASKS[name]
    found = []
    for provider, result in zip(("vanilla", "braze"), pair, strict=True):
        figures = _figures(task, result)
        found.append(
            {
                "op": "train",
                "model": name,
                "provider": provider,
                "pass": "step",
                "dtype": precision,
                "shape": f"batch={task.batch}",
                "steps": len(result.seconds),
                "swapped": _swapped(result) if provider == "braze" else "",
                "step_ratio": median(_paired_ratios(*pair)) if provider == "braze" else 1.0,
                **{_key(label): value for label, value in figures.items()},
            }
        )
    return found


def _key(label: str) -> str:
    return label.replace("/s", "_per_second").replace(",", "").replace(" ", "_").lower()
