"""Result files, read: what was measured, on which machine, at which commit, and how old that commit is."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from ..records import Record

#: The repository that this file belongs to, whose HEAD the results are compared with.
ROOT = Path(__file__).parents[2]
#: What a measurement depends on; a commit that leaves it alone does not age the results.
CODE = ("kernels", "layouts", "lightning_ext", "benchmarks", ":!benchmarks/results")


@dataclass(frozen=True)
class ResultFile:
    """One file of ``--json``; its records all have a ``benchmark`` and a ``machine``."""

    name: str
    command: str
    environment: dict[str, Any]
    records: list[Record]

    def commits(self) -> list[str]:
        """The commits that its records were measured at: a record may name one of its own."""
        own = self.environment.get("commit")
        found = dict.fromkeys(record.get("commit", own) for record in self.records) or {own: None}
        return [str(commit) if commit else "unknown" for commit in found]


def find(paths: Sequence[Path]) -> list[Path]:
    """The files themselves, and every JSON file inside the folders."""
    found: list[Path] = []
    for path in paths:
        if not path.exists():
            raise ValueError(f"report: there is no file or folder {path}; name files written by --json")
        found += sorted(path.rglob("*.json")) if path.is_dir() else [path]
    return found


def load(path: Path, start: Path) -> ResultFile:
    """Read one file; ``start`` is the folder that its name is given relative to."""
    try:
        content = json.loads(path.read_text())
        command, environment, found = (content[name] for name in ("command", "environment", "records"))
        records = [_named(record, command, environment) for record in found]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"report: {path} must hold the JSON of one benchmark, with command, environment and records, "
            f"but {type(error).__name__}: {error}; write it again with --json"
        ) from error
    name = str(path.relative_to(start)) if path.is_relative_to(start) else str(path)
    return ResultFile(name, command, environment, records)


#: The records that name a machine which has not been seen.
PREDICTED = "kernels predicted"


def _named(record: Record, command: str, environment: dict[str, Any]) -> Record:
    named = {"benchmark": command, **record, "machine": machine(record, environment)}
    if record.get("measure") in ("traffic", "code"):  # what was counted with no GPU, of operators and of optimizers
        named |= {"benchmark": "kernels", "op": record.get("op", record.get("case"))}
    if record.get("measure") == "prediction":
        named["benchmark"] = PREDICTED
    return named


def measured(records: Iterable[Record]) -> Iterator[Record]:
    """Without predictions: the machine that these name has not been seen."""
    return (record for record in records if record["benchmark"] != PREDICTED)


def machine(record: Record, environment: dict[str, Any]) -> str:
    """Where a record was measured, as one line; results of two machines are never put together."""
    device = record.get("device") or "cpu"
    torch = f"torch {environment.get('torch') or 'unknown'}"
    if device != "cpu":
        return f"{environment.get('gpu') or device}, {torch}"
    threads = record.get("threads") or environment.get("threads") or "?"
    processor = environment.get("processor") or "unknown processor"
    if environment.get("instructions"):
        processor += f" with {environment['instructions']}"
    return f"CPU: {processor}, {threads} thread{'' if threads == 1 else 's'}, {torch}"


class Age(NamedTuple):
    """How old a commit is, in words, and whether the code has changed since."""

    words: str
    stale: bool


def age(commit: str) -> Age:
    """How many commits lie between this one and HEAD, and how many of them change what was measured."""
    if commit == "unknown":
        return Age("unknown", True)
    name = commit.removesuffix("-dirty")
    dirty = ", with changes that were not committed" if commit != name else ""
    since = _count(name)
    if since is None:
        return Age(f"not in this history{dirty}", True)
    if since == 0:
        return Age(f"HEAD{dirty}", bool(dirty))
    changes = _count(name, *CODE)
    return Age(f"older than HEAD: {since} commits since, {changes} of them to code{dirty}", bool(changes or dirty))


def _count(commit: str, *paths: str) -> int | None:
    command = ["git", "-C", str(ROOT), "rev-list", "--count", f"{commit}..HEAD", "--", *paths]
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except FileNotFoundError:  # no git here
        return None
    return int(done.stdout) if done.returncode == 0 else None
