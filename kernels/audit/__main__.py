"""The auditing process: ``python -m braze.kernels.audit traffic|code``.

It reads requests, a JSON object a line: ``{"quick": true, "ops": ["rms_norm"], "targets": ["sm_90"]}``, where no names
stand for all. It answers each with a JSON object a line: first how many calls will be audited, then records and how
many calls are done, and at last ``{"end": true}``.
"""

from __future__ import annotations

import argparse
import json
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from ..op import Dims, Draw, Op
from .cases import Case, Shapes, audited_operators, cases, everything_in_triton, passes
from .machine_code import TARGETS, Compiled, compiled, read
from .traffic import metered


def _audited(op: Op) -> Sequence[Dims]:
    return op.audit or op.bench


#: Which sizes are audited, by what is audited and by --quick. A long row costs the interpreter minutes.
SIZES: dict[tuple[str, bool], Callable[[Op], Sequence[Dims]]] = {
    ("traffic", True): lambda op: _audited(op)[:1],
    ("traffic", False): lambda op: _audited(op)[:-1] or _audited(op),
    ("code", True): lambda op: [*_audited(op)[:1], *_audited(op)[1:][-1:]],
    ("code", False): _audited,
}


def main() -> None:
    """Audit what is asked for, until there are no more requests."""
    parser = argparse.ArgumentParser("python -m braze.kernels.audit", description=__doc__)
    parser.add_argument("what", choices=("traffic", "code"))
    what = parser.parse_args().what
    # Triton remarks on what has no defined meaning, such as a shift by all bits, and compiles on.
    warnings.filterwarnings("error", module=r"triton\.language")
    with everything_in_triton():
        for line in sys.stdin:
            for answer in answers(what, **json.loads(line)):
                print(json.dumps(answer), flush=True)


def answers(what: str, *, quick: bool, ops: Sequence[str], targets: Sequence[str]) -> Iterator[dict[str, Any]]:
    """The answers to one request."""
    chosen = [op for op in audited_operators() if not ops or op.name in ops]
    found = [list(cases([op], SIZES[what, quick], quick)) for op in chosen]
    yield {"calls": sum(map(len, found))}
    done = 0
    for calls in found:
        records = traffic(calls) if what == "traffic" else code(calls, quick, targets or tuple(TARGETS))
        for record in records:
            yield {"record": {"measure": what, **record}}
        done += len(calls)
        yield {"done": done}
    yield {"end": True}


def traffic(calls: Sequence[Case]) -> Iterator[dict[str, Any]]:
    """A record for each pass of each call: bytes moved, and the least that could be."""
    for case in calls:
        least = case.op.traffic(case.dtype.itemsize, **case.dims, **case.op.variants[case.variant])
        for name, run in passes(case, Draw(0, case.dtype)):
            with metered() as meter:
                run()
            floor = getattr(least, name)
            excess = case.op.excess.get((case.variant, name))
            yield {
                **case.facts(),
                "pass": name,
                "bytes": meter.total,
                "bytes_written": meter.written.total(),
                "least_bytes": floor,
                "ratio": meter.total / floor,
                **{f"bytes of {part}": moved for part, moved in meter.moved.items()},
                "allowed_ratio": excess.ratio if excess else None,
                "reason": excess.reason if excess else None,
            }


def code(calls: Sequence[Case], quick: bool, wanted: Sequence[str]) -> Iterator[dict[str, Any]]:
    """A record for each kernel, target and pass of each call."""
    found: list[tuple[dict[str, Any], Compiled]] = []
    for case in calls:
        # A compilation takes 0.2 s of processor.
        targets = wanted if not quick or case.dtype == torch.bfloat16 else tuple({"sm_90"} & set(wanted))
        for name, run in passes(case, Shapes(case.dtype)):
            with compiled(targets) as kernels:
                run()
            found += [({**case.facts(), "pass": name}, kernel) for kernel in kernels]
    codes = read([kernel for _, kernel in found], ("sm_90",) if quick else wanted)
    for (facts, _), kernel in zip(found, codes, strict=True):
        yield {**facts, **kernel._asdict()}


if __name__ == "__main__":
    main()
