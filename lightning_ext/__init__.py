"""Lightning: every Trainer gets the fused operators with one line."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .compile_cache import load_compile_cache as load_compile_cache
    from .compile_cache import save_compile_cache as save_compile_cache
    from .fused_precision import FusedPrecision as FusedPrecision
    from .meters import MetersCallback as MetersCallback
    from .prefetch import PrefetchCallback as PrefetchCallback
    from .recompiles import RegionReport as RegionReport
    from .regional import compile_regions as compile_regions
    from .regional import uncompile_regions as uncompile_regions
    from .start_report import fit_report as fit_report

# Loaded on first use, so that the package imports where Lightning is not installed.
_MODULES = {
    "FusedPrecision": "fused_precision",
    "MetersCallback": "meters",
    "PrefetchCallback": "prefetch",
    "RegionReport": "recompiles",
    "compile_regions": "regional",
    "fit_report": "start_report",
    "load_compile_cache": "compile_cache",
    "save_compile_cache": "compile_cache",
    "uncompile_regions": "regional",
}
__all__ = [
    "FusedPrecision",
    "MetersCallback",
    "PrefetchCallback",
    "RegionReport",
    "compile_regions",
    "fit_report",
    "load_compile_cache",
    "save_compile_cache",
    "uncompile_regions",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it has {', '.join(__all__)}")
    try:
        return getattr(importlib.import_module(f".{_MODULES[name]}", __name__), name)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] != "lightning":
            raise
        raise ImportError(
            f"{__name__}.{name} needs Lightning, which is not installed: pip install 'braze[lightning]'"
        ) from error
