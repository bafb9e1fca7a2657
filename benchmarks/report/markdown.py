"""The summary: the page in Markdown, without the plots and without the long tables."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from .comparisons import FASTER, SAME, SLOWER, UNKNOWN, Comparison, Standing
from .contents import Contents, OnMachine, Part
from .summaries import Means

#: A longer table is left to the page.
MOST_ROWS = 40


def render(contents: Contents) -> str:
    """The whole summary."""
    parts = ["# braze: benchmarks", contents.introduction]
    parts.append("\n".join(f"- **{machine}**: {what}" for machine, what in contents.machines))
    meaning = "Time of the other ÷ time of braze: above 1, braze is faster."
    parts += ["## Headline", meaning, headline(contents.standings)]
    parts += ["## Where braze is not faster", contents.not_faster]
    if contents.refused:
        wrong = ([r.get(name, "") for name in ("op", "shape", "pass", "status")] for r in contents.refused)
        parts.append(table(("op", "shape", "pass", "wrong result"), wrong))
    if contents.slower:
        parts.append(_comparisons(contents.slower))
    for part in contents.parts:
        parts += _part(part)
    rows = ((f.name, f.command, len(f.records), f.date, f.commit, f.age, f.environment) for f in contents.files)
    heads = ("file", "benchmark", "records", "date", "commit", "age", "machine and versions")
    parts += ["## Files", table(heads, rows)]
    return "\n\n".join(filter(None, parts)) + "\n"


def headline(standings: Iterable[Standing]) -> str:
    """How each provider stands against braze."""
    rows = [
        (one.benchmark, one.provider, f"{one.mean:.2f}", one.counts[FASTER],
         one.counts[SAME] + one.counts[UNKNOWN], one.counts[SLOWER], one.machine)
        for one in standings
    ]  # fmt: skip
    return table(("benchmark", "against", "geometric mean", "faster", "same", "slower", "machine"), rows)


def means_table(means: Means) -> str:
    """The geometric means by operator."""
    columns = list(dict.fromkeys(column for row in means.values() for column in row))
    rows = [
        (f"`{op}`", *(f"{row[column]:.2f}" if column in row else "" for column in columns)) for op, row in means.items()
    ]
    return table(("op", *(f"{provider}, {which}" for provider, which in columns)), rows)


def table(heads: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A Markdown table, or nothing without rows."""
    lines = ["| " + " | ".join(_escaped(cell) for cell in row) + " |" for row in rows]
    return "\n".join(["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|", *lines]) if lines else ""


def _escaped(cell: object) -> str:
    return " ".join(str(cell).replace("|", "\\|").split())


def _comparisons(found: Iterable[Comparison]) -> str:
    rows = (
        (one.benchmark, one.case, one.provider, f"{one.ratio:.2f} ({one.low:.2f} … {one.high:.2f})", one.machine)
        for one in found
    )
    return table(("benchmark", "case", "against", "time ÷ braze's (95 %)", "machine"), rows)


def _part(part: Part) -> list[str]:
    section = part.section
    found = [f"## {section.title}", section.meaning]
    if not part.machines:
        return [*found, f"Not measured yet: `{section.command}`"]
    return found + [f"`{section.command}`"] + [text for one in part.machines for text in _on_machine(one)]


def _on_machine(one: OnMachine) -> list[str]:
    if one.means:
        body = means_table(one.means)
    elif len(one.rows) <= MOST_ROWS:
        heads = [column.header for column in one.columns]
        body = table(heads, ([column.text(row) for column in one.columns] for row in one.rows))
    else:
        body = f"{len(one.rows):,} rows: on the page of `python -m braze.benchmarks report --html FILE`."
    return [f"### {one.machine}", one.note, body]
