"""Which implementation runs for these tensors, and why.

========================================  ==========================================================================
where                                     what runs
========================================  ==========================================================================
inside ``torch.compile``, ``export``      the plain reference: the compiler fuses it with its neighbours; ``Op.traced``,
                                          if there is one
DTensor                                   on every rank's own part, what runs for that (``sharding.py``)
under a tracer, a dispatch mode,
``torch.func``, forward-mode AD, or for
a tensor subclass, or one that is not
plain memory (sparse, nested, negated)    the plain reference, which they can see into
CUDA, ROCm, XPU tensor                    Triton
CPU tensor                                the compiled form; under ``SMALLEST_COMPILED`` ``Op.small``, if there is
                                          one, or the plain reference
anything else, or a missing part          the plain reference; one warning says what is missing
``use_backend(...)``, ``BRAZE_BACKEND``   what was asked for, or an error
========================================  ==========================================================================
"""

from __future__ import annotations

import functools
import importlib.util
import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch._C import _are_functorch_transforms_active, _is_any_autocast_enabled, _is_tracing, _len_torch_dispatch_stack
from torch.autograd import forward_ad
from torch.compiler import is_compiling

from . import sharding
from .compiled import compiled, uncompiled
from .op import Op

BACKENDS = ("eager", "compile", "triton")
#: A compiled call costs about 0.1 ms more than a plain one, forward and backward; below this many elements (measured on
#: two CPU cores with rms_norm, float32) it does not earn that back.
SMALLEST_COMPILED = 16_384


class Dispatched(Protocol):
    """What has a name and implementations: an operator, or an optimizer's rule."""

    @property
    def name(self) -> str:
        """For messages."""

    @property
    def impls(self) -> Mapping[str, Any]:
        """By backend."""


class Choice(NamedTuple):
    """The name of an implementation, and the reason that it runs."""

    backend: str
    reason: str


#: By device type; others run the plain form.
DEFAULTS = {
    device: Choice(backend, f"the default on {device!r}")
    for device, backend in {"cuda": "triton", "xpu": "triton", "cpu": "compile"}.items()
}
_SUBCLASS = "a tensor subclass defines its own operations"
_SMALL = Choice("eager", f"under {SMALLEST_COMPILED} elements a compiled call costs more than it saves")


def _valid(backend: str | None, where: str) -> str | None:
    if backend is not None and backend not in BACKENDS:
        raise ValueError(f"{where} must be one of {', '.join(BACKENDS)}, got {backend!r}")
    return backend


_forced = _valid(os.environ.get("BRAZE_BACKEND") or None, "the environment variable BRAZE_BACKEND")
_counted = False


@contextmanager
def use_backend(backend: str) -> Iterator[None]:
    """Make every operator run ``backend`` (``"eager"``, ``"compile"`` or ``"triton"``) inside the ``with`` block.

    The setting belongs to the process, as the flags of ``torch.backends`` do. It is not consulted inside
    ``torch.compile``, which always gets the plain reference. The environment variable ``BRAZE_BACKEND``, read when
    braze is imported, does the same for a whole program.

    Raises:
        ValueError: if there is no such backend.
    """
    global _forced
    before = _forced
    _forced = _valid(backend, "backend")
    try:
        yield
    finally:
        _forced = before


@contextmanager
def counted(launch: Callable[..., Any]) -> Iterator[None]:
    """Operators run their compiled form, uncompiled: ``launch(function, tensors)`` in the place of each compiled call.

    Also where a dispatch mode is active, which then sees what is around these calls: for counting what they move.
    """
    global _counted
    _counted = True
    try:
        with uncompiled(launch), use_backend("compile"):
            yield
    finally:
        _counted = False


def run(op: Op, *tensors: Tensor | None, **options: Any) -> Any:
    """Run ``op`` on checked arguments with the implementation that suits them."""
    first = tensors[0]
    assert first is not None
    if _is_any_autocast_enabled() and _asks_for_float32(op, first.device.type):
        tensors = tuple(_to_float32(t) for t in tensors)
    # DTensors bring the compiler the plain reference's operations, but know nothing of an opaque one.
    if is_compiling() and not (op.traced and sharding.any_sharded(tensors)):
        return (op.traced or op.reference)(*tensors, **options)
    choice = choose(op, tensors)
    if choice.reason is _SUBCLASS and sharding.any_sharded(tensors):
        signature = op.axes if isinstance(op.axes, str) else op.axes(*tensors, **options)
        return sharding.run(op.name, functools.partial(run, op, **options), signature, tensors)
    function = op.small if choice is _SMALL and op.small else implementation(op, choice.backend)
    index = first.device.index if choice.backend == "triton" else None
    if index is not None and index != torch.accelerator.current_device_index():
        with torch.accelerator.device_index(index):  # Triton launches on the current device
            return function(*tensors, **options)
    return function(*tensors, **options)


def choose(op: Dispatched, tensors: tuple[Tensor | None, ...]) -> Choice:
    """The implementation that ``op`` runs for ``tensors`` in eager mode, and why.

    Raises:
        RuntimeError: if a backend was asked for that cannot run here.
        ValueError: if the tensors lie on several devices.
    """
    present = [t for t in tensors if t is not None]
    why = seen_into(present)
    if why:
        return Choice("eager", why)
    device, dtype, elements = present[0].device, present[0].dtype, 0
    for t in present:
        if t.device != device:
            raise ValueError(
                f"{op.name}: all tensors must be on one device, got {', '.join(str(t.device) for t in present)}; "
                "move them, e.g. t.to(x.device)"
            )
        if t.dtype is torch.float64:
            dtype = t.dtype
        if t.numel() > elements:
            elements = t.numel()
    return preferred(op, _type(device), dtype, elements)


def asked() -> str | None:
    """The backend that :func:`use_backend` or the environment asks for."""
    return _forced


def preferred(op: Dispatched, device: str, dtype: torch.dtype, elements: int) -> Choice:
    """What :func:`choose` answers for ordinary tensors, the largest of which has so many elements."""
    if _forced:
        missing = unavailable(op, _forced, device, dtype)
        if missing:
            raise RuntimeError(f"backend {_forced!r} was asked for, but {op.name} cannot run it here: {missing}")
        return Choice(_forced, "asked for")
    default = DEFAULTS.get(device)
    if default is None:
        return Choice("eager", f"no fused implementation for device {device!r}")
    if default.backend == "compile" and elements < SMALLEST_COMPILED:
        return _SMALL
    missing = unavailable(op, default.backend, device, dtype)
    if missing:
        if dtype != torch.float64:
            _warn_once(f"braze runs plain PyTorch on {device!r}: {missing}")
        return Choice("eager", missing)
    return default


def unavailable(op: Dispatched, backend: str, device: str, dtype: torch.dtype) -> str | None:
    """Why ``op`` cannot run ``backend`` on such tensors, and what would help; None if it can."""
    if backend != "eager" and device == "meta":
        return "meta tensors have no data to run a kernel on; only the plain form gives their shapes"
    if backend == "compile" and device == "cpu" and not _counted and not _cpp_compiler():
        return "torch.compile needs a C++ compiler; install g++, or name yours in the environment variable CXX"
    if backend == "triton":
        if "triton" not in op.impls:
            return f"{op.name} has no Triton kernel"
        if not _triton_installed():
            return "Triton is not installed; pip install triton"
        if device == "cpu" and not _interpreting():
            return "Triton needs a GPU tensor; on the CPU, set TRITON_INTERPRET=1 before braze is imported (slow)"
        if dtype == torch.float64:
            return "the Triton kernels compute in float32; cast the float64 input down, or use the plain form"
    return None


def implementation(op: Op, backend: str) -> Callable[..., Any]:
    """The function behind a backend's name; it takes the arguments of ``op.reference``."""
    if backend == "eager":
        return op.reference
    if backend == "compile" and backend not in op.impls:
        return compiled(op.reference)
    return op.impls[backend]


def seen_into(tensors: list[Tensor]) -> str | None:
    """Why somebody has to see the plain operations; None if nobody does."""
    for t in tensors:
        if type(t) not in sharding.ORDINARY:
            return _SUBCLASS
        if t.layout is not torch.strided or t.is_nested or t.is_neg():
            return "a sparse, nested or lazily negated tensor is more than the memory that a kernel reads"
    if _len_torch_dispatch_stack() > 0 and not _counted:
        return "an active dispatch mode wants to see the plain operations"
    if _are_functorch_transforms_active():
        return "torch.func transforms the plain operations"
    if forward_ad._current_level >= 0:
        return "forward-mode differentiation needs the plain operations"
    if _is_tracing():
        return "torch.jit.trace records the plain operations"
    return None


def _asks_for_float32(op: Op, device: str) -> bool:
    return device in op.autocast_to_float32 and torch.is_autocast_enabled(device)


def _to_float32(tensor: Tensor | None) -> Tensor | None:
    half = tensor is not None and tensor.dtype in (torch.float16, torch.bfloat16)
    return tensor.float() if half and tensor is not None else tensor


@functools.cache
def _type(device: torch.device) -> str:
    return device.type  # a string that is made anew each time


@functools.cache
def _cpp_compiler() -> str | None:
    # Inductor's own search: it looks for no other names than CXX and the platform's one default.
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        return get_cpp_compiler()
    except InvalidCxxCompiler:
        return None


@functools.cache
def _triton_installed() -> bool:
    return importlib.util.find_spec("triton") is not None


@functools.cache
def _interpreting() -> bool:
    from triton import knobs

    return bool(knobs.runtime.interpret)


@functools.cache
def _warn_once(message: str) -> None:
    warnings.warn(message, RuntimeWarning, stacklevel=6)  # preferred, choose, run, the function, its caller
