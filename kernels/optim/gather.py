"""Which parameters a step updates together: they are gathered by kind, and states that are missing are made.

All that a step does in Python for each parameter is here, and ResNet-50 has 161 of them. What a step found is therefore
kept, and the next one, unless something was changed, only looks at it.
"""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
from torch import Tensor

from .. import sharding
from . import quantization
from .bucket import Bucket, Entry, Kind, local, shards
from .rule import Group, Rule

if TYPE_CHECKING:
    from .step import Extras, FusedStep


class Recipe(NamedTuple):
    """What a step does to the parameters of one group that have one rule and dtype.

    Attributes:
        options: their names.
        names: of the states that the rule's reference updates.
        state: the dtype of states; int8 for those in 8 bits.
        wanted: the name and dtype of every other state as large as its parameter.
    """

    options: tuple[str, ...]
    names: tuple[str, ...]
    state: torch.dtype
    wanted: dict[str, torch.dtype]


class Row(NamedTuple):
    """What a parameter was when it was gathered."""

    rule: Rule
    dtype: torch.dtype
    device: int
    stride: tuple[int, ...]
    gradient: torch.dtype
    state: dict[str, Any] | None
    tensors: list[tuple[str, Tensor]]


class Gathered(NamedTuple):
    """What a step found; the next one needs to find the gradients only, if all else is as it was.

    Attributes:
        params: of each group, with the row of each that had a gradient.
        recipes: of each group.
        buckets: by kind.
    """

    params: list[list[tuple[Tensor, Row | None]]]
    recipes: list[dict[tuple[Rule, torch.dtype, bool], Recipe]]
    buckets: dict[Kind, Bucket]


def gather(optimizer: FusedStep) -> dict[Kind, Bucket]:
    """All parameters with a gradient, by kind."""
    last = optimizer.gathered
    if last is not None and _is_as_it_was(optimizer, last):
        for bucket in last.buckets.values():
            bucket.grads = [cast(Tensor, p.grad) for p in bucket.originals]
        return last.buckets
    entries: dict[Kind, list[Entry]] = defaultdict(list)
    found = Gathered([], [], {})
    number, plain = -1, True
    for index, group in enumerate(optimizer.param_groups):
        recipes: dict[tuple[Rule, torch.dtype, bool], Recipe] = {}
        rows: list[tuple[Tensor, Row | None]] = []
        for p in group["params"]:
            number += 1
            if p.grad is None:
                rows.append((p, None))
                continue
            rule, dtype, small = optimizer._rule_of(p, group), p.dtype, _stays_wide(p)
            if (rule, dtype, small) not in recipes:
                recipes[rule, dtype, small] = _recipe(optimizer._extras, rule, group, dtype, small)
            recipe = recipes[rule, dtype, small]
            entry, dense = _entry(optimizer, rule, recipe, p, index, number)
            kind = Kind(rule, p.device, dtype, entry.grad.dtype, recipe.state, recipe.options, dense, shards(p))
            entries[kind].append(entry)
            plain = plain and entry.grad is p.grad and not entry.first
            state = optimizer.state.get(p)
            tensors = [(name, t) for name, t in (state or {}).items() if isinstance(t, Tensor)]
            rows.append((p, Row(rule, dtype, p.get_device(), p.stride(), entry.grad.dtype, state, tensors)))
        found.params.append(rows)
        found.recipes.append(recipes)
    found.buckets.update((kind, Bucket(own)) for kind, own in entries.items())
    optimizer.gathered = found if plain else None
    return found.buckets


def _is_as_it_was(optimizer: FusedStep, last: Gathered) -> bool:
    """Whether only the gradients can be others than at the last step, and they lie as the parameters do."""
    groups, states = optimizer.param_groups, optimizer.state
    if len(groups) != len(last.params):
        return False
    for group, rows, recipes in zip(groups, last.params, last.recipes, strict=True):
        if len(group["params"]) != len(rows):
            return False
        for (rule, dtype, small), recipe in recipes.items():
            if _recipe(optimizer._extras, rule, group, dtype, small) != recipe:
                return False
        for p, (before, row) in zip(group["params"], rows, strict=True):
            grad = p.grad
            if p is not before or (grad is None) != (row is None):
                return False
            if grad is None or row is None:
                continue
            rule, dtype, device, stride, gradient, state, tensors = row
            if (
                p.dtype != dtype
                or grad.dtype != gradient
                or p.get_device() != device
                or p.stride() != stride
                or not _lies_as(grad, p)
                or states.get(p) is not state
                or optimizer._rule_of(p, group) is not rule
            ):
                return False
            for name, t in tensors:
                if state.get(name) is not t:  # type: ignore[union-attr]  # there are none without a state
                    return False
    return True


def _recipe(extras: Extras, rule: Rule, group: Group, dtype: torch.dtype, small: bool) -> Recipe:
    names, options = rule.states(group), rule.options(group)
    asked = extras["state_dtype"]
    quantized = asked == "8bit" and not small and bool(names)
    rounding = extras["rounding"]
    if dtype != torch.bfloat16 and not (quantized and rounding == "stochastic"):
        rounding = "nearest"
    if isinstance(asked, str):
        state = torch.int8 if quantized else torch.promote_types(dtype, torch.float32)
    else:
        state = asked or (dtype if rounding == "nearest" else torch.float32)
    wanted = {} if quantized else dict.fromkeys(names, state)
    if rounding != "nearest":
        options += (rounding,)
    if rounding == "kahan":
        wanted["compensation"] = dtype
    if extras["ema_decay"] is not None:
        options += ("average",)
        wanted["ema"] = torch.promote_types(dtype, torch.float32)
    if extras["clear_gradients"]:
        options += ("clear",)
    if rounding == "stochastic" and "step" not in options:
        options += ("step",)
    return Recipe(options, names, state, wanted)


def _entry(optimizer: FusedStep, rule: Rule, recipe: Recipe, p: Tensor, index: int, number: int) -> tuple[Entry, bool]:
    """The entry of p, and whether its tensors are dense."""
    known = optimizer.state.get(p)
    state: dict[str, Any] = {} if known is None else known
    sharded = sharding.is_sharded(p)
    own = local(p) if sharded else p
    dense = is_dense(own)
    first = any(state.get(name) is None for name in recipe.names)
    scales = _quantized(state, recipe, p, dense)
    for name, dtype in recipe.wanted.items():
        state[name] = _like(p, state.get(name), dtype, dense, start=p if name == "ema" else None)
    shapes = rule.direction_states(p)
    for name, shape in shapes.items():
        state[name] = (
            _like(p, state.get(name), recipe.state, dense)
            if shape == p.shape
            else _of_shape(shape, p, state.get(name), recipe.state)
        )
    if "step" in recipe.options:
        state["step"] = _counter(state.get("step"), p.device)
    if known is None and state:
        optimizer.state[p] = state

    assert p.grad is not None
    grad = local(p.grad, like=p) if sharded else p.grad
    if dense and not _lies_as(grad, own):
        grad = torch.empty_like(own, dtype=grad.dtype).copy_(grad)
        if "clear" in recipe.options:
            local(p.grad).zero_()
    mine = (
        {name: local(state[name]) for name in (*recipe.names, *scales, *recipe.wanted, *shapes)} if sharded else state
    )
    return Entry(
        p,
        own,
        grad,
        state["step"] if "step" in recipe.options else None,
        tuple([mine[name] for name in recipe.names]),
        tuple([mine[name] for name in scales]),
        tuple([mine[name] for name in shapes]),
        mine["ema"] if "ema" in recipe.wanted else None,
        mine["compensation"] if "compensation" in recipe.wanted else None,
        index,
        number,
        first,
    ), dense


def _quantized(state: dict[str, Any], recipe: Recipe, p: Tensor, dense: bool) -> list[str]:
    """Put states into 8 bits, or out of them; the names of their scales, if they are in 8 bits."""
    for name in list(quantization.states_in(state)):
        if recipe.state != torch.int8 or not _lies_as(state[name], p):
            state[name] = quantization.read(state[name], state.pop(name + quantization.SCALE))
    if recipe.state != torch.int8:
        return []
    names = [name + quantization.SCALE for name in recipe.names]
    for name, scale in zip(recipe.names, names, strict=True):
        if scale not in state:
            known = state.get(name)
            state[name], state[scale] = quantization.new_codes(p, name), quantization.new_scales(p)
            if known is not None:
                quantization.write(_like(p, known, torch.float32, dense), state[name], state[scale])
    return names


def _stays_wide(p: Tensor) -> bool:
    """Whether p has states in float32 where others have them in 8 bits."""
    return p.numel() < quantization.LEAST or not is_dense(local(p))


def _like(p: Tensor, known: Tensor | None, dtype: torch.dtype, dense: bool, start: Tensor | None = None) -> Tensor:
    """A state of p's size, in ``dtype``, and where p is dense as it lies in memory; new ones are ``start``, or 0."""
    if known is None:
        return torch.zeros_like(p, dtype=dtype) if start is None else start.detach().to(dtype, copy=True)
    if known.dtype == dtype and (not dense or _lies_as(known, p)):
        return known
    return torch.empty_like(p, dtype=dtype).copy_(known)


def _of_shape(shape: tuple[int, ...], p: Tensor, known: Tensor | None, dtype: torch.dtype) -> Tensor:
    return torch.zeros(shape, dtype=dtype, device=p.device) if known is None else known.to(dtype)


def _counter(step: Any, device: torch.device) -> Tensor:
    if isinstance(step, Tensor) and step.dtype == torch.float32 and step.device == device:
        return step
    return torch.as_tensor(0.0 if step is None else step, dtype=torch.float32).to(device)


def _lies_as(t: Tensor, p: Tensor) -> bool:
    return (t.is_contiguous() and p.is_contiguous()) or t.stride() == p.stride()


def is_dense(t: Tensor) -> bool:
    """Whether the elements of t fill a piece of memory, in any order of the dims."""
    if t.is_contiguous():
        return True
    expected = 1
    for stride, size in sorted(zip(t.stride(), t.shape, strict=True)):
        if size != 1 and stride != expected:
            return False
        expected *= size
    return True
