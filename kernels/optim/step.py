"""The step that all optimizers share: everything is checked, then everything of one kind is updated in one launch.

=============================  =====================================================================================
where                          what runs
=============================  =====================================================================================
inside ``torch.compile``       the step of the torch optimizer, if nothing surrounds it; else the graph breaks, and:
CUDA, ROCm, XPU parameters     Triton: one launch for all parameters of one dtype
CPU parameters                 PyTorch's own fused kernel, where it has one and the dtype is float32 or float64; else
                               a compiled form of the rule
anything else                  the rule in plain PyTorch
=============================  =====================================================================================
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypedDict, cast

import torch
from torch import Tensor

from . import quantization
from .bucket import Bucket, Kind, total_norm
from .gather import Gathered, gather
from .rule import Rule
from .run import Around, run

Params = Iterable[Tensor] | Iterable[dict[str, Any]] | Iterable[tuple[str, Tensor]]

ROUNDINGS = ("nearest", "stochastic", "kahan")


class Extras(TypedDict, total=False):
    """What :class:`FusedStep` takes beside the arguments of the torch optimizer."""

    max_norm: float | None
    ema_decay: float | None
    rounding: str
    state_dtype: torch.dtype | str | None
    clear_gradients: bool
    seed: int


_DEFAULTS: Extras = {
    "max_norm": None,
    "ema_decay": None,
    "rounding": "nearest",
    "state_dtype": None,
    "clear_gradients": False,
    "seed": 0,
}


class FusedStep(torch.optim.Optimizer):
    """An optimizer whose step is one pass over memory, with all that usually surrounds it in the same pass.

    The constructors of its subclasses take these keyword arguments beside those of the torch optimizer. They are not
    part of the parameter groups: a checkpoint of the torch optimizer resumes here, and the reverse. What they keep in
    the state (``ema``, ``compensation``) the torch optimizer ignores.

    ``p.grad`` may or may not hold the unscaled and clipped gradient after a step. GradScaler leaves the unscaling to
    the step, which a gradient that is not finite turns into none, without a wait for the device.

    Args:
        max_norm: the gradients are scaled down to this norm over all parameters and shards, if theirs is larger, as
            ``torch.nn.utils.clip_grad_norm_`` does; ``gradient_norm`` then holds their norm before.
        ema_decay: of a running average of the parameters, ``ema ← decay·ema + (1 − decay)·p``, in float32; it starts as
            the parameters before the first step. :meth:`averaged` puts it in their place.
        rounding: of bfloat16 parameters: "nearest"; "stochastic", which is right on average; or "kahan", which
            remembers what rounding took (2 more bytes for each element). With the last two, small steps add up.
        state_dtype: of the states; None is the parameter's own, or float32 where the rounding is not "nearest".
            "stochastic" rounds states in bfloat16 as it does the parameters. "8bit" keeps them in blocks of 256 codes
            with a scale (``quantization.py``), and those of parameters with less than 4,096 elements, or with gaps in
            memory, in float32; the rounding "stochastic" is theirs, too, whatever the parameter's dtype.
        clear_gradients: whether the step leaves zeros in the gradients.
        seed: of stochastic rounding, in [0, 2³¹). Equal seeds, gradients and steps round equally, on every device.

    Raises:
        ValueError: if an argument is out of its range.
        TypeError: from a step, before anything is changed, if a gradient is sparse or a parameter complex.
    """

    rule: Rule
    #: Whether there is a step of ``torch.optim`` behind this one, which Dynamo knows.
    traced_as_torch = False
    #: The norm of all gradients at the last step, if ``max_norm`` is given.
    gradient_norm: Tensor | None = None
    #: What the CUDA graphs that a step was captured in read again at every replay.
    captured: list[Any]
    #: What the last step found, for the next one.
    gathered: Gathered | None = None
    _step_supports_amp_scaling = True

    def _rule_of(self, p: Tensor, group: dict[str, Any]) -> Rule:
        """How p is updated."""
        return self.rule

    def _set_extras(self, differentiable: bool = False, **extras: Any) -> None:
        name = type(self).__name__
        unknown = extras.keys() - _DEFAULTS.keys()
        if unknown:
            known = ", ".join(_DEFAULTS)
            raise TypeError(f"{name}: no argument {', '.join(sorted(unknown))}; beside torch's own there are {known}")
        e = self._extras = cast(Extras, _DEFAULTS | extras)
        self.captured = []
        if differentiable:
            raise ValueError(
                f"{name}: differentiable must be False, a fused step has no gradient; use torch.optim.{name}"
            )
        if e["max_norm"] is not None and not e["max_norm"] > 0.0:
            raise ValueError(f"{name}: max_norm must be positive, got {e['max_norm']}; None is for no clipping")
        if e["ema_decay"] is not None and not 0.0 <= e["ema_decay"] < 1.0:
            raise ValueError(f"{name}: ema_decay must lie in [0, 1), got {e['ema_decay']}; None is for no average")
        if e["rounding"] not in ROUNDINGS:
            raise ValueError(f"{name}: rounding must be one of {', '.join(ROUNDINGS)}, got {e['rounding']!r}")
        if e["state_dtype"] not in (None, torch.float32, torch.bfloat16, "8bit"):
            raise ValueError(
                f"{name}: state_dtype must be torch.float32, torch.bfloat16 or '8bit', got {e['state_dtype']!r}"
            )
        if e["state_dtype"] == "8bit" and self.rule.direction is not None:
            raise ValueError(
                f"{name}: state_dtype='8bit' is for the states of SGD, Adam, AdamW and Lion; use torch.bfloat16"
            )
        if not 0 <= e["seed"] < 2**31:
            raise ValueError(f"{name}: seed must lie in [0, 2**31), got {e['seed']}")

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_extras": self._extras, "captured": [], "gathered": None}

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update every parameter that has a gradient.

        Args:
            closure: computes the loss, and the gradients with it.

        Returns:
            what the closure returned; None without one.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if torch.compiler.is_compiling() and self._extras == _DEFAULTS and self.traced_as_torch:
            super().step()
        else:
            self._fused_step()
        return loss

    @torch.compiler.disable
    def _fused_step(self) -> None:
        self._check()
        found_inf = getattr(self, "found_inf", None)
        if found_inf is not None and (found_inf.device.type == "cpu" or self._starts_undampened()) and found_inf:
            return
        buckets = gather(self)
        factor = self._factor(buckets)
        weight = 1.0 - (self._extras["ema_decay"] or 0.0)
        for kind, bucket in buckets.items():
            factor, found_inf = (
                None if t is None else t.to(kind.device, non_blocking=True) for t in (factor, found_inf)
            )
            run(self, kind, bucket, Around(factor, found_inf, weight, self._extras["seed"]))
            bucket.grads = []  # they are the model's, to be freed when it likes

    def _starts_undampened(self) -> bool:
        """Whether the next step differs from all others: with dampening, a momentum starts as the first gradient."""
        return not self.state and any(group.get("dampening") for group in self.param_groups)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As the torch optimizer's, but states keep a dtype that is not their parameter's.

        The next step puts states into the ``state_dtype``: those in 8 bits that a float32 optimizer loads, and the
        reverse. For ``torch.optim`` see :func:`braze.kernels.optim.dequantized`.

        Raises:
            ValueError: if a state in 8 bits was saved from other shards, whose blocks are others.
        """
        saved = state_dict["state"]
        ids = [i for group in state_dict["param_groups"] for i in group["params"]]
        params = [p for group in self.param_groups for p in group["params"]]
        for i, p in zip(ids, params, strict=False):
            quantization.check(type(self).__name__, p, saved.get(i, {}))
        super().load_state_dict(state_dict)
        for i, p in zip(ids, params, strict=True):
            for name, value in saved.get(i, {}).items():
                if isinstance(value, Tensor) and value.dtype != p.dtype and name != "step":
                    self.state[p][name] = value.to(p.device)

    @contextlib.contextmanager
    def averaged(self) -> Iterator[None]:
        """Put the running averages in the place of the parameters inside the ``with`` block.

        Raises:
            RuntimeError: if there is no ``ema_decay``.
        """
        if self._extras["ema_decay"] is None:
            raise RuntimeError(f"{type(self).__name__}: there is no running average; give the optimizer an ema_decay")
        params = [p for group in self.param_groups for p in group["params"] if "ema" in self.state[p]]
        own = [p.detach().clone() for p in params]
        with torch.no_grad():
            for p in params:
                p.copy_(self.state[p]["ema"])
        try:
            yield
        finally:
            with torch.no_grad():
                for p, value in zip(params, own, strict=True):
                    p.copy_(value)

    def _check(self) -> None:
        """Refuse what a step cannot update, before it updates anything."""
        name = type(self).__name__
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                if p.grad.layout != torch.strided:
                    raise TypeError(
                        f"{name}: gradients must be dense, got one of layout {p.grad.layout} for a parameter "
                        f"{tuple(p.shape)}; use sparse=False in the layer, or torch.optim.SparseAdam for it"
                    )
                if not p.is_floating_point():
                    raise TypeError(
                        f"{name}: parameters must be real floating-point tensors, got {p.dtype} of shape "
                        f"{tuple(p.shape)}; give these to the optimizer of torch.optim"
                    )
                if self._extras["rounding"] != "nearest" and p.dtype == torch.float16:
                    raise TypeError(
                        f"{name}: rounding={self._extras['rounding']!r} is for torch.bfloat16 parameters, got "
                        f"torch.float16; use model.bfloat16(), or a float32 model under autocast"
                    )

    def _factor(self, buckets: dict[Kind, Bucket]) -> Tensor | None:
        """What the gradients are multiplied by: unscaled and clipped."""
        scale, max_norm = getattr(self, "grad_scale", None), self._extras["max_norm"]
        factor = None if scale is None else 1.0 / scale.float()
        if max_norm is not None and buckets:
            norm = total_norm(buckets)
            factor = torch.ones_like(norm) if factor is None else factor.to(norm.device)
            self.gradient_norm = norm * factor
            factor = factor * (max_norm / (self.gradient_norm + 1e-6)).clamp(max=1.0)
        return factor
