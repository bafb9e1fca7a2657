"""``python -m braze.layouts audit MODEL``: where a model loses channels_last, copies or transposes."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from . import audit, picture, specifier
from .report import LayoutReport


def main(argv: Sequence[str] | None = None) -> int:
    """Audit one model and print the report; return the exit status."""
    parser = argparse.ArgumentParser("python -m braze.layouts", description="Where bytes live and how they move.")
    command = parser.add_subparsers(required=True, metavar="COMMAND").add_parser(
        "audit", help="where a model loses channels_last, copies or transposes"
    )
    command.add_argument("model", help=specifier.FORMS)
    command.add_argument("--batch", type=int, default=2, metavar="N", help="images in the batch; default: 2")
    command.add_argument("--size", type=int, metavar="PIXELS", help="height and width; default: the model's, or 224")
    command.add_argument("--eval", action="store_true", help="audit the forward pass in evaluation, and nothing else")
    command.add_argument("--plot", type=Path, metavar="FILE", help="also draw the layout flow, a cell for each module")
    command.add_argument("--json", type=Path, metavar="FILE", help="also write the events here")
    arguments = parser.parse_args(argv)
    try:
        model = specifier.build(arguments.model)
    except ValueError as error:
        parser.error(str(error))
    model.train(not arguments.eval)
    images = specifier.example(model, arguments.batch, arguments.size)
    report = audit(model, images, backward=not arguments.eval)
    _print(report)
    title = f"{arguments.model}, images {list(images.shape)}"
    if arguments.plot:
        picture.draw(report, title, arguments.plot)
        print(f"layout flow: {arguments.plot}")
    if arguments.json:
        arguments.json.write_text(json.dumps({"model": title, "events": report.as_dicts()}) + "\n")
    return 0


def _print(report: LayoutReport) -> None:
    try:
        from rich.console import Console
    except ModuleNotFoundError:
        print(report)
        return
    console = Console()
    if not console.is_terminal:
        console.width = 170
    console.print(report)


if __name__ == "__main__":
    sys.exit(main())
