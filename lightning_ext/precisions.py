"""The precisions that the plugins take."""

from __future__ import annotations

from typing import Literal

PrecisionInput = Literal["32-true", "16-mixed", "bf16-mixed", "bf16-true", "32", 32]
PRECISIONS = ("32-true", "16-mixed", "bf16-mixed", "bf16-true")


def unified(owner: str, precision: object) -> str:
    """The one name of a precision.

    Raises:
        ValueError: if there is no such precision.
    """
    found = "32-true" if precision in (32, "32") else precision
    if found not in PRECISIONS:
        raise ValueError(
            f"{owner}: precision must be one of {', '.join(map(repr, PRECISIONS))} or 32, got {precision!r}; bfloat16 "
            "needs no loss scaling, so use it in the place of float16 parameters"
        )
    return str(found)


def has_float16_autocast(device_type: str) -> bool:
    """Whether Lightning trains in 16-mixed on such a device; on the CPU it takes bf16-mixed."""
    return device_type != "cpu"
