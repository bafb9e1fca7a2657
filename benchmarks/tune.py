"""``python -m braze.benchmarks tune OP``: launch parameters from measurements, in the place of reasoned ones.

Every launch of the operator's benchmark sizes, forward and backward, asks a table for its parameters with those that it
has reasoned out (``kernels/triton/launch_table.py``). For each such question the search (``tune_search.py``) walks
through its neighbours on every size that asks it. A choice is refused where it does not run, spills registers that the
reasoned one does not, gives other bits the second time, or leaves the error budget of the contract. Times are those of
``ops``, taken in turns with the reasoned choice. What a walk ends with is timed again from scratch, with warm and with
cold caches, and proposed only if the 95 % interval of its ratio lies below 0.98 on a size, below 1.02 on all of them,
and nowhere above 1 with cold caches: on the sizes of the benchmark, and on each with one dim a sixteenth as long, as
far as they ask the same question.

``--write`` puts the proposals into the table of this GPU, ``kernels/triton/launches/<device>.json``, with the evidence
beside them, and takes out what was measured before where the reasoned choice now stands. What was not asked is left as
it is. Operators that share a kernel may share an answer: name them together, to hold it to the sizes of all of them.
"""

from __future__ import annotations

import argparse
import difflib
import functools
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich import box
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from braze.kernels import OPS
from braze.kernels.op import Op
from braze.kernels.triton import launch_table
from braze.kernels.triton.launch_table import Ask

from . import records, tables
from .ops_case import BACKWARD, FORWARD, Case, cases, device_name
from .ops_measure import no_room
from .records import Record
from .tune_case import Subject
from .tune_search import STEPS, Choice, Proof, label, mean_ratio, objection, walk

#: The first alone with ``--quick``.
DTYPES = (torch.bfloat16, torch.float32)
FEWER = 16


class Effort(NamedTuple):
    """Rounds of each step of a walk, of the proof, of the proof with cold caches; and the most steps of a walk."""

    search: int = 20
    proof: int = 50
    cold: int = 10
    steps: int = STEPS


QUICK = Effort(search=10, proof=20, cold=6, steps=2)


class Place(NamedTuple):
    """A pass that asks; ``searched``: a benchmark size, and not one that only has to be no slower."""

    case: Case
    which: str
    searched: bool


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the operators and ``--write``."""
    parser.add_argument("op", nargs="+", type=_operator, metavar="OP", help="an operator; see docs/operators.md")
    parser.add_argument("--write", action="store_true", help="put the proposals where the kernels read them")


def _operator(name: str) -> Op:
    known = {op.name: op for op in OPS}
    if name not in known:
        close = difflib.get_close_matches(name, known, 3)
        hint = f"did you mean {' or '.join(close)}?" if close else f"there are {', '.join(known)}"
        raise argparse.ArgumentTypeError(f"there is no operator {name!r}; {hint}")
    return known[name]


def run(arguments: argparse.Namespace) -> list[Record]:
    """Search, print the table, write it if asked to, and return flat records."""
    if arguments.quick and arguments.write:
        sys.exit("tune: --quick looks at one size, which proves nothing about the others; leave it out to --write")
    if not torch.cuda.is_available():
        sys.exit("tune: needs a GPU, and there is none here")
    device = torch.device("cuda", torch.cuda.current_device())
    file = launch_table.path(device_name(device))
    if arguments.write:
        _must_be_writable(file.parent)
    found: list[Record] = []
    asked = better = 0
    columns = (TextColumn("{task.description:60}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns) as progress:
        task = progress.add_task("what launches ask", total=None)

        def tell(done: int, total: int, what: str) -> None:
            progress.update(task, completed=done, total=total, description=what)

        for result in tune(arguments.op, device, arguments.quick, tell):
            found += result.records
            arguments.keep(found)
            asked += result.ask is not None
            better += result.choice is not None
            if arguments.write and result.ask is not None:
                store(file, device_name(device), result)
    show(found)
    where = f"written to {file}" if arguments.write else "nothing is written without --write"
    said = f"other parameters are faster for {better} of {asked} kinds of launches; {where}"
    tables.console().print(said, highlight=False, soft_wrap=True)
    return found


class Result(NamedTuple):
    """What became of one question, or that a case could not be looked at; the proposed choice, if there is one."""

    records: list[Record]
    ask: Ask | None = None
    choice: Choice | None = None


def tune(
    ops: Sequence[Op],
    device: torch.device,
    quick: bool,
    tell: Callable[[int, int, str], object] = lambda done, total, what: None,
    subject: Callable[[Case], Subject] = Subject,
) -> Iterator[Result]:
    """The result of each question that the operators' launches ask, as they come."""
    effort = QUICK if quick else Effort()
    subjects = _Latest(subject)
    places: dict[Ask, list[Place]] = {}
    for case, searched in (found for op in ops for found in _cases(op, device, quick)):
        status = no_room(case)
        if status:
            yield Result([_record(Place(case, FORWARD, searched), None, status=status)])
            continue
        for which in (FORWARD, BACKWARD) if case.op.differentiable else (FORWARD,):
            for ask in subjects(case).asks(which):
                places.setdefault(ask, []).append(Place(case, which, searched))
    questions = {ask: found for ask, found in places.items() if any(place.searched for place in found)}
    for done, (ask, asking) in enumerate(questions.items()):
        tell(done, len(questions), f"{ask.kernel} {asking[0].case.op.name} {asking[0].which}")
        yield _answered(ask, asking, subjects, effort)
    tell(len(questions), len(questions), "done")


def _cases(op: Op, device: torch.device, quick: bool) -> Iterator[tuple[Case, bool]]:
    """The benchmark sizes, to be searched; and those with one dim shorter, at which no choice may be slower."""
    bench = list(cases([op], DTYPES, device, quick=False))
    if quick:
        yield bench[0], True
        return
    for case in bench:
        yield case, True
    seen = [(case.dims, case.dtype) for case in bench]
    for case in bench:
        for name, size in case.dims.items():
            shorter = {**case.dims, name: max(2, size // FEWER)}
            if size > 2 and (shorter, case.dtype) not in seen:
                seen.append((shorter, case.dtype))
                yield Case(op, shorter, case.dtype, device), False


class _Latest:
    """The subject of the case asked for last, and no other: inputs and truth take memory."""

    def __init__(self, make: Callable[[Case], Subject]) -> None:
        self._make = make
        self._case: Case | None = None
        self._subject: Subject | None = None

    def __call__(self, case: Case) -> Subject:
        if self._subject is None or self._case != case:
            self._subject = None  # first, so that both are never there at once
            self._case, self._subject = case, self._make(case)
        return self._subject


def _answered(ask: Ask, places: Sequence[Place], subjects: Callable[[Case], Subject], effort: Effort) -> Result:
    ends: dict[Choice, None] = {}
    tried, refused = 0, dict[Choice, str]()
    for place in places:
        if place.searched:
            subject = subjects(place.case)
            refusal = functools.partial(subject.refusal, place.which, ask)
            ratios = functools.partial(subject.ratios, place.which, ask, effort.search)
            found = walk(ask, refusal, ratios, effort.steps)
            tried += found.timed
            refused.update(found.refused)
            if found.best != ask.free:
                ends[found.best] = None
    refusals = [f"{label(choice)}: {why}" for choice, why in refused.items()]
    counts: Record = {"tried": tried, "refused": len(refused), "refusals": "; ".join(refusals)}
    if not ends:
        status = f"kept: none of {tried} choices was faster, {len(refused)} were refused"
        return Result([_record(place, ask, status=status, **counts) for place in places if place.searched], ask)
    return _proven(ask, places, subjects, effort, list(ends), counts)


def _proven(
    ask: Ask,
    places: Sequence[Place],
    subjects: Callable[[Case], Subject],
    effort: Effort,
    choices: list[Choice],
    counts: Record,
) -> Result:
    """Every choice on every place, timed anew; the fastest to which there is no objection is proposed."""
    proofs: dict[Choice, list[Proof]] = {choice: [] for choice in choices}
    figures: dict[Choice, list[tuple[Place, dict[str, float]]]] = {choice: [] for choice in choices}
    objections: dict[Choice, str] = {}
    for place in places:
        subject = subjects(place.case)
        for choice in choices:
            why = subject.refusal(place.which, ask, choice)
            if why:
                objections.setdefault(choice, why)
        left = [choice for choice in choices if choice not in objections]
        if left:
            for choice, (proof, numbers) in subject.prove(place.which, ask, left, effort.proof, effort.cold).items():
                proofs[choice].append(proof)
                figures[choice].append((place, numbers))
    for choice in choices:
        why = objections.get(choice) or objection(proofs[choice])
        if why:
            objections[choice] = why
    able = [choice for choice in choices if choice not in objections]
    best = min(able, key=lambda choice: mean_ratio(proofs[choice]), default=None)
    found = [
        _record(place, ask, choice, status=_status(choice, best, objections), **numbers, **counts)
        for choice in choices
        for place, numbers in figures[choice] or [(places[0], {})]
    ]
    return Result(found, ask, best)


def _status(choice: Choice, best: Choice | None, objections: dict[Choice, str]) -> str:
    if choice in objections:
        return f"kept: {objections[choice]}"
    return "proposed" if choice == best else "kept: another choice is faster"


def _record(place: Place, ask: Ask | None, choice: Choice | None = None, **figures: Any) -> Record:
    fields = place.case.record(place.which, "braze")
    asked = {} if ask is None else {"kernel": ask.kernel, "fixed": label(ask.fixed), "reasoned": label(ask.free)}
    measured = {} if choice is None else {"measured": label(choice)}
    return {**fields, "benchmark": "tune", **asked, **measured, **figures}


def store(file: Path, device: str, result: Result) -> None:
    """Replace a question's entry in the table of a device, or take it out where what was reasoned stands."""
    assert result.ask is not None
    entries = launch_table.read(file)
    if entries.pop(result.ask, None) is None and result.choice is None:
        return
    if result.choice is not None:
        now = records.environment()
        entries[result.ask] = {
            **launch_table.to_json(result.ask, dict(result.choice)),
            **{name: now[name] for name in ("date", "commit", "torch", "triton")},
            "check": "within the error budget, the same bits twice, no more spills, on every shape",
            "shapes": [_evidence(record) for record in result.records if record["status"] == "proposed"],
        }
    file.parent.mkdir(parents=True, exist_ok=True)
    records.replace(file, launch_table.text(device, sorted(entries.values(), key=lambda entry: entry["kernel"])))
    launch_table.forget()


EVIDENCE = (
    "op", "pass", "dtype", "shape", "reasoned_ms", "measured_ms", "ratio", "ratio_low", "ratio_high", "cold_ratio",
    "cold_ratio_low", "cold_ratio_high",
)  # fmt: skip


def _evidence(record: Record) -> Record:
    return {name: record[name] for name in EVIDENCE}


def _must_be_writable(folder: Path) -> None:
    """Before minutes of measuring, and not after."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        sys.exit(
            f"tune: --write puts the table into {folder}, which cannot be written to: {error.strerror}; "
            "install braze from a checkout (pip install --editable), or leave out --write"
        )


def show(found: Sequence[Record]) -> None:
    """Print a row for each choice and shape."""
    table = Table(box=box.SIMPLE, title="Launch parameters: what was reasoned out, and what was measured beside it")
    for name in ("kernel", "dtype", "shape, pass", "constants", "reasoned → measured"):
        table.add_column(name)
    for name in ("ms", "÷ reasoned (95 % interval)"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("status")
    for record in found:
        times = ratio = ""
        if "ratio" in record:
            times = f"{record['reasoned_ms']:.3g} → {record['measured_ms']:.3g}"
            ratio = tables.ratio(record, 3)
        choice = " → ".join(filter(None, (record.get("reasoned"), record.get("measured"))))
        shape = f"{record['shape']}, {record['pass']}"
        status = f"[bold]{record['status']}[/]" if record["status"] == "proposed" else record["status"]
        kernel, fixed = record.get("kernel", record["op"]), record.get("fixed", "")
        table.add_row(kernel, record["dtype"], shape, fixed, choice, times, ratio, status)
    tables.console().print(table)
