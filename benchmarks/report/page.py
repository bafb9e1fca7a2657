"""The page: one HTML file that needs nothing else."""

from __future__ import annotations

import html
from collections.abc import Sequence
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
#: Letters of a cell that is not broken into lines.
LONG = 60


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
            ("benchmark", "against", "geometric mean", "cases", "faster", "same", "slower", "", "machine"),
            [_standing(one) for one in contents.standings],
            whole=True,
        )
    return f'<section id="headline"><h2>Headline</h2>{body}</section>'


def _standing(one: Standing) -> list[str]:
    counts = {FASTER: one.counts[FASTER], SAME: one.counts[SAME] + one.counts[UNKNOWN], SLOWER: one.counts[SLOWER]}
    shares = "".join(f'<i class="{name}" style="flex-grow: {count}"></i>' for name, count in counts.items() if count)
    figures = [_number(one.mean, f"{one.mean:.2f}"), _number(sum(counts.values())), *map(_number, counts.values())]
    share = f'<td><span class="share">{shares}</span></td>'
    return [_word(one.benchmark), _provider(one.provider), *figures, share, _word(one.machine)]


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
        ratio = _number(one.ratio, f"{one.ratio:.2f}")
        whom = _provider(one.provider)
        rows.append([_word(one.benchmark), _word(one.case), whom, ratio, _word(interval), _word(one.machine)])
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
        + (f"<p>{html.escape(one.note)}</p>" if one.note else "")
        + _means(one.means)
        + f'<div class="figures">{"".join(map(_figure, one.figures))}</div>'
        + _records("Every record", one.columns, one.rows, open_=len(one.rows) <= MANY)
        for one in part.machines
    )
    return f"{opening}{meaning}<p>{command}</p>{body}</section>"


def _means(means: dict[str, dict[tuple[str, str], float]]) -> str:
    if not means:
        return ""
    columns = list(dict.fromkeys(column for row in means.values() for column in row))
    rows = [[_word(op), *(_ratio(row.get(column)) for column in columns)] for op, row in means.items()]
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
    rows = [[_cell(column, record) for column in columns] for record in records]
    return _folded(title, _table([column.header for column in columns], rows), len(records), open_)


def _cell(column: Column, record: Record) -> str:
    text, key = column.text(record), column.key(record)
    if column.field == "provider":
        return _provider(text)
    if isinstance(key, int | float):
        return _number(key, text)
    alarm = ' class="alarm"' if column.field == "status" and text != "ok" else ""
    return f"<td{alarm}>{html.escape(text)}</td>" if alarm else _word(text)


def _files(contents: Contents) -> str:
    rows = [
        [_word(one.name), _word(one.command), _number(len(one.records)), _word(one.date), _word(one.commit),
         _word(one.age.words), _word(one.environment)]
        for one in contents.files
    ]  # fmt: skip
    heads = ("file", "benchmark", "records", "date", "commit", "age", "machine and versions")
    return f'<section id="files"><h2>Files</h2>{_table(heads, rows)}</section>'


def _folded(title: str, table: str, rows: int, open_: bool) -> str:
    search = '<input type="search" placeholder="rows with …" aria-label="show only rows with">' if rows > MANY else ""
    count = f'<span class="count">{rows:,} row{"" if rows == 1 else "s"}</span>'
    summary = f"<summary>{html.escape(title)} {count}</summary>"
    return f"<details{' open' if open_ else ''}>{summary}{search}{table}</details>"


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]], *, whole: bool = False) -> str:
    numbers = {place for row in rows for place, cell in enumerate(row) if cell.startswith("<td data-value")}
    head = "".join(_head(name, place in numbers) for place, name in enumerate(heads))
    body = "".join(f"<tr>{''.join(row)}</tr>" for row in rows)
    kind = "scroll whole" if whole else "scroll"
    return f'<div class="{kind}"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _head(name: str, number: bool) -> str:
    kind = ' class="number"' if number else ""
    button = f'<button type="button">{html.escape(name)}</button>' if name else ""
    return f'<th scope="col"{kind}>{button}</th>'


def _word(text: object) -> str:
    words = str(text)
    kind = ' class="long"' if len(words) > LONG else ""
    return f"<td{kind}>{html.escape(words)}</td>"


def _number(value: float, text: str | None = None) -> str:
    return f'<td data-value="{value!r}">{html.escape(text if text is not None else f"{value:,}")}</td>'


def _provider(name: str) -> str:
    color = f"--series: var(--series-{svg.series(name)})"
    return f'<td><span class="provider" style="{color}">{html.escape(name)}</span></td>'
