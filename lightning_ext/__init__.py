"""Lightning: every Trainer gets the fused operators with one line."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .compile_cache import load_compile_cache as load_compile_cache
    from .compile_cache import save_compile_cache as save_compile_cache
    from .cuda_graphs import CUDAGraphCallback as CUDAGraphCallback
    from .fabric_fused_precision import FabricFusedPrecision as FabricFusedPrecision
    from .fused_callback import FusedCallback as FusedCallback
    from .fused_deepspeed_precision import FusedDeepSpeedPrecision as FusedDeepSpeedPrecision
    from .fused_precision import FusedPrecision as FusedPrecision
    from .meters import MetersCallback as MetersCallback
    from .prefetch import PrefetchCallback as PrefetchCallback
    from .recompiles import RegionReport as RegionReport
    from .regional import compile_regions as compile_regions
    from .regional import uncompile_regions as uncompile_regions
    from .sharding import prepare_for_sharding as prepare_for_sharding

# Loaded on first use, so that the package imports where Lightning is not installed.
_MODULES = {
    "CUDAGraphCallback": "cuda_graphs",
    "FabricFusedPrecision": "fabric_fused_precision",
    "FusedCallback": "fused_callback",
    "FusedDeepSpeedPrecision": "fused_deepspeed_precision",
    "FusedPrecision": "fused_precision",
    "MetersCallback": "meters",
    "PrefetchCallback": "prefetch",
    "RegionReport": "recompiles",
    "compile_regions": "regional",
    "load_compile_cache": "compile_cache",
    "prepare_for_sharding": "sharding",
    "save_compile_cache": "compile_cache",
    "uncompile_regions": "regional",
}
__all__ = [
    "CUDAGraphCallback",
    "FabricFusedPrecision",
    "FusedCallback",
    "FusedDeepSpeedPrecision",
    "FusedPrecision",
    "MetersCallback",
    "PrefetchCallback",
    "RegionReport",
    "compile_regions",
    "load_compile_cache",
    "prepare_for_sharding",
    "save_compile_cache",
    "uncompile_regions",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it has {', '.join(__all__)}")
    try:
        return getattr(importlib.import_module(f".{_MODULES[name]}", __name__), name)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] not in ("lightning", "pytorch_lightning"):
            raise
        raise ImportError(
            f"{__name__}.{name} needs Lightning, which is not installed: pip install 'braze[lightning]'"
        ) from error
