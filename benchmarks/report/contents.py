"""What the page and the summary say, before either is written."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from ..records import Record
from . import comparisons as compared
from .columns import Column, present
from .comparisons import Comparison, Standing
from .figures import Figure, grouped
from .results import Age, ResultFile, age, measured
from .sections import NOT_SHOWN, Section, sections
from .summaries import Means, operator_means


@dataclass(frozen=True)
class OnMachine:
    """What one benchmark found on one machine."""

    machine: str
    columns: list[Column]
    rows: list[Record]
    figures: list[Figure]
    note: str = ""
    means: Means = field(default_factory=dict)


@dataclass(frozen=True)
class Part:
    """One benchmark on all machines; on none, it has not been measured."""

    section: Section
    machines: list[OnMachine]


@dataclass(frozen=True)
class FileLine:
    """One result file, and one of the commits that it holds records of."""

    name: str
    command: str
    records: list[Record]
    date: str
    commit: str
    age: Age
    environment: str


@dataclass(frozen=True)
class Contents:
    """Everything, in the order of the page."""

    introduction: str
    machines: list[tuple[str, str]]
    standings: list[Standing]
    not_faster: str
    refused: list[Record]
    slower: list[Comparison]
    same: list[Comparison]
    parts: list[Part]
    files: list[FileLine]


def gather(files: Sequence[ResultFile], advance: Callable[[str], object] = lambda title: None) -> Contents:
    """Work everything out, the plots too, which take the time; ``advance`` is told which section is next."""
    records = [record for one in files for record in one.records]
    order = [section.benchmark for section in sections(records)]
    found = sorted(compared.comparisons(records), key=lambda one: order.index(one.benchmark))
    slower, same, wrong = compared.slower(found), compared.same(found), compared.refused(records)
    parts = []
    for section in sections(records):
        advance(section.title)
        own = [record for record in records if record["benchmark"] == section.benchmark]
        machines = grouped(own, "machine")
        parts.append(Part(section, [_on_machine(section, name, held) for (name,), held in machines.items()]))
    lines = [line for one in files for line in _lines(one)]
    return Contents(
        _introduction(lines), _machines(files), compared.standings(found), compared.not_faster(found, wrong),
        wrong, slower, same, parts, lines,
    )  # fmt: skip


def _on_machine(section: Section, machine: str, records: list[Record]) -> OnMachine:
    rows = section.rows(records)
    means = operator_means(compared.comparisons(records)) if section.benchmark == "ops" else {}
    return OnMachine(
        machine, present(section.columns, rows, NOT_SHOWN), rows, section.draw(records), section.note(records), means
    )


def _introduction(lines: Sequence[FileLine]) -> str:
    if not lines:
        return "There are no results yet."
    old = sum(len(line.records) for line in lines if line.age.stale)
    total = sum(len(line.records) for line in lines)
    return f"{total:,} records, {old:,} of them of older code than HEAD's" + (" (see Files)." if old else ".")


def _machines(files: Sequence[ResultFile]) -> list[tuple[str, str]]:
    found: dict[str, dict[str, None]] = {}
    for record in measured(record for one in files for record in one.records):
        found.setdefault(record["machine"], {})[str(record["benchmark"])] = None
    named = {machine: ", ".join(kinds).replace("ops, ops geometric mean", "ops") for machine, kinds in found.items()}
    if named and all(machine.startswith("CPU: ") for machine in named):
        named["GPU"] = "not measured yet: make gpu"
    return list(named.items())


def _lines(file: ResultFile) -> list[FileLine]:
    environment = file.environment
    own = environment.get("commit")
    versions = (f"{name} {environment[name]}" for name in ("python", "torch", "triton") if environment.get(name))
    facts = [environment.get("gpu") or environment.get("processor") or "unknown machine", *versions]
    if environment.get("cores"):
        facts.insert(1, f"{environment['cores']} cores")
    groups = {
        commit: [r for r in file.records if str(r.get("commit", own) or "unknown") == commit]
        for commit in file.commits()
    }
    date = str(environment.get("date", "unknown")).replace("T", " ")[:16]
    return [
        FileLine(file.name, file.command, held, date, commit,
                 age(commit), ", ".join(map(str, facts)))
        for commit, held in groups.items()
    ]  # fmt: skip
