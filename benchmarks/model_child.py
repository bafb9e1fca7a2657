"""One model of the ``models`` benchmark, judged and timed in a process of its own.

What is judged: the answer of the untrained model, and the losses of the first and the last of a few steps of training,
each against vanilla's. The budget is what roundings do to vanilla itself. Copies of it whose every weight is off by a
rounding of the precision (uniform, at most half a step) are run as it is, and a provider may differ from it by

    ROUNDINGS · (the largest difference of such a copy, at this step or before + one rounding step of the figure)

A weight's rounding is one of about ten between a weight and that of the next layer, and another program rounds
differently in all of them: √20 times as much, and three standard deviations of that are 13 times as much.
"""

from __future__ import annotations

import copy
import itertools
import logging
import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from . import memory, timing
from .model_providers import BRAZE, COMPILED, LIKE, NAMES, VANILLA, Absent, Learner, Task, learner
from .ops_case import device_name
from .records import Record
from .workloads import WORKLOADS, Scale, shape

ROUNDINGS = 16
#: Copies of vanilla with rounded weights.
COPIES = 2
BATCHES = 4
#: Steps of training that are judged, and rounds that are timed.
STEPS, QUICK_STEPS = 6, 3
ROUNDS, QUICK_ROUNDS = 10, 3
#: Of the memory that is free, what the copies of a model may take, and the bytes of a parameter with AdamW's state.
SHARE, PARAMETER_BYTES = 0.7, 12

Pass = Literal["inference", "training"]


class Stage(NamedTuple):
    """What is being done, for the progress bar."""

    text: str


@dataclass
class Budget:
    """What vanilla found, and how far from it another may be."""

    answer: Tensor
    answer_budget: float
    losses: list[float]
    loss_budgets: list[float]


@dataclass
class Run:
    """A provider that runs, and what is known about it: figures of its records by pass."""

    learner: Any
    figures: dict[Pass, Record]

    def ok(self, which: Pass) -> bool:
        """Whether it is to be timed."""
        return self.figures.get(which, {}).get("status") == "ok"


def measure(name: str, scale: Scale, device: str) -> Iterator[Stage | Record]:
    """Records of one model, as they are found, and the stages between."""
    _quiet()
    yield Stage("building")
    task = build(name, scale, device)
    size = task.workload.sizes[scale]
    common = {
        "benchmark": "models",
        "model": name,
        "device": device_name(task.device),
        "threads": torch.get_num_threads(),
        "dtype": task.dtype,
        "shape": shape(size),
        "parameters": sum(p.numel() for p in task.model.parameters()),
        "unit": task.workload.unit,
    }
    yield Stage("rounding vanilla")
    budget = vanilla(task, QUICK_STEPS if scale == "quick" else STEPS)
    for number, group in enumerate(_groups(task)):
        for found in _group(task, group, budget, task.workload.items(size), quick=scale == "quick"):
            if isinstance(found, Stage):
                yield found
            elif number == 0 or found["provider"] != BRAZE:  # the first group had it
                yield {**common, **found}


def build(name: str, scale: Scale, device: str = "cpu") -> Task:
    """The model and its batches, always the same."""
    workload = WORKLOADS[name]
    size = workload.sizes[scale]
    torch.manual_seed(0)
    model = workload.build(size).to(device)
    generator = torch.Generator().manual_seed(0)
    drawn = [workload.batch(size, generator) for _ in range(BATCHES)]
    batches = [{key: value.to(device) for key, value in batch.items()} for batch in drawn]
    return Task(workload, model, batches, torch.device(device))


def _group(task: Task, names: Sequence[str], budget: Budget, items: int, quick: bool) -> Iterator[Stage | Record]:
    """Providers whose copies of the model are there together, and take turns."""
    runs: dict[str, Run] = {}
    for name in names:
        yield Stage(name)
        compiles = quick and name.endswith(COMPILED)
        absent = "skipped: --quick compiles no model, which takes a minute"
        runs[name] = _none(absent) if compiles else judge(task, name, budget)
    for which in ("inference", "training"):
        yield Stage(f"timing {which}")
        _time(runs, which, items, QUICK_ROUNDS if quick else ROUNDS, timing.clock_for(task.device))
    for name, run in runs.items():
        if run.learner is not None:
            run.learner.close()
        for which, figures in run.figures.items():
            yield {"provider": name, "pass": which, **figures}


def vanilla(task: Task, steps: int) -> Budget:
    """Vanilla's answer and losses, and what roundings of the weights do to them."""
    answer, losses = _results(task, steps)
    spread, spreads = 0.0, [0.0] * steps
    for seed in range(COPIES):
        answer_of_copy, losses_of_copy = _results(_rounded(task, seed), steps)
        spread = max(spread, difference(answer_of_copy, answer))
        spreads = [max(s, abs(a - b)) for s, a, b in zip(spreads, losses_of_copy, losses, strict=True)]
    eps = _eps(task)
    budgets = [
        ROUNDINGS * (largest + eps * abs(loss))
        for largest, loss in zip(itertools.accumulate(spreads, max), losses, strict=True)
    ]
    return Budget(answer, ROUNDINGS * (spread + eps), losses, budgets)


def difference(got: Tensor, wanted: Tensor) -> float:
    """max |got − wanted| / max |wanted|; infinite for what is no number."""
    apart = ((got.float() - wanted.float()).abs().max() / wanted.float().abs().max()).item()
    return apart if apart == apart else float("inf")


def judge(task: Task, name: str, budget: Budget) -> Run:
    """A provider, trained for as many steps as vanilla; where it cannot run, why."""
    start = time.perf_counter()
    try:
        run = Run(learner(task, name), {})
        if run.learner.infers:
            run.learner.train(False)
            run.figures["inference"] = _judge_answer(run.learner.infer(), budget)
        run.learner.train(True)
        losses = [run.learner.step().item()]
        start_s = time.perf_counter() - start
        losses += [run.learner.step().item() for _ in budget.losses[1:]]
    except Absent as absent:
        return _none(str(absent))
    except Exception as error:  # whatever a compiler or a model raises: the others go on
        return _none(f"failed: {type(error).__name__}: {error}"[:300])
    run.figures["training"] = {**_judge_losses(losses, budget), "start_s": start_s}
    return run


def _judge_answer(answer: Tensor, budget: Budget) -> Record:
    apart = difference(answer, budget.answer)
    right = apart <= budget.answer_budget
    status = "ok" if right else f"wrong: answer {apart:.2g} from vanilla's, budget {budget.answer_budget:.2g}"
    return {"status": status, "error_outputs": apart, "budget_outputs": budget.answer_budget}


def _judge_losses(losses: list[float], budget: Budget) -> Record:
    figures: Record = {"status": "ok", "steps": len(losses)}
    for label, i in (("last", -1), ("first", 0)):
        apart = losses[i] - budget.losses[i]
        figures |= {f"loss_{label}": losses[i], f"loss_{label}_difference": apart}
        figures[f"loss_{label}_budget"] = budget.loss_budgets[i]
        if not abs(apart) <= budget.loss_budgets[i]:
            figures["status"] = f"wrong: {label} loss {apart:+.2g} from vanilla's, budget {budget.loss_budgets[i]:.2g}"
    return figures


def _time(runs: dict[str, Run], which: Pass, items: int, rounds: int, clock: timing.Clock) -> None:
    """Add times and memory to the figures of all that are right."""
    timed = {name: run for name, run in runs.items() if run.ok(which)}
    work = {}
    for name, run in timed.items():
        run.learner.train(which == "training")
        work[name] = run.learner.step if which == "training" else run.learner.infer
    if not work:
        return
    with torch.set_grad_enabled(which == "training"):
        samples = timing.compare(work, clock, rounds)
    for name, run in timed.items():
        figures: Record = samples.milliseconds(name, BRAZE)
        figures |= samples.ratio_fields(name, LIKE.get(name, name), prefix="like_")
        figures |= {"items_per_second": items / samples.quartiles(name).median, "rounds": rounds}
        run.figures[which] |= {**figures, "peak_bytes": run.learner.peak(work[name])}


def _results(task: Task, steps: int) -> tuple[Tensor, list[float]]:
    plain = Learner(task, VANILLA)
    plain.train(False)
    answer = plain.infer()
    plain.train(True)
    return answer, [plain.step().item() for _ in range(steps)]


def _rounded(task: Task, seed: int) -> Task:
    model = copy.deepcopy(task.model)
    generator = torch.Generator(task.device).manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1 + _eps(task) * (torch.rand(p.shape, generator=generator, device=p.device) - 0.5))
    return Task(task.workload, model, task.batches, task.device)


def _eps(task: Task) -> float:
    return torch.finfo(torch.float32 if task.dtype == "32-true" else torch.bfloat16).eps


def _groups(task: Task) -> list[list[str]]:
    """The providers, pairs together and braze in each, as many at a time as there is memory for copies of the model."""
    pairs = [[name, *([LIKE[name]] if LIKE[name] != BRAZE else [])] for name in NAMES if name in LIKE]
    parameters = sum(p.numel() for p in task.model.parameters())
    fit = int(SHARE * memory.available(task.device) / (PARAMETER_BYTES * parameters))
    groups = [[BRAZE]]
    for pair in pairs:
        if len(groups[-1]) > 1 and len(groups[-1]) + len(pair) > fit:
            groups.append([BRAZE])
        groups[-1] += pair
    return groups


def _none(status: str) -> Run:
    return Run(None, {"training": {"status": status}})


def _quiet() -> None:
    warnings.simplefilter("ignore")  # advice about workers and loggers would tear up the progress bar
    for name in ("lightning.pytorch", "torch._inductor", "torch.utils.cpp_extension"):
        logging.getLogger(name).setLevel(logging.ERROR)
