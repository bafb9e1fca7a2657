"""Matplotlib's figures as SVG that belongs to the page: its type, its colours in light and dark, nothing from outside.

A figure is drawn in stand-in colours. In its SVG each becomes a variable of the page's style sheet, so that a provider
has one colour everywhere, and another shade of it on a dark page.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import matplotlib

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TEXT, LINE = "#010203", "#010204"
#: Colour → the variable of ``page.css``. The first hues there are after Okabe and Ito's, which every kind of colour
#: vision tells apart; a provider's marker does so a second time.
SERIES = tuple(f"#0a0b{10 + i:02x}" for i in range(9))
VARIABLES = {TEXT: "var(--text)", LINE: "var(--line)", **{c: f"var(--series-{i})" for i, c in enumerate(SERIES)}}
MARKERS = "osD^vPX*h"
#: Of CSS: letters of ten points come out as large as the page's small print.
PIXELS_AN_INCH = 96

#: Who has which place; one that is not named here takes a place after them.
PLACES = (
    ("braze", "packed", "channels_last"),
    ("aten", "eager", "vanilla eager", "padded", "contiguous", "default_collate", "torch, for-loop"),
    ("compiled", "torch.compile", "vanilla compiled", "torch, foreach"),
    ("max-autotune", "torch, fused", "torch, chunked"),
    ("braze compiled",),
    ("liger",),
    ("torch",),
    ("lightning",),
    ("braze lightning",),
)

STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "braze",
    "font.size": 10,
    "text.parse_math": False,
    "axes.edgecolor": LINE,
    "axes.labelcolor": TEXT,
    "axes.titlecolor": TEXT,
    "axes.titlesize": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "text.color": TEXT,
    "xtick.color": TEXT,
    "ytick.color": TEXT,
    "grid.color": LINE,
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "lines.linewidth": 1.6,
    "lines.markersize": 5,
}


def _place(provider: str) -> int:
    places = [place for place, names in enumerate(PLACES) if provider in names]
    return places[0] if places else len(PLACES) + sum(provider.encode()) % 48


def series(provider: str) -> int:
    """The number of a provider's colour."""
    place = _place(provider)
    return place and 1 + (place - 1) % (len(SERIES) - 1)  # braze's is nobody else's


def color(provider: str) -> str:
    """The stand-in colour of a provider."""
    return SERIES[series(provider)]


def marker(provider: str) -> str:
    """The marker of a provider; where two share a colour, it tells them apart."""
    place = _place(provider)
    return MARKERS[(place + place // len(SERIES)) % len(MARKERS)]


@contextmanager
def style() -> Iterator[None]:
    """Everything that is drawn inside is drawn for the page."""
    with matplotlib.rc_context(STYLE):
        yield


def of(figure: Figure, title: str) -> str:
    """The ``<svg>`` element, named ``title`` for those who do not see it."""
    buffer = io.StringIO()
    empty = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    figure.savefig(buffer, format="svg", transparent=True, metadata=empty)
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r'\s(xmlns(:\w+)?|version)="[^"]*"', "", text)
    text = re.sub(r'<g id="[^"]*">', "<g>", text)
    text = re.sub(r"font: ([^;\"']*?px) [^;\"]*", r"font: \1 var(--face)", text)
    text = re.sub(r"#01020[34]|#0a0b[0-9a-f]{2}", lambda found: VARIABLES[found[0]], text)
    width = figure.get_figwidth() * PIXELS_AN_INCH
    text = re.sub(r'\s(width|height)="[\d.]+pt"', "", text, count=2)
    label = title.replace("&", "&amp;").replace('"', "&quot;").replace("<", "&lt;")
    return text.replace("<svg", f'<svg role="img" aria-label="{label}" style="max-width: {width:.0f}px"', 1)
