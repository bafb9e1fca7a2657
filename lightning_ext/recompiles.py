"""What regions were compiled, how often, and which guard failures made it so."""

from __future__ import annotations

import dataclasses
import re
from collections import Counter
from collections.abc import Iterator
from types import CodeType
from typing import Any

from torch._dynamo.eval_frame import _debug_get_cache_entry_list
from torch._dynamo.utils import guard_failures

from .repeated import Left
from .table import Table

#: What torch's guard failures say → the cause, and what the user can change.
CAUSES = (
    (
        r"size mismatch at index 0|\[0\]\.size\(\)\[0\]",
        "batch size",
        "DataLoader(drop_last=True) makes all batches equal; dynamic_batch=True compiles for any size",
    ),
    (r"size mismatch at index \d|size\(\)\[\d", "shape", "pad to a few lengths, or compile with dynamic=True"),
    (r"grad_mode", "grad mode", "training and validation have a graph each; no change is needed"),
    (r"dispatch key set mismatch", "inference mode", "Trainer(inference_mode=False) shares the graph of no_grad"),
    (r"\.training\b", "training mode", "training and validation have a graph each; no change is needed"),
    (r"GLOBAL_STATE changed", "global state", "set autocast, threads and default dtype once, before the first batch"),
    (r"is (not )?None", "optional argument", "a graph with it and one without; pass it always, or never"),
    (r"dtype mismatch|expected type|dtype=", "dtype", "pass the same dtype each time"),
    (
        r"'k?w?args\[.*requires_grad",
        "input without gradient",
        "a first block's input may need no gradient; no change is needed",
    ),
    (r"requires_grad", "frozen parameter", "frozen and trained blocks have a graph each; freeze whole kinds"),
    (r"stride mismatch", "memory layout", "keep one memory format; .contiguous() where it varies"),
    (
        r"== -?\d+$",
        "int attribute",
        "dynamic from its second value on; no change is needed unless a branch depends on it",
    ),
    (r"== -?[\d.]+(e-?\d+)?$", "float attribute", "give equal blocks equal values (dropout and drop-path rates too)"),
    (r"rank mismatch", "number of dimensions", "pass tensors of as many dimensions each time"),
    (r"\bmodule\.", "attribute", "blocks that differ in it have a graph each; give equal blocks equal values"),
)


@dataclasses.dataclass(frozen=True)
class Recompile:
    """Guard failures of one cause: ``failures`` different ones, of which ``example`` is the first."""

    cause: str
    example: str
    change: str
    failures: int


class Region:
    """Equal blocks that share their compiled code.

    Attributes:
        kind: the name of the blocks' class.
        paths: where they are.
        code: the code object under which torch keeps their graphs; None in a pickled copy.
        chosen: the arguments of ``compile_regions``.
    """

    def __init__(self, kind: str, paths: list[str], code: CodeType, chosen: dict[str, Any]) -> None:
        self.kind, self.paths, self.chosen = kind, paths, chosen
        self.code: CodeType | None = code
        self._kept: tuple[int, list[str], bool] = (0, [], False)
        self._said: set[str] = set()

    @property
    def frames(self) -> int:
        """How many times torch has compiled this region; 0 if it has not been called."""
        return self._counts()[0]

    @property
    def breaks(self) -> bool:
        """Whether a graph break divides it."""
        return self._counts()[2]

    @property
    def recompiles(self) -> list[Recompile]:
        """Why the region was compiled more than once."""
        distinct = list(dict.fromkeys(self._counts()[1]))
        causes = {failure: _cause(failure) for failure in distinct}
        counts = Counter(causes.values())
        first = {cause: failure for failure, cause in reversed(causes.items())}
        return [Recompile(cause, first[cause, change], change, n) for (cause, change), n in counts.items()]

    def news(self) -> Iterator[str]:
        """What the user should be told, each once."""
        found = self.recompiles
        where = f"{self.kind} ({len(self.paths)} blocks: {pattern(self.paths)})"
        for one in found:
            if one.cause == "batch size" and self._first("batch size"):
                yield (
                    f"compile_regions: {where} was compiled again for another batch size ({one.example}), such as that "
                    f"of a last batch that is not full: {one.change}"
                )
        if self.frames > self.chosen["budget"] and self._first("budget"):
            why = "".join(f"\n  {one.cause}: {one.example}: {one.change}" for one in found)
            budget = self.chosen["budget"]
            yield f"compile_regions: {where} was compiled {self.frames} times; its budget is {budget}:{why}"

    def __getstate__(self) -> dict[str, Any]:
        # What else was chosen may hold functions, which cannot be pickled.
        chosen = {"budget": self.chosen["budget"]}
        return {**self.__dict__, "code": None, "chosen": chosen, "_kept": self._counts()}

    def _first(self, subject: str) -> bool:
        new = subject not in self._said
        self._said.add(subject)
        return new

    def _counts(self) -> tuple[int, list[str], bool]:
        if self.code is None:
            return self._kept
        entries = _debug_get_cache_entry_list(self.code)
        failures = [_brief(failure) for failure in guard_failures.get(self.code, ())]
        breaks = any(name.startswith("__resume_at") for entry in entries for name in entry.code.co_names)
        return len(entries), failures, breaks


class RegionReport:
    """The regions of one call of ``compile_regions``, and the blocks that it left; live until pickled."""

    def __init__(self, regions: list[Region], left: list[Left]) -> None:
        self.regions, self.left = regions, left

    def __iter__(self) -> Iterator[Region]:
        return iter(self.regions)

    def __len__(self) -> int:
        return len(self.regions)

    @property
    def frames(self) -> int:
        """How many times torch has compiled a region of these."""
        return sum(region.frames for region in self.regions)

    def as_dicts(self) -> list[dict[str, Any]]:
        """Plain values, ready for ``json.dumps``."""
        regions = [
            {
                "kind": region.kind,
                "paths": region.paths,
                "frames": region.frames,
                "breaks": region.breaks,
                "recompiles": [dataclasses.asdict(one) for one in region.recompiles],
            }
            for region in self.regions
        ]
        return regions + [{"kind": one.was, "paths": [one.path], "left": one.reason} for one in self.left]

    def __str__(self) -> str:
        rows = [row for region in self.regions for row in _rows(region)]
        groups: dict[tuple[str, str], list[str]] = {}
        for one in self.left:
            groups.setdefault((one.was, one.reason), []).append(one.path)
        notes = [f"left: {was} {pattern(paths)}: {reason}" for (was, reason), paths in groups.items()]
        blocks = sum(len(region.paths) for region in self.regions)
        notes.append(f"{blocks} blocks of {len(self)} kinds" if self.regions else "no repeated blocks found")
        header = ("region", "blocks", "where", "compiled", "why again, and what to change")
        return str(Table(header, rows, notes=notes))


def _rows(region: Region) -> list[tuple[str, ...]]:
    notes = [f"{one.cause} ({one.example}): {one.change}" for one in region.recompiles]
    if region.breaks:
        notes.append("a graph break divides it: fullgraph=True raises where it is")
    first = (region.kind, f"×{len(region.paths)}", pattern(region.paths), f"{region.frames}×")  # noqa: RUF001 (the multiplication sign is meant)
    return [(*first, notes[0] if notes else ""), *(("", "", "", "", note) for note in notes[1:])]


def pattern(paths: list[str]) -> str:
    """Paths with their numbers replaced by ``*``, each once."""
    if len(paths) == 1:
        return paths[0]
    patterns = dict.fromkeys(re.sub(r"(?<![^._])\d+(?![^._])", "*", path) for path in paths)
    return ", ".join(patterns)


def _brief(failure: str) -> str:
    """Without the graph's number, the line of source and the stack."""
    return re.sub(r"^\S+: ", "", failure.split("\n")[0].split("  # ")[0].strip())


def _cause(failure: str) -> tuple[str, str]:
    for pattern, cause, change in CAUSES:
        if re.search(pattern, failure):
            return cause, change
    return "other", 'TORCH_LOGS="recompiles" prints where the value comes from'
