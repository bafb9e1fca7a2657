"""``fold`` and ``unfold``: normalizations by running statistics become part of the layer beside them, for inference."""

from __future__ import annotations

import collections
import copy
from collections.abc import Hashable, Iterable
from typing import Any

import torch
from torch import nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from .barrier import barrier
from .choices import Choice, checked, matches
from .dataflow import Dataflow, Step
from .folded import Fold, fold_of, pads_zeros, sample_input
from .joint import fusion
from .report import FusionReport, Record
from .sample import Refused, Sample, kind, quiet
from .sites import hooked
from .verify import REPEATS, SLACK, Check, Measure, Result, measure

_Pair = tuple[nn.Module, nn.Module, bool]


def fold(model: nn.Module, *, skip: Iterable[Choice] = (), only: Iterable[Choice] | None = None) -> FusionReport:
    """Fold every batch normalization into the convolution or linear layer before it, or right behind it, in place.

        layer, then norm:   y = s·(W x + b) + t = (s·W) x + (s·b + t)
        norm, then layer:   y = W (s·x + t) + b = (W·s) x + (W t + b)       s = weight / √(var + ε),  t = bias − mean·s

    Neighbours are found by the flow of data. A norm goes into the layer behind it only if that layer pads with no
    zeros, or the shift t is zero. Each fold is checked with drawn parameters in float32, and with the model's own in
    float32 and in its dtype: the error against float64 is at most twice that of the two apart, and a rounding step.

    Parameters, buffers, their identities and ``state_dict`` keys and values stay: the folded numbers lie beside them,
    which takes the memory of those layers once more. They are made anew by ``load_state_dict``, and where a parameter
    was replaced or changed in place (but not through ``.data``). Gradients are right, and cost a fold in every call:
    for speed run under ``no_grad`` or ``inference_mode``. ``model.train()`` unfolds. A module that is folded must not
    be replaced by another.

    Args:
        model: in evaluation. It may be fused, before or after; unfold it before ``unfuse``.
        skip: what to leave alone: paths of norms, with wildcards, or module classes, as in :func:`fuse`.
        only: the same; if given, nothing else is folded.

    Returns:
        A report with one record for each norm: "folded", "already folded", or "left" with the reason.

    Raises:
        TypeError: if model is no module, or an entry of skip or only is neither a string nor a module class.
        ValueError: if the model, or a norm in it, is in training.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"fold: model must be a torch.nn.Module, got {type(model).__name__}; pass the model itself")
    skip = checked("fold", "skip", skip)
    only = None if only is None else checked("fold", "only", only)
    norms = {path: module for path, module in model.named_modules() if _normalizes(module)}
    training = [path for path, norm in norms.items() if norm.training]
    if model.training or training:
        raise ValueError(
            f"fold: model must be in evaluation, got {training[0] if training else 'a model'} in training, where a "
            "normalization follows its batch; call model.eval() first"
        )
    with quiet(model):
        records, folds = _search(model, norms, skip, only)
    _apply(folds)
    return FusionReport(records, "folded")


def unfold(model: nn.Module) -> None:
    """Give every module that :func:`fold` folded its own class back; its parameters never changed.

    Raises:
        RuntimeError: if a folded module's class has been changed again since; nothing is changed then.
    """
    folds = {id(one): one for one in map(fold_of, model.modules()) if one is not None}
    for one in folds.values():
        one.check()
    for one in folds.values():
        one.undo()


def _normalizes(module: nn.Module) -> bool:
    """A normalization by running statistics, whatever its class; which they are, the numbers must show."""
    statistics = (getattr(module, name, None) for name in ("running_mean", "running_var"))
    return all(isinstance(t, torch.Tensor) for t in statistics) and hasattr(module, "eps") and hasattr(module, "bias")


def _search(
    model: nn.Module, norms: dict[str, nn.Module], skip: tuple[Choice, ...], only: tuple[Choice, ...] | None
) -> tuple[list[Record], list[Fold]]:
    candidates = _Candidates(model, norms.values())
    paths = {id(module): path for path, module in model.named_modules()}
    records, folds = [], []
    for path, norm in norms.items():
        if any(matches(choice, path, norm, "fold") for choice in skip):
            continue
        if only is not None and not any(matches(choice, path, norm, "fold") for choice in only):
            continue
        was, known = type(norm).__name__, fold_of(norm)
        if known is not None:
            records.append(Record(path, was, f"in {paths.get(id(known.layer), '?')}", "already folded"))
            continue
        try:
            made, check = candidates.fold(norm)
        except Refused as refused:
            records.append(Record(path, was, "", "left", str(refused)))
            continue
        records.append(Record(path, was, f"in {paths[id(made.layer)]}", "folded", "", check))
        folds.append(made)
    return records, folds


class _Candidates:
    """What is known of one model: how data flows, and what is used more than once."""

    def __init__(self, model: nn.Module, norms: Iterable[nn.Module]) -> None:
        self.model = model
        self.flow = Dataflow(model, {id(norm) for norm in norms})
        self.places = collections.Counter(id(m) for _, m in model.named_modules(remove_duplicate=False))
        self.owners = collections.Counter(id(p) for m in model.modules() for p in m._parameters.values())
        self.taken: set[int] = set()
        self.drawn: dict[Hashable, Check | str] = {}

    def fold(self, norm: nn.Module) -> tuple[Fold, Check]:
        """The fold of ``norm``, not applied yet, and its check.

        Raises:
            Refused: with the reason, if it must stay.
        """
        self._free(norm, "it")
        layer, _, norm_first = pair = self._neighbours(norm)
        self._free(layer, f"its neighbour, a {type(layer).__name__},")
        if fusion(layer) is not None:
            raise Refused(f"its neighbour, a {type(layer).__name__}, is fused; unfuse the model first")
        key = kind(layer), kind(norm), norm_first
        if key not in self.drawn:
            try:
                self.drawn[key] = _check(self._drawn(pair), [torch.float32])
            except Refused as refused:
                self.drawn[key] = str(refused)
        found = self.drawn[key]
        if isinstance(found, str):
            raise Refused(found)
        own = _check(pair, {torch.float32: 0, _dtype(layer): 0})
        self.taken.add(id(layer))
        worst = max(found, own, key=lambda check: check.error / check.budget)
        return Fold(layer, norm, norm_first), worst

    def _neighbours(self, norm: nn.Module) -> _Pair:
        step = self._step(norm, "it")
        before = self.flow.before(step)
        if before is not None and _foldable(before):
            self._step(before, "the layer before it")
            return before, norm, False
        behind = self.flow.behind(step)
        plain = not any(True for _ in norm.children())
        if behind is not None and _foldable(behind) and plain and not isinstance(behind, _ConvTransposeNd):
            self._step(behind, "the layer behind it")
            if type(behind).forward is not _torchs_forward(behind):
                raise Refused("the layer behind it has a forward of its own, which may pad")
            return behind, norm, True
        raise Refused("no convolution or linear layer is right before it or right behind it, and only there")

    def _step(self, module: nn.Module, what: str) -> Step:
        steps = self.flow.calls.get(id(module), [])
        if not steps:
            raise Refused(self.flow.failures.get(id(module), f"no traced forward calls {what}"))
        if len(steps) > 1:
            raise Refused(f"{what} is called more than once")
        if len(steps[0].node.args) != 1 or steps[0].node.kwargs:
            raise Refused(f"{what} is called with more than its input")
        return steps[0]

    def _free(self, module: nn.Module, what: str) -> None:
        """Nothing but its forward counts, and nobody else uses it or its parameters."""
        if id(module) in self.taken or fold_of(module) is not None:
            raise Refused(f"{what} holds another norm")
        reason = barrier(module)
        if reason:
            raise Refused(f"{what} cannot be folded: {reason}")
        if hooked(module):
            raise Refused(f"{what} has hooks")
        if self.places[id(module)] > 1 or any(self.owners[id(p)] > 1 for p in module.parameters()):
            raise Refused(f"{what} is shared, or its parameters are")
        if any(t.is_meta for t in (*module.parameters(), *module.buffers())):
            raise Refused(f"{what} is on the meta device: load the weights first")

    def _drawn(self, pair: _Pair) -> _Pair:
        layer, norm, norm_first = pair
        drawn: list[Any] = [Sample(m, self.model, {}).module.to(_dtype(m)).eval() for m in (layer, norm)]
        if norm_first and pads_zeros(layer):  # legal without a shift only
            drawn[1].running_mean.zero_()
            if drawn[1].bias is not None:
                drawn[1].bias.data.zero_()
        return drawn[0], drawn[1], norm_first


def _foldable(module: nn.Module) -> bool:
    return isinstance(module, (_ConvNd, nn.Linear))


def _torchs_forward(layer: nn.Module) -> Any:
    owner = next(base for base in type(layer).__mro__ if base.__module__.startswith("torch.nn.modules."))
    return owner.forward  # type: ignore[attr-defined]


def _dtype(module: nn.Module) -> torch.dtype:
    return next(t.dtype for t in (*module.parameters(), *module.buffers()) if t.is_floating_point())


def _check(pair: _Pair, dtypes: Iterable[torch.dtype]) -> Check:
    """Both one after the other against the fold, each against float64.

    Raises:
        Refused: if the fold is over its budget.
    """
    generator = torch.Generator().manual_seed(1)
    worst = Check(0.0, 1.0, "", 0)
    for dtype in dtypes:
        name = f"output, {str(dtype).removeprefix('torch.')}"
        measures = [_measure(pair, generator, dtype, name)]
        if measures[0].error > measures[0].budget:  # that may be luck, as in verify
            measures += [_measure(pair, generator, dtype, name) for _ in range(REPEATS)]
        error, budget = max(m.error for m in measures), max(m.budget for m in measures)
        if error > budget:
            raise Refused(f"folded it is less accurate: error {error:.1e}, budget {budget:.1e} ({name})")
        if error / budget > worst.error / worst.budget:
            worst = Check(error, budget, name, len(measures))
    return worst


def _measure(pair: _Pair, generator: torch.Generator, dtype: torch.dtype, name: str) -> Measure:
    layer, norm, norm_first = pair
    apart, together = ([copy.deepcopy(m).to(dtype) for m in (layer, norm)] for _ in range(2))
    exact = [copy.deepcopy(m).double() for m in apart]
    Fold(together[0], together[1], norm_first).apply()
    x = sample_input(layer, generator).to(next(layer.parameters()).device, dtype)
    with torch.no_grad():
        try:
            truth, plain = _run(exact, x.double(), norm_first), _run(apart, x, norm_first)
        except Exception as failure:
            raise Refused(f"it fails on drawn inputs: {failure}") from failure
        got = _run(together, x, norm_first)
    return measure(Result(name, plain, dtype), Result(name, got, dtype), Result(name, truth, dtype), SLACK)


def _run(modules: list[nn.Module], x: torch.Tensor, norm_first: bool) -> torch.Tensor:
    first, second = reversed(modules) if norm_first else modules
    y: torch.Tensor = second(first(x))
    return y


def _apply(folds: list[Fold]) -> None:
    done: list[Fold] = []
    try:
        for one in folds:
            one.apply()
            done.append(one)
    except BaseException:
        for one in done:
            one.undo()
        raise
