"""The auditing process: ``python -m braze.kernels.audit traffic|code [--quick]`` prints a JSON record a line.

A first line says how many calls will be audited; each record says in ``"call"`` which of them it is from.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from typing import Any

from ..op import Draw
from .cases import Case, Shapes, cases, everything_in_triton, passes
from .machine_code import TARGETS, compiled
from .traffic import metered


def main() -> None:
    """Audit, and print."""
    parser = argparse.ArgumentParser("python -m braze.kernels.audit", description=__doc__)
    parser.add_argument("what", choices=("traffic", "code"))
    parser.add_argument("--quick", action="store_true", help="the pairs of size, variant and dtype that differ most")
    arguments = parser.parse_args()
    audit = {"traffic": traffic, "code": code}[arguments.what]
    # A long row costs the interpreter minutes; its kernels are the business of the machine code.
    found = list(cases(arguments.quick, first_size_only=arguments.what == "traffic" and arguments.quick))
    print(json.dumps({"calls": len(found)}), flush=True)
    with everything_in_triton():
        for number, case in enumerate(found):
            for record in audit(case):
                print(json.dumps({"call": number, "measure": arguments.what, **record}), flush=True)


def traffic(case: Case) -> Iterator[dict[str, Any]]:
    """A record for each pass: bytes moved, and the least that could be."""
    least = case.op.traffic(case.dtype.itemsize, **case.dims, **case.op.variants[case.variant])
    for name, run in passes(case, Draw(0, case.dtype)):
        with metered() as meter:
            run()
        floor = getattr(least, name)
        excess = case.op.excess.get(name)
        yield {
            **case.facts(),
            "pass": name,
            "bytes": meter.total,
            "least_bytes": floor,
            "ratio": meter.total / floor,
            **{f"bytes of {part}": moved for part, moved in meter.moved.items()},
            "allowed_ratio": excess.ratio if excess else None,
            "reason": excess.reason if excess else None,
        }


def code(case: Case) -> Iterator[dict[str, Any]]:
    """A record for each kernel, target and pass."""
    for name, run in passes(case, Shapes(case.dtype)):
        # Spills and widths depend on the variant far more than on the target: one target does for the variants.
        plain = case.variant == next(iter(case.op.variants))
        with compiled(tuple(TARGETS) if plain else ("sm_90",)) as codes:
            run()
        for kernel in codes:
            yield {**case.facts(), "pass": name, **kernel._asdict()}


if __name__ == "__main__":
    main()
