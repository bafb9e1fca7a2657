"""The README's performance tables, written from the committed results so that the two never differ."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from . import markdown
from .comparisons import comparisons, not_faster, refused, standings
from .figures import grouped
from .results import ResultFile, measured
from .summaries import operator_means

BEGIN = "<!-- written by: python -m braze.benchmarks report --readme README.md -->"
END = "<!-- end of what is written -->"


def update(path: Path, files: Sequence[ResultFile]) -> None:
    """Put the tables between the two marks of the file; everything else stays."""
    text = path.read_text(encoding="utf-8")
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise ValueError(f"report: {path} must hold the line {BEGIN!r} once, and after it {END!r}; add them")
    before, after = text[: text.index(BEGIN)], text[text.index(END) :]
    path.write_text(f"{before}{block(files)}{after}", encoding="utf-8")


def block(files: Sequence[ResultFile]) -> str:
    """The first mark and the tables, up to the second mark."""
    records = [record for one in files for record in one.records]
    found = comparisons(records)
    parts = [BEGIN]
    if all(record["machine"].startswith("CPU: ") for record in measured(records)):
        parts.append("On a GPU: not measured yet (`make gpu`).")
    if not found:
        parts.append("On the CPU: not measured yet (`python -m braze.benchmarks ops --device cpu`).")
    else:
        parts.append("Time of the other ÷ time of braze, so above 1 braze is faster; counted by the 95 % interval.")
        parts += [not_faster(found, refused(records)), markdown.headline(standings(found))]
    for (machine,), own in grouped((r for r in records if r["benchmark"] == "ops"), "machine").items():
        means = operator_means(comparisons(own))
        if means:
            title = f"Each operator on {machine}: geometric means over its shapes and dtypes"
            body = markdown.means_table(means)
            parts.append(f"<details><summary>{title}</summary>\n\n{body}\n\n</details>")
    return "\n\n".join(parts) + "\n\n"
