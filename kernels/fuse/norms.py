"""RMSNorm and LayerNorm, of any class: one input, no children, at most two parameters [D].

    y = (x − μ) / √(mean((x − μ)²) + ε) · (weight + offset) + bias        μ = 0 for RMSNorm

Which parameter is which, and whether there is a mean or an offset, follow from the output for a large input, where ε
vanishes; ε follows from the output for a tiny one, where it dominates.
"""

from __future__ import annotations

import copy
import functools
import textwrap
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..ops.layer_norm import layer_norm
from ..ops.layer_norm_2d import layer_norm_2d
from ..ops.rms_norm import rms_norm
from .joint import Joint, fusion, own_forward, takes
from .sample import Draw, Exactly, Refused, Sample, kind
from .savings import ELEMENT, Measure
from .sites import Known

#: Width of the sample of a norm that has no parameter to tell its width.
ANY_WIDTH = 48


@dataclass(frozen=True)
class Norm(Joint):
    """A row norm: what it centres, scales and adds, by attribute name; ``eps`` is an attribute's name or a number.

    ``permutes``: of images, it gives ``torch.channels_last``, whatever comes. Layers behind it work in that format.
    """

    hint: ClassVar[str] = "norm"
    common: ClassVar[bool] = True
    center: bool
    weight: str | None
    bias: str | None
    weight_offset: float
    eps: str | float
    promotes: bool
    narrows: bool
    channels_first: bool = False
    permutes: bool = False

    @property
    def operator(self) -> str:  # type: ignore[override]
        """The name of the fused operator."""
        if self.channels_first:
            return "layer_norm_2d"
        return "layer_norm" if self.center else "rms_norm"

    @classmethod
    def suits(cls, module: nn.Module) -> bool:
        """No children, no buffers, and one width for all parameters; without parameters, an ε or None for one."""
        if isinstance(module, nn.GroupNorm):
            return False
        children = (name for name, _ in module.named_children() if name != "parametrizations")
        if any(True for _ in children) or any(True for _ in module.buffers()):
            return False
        shapes = [tuple(p.shape) for p in module.parameters()]
        if not shapes:
            return bool(_small_numbers(module)) or hasattr(module, "normalized_shape")
        rows = len(shapes[0]) == 1 or hasattr(module, "normalized_shape")
        return rows and len(shapes) <= 2 and len(set(shapes)) == 1 and shapes[0] not in ((0,), (1,))

    @classmethod
    def recognise(cls, sample: Sample) -> Norm | None:
        """Probe the sample with a large and a tiny input."""
        module, parameters = sample.module, dict[str, Tensor](sample.module.named_parameters())
        if any(p.dim() != 1 for p in parameters.values()):
            raise Refused("it normalizes over more than the last dim")
        try:
            return cls._recognised(sample, channels_first=False)
        except Refused:
            if len(parameters) == 0 or _of_image(module) is None:
                raise
            return cls._recognised(sample, channels_first=True)

    @classmethod
    def _recognised(cls, sample: Sample, channels_first: bool) -> Norm | None:
        module, parameters = sample.module, dict[str, Tensor](sample.module.named_parameters())
        probe = functools.partial(_probe_images if channels_first else _probe, module)
        large = 1e3 * (sample.randn(2, 3, _width(sample)) + 0.7)
        y = probe(large)
        for center in (False, True):
            normalized = _normalize(large, center)
            for weight, offset, bias in _affine_forms(parameters):
                if not (center and offset) and _close(y, _affine(normalized, parameters, weight, offset, bias)):
                    if channels_first and not center:
                        raise Refused("there is no fused operator for a root mean square over channels")
                    eps = _find_eps(sample, probe, center, weight, offset, bias)
                    mixes = weight is not None and not channels_first
                    promotes = mixes and _result(module, torch.bfloat16, torch.float32) == torch.float32
                    narrows = mixes and _result(module, torch.float32, torch.bfloat16) == torch.bfloat16
                    permutes = channels_first and _permutes(module)
                    return cls(center, weight, bias, offset, eps, promotes, narrows, channels_first, permutes)
        return None

    def members(self, original: type) -> dict[str, Any]:
        """A forward that runs the fused operator, and the original's own for all that the operator does not take."""
        own = original.forward  # type: ignore[attr-defined]
        center, weight_name, bias_name, offset = self.center, self.weight, self.bias, self.weight_offset
        eps_name, eps_value = (self.eps, None) if isinstance(self.eps, str) else (None, self.eps)
        promotes, narrows, channels_first, permutes = self.promotes, self.narrows, self.channels_first, self.permutes

        @functools.wraps(own)
        def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
            if len(args) != 1 or kwargs or not takes(args[0]):
                return own(self, *args, **kwargs)
            x: Tensor = args[0]
            weight: Tensor | None = None if weight_name is None else getattr(self, weight_name)
            bias = None if bias_name is None else getattr(self, bias_name)
            eps: Any = eps_value if eps_name is None else getattr(self, eps_name)
            if channels_first:
                if x.dim() != 4 or weight is None or weight.shape != x.shape[1:2]:
                    return own(self, x)
                if permutes:
                    x = x.contiguous(memory_format=torch.channels_last)
                return layer_norm_2d(x, weight, bias, eps=eps)
            if weight is not None and weight.shape != x.shape[-1:]:
                return own(self, x)
            if promotes and weight is not None and weight.dtype != x.dtype:
                x = x.to(torch.promote_types(x.dtype, weight.dtype))
            y = layer_norm(x, weight, bias, eps=eps) if center else rms_norm(x, weight, eps=eps, weight_offset=offset)
            return y.to(weight.dtype) if narrows and weight is not None and weight.itemsize < y.itemsize else y

        return {"forward": forward}

    def draws(self, sample: Sample) -> list[Draw]:
        """Other means, other scales (one about √ε), and rows with an outlier."""
        width = _width(sample)
        noise = functools.partial(sample.randn, 3, 8, width)
        spike = noise()
        spike[..., 0] = 50.0
        if self.channels_first:
            rows = [noise(), 0.5 * noise() + 3.0, 1e-3 * noise(), 3e3 * noise(), spike]
            labels = ("an ordinary", "a shifted", "a tiny", "a large", "a spiky")
            images = [r.unflatten(1, (2, 4)).movedim(-1, 1) for r in rows]
            return [Draw(label, (image,)) for label, image in zip(labels, images, strict=True)]
        return [
            Draw("an ordinary", (noise(),)),
            Draw("a shifted", (0.5 * noise() + 3.0,)),
            Draw("a tiny", (1e-3 * noise(),)),
            Draw("a large", (3e3 * noise(),)),
            Draw("a spiky", (spike,)),
            Draw("a two-dimensional", (noise()[0],)),
        ]

    def measure(self, module: nn.Module) -> Measure:
        """A row; its width is that of the parameters."""
        shapes: list[Any] = [p.shape for p in module.parameters()] or [getattr(module, "normalized_shape", ())]
        return Measure("pixel" if self.channels_first else "token", shapes[0][-1]) if shapes[0] else ELEMENT

    def exact(self, original: nn.Module) -> nn.Module:
        """``eps=None`` means the machine epsilon of float32, which the float64 copy would take its own for."""
        if isinstance(self.eps, str) and getattr(original, self.eps) is None:
            setattr(original, self.eps, torch.finfo(torch.float32).eps)
        return original


def _width(sample: Sample) -> int:
    for parameter in sample.module.parameters():
        return parameter.shape[0]
    shape = getattr(sample.module, "normalized_shape", None)
    return int(shape[-1]) if shape else ANY_WIDTH


def _probe(module: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad(), Exactly():
        try:
            y = own_forward(module)(module, x.clone())
        except Exception as error:
            raise Refused(f"it does not take rows of {x.shape[-1]} features: {_summary(error)}") from error
    if not isinstance(y, Tensor) or y.shape != x.shape or not y.is_floating_point():
        raise Refused("it does not return a tensor like its input")
    return y.double()


def _of_image(module: nn.Module) -> Tensor | None:
    """What the module makes of an image; None if it does not take any."""
    image = torch.zeros(1, next(module.parameters()).shape[0], 2, 3, dtype=torch.float64)
    try:
        y = own_forward(module)(module, image)
    except Exception:
        return None
    return y if y.shape == image.shape else None


def _permutes(module: nn.Module) -> bool:
    y = _of_image(module)
    return y is not None and y.is_contiguous(memory_format=torch.channels_last)


def _probe_images(module: nn.Module, rows: Tensor) -> Tensor:
    """As :func:`_probe`, with the rows as the channels of pixels."""
    return _probe(module, rows.unsqueeze(0).movedim(-1, 1)).movedim(1, -1).squeeze(0)


def _summary(error: Exception) -> str:
    return textwrap.shorten(str(error), 80) or type(error).__name__


def _normalize(x: Tensor, center: bool) -> Tensor:
    h = x - x.mean(-1, keepdim=True) if center else x
    return h * h.square().mean(-1, keepdim=True).rsqrt()


def _affine_forms(parameters: dict[str, Tensor]) -> Iterator[tuple[str | None, float, str | None]]:
    """(weight, offset, bias): every use of all the parameters."""
    names = list(parameters)
    if not names:
        yield None, 0.0, None
    elif len(names) == 1:
        yield names[0], 0.0, None
        yield names[0], 1.0, None
    else:
        yield names[0], 0.0, names[1]
        yield names[1], 0.0, names[0]


def _affine(
    normalized: Tensor, parameters: dict[str, Tensor], weight: str | None, offset: float, bias: str | None
) -> Tensor:
    scaled = normalized if weight is None else normalized * (parameters[weight] + offset)
    return scaled if bias is None else scaled + parameters[bias]


def _close(y: Tensor, expected: Tensor) -> bool:
    return bool((y - expected).abs().max() <= 1e-6 * expected.abs().max())


def _find_eps(
    sample: Sample, probe: Callable[[Tensor], Tensor], center: bool, weight: str | None, offset: float, bias: str | None
) -> str | float:
    """The attribute that holds ε, or else its value."""
    parameters = dict[str, Tensor](sample.module.named_parameters())
    tiny = 1e-5 * sample.randn(2, 3, _width(sample))
    y = probe(tiny)
    h = tiny - tiny.mean(-1, keepdim=True) if center else tiny
    scaled = y if bias is None else y - parameters[bias]
    unscaled = scaled if weight is None else scaled / (parameters[weight] + offset)
    row, out = h[0, 0], unscaled[0, 0]
    eps = ((row.norm() / out.norm()) ** 2 - row.square().mean()).item()
    for name, value in _small_numbers(sample.module):
        stands_for = torch.finfo(torch.float64).eps if value is None else value
        if abs(eps - stands_for) <= 1e-4 * abs(stands_for) + 1e-18:
            return name
    return max(float(f"{eps:.6g}"), 0.0)


def _small_numbers(module: nn.Module) -> list[tuple[str, float | None]]:
    """Attributes that could be an ε. None stands for the dtype's own, as in torch.nn.RMSNorm."""
    public = ((name, value) for name, value in vars(module).items() if name[:1] != "_")
    return [
        (name, value)
        for name, value in public
        if (isinstance(value, float) and 0.0 < value < 0.1) or (value is None and "eps" in name)
    ]


def _result(module: nn.Module, inputs: torch.dtype, parameters: torch.dtype) -> torch.dtype | None:
    """The dtype of the result where those of input and parameters differ; None if it does not take that."""
    mixed = copy.deepcopy(module).to(parameters)
    weight = next(mixed.parameters())
    try:
        y = own_forward(mixed)(mixed, torch.ones(1, 2, weight.shape[0], dtype=inputs, device=weight.device))
    except Exception:
        return None
    return y.dtype if isinstance(y, Tensor) else None


# ---- Norms beside others in the source of a forward.


def original_type(norm: Any) -> type[nn.Module]:
    """The class of a norm, before it was fused."""
    made = fusion(norm)
    return type(norm) if made is None else made.original


def recognised(norm: nn.Module, known: Known) -> Norm | None:
    """The row norm that the module is, fused already or not."""
    made = fusion(norm)
    if made is not None:
        return made.joint if isinstance(made.joint, Norm) else None
    found: Norm | None = known.once((Norm, kind(norm)), lambda: _probed(norm)) if Norm.suits(norm) else None
    return found


def _probed(norm: nn.Module) -> Norm | None:
    try:
        return Norm.recognise(Sample(norm, norm, {}))
    except Refused:
        return None
