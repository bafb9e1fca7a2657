"""A normalization folded into the layer beside it: what becomes of the two modules, and back.

    layer, then norm:   y = s·(W x + b) + t = (s·W) x + (s·b + t)
    norm, then layer:   y = W (s·x + t) + b = (W·s) x + (W t + b)       s = weight / √(var + ε),  t = bias − mean·s

Both modules keep their parameters and buffers, and with them the ``state_dict``; only their classes change. The layer
runs a stand-in of its own class that holds the folded weight and bias; the norm hands on what it gets. Folded numbers
follow what they come from: a parameter that was replaced, or changed in place by an operation that autograd counts, and
a ``load_state_dict`` make them anew. ``train()`` undoes the fold.
"""

from __future__ import annotations

import copyreg
import math
import types
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from .sample import Refused


class Fold:
    """Two neighbours that are folded: which, in which order, and the stand-in of the layer."""

    def __init__(self, layer: nn.Module, norm: nn.Module, norm_first: bool) -> None:
        self.layer, self.norm, self.norm_first = layer, norm, norm_first
        self.stand_in = _stand_in(layer)
        self.seen: list[tuple[Any, int]] = []
        self.refresh()

    def sources(self) -> list[Tensor]:
        """What the folded numbers follow from."""
        tensors = [t for m in (self.layer, self.norm) for t in (*_own(m._parameters), *_own(m._buffers))]
        return [t for t in tensors if t.is_floating_point()]

    def refresh(self) -> None:
        """Make the folded numbers anew if what they come from is not what it was."""
        found: list[tuple[Any, int]] = [(t, 0 if t.is_inference() else t._version) for t in self.sources()]
        found.append((self.norm.eps, 0))
        same = len(found) == len(self.seen) and all(
            t is before and version == known for (t, version), (before, known) in zip(found, self.seen, strict=True)
        )
        if not same:
            self._make()
            self.seen = found

    def reload(self) -> None:
        """Make the folded numbers anew while a ``state_dict`` is loaded, of which half may be there.

        What cannot be folded becomes NaN, for code that was compiled and does not refresh.
        """
        self.seen = []
        try:
            self._make()
        except Refused:
            for parameter in self.stand_in.parameters():
                parameter.data = torch.full_like(parameter, torch.nan)

    def _make(self) -> None:
        with torch.inference_mode(False), torch.no_grad():
            for name, value in self.numbers().items():
                self.stand_in._parameters[name] = nn.Parameter(value, requires_grad=False)

    def numbers(self) -> dict[str, Tensor]:
        """The folded weight and bias, computed in float64; gradients flow through.

        Raises:
            Refused: if there is a shift before a convolution that pads with zeros.
        """
        layer: Any = self.layer
        weight = layer.weight.double()
        bias = None if layer.bias is None else layer.bias.double()
        scale, shift = affine(self.norm)
        if not self.norm_first:
            folded = weight * _along_outputs(layer, scale)
            bias = shift if bias is None else bias * scale + shift
        else:
            if pads_zeros(layer) and bool((shift != 0).any()):
                raise Refused("the layer behind it pads with zeros, and the norm would shift them")
            groups = getattr(layer, "groups", 1)
            blocks = weight.unflatten(0, (groups, -1))
            shape = (groups, 1, -1, *(1,) * (weight.dim() - 2))
            folded = (blocks * scale.view(shape)).flatten(0, 1)
            moved = (blocks * shift.view(shape)).flatten(2).sum(2).flatten()
            bias = moved if bias is None else bias + moved
        return {"weight": folded.to(layer.weight.dtype), "bias": bias.to(layer.weight.dtype)}

    def run(self, *args: Any, **kwargs: Any) -> Any:
        """What the layer returns."""
        if not torch.compiler.is_compiling():
            try:
                self.refresh()
            except Refused as refused:
                raise RuntimeError(f"fold: {refused}; its parameters have changed: call unfold(model)") from refused
        if torch.is_grad_enabled() and any(t.requires_grad for t in self.sources()):
            # A gradient may be wanted of what was folded: fold as part of the computation.
            return torch.func.functional_call(self.stand_in, self.numbers(), args, kwargs)
        return self.stand_in.forward(*args, **kwargs)

    def holds(self, x: Any) -> bool:
        """Whether the fold is the same for x, which both see: BatchNorm1d and Linear agree on rows alone."""
        return not isinstance(self.layer, nn.Linear) or x.dim() == 2

    def apply(self) -> None:
        """Fold; if a class cannot be changed, nothing is."""
        try:
            for module, mixin in ((self.layer, FoldedLayer), (self.norm, FoldedNorm)):
                module.__class__ = folded_class(mixin, type(module))
                vars(module)["_braze_fold"] = self
        except BaseException:
            self.undo()
            raise

    def check(self) -> None:
        """Whether the fold can be undone.

        Raises:
            RuntimeError: if a class has been changed again since.
        """
        for module in (self.layer, self.norm):
            if "_braze_original" not in vars(type(module)):
                raise RuntimeError(
                    f"unfold: the class of a folded {type(module).__name__} must be the one that fold gave it, but was "
                    "changed since; undo that change first"
                )

    def undo(self) -> None:
        """Give both their classes back."""
        for module in (self.layer, self.norm):
            if vars(module).pop("_braze_fold", None) is not None:
                module.__class__ = vars(type(module))["_braze_original"]


class FoldedLayer(nn.Module):
    """Mixed into the class of the layer."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The layer and the norm at once."""
        fold = _ready(self)
        x = next(iter((*args, *kwargs.values())))
        return fold.run(*args, **kwargs) if fold.holds(x) else super().forward(*args, **kwargs)

    def train(self, mode: bool = True) -> Any:
        """In training the norm is none that could be folded."""
        return _train(self, mode, super().train)

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Any:
        super()._apply(fn, recurse)
        vars(self)["_braze_fold"].stand_in._apply(fn)
        return self

    def _load_from_state_dict(self, *args: Any) -> None:
        super()._load_from_state_dict(*args)
        vars(self)["_braze_fold"].reload()

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _reduced(self, FoldedLayer, super().__reduce_ex__(max(int(protocol), 2)))


class FoldedNorm(nn.Module):
    """Mixed into the class of the norm."""

    def forward(self, input: Any) -> Any:
        """What it gets, through its children: an activation, perhaps."""
        fold = _ready(self)
        if not fold.holds(input):
            return super().forward(input)
        if isinstance(self, nn.modules.batchnorm._BatchNorm):
            self._check_input_dim(input)
        for child in self.children():
            input = child(input)
        return input

    def train(self, mode: bool = True) -> Any:
        """As of the layer."""
        return _train(self, mode, super().train)

    def _load_from_state_dict(self, *args: Any) -> None:
        super()._load_from_state_dict(*args)
        vars(self)["_braze_fold"].reload()

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _reduced(self, FoldedNorm, super().__reduce_ex__(max(int(protocol), 2)))


_made: dict[tuple[type, type], type] = {}


def folded_class(mixin: type, original: type) -> type:
    """The subclass of ``original`` for a folded module; the same one each time."""
    if (mixin, original) in _made:
        return _made[mixin, original]
    names = {name: getattr(original, name) for name in ("__module__", "__qualname__", "__doc__")}
    folded = types.new_class(
        original.__name__, (mixin, original), exec_body=lambda space: space.update(names, _braze_original=original)
    )
    return _made.setdefault((mixin, original), folded)


def fold_of(module: nn.Module) -> Fold | None:
    """The fold that ``module`` is part of."""
    return vars(module).get("_braze_fold")


def affine(norm: Any) -> tuple[Tensor, Tensor]:
    """Scale and shift of a normalization by running statistics, in float64."""
    scale = torch.rsqrt(norm.running_var.double() + norm.eps)
    if norm.weight is not None:
        scale = scale * norm.weight.double()
    shift = -norm.running_mean.double() * scale
    return scale, shift if norm.bias is None else shift + norm.bias.double()


def pads_zeros(layer: Any) -> bool:
    """Whether it reads zeros beside what it is given."""
    padding = getattr(layer, "padding", 0)
    sizes = (padding,) if isinstance(padding, (int, str)) else padding
    return getattr(layer, "padding_mode", "zeros") == "zeros" and any(size not in (0, "valid") for size in sizes)


def _along_outputs(layer: Any, scale: Tensor) -> Tensor:
    """The scale of each output channel, to multiply the weight by."""
    weight = layer.weight
    if not isinstance(layer, _ConvTransposeNd):
        return scale.view(-1, *(1,) * (weight.dim() - 1))
    # [in, out/groups, …]: the inputs of a group are neighbours.
    rows = scale.view(layer.groups, 1, -1).expand(-1, weight.shape[0] // layer.groups, -1).flatten(0, 1)
    return rows.view(*rows.shape, *(1,) * (weight.dim() - 2))


def _stand_in(layer: nn.Module) -> nn.Module:
    """A module of the same class and attributes, with no parameters yet."""
    stand_in: nn.Module = object.__new__(type(layer))
    stand_in.__dict__.update(vars(layer), _parameters={"weight": None, "bias": None}, _buffers={}, training=False)
    return stand_in


def _own(tensors: Any) -> list[Tensor]:
    return [t for t in tensors.values() if t is not None]


def _ready(module: nn.Module) -> Fold:
    if module.training:
        raise RuntimeError(
            f"fold: a folded {type(module).__name__} must be in evaluation, but its training flag was set; call "
            "train(), which unfolds, or unfold(model)"
        )
    fold: Fold = vars(module)["_braze_fold"]
    return fold


def _train(module: nn.Module, mode: bool, own: Callable[[bool], Any]) -> Any:
    if not mode:
        return own(mode)
    fold: Fold = vars(module)["_braze_fold"]
    fold.check()
    fold.undo()
    return module.train(mode)


def _reduced(module: nn.Module, mixin: type, own: Any) -> Any:
    make, arguments, *rest = own
    if make is copyreg.__newobj__ and arguments == (type(module),):  # type: ignore[attr-defined]
        return (_rebuild, (mixin, vars(type(module))["_braze_original"]), *rest)
    return own


def _rebuild(mixin: type, original: type) -> Any:
    return object.__new__(folded_class(mixin, original))


def sample_input(layer: Any, generator: torch.Generator) -> Tensor:
    """A batch that the layer takes, a step larger than its kernel; float64."""
    if isinstance(layer, nn.Linear):
        return torch.randn(4, layer.in_features, generator=generator, dtype=torch.float64)
    assert isinstance(layer, _ConvNd)
    sizes = [d * (k - 1) + 2 for d, k in zip(layer.dilation, layer.kernel_size, strict=True)]
    shape = (2, layer.in_channels, *sizes)
    return torch.randn(shape, generator=generator, dtype=torch.float64) + 1 / math.e
