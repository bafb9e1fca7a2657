"""``python -m braze.benchmarks report``: one HTML page and a Markdown summary from the files that ``--json`` wrote.

The page needs nothing but itself: no network, no other file. After the headline both say where braze is not faster,
then all else; which machine and commit every figure is of; and what has not been measured.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from . import markdown, page, readme
from .contents import gather
from .results import find, load
from .sections import SECTIONS

RESULTS = Path(__file__).parents[1] / "results"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the files, and where to write."""
    parser.add_argument(
        "files", nargs="*", type=Path, metavar="FILE", help=f"files of --json, or folders of them (default: {RESULTS})"
    )
    parser.add_argument("--html", type=Path, metavar="FILE", help="write the page here")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="write the summary here")
    parser.add_argument("--readme", type=Path, metavar="FILE", help="write the performance tables into this file")


def run(arguments: argparse.Namespace) -> None:
    """Read the files and write what was asked for; without any of it, print the summary."""
    paths = arguments.files or [RESULTS]
    start = paths[0] if len(paths) == 1 and paths[0].is_dir() else Path.cwd()
    try:
        files = [load(path, start) for path in find(paths)]
        if arguments.readme:
            readme.update(arguments.readme, files)
    except ValueError as error:
        sys.exit(str(error))
    if arguments.readme and not arguments.html and not arguments.markdown:
        return
    columns = (TextColumn("{task.description:32}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, transient=True) as bar:
        task = bar.add_task("", total=len(SECTIONS))
        contents = gather(files, lambda title: bar.update(task, advance=1, description=title))
    if arguments.html:
        arguments.html.write_text(page.render(contents), encoding="utf-8")
    if arguments.markdown:
        arguments.markdown.write_text(markdown.render(contents), encoding="utf-8")
    if not arguments.html and not arguments.markdown:
        print(markdown.render(contents))
