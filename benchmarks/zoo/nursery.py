"""Reads model names, forks a process that measures each, and writes a JSON record a line.

What all models need is imported once, here, so that a child starts in milliseconds.
"""

from __future__ import annotations

import json
import os
import signal
import sys

#: Seconds after which a model's process is ended.
LIMIT = 900


def main() -> None:
    """Serve until the input ends."""
    from .measure import measure
    from .models import warm

    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what models print is no record
    warm()
    for line in sys.stdin:
        name = line.strip()
        child = os.fork()
        if not child:
            signal.alarm(LIMIT)
            print(json.dumps(measure(name)), file=answers, flush=True)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        if status:
            ended = f"the process ended with signal {os.WTERMSIG(status)}; {LIMIT} s is the limit"
            print(json.dumps({"model": name, "exception": ended, "at": ""}), file=answers, flush=True)


if __name__ == "__main__":
    main()
