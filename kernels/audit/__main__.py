"""The auditing process: ``python -m braze.kernels.audit traffic|code [--quick] [--op NAME] [--target NAME]``.

It prints a JSON record a line. A first line says how many calls will be audited; each record says in ``"call"`` which
of them it is from.
"""

from __future__ import annotations

import argparse
import functools
import json
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from ..op import Dims, Draw, Op
from .cases import Case, Shapes, audited_operators, cases, everything_in_triton, passes
from .machine_code import TARGETS, compiled
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
    """Audit, and print."""
    parser = argparse.ArgumentParser("python -m braze.kernels.audit", description=__doc__)
    parser.add_argument("what", choices=("traffic", "code"))
    parser.add_argument("--quick", action="store_true", help="the pairs of size, variant and dtype that differ most")
    parser.add_argument("--op", action="append", metavar="NAME", help="only this operator; may be repeated")
    parser.add_argument(
        "--target", action="append", choices=TARGETS, help="machine code for this only; may be repeated"
    )
    arguments = parser.parse_args()
    ops = [op for op in audited_operators() if not arguments.op or op.name in arguments.op]
    audit: Callable[[Case, bool], Iterator[dict[str, Any]]] = traffic
    if arguments.what == "code":
        audit = functools.partial(code, wanted=arguments.target or tuple(TARGETS))
    found = list(cases(ops, SIZES[arguments.what, arguments.quick], arguments.quick))
    print(json.dumps({"calls": len(found)}), flush=True)
    # Triton remarks on what has no defined meaning, such as a shift by all bits, and compiles on.
    warnings.filterwarnings("error", module=r"triton\.language")
    with everything_in_triton():
        for number, case in enumerate(found):
            for record in audit(case, arguments.quick):
                print(json.dumps({"call": number, "measure": arguments.what, **record}), flush=True)


def traffic(case: Case, quick: bool) -> Iterator[dict[str, Any]]:
    """A record for each pass: bytes moved, and the least that could be."""
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


def code(case: Case, quick: bool, wanted: Sequence[str]) -> Iterator[dict[str, Any]]:
    """A record for each kernel, target and pass."""
    for name, run in passes(case, Shapes(case.dtype)):
        # A disassembly takes 0.3 s of processor, a compilation 0.2. Spills differ between targets and between variants.
        plain = case.variant == next(iter(case.op.variants))
        targets = wanted if not quick or case.dtype == torch.bfloat16 else tuple({"sm_90"} & set(wanted))
        disassembled = targets if not quick else ("sm_90",) if plain else ()
        with compiled(targets, disassembled) as codes:
            run()
        for kernel in codes:
            yield {**case.facts(), "pass": name, **kernel._asdict()}


if __name__ == "__main__":
    main()
