"""What tests run in processes of their own; it imports nothing, so that those start at once."""

import os
from collections.abc import Iterator
from typing import Any


def one_record(name: str, *how: str) -> Iterator[dict[str, Any]]:
    yield {
        "benchmark": "models",
        "model": name,
        "provider": "eager",
        "pass": "training",
        "shape": " ".join(how),
        "status": "ok",
    }


def record_then_abort(name: str, *how: str) -> Iterator[dict[str, Any]]:
    yield from one_record(name, *how)
    os.abort()


def refuse(name: str, *how: str) -> Iterator[dict[str, Any]]:
    raise ValueError(f"{name} cannot be built")
    yield {}


def say_nothing(name: str, *how: str) -> Iterator[dict[str, Any]]:
    yield from one_record(name, *how)
    while True:
        pass
