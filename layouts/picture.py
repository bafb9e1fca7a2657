"""A picture of a model's layout flow: a cell for each module and pass, green where channels_last was kept."""

from __future__ import annotations

from pathlib import Path

from .report import Device, LayoutReport

#: From best to worst; a module shows the worst of its own events.
COLOURS = {"kept": "#4caf50", "copies": "#cddc39", "transposes": "#ff9800", "loses": "#e53935", "crashes": "#000000"}
COLUMNS: tuple[tuple[Device, bool, str], ...] = (
    ("cpu", False, "CPU\nforward"),
    ("cpu", True, "CPU\nbackward"),
    ("cuda", False, "CUDA\nforward"),
    ("cuda", True, "CUDA\nbackward"),
)
#: Modules to one column of the page.
ROWS = 60


def worst(report: LayoutReport) -> dict[tuple[Device, bool, str], str]:
    """(device, backward, module) → the worst kind of its own events; modules with none are missing."""
    found: dict[tuple[Device, bool, str], str] = {}
    for event in report:
        place = event.device, event.backward, event.module
        found[place] = max(found.get(place, "kept"), event.kind, key=list(COLOURS).index)
    return found


def draw(report: LayoutReport, title: str, path: Path) -> None:
    """Write the picture to ``path``; modules run from top to bottom, then from left to right."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot
    from matplotlib.patches import Patch

    kinds, modules = worst(report), report.modules
    pages = [modules[i : i + ROWS] for i in range(0, len(modules), ROWS)] or [[""]]
    height = 1.6 + 0.16 * max(map(len, pages))
    size = (4.2 * len(pages), height)
    figure, axes = pyplot.subplots(1, len(pages), figsize=size, layout="constrained", squeeze=False)
    for axis, page in zip(axes[0], pages, strict=True):
        cells = [[COLOURS[kinds.get((d, b, name), "kept")] for d, b, _ in COLUMNS] for name in page]
        axis.imshow([[matplotlib.colors.to_rgb(cell) for cell in row] for row in cells], aspect="auto")
        axis.set_ylim(len(pages[0]) - 0.5, -0.5)  # cells of one height on all pages
        axis.spines[:].set_visible(False)
        axis.set_yticks(range(len(page)), [name[-40:] or "(the model)" for name in page], fontsize=6)
        axis.set_xticks(range(len(COLUMNS)), [label for *_, label in COLUMNS], fontsize=6)
        axis.set_xticks([x + 0.5 for x in range(len(COLUMNS) - 1)], minor=True)
        axis.set_yticks([y + 0.5 for y in range(len(page) - 1)], minor=True)
        axis.grid(which="minor", color="white", linewidth=1)
        axis.tick_params(which="both", length=0)
        axis.xaxis.tick_top()
    legend = [Patch(color=colour, label=kind) for kind, colour in COLOURS.items()]
    figure.legend(handles=legend, loc="outside lower center", ncols=len(legend), fontsize=7)
    figure.suptitle(title, fontsize=9)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
