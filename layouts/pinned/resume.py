"""Where an iteration stands: so that it can be saved in the middle of an epoch, and goes on from there."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterable, Iterator
from typing import Any, Protocol

import torch

State = dict[str, Any]


class Course(Protocol):
    """One loader, and where it is."""

    def begin(self) -> Iterator[Any]:
        """Start an epoch, or go on with the one whose state was loaded."""

    def state(self) -> State:
        """The state with which a fresh loader would go on as this one would now."""

    def load(self, state: State) -> None:
        """Make the next :meth:`begin` go on from ``state``."""


class Stateful:
    """A loader that keeps its state itself, as torchdata's StatefulDataLoader does; states are its own."""

    def __init__(self, loader: Any) -> None:
        self._loader = loader

    def begin(self) -> Iterator[Any]:
        """What the loader gives."""
        return iter(self._loader)

    def state(self) -> State:
        """A copy: the loader's own may change as the loader goes on."""
        return copy.deepcopy(self._loader.state_dict())

    def load(self, state: State) -> None:
        """Hand it to the loader."""
        self._loader.load_state_dict(state)


class Replay:
    """Any other loader: the batches that were had are produced again and thrown away.

    The order is the same because the generators that shuffling draws from (torch's own, and those of the loader and
    its samplers) start from the state that they had when the epoch began.
    """

    def __init__(self, loader: Iterable[Any]) -> None:
        self._loader = loader
        self._loaded: State | None = None
        self._begun: list[torch.Tensor] | None = None
        self._batches = 0

    def begin(self) -> Iterator[Any]:
        """The loader's batches, but for those that the loaded state says were had."""
        loaded, self._loaded = self._loaded, None
        if loaded is None or loaded["generators"] is None:  # from the start, in an order of its own
            self._batches, self._begun = 0, [generator.get_state() for generator in self._generators()]
            return self._counted(iter(self._loader))
        self._batches, self._begun = loaded["batches"], loaded["generators"]
        return self._counted(self._remaining(**loaded))

    def state(self) -> State:
        """How many batches were had, and from which random numbers."""
        return self._loaded or {"batches": self._batches, "generators": self._begun}

    def load(self, state: State) -> None:
        """Note it for :meth:`begin`."""
        if set(state) != {"batches", "generators"}:
            raise ValueError(
                f"PinnedLoader: a state of {type(self._loader).__name__}, which keeps none itself, must have the keys "
                f"batches and generators, got {sorted(state)}; was it saved with another loader?"
            )
        drawn_from = state["generators"]
        if drawn_from is not None and len(drawn_from) != len(self._generators()):
            raise ValueError(
                f"PinnedLoader: the state is of a loader with {len(drawn_from)} random generators, this one has "
                f"{len(self._generators())}; make it with the same generator= and samplers"
            )
        self._loaded = state

    def _counted(self, source: Iterator[Any]) -> Iterator[Any]:
        yield from map(self._count, source)  # with no variable that would hold the batch
        self._begun, self._batches = None, 0

    def _count(self, batch: Any) -> Any:
        self._batches += 1
        return batch

    def _remaining(self, batches: int, generators: list[torch.Tensor]) -> Iterator[Any]:
        callers = torch.default_generator.get_state()
        try:
            for generator, state in zip(self._generators(), generators, strict=True):
                generator.set_state(state)
            source = iter(self._loader)
            for _ in itertools.islice(source, batches):
                pass
            first = list(itertools.islice(source, 1))  # where none was had: a sampler draws its order with the first
        finally:
            torch.default_generator.set_state(callers)
        return itertools.chain((first.pop() for _ in range(len(first))), source)

    def _generators(self) -> list[torch.Generator]:
        batch_sampler = getattr(self._loader, "batch_sampler", None)
        samplers = (getattr(self._loader, "sampler", None), batch_sampler, getattr(batch_sampler, "sampler", None))
        found = [torch.default_generator]
        for owner in (self._loader, *samplers):
            generator = getattr(owner, "generator", None)
            if isinstance(generator, torch.Generator) and all(generator is not one for one in found):
                found.append(generator)
        return found


def course(loader: Iterable[Any]) -> Course:
    """How to keep the place in ``loader``."""
    own = hasattr(loader, "state_dict") and hasattr(loader, "load_state_dict")
    return Stateful(loader) if own else Replay(loader)
