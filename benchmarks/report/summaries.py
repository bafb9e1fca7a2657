"""Tables that are worked out of the records: geometric means by operator, and the worst of each kernel."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from ..records import Record
from .comparisons import Comparison, geometric_mean

#: (provider, pass), then for each operator the mean of its cases there.
Means = dict[str, dict[tuple[str, str], float]]


def operator_means(found: Sequence[Comparison]) -> Means:
    """The geometric mean of the ratios over shapes and dtypes, by operator, provider and pass."""
    groups: dict[str, dict[tuple[str, str], list[float]]] = {}
    for one in found:
        column = one.provider, str(one.record.get("pass", ""))
        groups.setdefault(str(one.record.get("op", "")), {}).setdefault(column, []).append(one.ratio)
    return {
        op: {column: geometric_mean(ratios) for column, ratios in columns.items()} for op, columns in groups.items()
    }


def zoo_totals(records: Sequence[Record]) -> str:
    """How many joints of each kind were swapped, and how many models stayed right."""
    counted, swapped = Counter[str](), Counter[str]()
    for record in records:
        counted.update(record.get("found") or {})
        swapped.update(record.get("swapped") or {})
    joints = ", ".join(f"{swapped[kind]:,} of {counted[kind]:,} {kind}" for kind in counted)
    right = sum(bool(record.get("right")) for record in records)
    return f"Swapped: {joints}. Right to the error budget: {right} of {len(records)} models."


def audit_totals(records: Sequence[Record]) -> str:
    """How many models have each verdict."""
    verdicts = Counter(str(record.get("verdict")) for record in records)
    return ", ".join(f"{count} {verdict}" for verdict, count in verdicts.most_common()) + "."


def kernels_table(records: Sequence[Record]) -> list[Record]:
    """The worst traffic of each pass, and the worst machine code of each kernel on each target."""
    traffic: dict[tuple[str, ...], Record] = {}
    code: dict[tuple[str, ...], Record] = {}
    for record in records:
        key = tuple(str(record.get(name)) for name in ("op", "pass", "kernel", "target"))
        if record.get("measure") == "traffic":
            worst = traffic.setdefault(key, record)
            if record.get("ratio", 0) > worst.get("ratio", 0):
                traffic[key] = record
        else:
            worst = code.setdefault(key, dict(record))
            for name, most in (("registers", max), ("spills", max), ("widest_load", min), ("widest_store", min)):
                both = [one[name] for one in (worst, record) if one.get(name) is not None]
                worst[name] = most(both) if both else None
    kept = ("op", "pass", "kernel", "target", "ratio", "reason", "registers", "spills", "widest_load", "widest_store")
    return [{name: r.get(name) for name in kept} for r in (*traffic.values(), *code.values())]
