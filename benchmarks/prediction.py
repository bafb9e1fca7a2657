"""What the kernels of an operator should take on a GPU that is not here.

    time = launches · launch overhead + max(bytes / copy ceiling, products' operations / matrix ceiling)

The audit counts bytes and launches in Triton's interpreter, at sizes that suit an interpreter; at another size the
bytes are the operator's least, times what the audit found more than that. Latency, occupancy and caches are not
modelled: this is what a kernel is to be held against, and not what it will do. Where a GPU is, its own ceilings,
measured in the same run, take the place of the assumed ones.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

from .ceilings import Ceilings
from .ops_case import BACKWARD, BOTH, FORWARD, Case
from .records import Record

#: NVIDIA's data sheets, dense operations without TF32: H100 SXM 3.35 TB/s, 989 TFLOP/s in bfloat16, 67 in float32; H200
#: 4.8 TB/s and the same. Of these nine tenths for a copy and seven for a product, and 3 µs a launch: assumed, measured
#: nowhere yet.
ASSUMED = {
    "H100": Ceilings(0.9 * 3350, {"torch.bfloat16": 0.7 * 989, "torch.float32": 0.7 * 67}, launch_us=3.0),
    "H200": Ceilings(0.9 * 4800, {"torch.bfloat16": 0.7 * 989, "torch.float32": 0.7 * 67}, launch_us=3.0),
}
RESULTS = Path(__file__).parent / "results" / "kernels.json"


class Counted(NamedTuple):
    """What the audit counted of a pass: bytes in units of the least, and the kernels and operations that move any."""

    ratio: float
    launches: int


#: By operator, pass and dtype, of the default variant.
Counts = Mapping[tuple[str, str, str], Counted]


def counts(records: Iterable[Record]) -> Counts:
    """The counts among the records of an audit, each at the first size that was audited."""
    found: dict[tuple[str, str, str], Counted] = {}
    for record in records:
        if record.get("measure") == "traffic" and record["variant"] == "default":
            launches = sum(name.startswith("bytes of ") for name in record)
            key = record["op"], record["pass"], record["dtype"]
            found.setdefault(key, Counted(record["ratio"], launches))
    return found


def recorded() -> Counts:
    """Those of the audit whose results lie beside the benchmarks; none in an installation that left them out."""
    return counts(json.loads(RESULTS.read_text())["records"]) if RESULTS.exists() else {}


def bytes_us(moved: float, launches: int, ceilings: Ceilings) -> float:
    """Microseconds of kernels that only move bytes."""
    assert ceilings.launch_us is not None
    return launches * ceilings.launch_us + moved / (1e3 * ceilings.copy_gbs)


def predicted_us(case: Case, which: str, counted: Counts, ceilings: Ceilings) -> float | None:
    """Microseconds of one pass; None of an operator or a variant that was not counted, or without a ceiling."""
    if which == BOTH:
        parts = [predicted_us(case, part, counted, ceilings) for part in (FORWARD, BACKWARD)]
        return None if None in parts else sum(part for part in parts if part is not None)
    found = counted.get((case.op.name, which, str(case.dtype).removeprefix("torch.")))
    if found is None or case.variant != "default" or ceilings.launch_us is None:
        return None
    forward, both = case.matmul_flops(FORWARD) or 0, case.matmul_flops(BOTH) or 0
    flops = forward if which == FORWARD else both - forward
    seconds = ceilings.seconds(case.dtype, found.ratio * case.least_bytes(which), flops)
    return None if seconds is None else found.launches * ceilings.launch_us + 1e6 * seconds
