"""An independent count of the joints of a model: by class names and by what the source of a forward says.

It shares no code with ``fuse``, which goes by structure and numbers; so each can find what the other misses.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import itertools
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

from torch import nn


class Expected(NamedTuple):
    """A joint that the count expects at the module of this path."""

    kind: str
    path: str
    was: str


_NORM = re.compile(r"(rms|layer|simple|qk|ada)?_?norm(2d|1d|3d|nogain|fp32|withbias)?$|layernorm|rmsnorm|^norm")
_NO_NORM = re.compile(r"batch|group|instance|response|weight|spectral|gated|norm_?act|l2|^nonorm")
_ACTIVATION = (
    r"(?:self\.\w*(?:act|gelu|silu|swish)\w*|ACT2FN\[[^\]]*\]|(?:F|nn\.functional|torch)\.(?:silu|gelu|relu|sigmoid))"
)
_GATED = re.compile(rf"{_ACTIVATION}\((?:[^()]|\((?:[^()]|\([^()]*\))*\))*\)\s*\*(?!\*)|[\w)\]]\s*\*\s*{_ACTIVATION}\(")
_PLAIN = re.compile(r"mlp|ffn|feed_?forward|denseactdense")
_ROTARY = re.compile(r"\b\w*(?:apply_rot|rotary_pos|apply_rope|rotary_emb)\w*\(\s*\w*(?:q|k|x|query|key)\w*\s*[,)]")

#: Residual sums: a summand that is a call of a module, or two nested ones; or that such a statement made just before.
_SUMS = (
    r"\+ self\.(\w+)\((?:self\.(\w+)\()?",
    r"(?:=|return) self\.(\w+)\((?:self\.(\w+)\()?[^\n]*\) \+ ",
    r"(?P<y>\w+) = self\.(\w+)\((?P=y)\)\n\s*(?:(?P=y) = |return )?(?:\w+ \+ (?P=y)|(?P=y) \+=? \w+)\n",
    r"(?P<y>\w+) = self\.(\w+)\((?P=y)\)\n\s*(?P=y) = self\.\w+\((?P=y) \+ \w+\)",
    r"(?P<y>\w+) = [\w.]*\bdropout\((?P=y), p=self\.(\w+)[^\n]*\n\s*(?P=y) = (?:\w+ \+ (?P=y)|(?P=y) \+ \w+)\n",
)
_MODULATED = re.compile(r"self\.\w*norm\w*\([\w.]*\) \* \(1 \+ \w|\bmodulate\(\s*self\.\w*norm")
_GATED_SUM = re.compile(r"\+ \w*gate\w*(?:\.unsqueeze\(1\)|\[:, None\])? \* ")


def expected_joints(model: nn.Module) -> list[Expected]:
    """Every joint by the names and the source of its module's class."""
    found = []
    for path, module in model.named_modules():
        found += [Expected(kind, path, type(module).__name__) for kind in _kinds(module)]
        found += [Expected(kind, _join(path, name), was) for kind, name, was in _in_sequence(module)]
    return found


def _kinds(module: nn.Module) -> Iterator[str]:
    name, source = type(module).__name__.lower(), _source(type(module))
    if _is_norm(module, name):
        yield "norm"
    linear = sum(hasattr(child, "in_features") for child in module.children())
    stacked = sum(p.dim() == 3 for p in module.parameters(recurse=False))
    if (linear >= 2 or stacked >= 2) and _GATED.search(source):
        yield "gated mlp"
    if linear == 2 and _PLAIN.search(name) and not _GATED.search(source):
        yield "plain mlp, offered"
    if _ROTARY.search(source):
        yield "rope"
    yield from _tails(module, source)
    if _MODULATED.search(source):
        yield "modulated norm"
    if _GATED_SUM.search(source):
        yield "gated sum"
    if isinstance(module, nn.modules.batchnorm._BatchNorm) and _own_activation(module):
        yield "batch norm and activation"
    if isinstance(module, nn.GroupNorm) and _own_activation(module):
        yield "group norm and activation"


def _tails(module: nn.Module, source: str) -> set[str]:
    """What the sums of a forward end with, as it is set: a factor of each channel, or a probability above 0."""
    guarded = re.findall(r"if self\.(\w+):\n[^\n]*\n\s+\w+ \+= \w+\n", source)
    if any(getattr(module, flag, None) is False for flag in guarded):
        return set()  # a block of another size, with no sum
    names = [name for one in _SUMS for match in re.finditer(one, source) for name in match.groups()]
    found = set()
    for step in (getattr(module, name, None) for name in names if name is not None):
        if type(step) is nn.Dropout or isinstance(step, float):
            rate: Any = getattr(step, "p", step)
            found |= {"dropout and sum"} if not getattr(step, "inplace", False) and rate > 0.0 else set()
        elif isinstance(step, nn.Module) and not any(True for _ in step.children()):
            vectors = [tuple(p.shape) for p in step.parameters()]
            if re.search("scale", type(step).__name__.lower()) and len(vectors) == 1 and len(vectors[0]) == 1:
                found.add("residual tail")
            if re.search("droppath|stochasticdepth", type(step).__name__.lower()):
                rate = next((getattr(step, name) for name in ("drop_prob", "p") if hasattr(step, name)), 0.0)
                found |= {"residual tail"} if rate > 0.0 else set()
    return found


def _is_norm(module: nn.Module, name: str) -> bool:
    if isinstance(module, (nn.LayerNorm, nn.RMSNorm)):
        return not _own_activation(module)
    leaf = not any(True for _ in module.children()) and not any(True for _ in module.buffers())
    return leaf and bool(_NORM.search(name)) and not _NO_NORM.search(name)


def _own_activation(module: nn.Module) -> bool:
    act = getattr(module, "act", None)
    return isinstance(act, nn.Module) and not isinstance(act, nn.Identity)


def _in_sequence(module: nn.Module) -> Iterator[tuple[str, str, str]]:
    """Norms that an activation follows: in an nn.Sequential, or by the words of a forward."""
    kinds = {nn.modules.batchnorm._BatchNorm: "batch norm and activation", nn.GroupNorm: "group norm and activation"}
    children = dict(module.named_children())
    follows: set[str] = set()
    if isinstance(module, nn.Sequential):
        follows = {a for (a, _), (_, act) in itertools.pairwise(children.items()) if _activation(act)}
    else:
        source = _source(type(module))
        for name in children:
            word = re.escape(f"self.{name}(")
            direct = rf"(?P<a>{_ACTIVATION})\(\s*{word}"
            behind = r"(?P<a>self\.\w*(?:relu|act|silu|gelu)\w*|F\.\w*(?:relu|silu|gelu)\w*)"
            then = rf"(\w+) = {word}[^\n]*\n\s*\1 = {behind}\(\1"
            acts = [match["a"].removeprefix("self.") for one in (direct, then) for match in re.finditer(one, source)]
            if any(type(children.get(act)) is not nn.Identity for act in acts):
                follows.add(name)
    for name in follows:
        for base, kind in kinds.items():
            if isinstance(children[name], base) and not _own_activation(children[name]):
                yield kind, name, type(children[name]).__name__


def _activation(module: nn.Module) -> bool:
    return type(module).__module__ == "torch.nn.modules.activation" and not isinstance(module, nn.MultiheadAttention)


def _source(cls: type) -> str:
    """Of the forward, and of what a class calls like it."""
    return _cached_source(cls)


@functools.cache
def _cached_source(cls: type) -> str:
    found: dict[str, str] = {}
    for base in cls.__mro__:
        for name, value in vars(base).items():
            if "forward" in name and name not in found and not base.__module__.startswith("torch.nn."):
                with contextlib.suppress(OSError, TypeError):
                    found[name] = inspect.getsource(inspect.unwrap(value))
    return "\n".join(found.values())


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name
