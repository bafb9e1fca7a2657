"""``python -m braze.benchmarks COMMAND``: every measurement, each with ``--quick`` and ``--json FILE``."""

from __future__ import annotations

import argparse
import functools
import importlib
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from . import records

PROGRAM = "python -m braze.benchmarks"

#: These measure nothing themselves, and have no use for ``--quick`` and ``--json``.
WITHOUT_MEASURING = ("report", "gpu")

#: A command is the module of the same name; it offers ``add_arguments(parser)`` and ``run(arguments) -> records``.
COMMANDS = {
    "kernels": "judge every Triton kernel with no GPU: bytes moved, registers, spills, access width",
    "ops": "time every operator against plain ATen and torch.compile, with its error beside its speed",
    "selfcheck": "what the harness says of two equal providers, of one that is 5 % slower, and of a wrong one",
    "losses": "memory and time of a linear layer and its cross-entropy, with and without logits",
    "optim": "time a step of every optimizer against torch.optim's three forms, and count what its kernels move",
    "loaders": "time collating, crossing from a worker and normalizing against torch, timm and torchvision",
    "rounding": "train a language model in bfloat16 alone, by how parameters are rounded, against float32",
    "packing": "train a language model on packed and on padded batches of the same documents",
    "audit": "which torchvision and timm models keep channels_last, which lose it, and where",
    "freed_memory": "time training steps and inference of whole models with and without keep_freed_memory",
    "channels_last": "time a training step of convolutional models, channels_last against contiguous",
    "models": "time a training step and inference of whole models: vanilla, compiled, Liger-Kernel, braze, Lightning",
    "scaling": "how time and memory grow with rows, row length, vocabulary, sequence and width, against the roofline",
    "zoo": "fuse every kind of model, against an independent count of its joints",
    "tune": "search a GPU's best launch parameters of operators, and write them where the kernels read them",
    "compare": "which operators became slower or faster since a commit",
    "report": "one HTML page and a Markdown summary from the files that --json wrote",
    "gpu": "make gpu: the contract and the timings on a machine with a GPU and perhaps no network",
    "demo": "train real models under Lightning, vanilla and fused, side by side",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return the exit status."""
    words = list(sys.argv[1:] if argv is None else argv)
    if not words or words[0] not in COMMANDS:
        listing = "\n".join(f"  {name:14}{what}" for name, what in COMMANDS.items())
        chooser = argparse.ArgumentParser(
            PROGRAM,
            description=f"Every measurement, from one place.\n\ncommands:\n{listing}",
            formatter_class=argparse.RawTextHelpFormatter,
        )
        chooser.add_argument("command", choices=COMMANDS, metavar="COMMAND", help="one of the above; it has its --help")
        chooser.parse_args(words or ["--help"])
        raise AssertionError("unreachable: argparse exits, for help or with an error")
    name = words[0]
    parser, command = parser_of(name)
    arguments = parser.parse_args(words[1:])
    if arguments.json and not arguments.json.absolute().parent.is_dir():
        parser.error(f"--json: there is no folder {arguments.json.absolute().parent}; make it first")
    arguments.keep = functools.partial(records.write, arguments.json, name) if arguments.json else _forget
    found = command.run(arguments)
    if arguments.json:
        records.write(arguments.json, name, found)
    return 0


def parser_of(name: str) -> tuple[argparse.ArgumentParser, Any]:
    """The command's parser, and its module.

    ``run`` gets from it, beside the flags, ``keep(records)``: to be called with all that there is so far, so that a
    command which is cut off leaves that in the file of ``--json``.
    """
    command = _load(name)
    parser = argparse.ArgumentParser(f"{PROGRAM} {name}", description=COMMANDS[name])
    if name in WITHOUT_MEASURING:
        parser.set_defaults(json=None)
    else:
        parser.add_argument("--quick", action="store_true", help="small sizes and few repeats: under a minute or so")
        parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures here, as flat records")
    command.add_arguments(parser)
    return parser, command


def _forget(found: Sequence[records.Record]) -> None:
    pass


def _load(name: str) -> Any:
    try:
        return importlib.import_module(f"braze.benchmarks.{name}")
    except ModuleNotFoundError as error:
        if error.name is None or error.name.startswith("braze."):
            raise
        sys.exit(f"the command {name!r} needs {error.name}, which is not installed: pip install 'braze[bench]'")


if __name__ == "__main__":
    sys.exit(main())
