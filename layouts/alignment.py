"""Dims padded to a multiple, so that matrix products run on aligned rows and whole tiles.

    vocabulary   of a head, and of the embedding that shares its weight: logits of the padded width are computed, and
                 returned as a view of the width that the model has. No loss sees the others, whatever it is. (A bias
                 of −inf would need a bias, and spoil label smoothing and z-losses.)
    hidden       the width inside an MLP, f in  down(act(up(x))):  zero rows of ``up``, zero columns of ``down``.
    head_dim     of attention: q, k, v and the rotary tables get zeros behind each half of a head, the output projection
                 zero columns.

Zeros stay zeros in training: their gradients are zero, and an element-wise optimizer leaves them there.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from .padding import ATTRIBUTE, Padded, Padding, pad_parameters, padded_modules, restore, zeros_stay

#: What attention calls its layers in transformers.
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")


@dataclass(frozen=True)
class PaddingRecord:
    """One dim: the modules that share it, how it was, how it is now, and why."""

    paths: tuple[str, ...]
    kind: str  #: "vocabulary", "hidden" or "head_dim"
    size: int
    padded: int  #: the same as ``size`` if it was left
    reason: str = ""


class PaddingReport(list[PaddingRecord]):
    """A record for each dim that was found; printing it gives a line for each."""

    def __str__(self) -> str:
        lines = []
        for record in self:
            change = f"{record.size} → {record.padded}" if record.padded != record.size else f"{record.size}, left"
            reason = f": {record.reason}" if record.reason else ""
            lines.append(f"{record.kind:12}{', '.join(record.paths)}  {change}{reason}")
        return "\n".join(lines)


def pad_to_multiple(
    model: nn.Module, *, vocabulary: int | None = 64, hidden: int | None = None, head_dim: int | None = None
) -> PaddingReport:
    """Pad dims of the parameters of a model, in place, to multiples of these; None leaves a kind of dim alone.

    Parameters stay the same objects, tied ones stay tied, and ``state_dict`` shows them as they were; checkpoints of
    either form load. Outputs and gradients stay what they were but for the order of sums: ``hidden`` and ``head_dim``
    are changed only where a float64 copy of the module gives the same output and leaves zeros at zero. A model that is
    padded already is padded anew from its own sizes.

    Call it before the model is sharded or compiled and before its optimizer is made: the optimizer's state has the
    padded shapes. Optimizers that mix the entries of a matrix (Muon, Adafactor) see the zeros too.

    Raises:
        ValueError: for a multiple below 1.
    """
    for name, multiple in (("vocabulary", vocabulary), ("hidden", hidden), ("head_dim", head_dim)):
        if multiple is not None and multiple < 1:
            raise ValueError(
                f"pad_to_multiple: {name} must be at least 1, got {multiple}; None leaves these dims alone"
            )
    unpad(model)
    report = PaddingReport()
    if vocabulary is not None:
        report += _pad_vocabulary(model, vocabulary)
    if hidden is not None:
        report += _pad_hidden(model, hidden)
    if head_dim is not None:
        report += _pad_heads(model, head_dim)
    return report


def unpad(model: nn.Module) -> None:
    """Undo :func:`pad_to_multiple`: parameters and gradients have their shapes again, and their values to the bit."""
    restore(model)


def _round_up(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple


def _is_plain(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether it computes what torch's own module does, from a parameter that is a parameter."""
    return isinstance(module, kind) and type(module).forward is kind.forward and "weight" in module._parameters


def _users(model: nn.Module) -> dict[int, list[tuple[str, nn.Module]]]:
    """The modules that own each parameter, by its id."""
    users: dict[int, list[tuple[str, nn.Module]]] = {}
    for path, module in model.named_modules():
        for parameter in module.parameters(recurse=False):
            users.setdefault(id(parameter), []).append((path, module))
    return users


# ------------------------------------------------------------------ vocabulary


def _pad_vocabulary(model: nn.Module, multiple: int) -> Iterator[PaddingRecord]:
    users = _users(model)
    sizes = {module.num_embeddings for module in model.modules() if isinstance(module, nn.Embedding)}
    seen: set[int] = set()
    for path, head in model.named_modules():
        if not isinstance(head, nn.Linear) or head.out_features not in sizes or id(head.weight) in seen:
            continue
        size, padded = head.out_features, _round_up(head.out_features, multiple)
        sharing = users.get(id(head.weight), [(path, head)])
        seen.add(id(head.weight))
        paths = tuple(path for path, _ in sharing)
        strange = [m for _, m in sharing if not (_is_plain(m, nn.Linear) or _is_plain(m, nn.Embedding))]
        if strange:
            yield PaddingRecord(
                paths, "vocabulary", size, size, f"{type(strange[0]).__name__} has a forward of its own"
            )
        elif padded == size:
            yield PaddingRecord(paths, "vocabulary", size, size, "a multiple already")
        else:
            done: set[int] = set()
            for _, module in sharing:
                _pad_rows(module, Padding(0, size, padded), done)
            yield PaddingRecord(paths, "vocabulary", size, padded)


def _pad_rows(module: nn.Module, padding: Padding, done: set[int]) -> None:
    """Pad the rows of an embedding or a head, and hide it."""
    names = [name for name in ("weight", "bias") if module._parameters.get(name) is not None]
    padded = pad_parameters(module, dict.fromkeys(names, padding), done)
    if isinstance(module, nn.Embedding):
        padded.handles.append(module.register_forward_pre_hook(_check_ids, prepend=True, with_kwargs=True))
    else:
        padded.handles.append(module.register_forward_hook(_narrow_output, prepend=True))


def _narrow_output(head: nn.Module, inputs: Any, output: Tensor) -> Tensor:
    return output.narrow(-1, 0, head.__dict__[ATTRIBUTE].paddings["weight"].size)


def _check_ids(embedding: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """An id beyond the vocabulary is an error still, though there is a row of zeros for it."""
    ids = args[0] if args else kwargs["input"]
    size = embedding.__dict__[ATTRIBUTE].paddings["weight"].size
    torch._assert_async((ids < size).all(), f"embedding: token ids must be below the size of the vocabulary, {size}")


# ------------------------------------------------------------------ the width inside an MLP


def _pad_hidden(model: nn.Module, multiple: int) -> Iterator[PaddingRecord]:
    users = _users(model)
    for path, module in list(model.named_modules()):
        linears = {name: child for name, child in module.named_children() if isinstance(child, nn.Linear)}
        for down, ups in _mlps(linears):
            layers = [linears[name] for name in (*ups, down)]
            size = layers[-1].in_features
            padded = _round_up(size, multiple)
            if padded == size:
                continue
            x = torch.randn(2, 3, layers[0].in_features, dtype=torch.float64, generator=torch.Generator())
            pad = partial(_pad_mlp, ups=ups, down=down, size=size, padded=padded)
            reason = _unsuitable(layers, users) or _refusal(module, pad, x)
            if reason is None:
                pad(module)
            paths = tuple(f"{path}.{name}".lstrip(".") for name in (*ups, down))
            yield PaddingRecord(paths, "hidden", size, size if reason else padded, reason or "")


def _pad_mlp(module: nn.Module, ups: list[str], down: str, size: int, padded: int) -> None:
    for name in ups:
        _pad_linear(module.get_submodule(name), Padding(0, size, padded))
    _pad_linear(module.get_submodule(down), Padding(1, size, padded))


def _mlps(linears: dict[str, nn.Linear]) -> Iterator[tuple[str, list[str]]]:
    """(down, ups) among the layers of one module: the only one that takes a width, narrows it, and all that give it."""
    for down, layer in linears.items():
        takers = [name for name, other in linears.items() if other.in_features == layer.in_features]
        ups = [name for name, other in linears.items() if other.out_features == layer.in_features]
        if takers == [down] and ups and layer.in_features > layer.out_features:
            yield down, ups


def _pad_linear(layer: nn.Module, padding: Padding) -> None:
    names = ["weight"]
    if padding.dim == 0 and layer._parameters.get("bias") is not None:
        names.append("bias")
    pad_parameters(layer, dict.fromkeys(names, padding), set())


def _unsuitable(layers: list[Any], users: dict[int, list[tuple[str, nn.Module]]]) -> str | None:
    """Why the parameters of layers cannot be padded together."""
    for layer in layers:
        if not _is_plain(layer, nn.Linear):
            return f"{type(layer).__name__} is no plain nn.Linear"
        if ATTRIBUTE in layer.__dict__:
            return "a layer of it is padded already, for another dim"
        if any(len(users[id(p)]) > 1 for p in layer.parameters()):
            return "a parameter of it is shared with another module"
    return None


# ------------------------------------------------------------------ head dims


def _pad_heads(model: nn.Module, multiple: int) -> Iterator[PaddingRecord]:
    users = _users(model)
    for path, module in list(model.named_modules()):
        size = getattr(module, "head_dim", None)
        layers = [getattr(module, name, None) for name in PROJECTIONS]
        if not isinstance(size, int) or not all(isinstance(layer, nn.Linear) for layer in layers):
            continue
        padded = _round_up(size, multiple)
        if padded == size:
            continue
        draw = partial(torch.randn, dtype=torch.float64, generator=torch.Generator())
        x, half = draw(2, 3, layers[0].in_features), draw(2, 2, 3, size // 2)  # type: ignore[union-attr]
        tables = tuple(torch.cat((half, half), -1).unbind())
        odd = "it has no halves to pad" if size % 2 or padded % 2 else None
        pad = partial(_pad_attention, size=size, padded=padded)
        reason = odd or _unsuitable(layers, users)
        reason = reason or _refusal(module, pad, x, position_embeddings=tables, attention_mask=None)
        if reason is None:
            pad(module)
        yield PaddingRecord((path,), "head_dim", size, size if reason else padded, reason or "")


def _pad_attention(module: Any, size: int, padded: int) -> None:
    for name in PROJECTIONS:
        layer = getattr(module, name)
        dim = int(name == "o_proj")
        entries = layer.weight.shape[dim]
        heads = entries // size
        _pad_linear(layer, Padding(dim, entries, heads * padded, 2 * heads))
    own = Padded()
    own.attributes["head_dim"] = size
    own.handles.append(module.register_forward_pre_hook(_pad_tables, prepend=True, with_kwargs=True))
    module.__dict__[ATTRIBUTE] = own
    module.head_dim = padded


def _pad_tables(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
    """Give the rotary tables the width of the heads."""
    tables = kwargs.get("position_embeddings")
    if tables is not None:
        size, padded = module.__dict__[ATTRIBUTE].attributes["head_dim"], module.head_dim
        kwargs = {**kwargs, "position_embeddings": tuple(Padding(t.dim() - 1, size, padded, 2).pad(t) for t in tables)}
    return args, kwargs


# ------------------------------------------------------------------ trying it on a copy


def _refusal(module: nn.Module, pad: Callable[[nn.Module], None], *args: Tensor, **kwargs: Any) -> str | None:
    """Why padding would change what the module computes, found on a float64 copy; None if it would not."""
    trial = copy.deepcopy(module).double().cpu().eval().requires_grad_()
    with torch.enable_grad():
        try:
            plain = _outputs(trial, args, kwargs)
        except Exception as error:
            return f"it could not be tried: {type(error).__name__}"
        pad(trial)
        try:
            changed = _outputs(trial, args, kwargs)
        except Exception as error:
            return f"padded, it fails: {type(error).__name__}"
        # Sums in another order differ by some n·2⁻⁵³, about 1e-12; one more entry in a mean by 1/n, about 1e-4.
        for before, after in zip(plain, changed, strict=True):
            if before.shape != after.shape or (before - after).abs().max() > 1e-8 * before.abs().max():
                return "padded, it computes something else"
        torch.autograd.backward(changed, [y.detach().cos() for y in changed])  # any gradient serves
    if not plain or not all(zeros_stay(m) for m, _ in padded_modules(trial)):
        return "padded, its zeros would be trained"
    return None


def _outputs(module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Any]) -> list[Tensor]:
    outputs = pytree.tree_leaves(module(*args, **kwargs))
    return [y for y in outputs if isinstance(y, Tensor) and y.requires_grad]
