"""One operator on one shape and dtype, launched with parameters that are tried."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from braze.kernels import use_backend
from braze.kernels.triton import launch_table
from braze.kernels.triton.launch_table import Answer, Ask

from . import timing
from .accuracy import Judge, cotangents_for, leaves, tensors
from .ops_case import FORWARD, Case
from .tune_search import Choice, Proof, label


class Subject:
    """A case with its inputs and, once it is asked for, the truth about them."""

    def __init__(self, case: Case, clocks: Callable[[torch.device], timing.Clocks] = timing.clocks_for) -> None:
        self.case, self._clocks = case, clocks
        self._call = case.call()

    @functools.cached_property
    def _judge(self) -> Judge:
        return Judge(self.case.op, self._call)

    def asks(self, which: str) -> list[Ask]:
        """What the launches of a pass ask."""
        found: dict[Ask, None] = {}
        self._run(which, lambda ask: found.setdefault(ask))
        return list(found)

    def refusal(self, which: str, ask: Ask, choice: Choice) -> str | None:
        """Why a choice is none: it does not run, is wrong, not deterministic, or spills more than what was reasoned."""
        answer, judge = _instead(ask, choice), self._judge
        try:
            with _spilled() as spills:
                first = self._run(which, answer)
            again = self._run(which, answer)
            with _launching(answer):
                errors = judge.errors(self.case.op.fn, gradients=self.case.op.differentiable)
        except Exception as error:  # of the compiler, of the launch, or a limit of the machine
            return f"failed: {type(error).__name__}: {(str(error).strip().splitlines() or ['no message'])[0]}"
        if which == FORWARD:
            errors = errors.of_outputs()
        if errors.wrong:
            return f"wrong: {errors.wrong}"
        if not all(map(_same_bits, first, again)):
            return "not the same bits twice"
        with _spilled() as before:
            self._run(which, _reasoned)
        return f"spills registers: {dict(spills - before)}" if spills - before else None

    def ratios(self, which: str, ask: Ask, rounds: int, first: Choice, others: Sequence[Choice]) -> list[timing.Ratio]:
        """The times of other choices over that of the first, with warm caches."""
        samples = self._timed(which, ask, [first, *others], rounds, cold=False)
        return [samples.ratio(label(choice), label(first)) for choice in others]

    def prove(
        self, which: str, ask: Ask, choices: Sequence[Choice], rounds: int, cold_rounds: int
    ) -> dict[Choice, tuple[Proof, dict[str, float]]]:
        """Each choice against what was reasoned, with warm and with cold caches; and the figures of that."""
        everything = [ask.free, *choices]
        warm = self._timed(which, ask, everything, rounds, cold=False)
        cold = self._timed(which, ask, everything, cold_rounds, cold=True)
        reasoned = label(ask.free)
        found = {}
        for choice in choices:
            name = label(choice)
            figures = {
                "reasoned_ms": 1e3 * warm.quartiles(reasoned).median,
                "measured_ms": 1e3 * warm.quartiles(name).median,
                **warm.ratio_fields(name, reasoned),
                **cold.ratio_fields(name, reasoned, prefix="cold_"),
            }
            found[choice] = Proof(warm.ratio(name, reasoned), cold.ratio(name, reasoned)), figures
        return found

    def _timed(self, which: str, ask: Ask, choices: Sequence[Choice], rounds: int, *, cold: bool) -> timing.Samples:
        clocks = self._clocks(self.case.device)
        works = {label(choice): self._work(which, _instead(ask, choice)) for choice in choices}
        return timing.compare(works, clocks.cold if cold else clocks.warm, rounds)

    def _work(self, which: str, answer: Answer) -> timing.Work:
        work = self.case.work(which, self.case.op.fn, self._call, self._judge.cotangents)

        def under(part: Callable[..., Any]) -> Callable[..., Any]:
            def answered(*arguments: Any) -> Any:
                with _launching(answer):
                    return part(*arguments)

            return answered

        if isinstance(work, timing.Prepared):
            return timing.Prepared(under(work.prepare), under(work.finish))
        return under(work)

    def _run(self, which: str, answer: Answer) -> list[Tensor]:
        """The results of one pass, whose launches alone get the answer: the other's are as reasoned."""
        with _launching(answer if which == FORWARD else _reasoned):
            outputs = tensors(self.case.op.fn(*self._call.args, **self._call.kwargs))
        if which == FORWARD:
            return [y.detach() for y in outputs]
        with _launching(answer):
            return list(torch.autograd.grad(outputs, leaves(self._call), cotangents_for(outputs)))


@contextmanager
def _launching(answer: Answer) -> Iterator[None]:
    """Have every operator launch its kernels, with what the answer says."""
    with launch_table.answering(answer), use_backend("triton"):
        yield


def _reasoned(ask: Ask) -> None:
    """Nothing else, whatever the table says."""


def _instead(ask: Ask, choice: Choice) -> Answer:
    return lambda asked: dict(choice) if asked == ask else None


def _same_bits(one: Tensor, other: Tensor) -> bool:
    return torch.equal(*(t.contiguous().view(-1).view(torch.uint8) for t in (one, other)))


@contextmanager
def _spilled() -> Iterator[Counter[str]]:
    """Registers that the launches inside the block spilled, by kernel; none in the interpreter."""
    from triton.runtime.jit import JITFunction

    found: Counter[str] = Counter()
    launch = JITFunction.run

    def noted(self: Any, *args: Any, **kwargs: Any) -> Any:
        kernel = launch(self, *args, **kwargs)
        found[kernel.metadata.name] = max(found[kernel.metadata.name], kernel.n_spills or 0)
        return kernel

    with mock.patch.object(JITFunction, "run", noted):
        yield found
