"""Work in a process of its own, whose death leaves the one that asked alive."""

from __future__ import annotations

import multiprocessing
import os
import signal
import traceback
from collections.abc import Callable, Generator, Iterator, Sequence
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any, NamedTuple


class ChildDied(RuntimeError):
    """A process ended before its work did, or its work failed; the message says how."""


class _Failed(NamedTuple):
    error: str


class _Done(NamedTuple):
    pass


def messages(
    task: Callable[..., Iterator[Any]], *arguments: Any, preload: Sequence[str], seconds: float
) -> Generator[Any, None, None]:
    """What the generator ``task(*arguments)`` yields in another process, as it comes.

    The process is forked from one that has imported the modules of ``preload``, and computed nothing.

    Raises:
        ChildDied: if the task raises, if its process ends before it, or if it says nothing for ``seconds``.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(preload))
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_send, args=(sender, task, arguments), daemon=True)
    process.start()
    sender.close()
    try:
        while True:
            if not receiver.poll(seconds):
                raise ChildDied(f"no answer in {seconds:.0f} s")
            try:
                message = receiver.recv()
            except EOFError:
                raise ChildDied(death(process)) from None
            if isinstance(message, _Failed):
                raise ChildDied(message.error)
            if isinstance(message, _Done):
                return
            yield message
    finally:
        process.kill()
        process.join()


def death(process: BaseProcess) -> str:
    """How a process ended, such as "SIGSEGV"."""
    process.join()
    status = process.exitcode or 0
    return signal.Signals(-status).name if status < 0 else f"exit status {status}"


def _send(pipe: Connection, task: Callable[..., Iterator[Any]], arguments: tuple[Any, ...]) -> None:
    for standard in (1, 2):  # what it prints would tear up the progress bar of the one that asked
        os.dup2(os.open(os.devnull, os.O_WRONLY), standard)
    try:
        for message in task(*arguments):
            pipe.send(message)
        pipe.send(_Done())
    except Exception as error:
        where = traceback.extract_tb(error.__traceback__)[-1]
        pipe.send(_Failed(f"{type(error).__name__}: {error} ({where.name}, line {where.lineno})"))
