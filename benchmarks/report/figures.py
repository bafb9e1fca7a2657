"""The plots, one function for each question; each gives a figure for every group of records that has what it shows."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure as Canvas
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter, NullLocator

from ..records import Record
from . import svg
from .columns import MIB, exponent
from .comparisons import Comparison, comparisons, finite, geometric_mean

#: The least error drawn, a hundredth of float32's rounding step: an error of zero has no place on a logarithmic scale.
NO_ERROR = 1e-9
#: Inches of a figure that takes the width of the page, and letters of a label that leave its axes room.
WIDE, LABEL = 12, 46


class Figure(NamedTuple):
    """A drawn group of records."""

    title: str
    svg: str
    wide: bool = False


def none(records: Sequence[Record]) -> list[Figure]:
    """Nothing to draw."""
    return []


def grouped(records: Iterable[Record], *fields: str) -> dict[tuple[str, ...], list[Record]]:
    """The records by what stands in these fields."""
    groups: dict[tuple[str, ...], list[Record]] = {}
    for record in records:
        groups.setdefault(tuple(str(record.get(name, "")) for name in fields), []).append(record)
    return groups


def operators(records: Sequence[Record]) -> list[Figure]:
    """An overview of ratios, errors and memory, then speed against size of every operator."""
    found = [*means(records), *errors(records), *memory(records)]
    return found + [speed(op, own) for (op,), own in grouped(filter(_has_speed, records), "op").items()]


def means(records: Sequence[Record]) -> list[Figure]:
    """The geometric mean of the ratios of each operator, a panel for each pass."""
    passes = grouped((one.record | {"ratio": one.ratio} for one in comparisons(records)), "pass")
    if not passes:
        return []
    ops = sorted({str(r.get("op", "")) for own in passes.values() for r in own}, reverse=True)
    with svg.style():
        canvas = Canvas(figsize=(WIDE, 1.4 + 0.22 * len(ops)), layout="constrained")
        panels = canvas.subplots(1, len(passes), sharey=True, squeeze=False)[0]
        for axes, ((which,), own) in zip(panels, passes.items(), strict=True):
            for (op, provider), ratios in grouped(own, "op", "provider").items():
                _dot(axes, geometric_mean(r["ratio"] for r in ratios), ops.index(op), provider)
            _rows(axes, ops)
            _ratios(axes, which)
        providers = _providers(r for own in passes.values() for r in own)
        return [_finished(canvas, "Time ÷ braze's, geometric mean of each operator", providers, wide=True)]


def errors(records: Sequence[Record]) -> list[Figure]:
    """The largest error of each operator and provider, a panel for each dtype."""
    largest: dict[tuple[str, ...], float] = {}
    for key, own in grouped(records, "dtype", "op", "provider").items():
        both = [r.get(name) for r in own for name in ("error_outputs", "error_gradients")]
        numbers = [float(one) for one in both if isinstance(one, int | float) and not isinstance(one, bool)]
        if numbers:
            largest[key] = max(numbers)
    if not largest:
        return []
    ops, dtypes = sorted({op for _, op, _ in largest}, reverse=True), dict.fromkeys(dtype for dtype, _, _ in largest)
    with svg.style():
        canvas = Canvas(figsize=(WIDE, 1.4 + 0.22 * len(ops)), layout="constrained")
        panels = canvas.subplots(1, len(dtypes), sharey=True, squeeze=False)[0]
        for axes, dtype in zip(panels, dtypes, strict=True):
            for (own_dtype, op, provider), error in largest.items():
                if own_dtype == dtype and error == error:
                    _dot(axes, min(max(error, NO_ERROR), 10.0), ops.index(op), provider)
            _rows(axes, ops)
            axes.set(xscale="log", title=dtype, xlabel="largest error against float64 ÷ largest entry")
            _plain_logarithm(axes, "x", exponent)
        judged = list(dict.fromkeys(provider for _, _, provider in largest))
        return [_finished(canvas, "Largest error of each operator", judged, wide=True)]


def memory(records: Sequence[Record]) -> list[Figure]:
    """Peak memory in units of the least bytes that must move, a panel for each pass."""
    usable = [r for r in records if finite(r.get("peak_bytes")) and finite(r.get("least_bytes"))]
    if not usable:
        return []
    passes = grouped(usable, "pass")
    ops = sorted({str(r.get("op", "")) for r in usable}, reverse=True)
    with svg.style():
        canvas = Canvas(figsize=(WIDE, 1.4 + 0.22 * len(ops)), layout="constrained")
        panels = canvas.subplots(1, len(passes), sharey=True, squeeze=False)[0]
        for axes, ((which,), own) in zip(panels, passes.items(), strict=True):
            for (op, provider), cases in grouped(own, "op", "provider").items():
                peak = geometric_mean(r["peak_bytes"] / r["least_bytes"] for r in cases)
                _dot(axes, peak, ops.index(op), provider)
            _rows(axes, ops)
            axes.set(xscale="log", title=which, xlabel="peak bytes allocated ÷ least bytes moved")
            _plain_logarithm(axes, "x")
        return [_finished(canvas, "Peak memory of each operator", _providers(usable), wide=True)]


def _has_speed(record: Record) -> bool:
    return bool(finite(record.get("median_ms")) and finite(record.get("least_bytes")))


def speed(op: str, records: Sequence[Record]) -> Figure:
    """Bytes that must move, by the time that it takes, against how many they are; dashed is what a copy reaches."""
    dtypes, passes = ([key for (key,) in grouped(records, name)] for name in ("dtype", "pass"))
    panels = grouped(records, "dtype", "pass")
    with svg.style():
        size = (1.2 + 3.0 * len(dtypes), 0.9 + 2.0 * len(passes))
        canvas = Canvas(figsize=size, layout="constrained")
        grid = canvas.subplots(len(passes), len(dtypes), sharex=True, sharey=True, squeeze=False)
        for row, which in zip(grid, passes, strict=True):
            for axes, dtype in zip(row, dtypes, strict=True):
                _speeds(axes, panels.get((dtype, which), []))
                axes.set(xscale="log", yscale="log", title=", ".join(filter(None, (which, dtype))))
        for direction in "xy":
            _plain_logarithm(grid[0][0], direction)
        canvas.supxlabel("least MiB moved", fontsize=10)
        canvas.supylabel("GB/s", fontsize=10)
        return _finished(canvas, f"{op}: speed against size", _providers(records), ceiling="what a copy reaches")


def _speeds(axes: Axes, records: Sequence[Record]) -> None:
    axes.grid(alpha=0.6)
    for (provider,), own in grouped(records, "provider").items():
        own = sorted(own, key=lambda r: r["least_bytes"])
        sizes = [r["least_bytes"] / MIB for r in own]
        speeds = [_gbs(r, "median_ms") for r in own]
        if provider == "copy" and len(own) > 1:
            axes.plot(sizes, speeds, "--", color=svg.TEXT, linewidth=1.2)
        elif provider == "copy":  # a line through one point is none
            axes.axhline(speeds[0], linestyle="--", color=svg.TEXT, linewidth=1.2)
        if provider == "copy":
            continue
        axes.plot(sizes, speeds, color=svg.color(provider), marker=svg.marker(provider))
        for x, r in zip(sizes, own, strict=True):
            if finite(r.get("quartile_low_ms")) and finite(r.get("quartile_high_ms")):
                ends = [_gbs(r, "quartile_low_ms"), _gbs(r, "quartile_high_ms")]
                axes.plot([x, x], ends, color=svg.color(provider), linewidth=1)
    ceilings = [ceiling for r in records if (ceiling := finite(r.get("copy_ceiling_gbs")))]
    if ceilings and "copy" not in {r.get("provider") for r in records}:
        axes.axhline(max(ceilings), linestyle="--", color=svg.TEXT, linewidth=1.2)


def _gbs(record: Record, field: str) -> float:
    return record["least_bytes"] / record[field] / 1e6


def scaling(records: Sequence[Record]) -> list[Figure]:
    """Time and memory against one size, for each operator, pass, dtype and axis."""
    usable = [r for r in records if finite(r.get("size")) and finite(r.get("median_ms"))]
    return [_growth(key, own) for key, own in grouped(usable, "op", "axis", "pass", "dtype").items()]


def _growth(key: tuple[str, ...], records: Sequence[Record]) -> Figure:
    axis = key[1]
    with svg.style():
        canvas = Canvas(figsize=(7.2, 3.4), layout="constrained")
        times, peaks = canvas.subplots(1, 2)
        for (provider,), own in grouped(records, "provider").items():
            own = sorted(own, key=lambda r: r["size"])
            look: dict[str, Any] = {"color": svg.color(provider), "marker": svg.marker(provider)}
            times.plot([r["size"] for r in own], [r["median_ms"] for r in own], **look)
            held = [r for r in own if finite(r.get("peak_bytes"))]
            peaks.plot([r["size"] for r in held], [r["peak_bytes"] / MIB for r in held], **look)
        roof = sorted({r["size"]: floor for r in records if (floor := _roofline(r))}.items())
        times.plot([size for size, _ in roof], [floor for _, floor in roof], "--", color=svg.TEXT, linewidth=1.2)
        for axes, what in ((times, "milliseconds"), (peaks, "peak memory, MiB")):
            axes.set(xscale="log", yscale="log", xlabel=axis, title=what)
            axes.grid(alpha=0.6)
            for direction in "xy":
                _plain_logarithm(axes, direction)
        title = ", ".join(filter(None, (key[0], key[2], key[3]))) + f": against {axis}"
        return _finished(canvas, title, _providers(records), ceiling="the roofline")


def _roofline(record: Record) -> float | None:
    """Milliseconds: by the record itself, or of a copy of the least bytes."""
    least, ceiling = finite(record.get("least_bytes")), finite(record.get("copy_ceiling_gbs"))
    return finite(record.get("roofline_ms")) or (least / ceiling / 1e6 if least and ceiling else None)


def models(records: Sequence[Record]) -> list[Figure]:
    """Ratios of time with their intervals, then the peak memory of every model."""
    return intervals(records) + bars(records, "model", "pass", title="Peak memory of a model")


def losses(records: Sequence[Record]) -> list[Figure]:
    """Ratios of time with their intervals, then the peak memory at every size."""
    return intervals(records) + bars(records, "shape", title="Peak memory of head and loss")


def intervals(records: Sequence[Record]) -> list[Figure]:
    """Every case's ratio and its 95 % interval."""
    found = comparisons(records)
    if not found:
        return []
    rows = list(dict.fromkeys(one.case for one in found))[::-1]
    providers = list(dict.fromkeys(one.provider for one in found))
    with svg.style():
        beside = {row: [one.provider for one in found if one.case == row] for row in rows}
        most = max(map(len, beside.values()))
        row = max(0.16 + 0.12 * most, 0.2 * max(_lines(name) for name in rows))
        canvas = Canvas(figsize=(WIDE, 1.5 + row * len(rows)), layout="constrained")
        axes = canvas.subplots()
        for one in found:
            place = beside[one.case].index(one.provider) - (len(beside[one.case]) - 1) / 2
            _interval(axes, one, rows.index(one.case) - 0.7 * place / most)
        _rows(axes, rows)
        _ratios(axes, "")
        title = "Time ÷ braze's, with its 95 % interval"
        return [_finished(canvas, title, providers, wide=True)]


def _interval(axes: Axes, one: Comparison, y: float) -> None:
    if one.low is not None and one.high is not None:
        axes.plot([one.low, one.high], [y, y], color=svg.color(one.provider), linewidth=1.4)
    _dot(axes, one.ratio, y, one.provider)


def bars(records: Sequence[Record], *fields: str, title: str) -> list[Figure]:
    """Peak memory of every provider in every case."""
    usable = [r for r in records if finite(r.get("peak_bytes"))]
    if not usable:
        return []
    rows = list(dict.fromkeys(", ".join(str(r.get(name, "")) for name in fields) for r in usable))[::-1]
    with svg.style():
        canvas = Canvas(figsize=(WIDE, 1.4 + 0.5 * len(rows)), layout="constrained")
        axes = canvas.subplots()
        for r in usable:
            y = rows.index(", ".join(str(r.get(name, "")) for name in fields))
            _dot(axes, r["peak_bytes"] / MIB, y, str(r.get("provider", "")))
        _rows(axes, rows)
        axes.set(xscale="log", xlabel="MiB")
        _plain_logarithm(axes, "x")
        return [_finished(canvas, title, _providers(usable), wide=True)]


def rounding(records: Sequence[Record]) -> list[Figure]:
    """The loss that each way of rounding ends at, of float32's, a dot for each seed."""
    usable = [r for r in records if finite(r.get("train_of_float32"))]
    if not usable:
        return []
    rows = list(dict.fromkeys(str(r.get("provider", "")) for r in usable))[::-1]
    with svg.style():
        canvas = Canvas(figsize=(WIDE, 1.2 + 0.35 * len(rows)), layout="constrained")
        axes = canvas.subplots()
        for r in usable:
            axes.plot(r["train_of_float32"], rows.index(str(r.get("provider", ""))), "o", color=svg.SERIES[0])
        axes.axvline(1, color=svg.TEXT, linewidth=1)
        _rows(axes, rows)
        axes.set(xlabel="training loss ÷ float32's of the same seed")
        return [_finished(canvas, "Training loss by rounding", [], wide=True)]


def traffic(records: Sequence[Record]) -> list[Figure]:
    """The worst bytes moved ÷ least bytes of each operator, for each pass."""
    worst: dict[tuple[str, ...], float] = {}
    for key, own in grouped(records, "op", "pass").items():
        ratios = [ratio for r in own if r.get("measure") == "traffic" and (ratio := finite(r.get("ratio")))]
        if ratios:
            worst[key] = max(ratios)
    if not worst:
        return []
    ops = sorted({op for op, _ in worst}, reverse=True)
    with svg.style():
        canvas = Canvas(figsize=(WIDE, 1.4 + 0.2 * len(ops)), layout="constrained")
        axes = canvas.subplots()
        looks = dict(zip(dict.fromkeys(which for _, which in worst), range(len(svg.SERIES)), strict=False))
        for (op, which), ratio in worst.items():
            look = looks.get(which, 0)
            axes.plot(ratio, ops.index(op), svg.MARKERS[look], color=svg.SERIES[look], label=which)
        _rows(axes, ops)
        _ratios(axes, "")
        axes.set(xlabel="bytes moved ÷ least bytes, the worst of all variants and dtypes")
        handles = [_handle(svg.SERIES[i], svg.MARKERS[i], which or "step") for which, i in looks.items()]
        canvas.legend(handles=handles, loc="outside upper left", ncols=4)
        title = "Bytes that each kernel moves"
        return [Figure(title, svg.of(canvas, title), wide=True)]


def _providers(records: Iterable[Record]) -> list[str]:
    return list(dict.fromkeys(str(r.get("provider", "")) for r in records if r.get("provider") != "copy"))


def _dot(axes: Axes, x: float, y: float, provider: str) -> None:
    axes.plot(x, y, svg.marker(provider), color=svg.color(provider))


def _rows(axes: Axes, names: Sequence[str]) -> None:
    axes.set_yticks(range(len(names)), [textwrap.fill(name, LABEL) for name in names])
    axes.set_ylim(-0.6, len(names) - 0.4)
    axes.tick_params(axis="y", length=0)
    axes.grid(alpha=0.6)


def _lines(name: str) -> int:
    return len(textwrap.wrap(name, LABEL)) or 1


def _ratios(axes: Axes, title: str) -> None:
    axes.set(xscale="log", title=title, xlabel="slower   ←   time ÷ braze's   →   braze is faster")
    axes.axvline(1, color=svg.TEXT, linewidth=1)
    _plain_logarithm(axes, "x")


def _six_digits(value: float) -> str:
    return f"{value:,.6g}"


def _plain_logarithm(axes: Axes, direction: str, write: Callable[[float], str] = _six_digits) -> None:
    """Ticks written out, as many as make a range readable: a decade may be wider than all that is drawn."""
    (low, high), axis = (axes.get_xlim(), axes.xaxis) if direction == "x" else (axes.get_ylim(), axes.yaxis)
    if high / low < 4:
        axis.set_major_locator(MaxNLocator(5))
        axis.set_minor_locator(NullLocator())
    else:
        subs = (1, 1.5, 2, 3, 5, 7) if high / low < 10 else (1, 2, 5) if high / low < 200 else (1,)
        axis.set_major_locator(LogLocator(base=10, subs=subs, numticks=12))
    axis.set_major_formatter(FuncFormatter(lambda value, _: write(value)))
    axis.set_minor_formatter(NullFormatter())


def _handle(color: str, marker: str, label: str, **look: Any) -> Line2D:
    return Line2D([], [], color=color, marker=marker, label=label, **{"linestyle": "none", **look})


def _finished(canvas: Canvas, title: str, providers: Sequence[str], ceiling: str = "", wide: bool = False) -> Figure:
    handles = [_handle(svg.color(name), svg.marker(name), name) for name in providers]
    if ceiling:
        handles.append(_handle(svg.TEXT, "", ceiling, linestyle="--", linewidth=1.2))
    if handles:
        # A letter is about 0.08 inch wide, a marker with its margins 0.6.
        longest = max(len(str(handle.get_label())) for handle in handles)
        columns = max(1, int(canvas.get_figwidth() / (0.08 * longest + 0.6)))
        canvas.legend(handles=handles, loc="outside upper left", ncols=columns)
    return Figure(title, svg.of(canvas, title), wide)
