"""What one training run of the demo reports."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

Precision = Literal["32-true", "bf16-mixed", "bf16-true"]

#: Steps between two turns. The first block compiles and warms up, so no figure comes from it.
BLOCK = 5

#: Steps at the end that run under the memory profiler and so are not timed: two, because the gradients of one live on
#: through the next one's forward pass.
PROFILED = 2


@dataclass
class Result:
    """What one run found."""

    losses: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    #: From ``fit`` to the first step: set-up, and the check of every swap, and two validation batches.
    set_up: float = 0.0
    validation_loss: float = float("nan")
    #: The most bytes that tensors held at one time in a training step.
    tensor_bytes: int = 0
    #: The most memory that the process held at any time, libraries and compiler included.
    process_bytes: int = 0
    #: (class, status, reason) of every joint that ``fuse`` found.
    joints: list[tuple[str, str, str]] = field(default_factory=list)
