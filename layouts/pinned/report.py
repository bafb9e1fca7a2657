"""What a loader cost: how long the training loop waited for it, and which way the bytes went."""

from __future__ import annotations

import dataclasses
from collections import Counter, deque

import numpy as np


@dataclasses.dataclass
class LoaderReport:
    """Figures of a :class:`PinnedLoader` since it was made.

    Attributes:
        steps: batches handed out.
        seconds: how long the loop waited for them: for data, for memory, for copies on the host.
        waits: the seconds of the last steps, one by one.
        late: steps whose copy to the device had not ended when the batch was handed out.
        tensors: how many went each way: ``slab`` (from where SlabCollate put it), ``pinned`` (was page-locked when it
            came), ``staged`` (copied into a page-locked slab first), ``direct`` (from pageable memory), ``blocking``
            (not a plain tensor: by its own ``.to``), ``present`` (was on the device).
        nbytes: the bytes of these.
        slabs: slabs of the loader, and of the SlabCollate of this process.
        slab_bytes: their memory.
        made: slabs made so far.
        lendings: batches that got a slab.
        refusals: batches that got fresh memory because every slab was lent.
    """

    steps: int = 0
    seconds: float = 0.0
    waits: deque[float] = dataclasses.field(default_factory=lambda: deque(maxlen=4096))
    late: int = 0
    tensors: Counter[str] = dataclasses.field(default_factory=Counter)
    nbytes: Counter[str] = dataclasses.field(default_factory=Counter)
    slabs: int = 0
    slab_bytes: int = 0
    made: int = 0
    lendings: int = 0
    refusals: int = 0

    def waited(self, seconds: float) -> None:
        """Count a step."""
        self.steps += 1
        self.seconds += seconds
        self.waits.append(seconds)

    @property
    def reuse(self) -> float:
        """The part of lendings that made no new slab."""
        return 1.0 - self.made / self.lendings if self.lendings else 0.0

    def __str__(self) -> str:
        if not self.waits:
            return "no batch yet"
        low, median, high = np.percentile(self.waits, (5, 50, 95)) * 1e3
        lines = [
            f"{self.steps} batches; waited {median:.3g} ms a step (5 to 95 %: {low:.3g} to {high:.3g}), "
            f"{self.seconds:.3g} s in all; {self.late} copies ended late"
        ]
        lines += [
            f"  {way:7} {count} tensors, {self.nbytes[way] / self.steps / 2**20:.3g} MiB a batch"
            for way, count in self.tensors.most_common()
        ]
        lines.append(
            f"  {self.slabs} slabs in this process, {self.slab_bytes / 2**20:.3g} MiB; lent {self.lendings} times, "
            f"{self.reuse:.0%} of them reused, {self.refusals} times all were lent"
        )
        return "\n".join(lines)
