"""The page: one HTML file that needs nothing else."""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence
from importlib import resources

from ..records import Record
from . import svg
from .columns import Column, present
from .comparisons import FASTER, SAME, SLOWER, UNKNOWN, Comparison, Standing
from .contents import Contents, Part
from .figures import Figure
from .sections import NOT_SHOWN

#: A table of more rows starts closed and has a field to search it.
MANY = 20


def render(contents: Contents) -> str:
    """The whole page."""
    style, script = (resources.files(__package__).joinpath(name).read_text() for name in ("page.css", "page.js"))
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>braze: benchmarks</title>
<style>
{style}</style>
</head>
<body>
<header>
<h1>braze: benchmarks</h1>
<p>{html.escape(contents.introduction)}</p>
{_machines(contents)}
</header>
{_navigation(contents)}
<main>
{_headline(contents)}
{_slower(contents)}
{"".join(_part(part) for part in contents.parts)}
{_files(contents)}
</main>
<script>
{script}</script>
</body>
</html>
"""


def _machines(contents: Contents) -> str:
    if not contents.machines:
        return ""
    items = "".join(
        f"<li><b>{html.escape(name)}</b> <span>{html.escape(what)}</span></li>" for name, what in contents.machines
    )
    return f'<ul class="machines">{items}</ul>'


def _navigation(contents: Contents) -> str:
    places = [("headline", "Headline"), ("slower", "Not faster")]
    places += [(part.section.benchmark, part.section.title) for part in contents.parts] + [("files", "Files")]
    links = "".join(f'<a href="#{html.escape(_id(to), quote=True)}">{html.escape(name)}</a>' for to, name in places)
    return f"<nav>{links}</nav>"


def _id(benchmark: str) -> str:
    return benchmark.replace(" ", "-")


def _headline(contents: Contents) -> str:
    if not contents.standings:
        body = "<p>Nothing has been timed against braze yet.</p>"
    else:
        body = "<p>Time of the other ÷ time of braze: above 1, braze is faster. Counted by the 95 % interval.</p>"
        body += _table(
            ("machine", "benchmark", "against", "geometric mean", "cases", "faster", "same", "slower", ""),
            (_standing(one) for one in contents.standings),
        )
    return f'<section id="headline"><h2>Headline</h2>{body}</section>'


def _standing(one: Standing) -> str:
    counts, total = one.counts, sum(one.counts.values())
    cells = (
        _word(one.machine) + _word(one.benchmark) + _provider(one.provider) + _number(one.mean, f"{one.mean:.2f}")
        + _number(total) + _number(counts[FASTER]) + _number(counts[SAME] + counts[UNKNOWN]) + _number(counts[SLOWER])
    )  # fmt: skip
    shares = "".join(
        f'<i class="{name}" style="flex-grow: {count}"></i>'
        for name, count in ((FASTER, counts[FASTER]), (SAME, counts[SAME] + counts[UNKNOWN]), (SLOWER, counts[SLOWER]))
        if count
    )
    return f'<tr>{cells}<td><span class="share">{shares}</span></td></tr>'


def _slower(contents: Contents) -> str:
    parts = [f'<section id="slower"><h2>Where braze is not faster</h2><p>{html.escape(contents.not_faster)}</p>']
    if contents.refused:
        parts.append(_cases("Wrong results, which get no time", contents.refused))
    if contents.slower:
        parts.append(_comparisons("Slower, beyond the interval; the worst first", contents.slower, open_=True))
    if contents.same:
        parts.append(_comparisons("No difference that the interval shows", contents.same, open_=False))
    return "".join(parts) + "</section>"


def _cases(title: str, records: Sequence[Record]) -> str:
    columns = present((), records, NOT_SHOWN)
    return _records(title, columns, records, open_=True)


def _comparisons(title: str, found: Sequence[Comparison], *, open_: bool) -> str:
    rows = []
    for one in found:
        interval = "" if one.low is None or one.high is None else f"{one.low:.2f} … {one.high:.2f}"
        rows.append(
            f"<tr>{_word(one.benchmark)}{_word(one.case)}{_provider(one.provider)}{_number(one.ratio, f'{one.ratio:.2f}')}"
            f"{_word(interval)}{_word(one.machine)}</tr>"
        )
    heads = ("benchmark", "case", "against", "time ÷ braze's", "95 % interval", "machine")
    return _folded(title, _table(heads, rows), len(rows), open_)


def _part(part: Part) -> str:
    section = part.section
    opening = f'<section id="{html.escape(_id(section.benchmark), quote=True)}"><h2>{html.escape(section.title)}</h2>'
    meaning = f"<p>{html.escape(section.meaning)}</p>" if section.meaning else ""
    command = f"<code>{html.escape(section.command)}</code>"
    if not part.machines:
        return f'{opening}{meaning}<p class="missing">Not measured yet: {command}</p></section>'
    body = "".join(
        f"<h3>{html.escape(one.machine)}</h3>"
        + _means(one.means)
        + f'<div class="figures">{"".join(map(_figure, one.figures))}</div>'
        + _records("Every figure", one.columns, one.rows, open_=len(one.rows) <= MANY)
        for one in part.machines
    )
    return f"{opening}{meaning}<p>{command}</p>{body}</section>"


def _means(means: dict[str, dict[tuple[str, str], float]]) -> str:
    if not means:
        return ""
    columns = list(dict.fromkeys(column for row in means.values() for column in row))
    rows = (
        f"<tr>{_word(op)}" + "".join(_ratio(row.get(column)) for column in columns) + "</tr>"
        for op, row in means.items()
    )
    heads = ("op", *(f"{provider}, {which}" for provider, which in columns))
    table = _table(heads, rows)
    return _folded("Geometric means by operator: time ÷ braze's", table, len(means), True)


def _ratio(ratio: float | None) -> str:
    if ratio is None:
        return "<td></td>"
    tint = "" if 0.95 < ratio < 1.05 else ' class="faster"' if ratio > 1 else ' class="slower"'
    return f'<td data-value="{ratio!r}"{tint}>{ratio:.2f}</td>'


def _figure(figure: Figure) -> str:
    wide = ' class="wide"' if figure.wide else ""
    return f"<figure{wide}><figcaption>{html.escape(figure.title)}</figcaption>{figure.svg}</figure>"


def _records(title: str, columns: Sequence[Column], records: Sequence[Record], *, open_: bool) -> str:
    rows = (
        f"<tr>{''.join(_cell(column, record) for column in columns)}</tr>"
        for record in records
    )  # fmt: skip
    return _folded(title, _table([column.header for column in columns], rows), len(records), open_)


def _cell(column: Column, record: Record) -> str:
    text, key = column.text(record), column.key(record)
    if column.field == "provider":
        return _provider(text)
    if isinstance(key, int | float):
        return _number(key, text)
    alarm = ' class="alarm"' if column.field == "status" and text != "ok" else ""
    return f"<td{alarm}>{html.escape(text)}</td>"


def _files(contents: Contents) -> str:
    rows = (
        f"<tr>{_word(one.name)}{_word(one.command)}{_number(len(one.records))}{_word(one.date)}{_word(one.commit)}"
        f"{_word(one.age)}{_word(one.environment)}</tr>"
        for one in contents.files
    )
    heads = ("file", "benchmark", "records", "date", "commit", "age", "machine and versions")
    return f'<section id="files"><h2>Files</h2>{_table(heads, rows)}</section>'


def _folded(title: str, table: str, rows: int, open_: bool) -> str:
    search = '<input type="search" placeholder="rows with …" aria-label="show only rows with">' if rows > MANY else ""
    summary = f'<summary>{html.escape(title)} <span class="count">{rows:,} row{"" if rows == 1 else "s"}</span></summary>'
    return f"<details{' open' if open_ else ''}>{summary}{search}{table}</details>"


def _table(heads: Iterable[str], rows: Iterable[str]) -> str:
    head = "".join(f'<th scope="col"><button type="button">{html.escape(name)}</button></th>' if name else "<th></th>"
                   for name in heads)  # fmt: skip
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{"".join(rows)}</tbody></table></div>'


def _word(text: object) -> str:
    return f"<td>{html.escape(str(text))}</td>"


def _number(value: float, text: str | None = None) -> str:
    return f'<td data-value="{value!r}">{html.escape(text if text is not None else f"{value:,}")}</td>'


def _provider(name: str) -> str:
    return f'<td><span class="provider" style="--series: var(--series-{svg.series(name)})">{html.escape(name)}</span></td>'
