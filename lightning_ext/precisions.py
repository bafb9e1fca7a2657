"""The precisions that the plugins take."""

from __future__ import annotations

from typing import Literal

import torch

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


def refuse_fp8(owner: str, fp8: str | None) -> None:
    """Say what is missing for matrix products in 8 bits.

    Raises:
        NotImplementedError: if fp8 is anything but None.
    """
    if fp8 is None:
        return
    if not torch.cuda.is_available():
        missing = "this machine has no CUDA GPU"
    elif torch.cuda.get_device_capability() < (8, 9):
        major, minor = torch.cuda.get_device_capability()
        missing = f"this GPU has compute capability {major}.{minor}, and float8 matrix products need 8.9"
    else:
        missing = "this GPU has them, but braze has no path to them yet that was run on one"
    raise NotImplementedError(
        f"{owner}: fp8 must be None, got {fp8!r}: {missing}; use precision='bf16-mixed', or convert the linear layers "
        "with torchao.float8 before training"
    )


def has_float16_autocast(device_type: str) -> bool:
    """Whether Lightning trains in 16-mixed on such a device; on the CPU it takes bf16-mixed."""
    return device_type != "cpu"
