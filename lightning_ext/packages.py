"""Lightning comes as two packages whose Trainers refuse each other's plugins: braze builds its own on the one in use.

That is ``lightning``, unless only ``pytorch_lightning`` (or ``lightning_fabric``) is imported, or installed, when the
first plugin is asked for.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from typing import TYPE_CHECKING


def _standalone() -> bool:
    if "lightning" in sys.modules and sys.modules["lightning"] is not None:
        return False
    imported = any(sys.modules.get(name) for name in ("pytorch_lightning", "lightning_fabric"))
    return imported or importlib.util.find_spec("lightning") is None


if TYPE_CHECKING:
    from lightning.fabric.plugins.precision.fsdp import FSDPPrecision as FabricFSDPPrecision
    from lightning.pytorch import Callback as Callback
    from lightning.pytorch import LightningModule as LightningModule
    from lightning.pytorch import Trainer as Trainer
    from lightning.pytorch.plugins import DeepSpeedPrecision as DeepSpeedPrecision
    from lightning.pytorch.plugins import FSDPPrecision as FSDPPrecision
    from lightning.pytorch.plugins import Precision as Precision
    from lightning.pytorch.strategies import DeepSpeedStrategy as DeepSpeedStrategy
    from lightning.pytorch.strategies import ModelParallelStrategy as ModelParallelStrategy
    from lightning.pytorch.utilities import rank_zero_info as rank_zero_info
    from lightning.pytorch.utilities import rank_zero_warn as rank_zero_warn
    from lightning.pytorch.utilities.model_helpers import is_overridden as is_overridden
else:
    _trainer, _fabric = (
        ("pytorch_lightning", "lightning_fabric") if _standalone() else ("lightning.pytorch", "lightning.fabric")
    )
    _FROM = {
        f"{_trainer}": ("Callback", "LightningModule", "Trainer"),
        f"{_trainer}.plugins": ("DeepSpeedPrecision", "FSDPPrecision", "Precision"),
        f"{_trainer}.strategies": ("DeepSpeedStrategy", "ModelParallelStrategy"),
        f"{_trainer}.utilities": ("rank_zero_info", "rank_zero_warn"),
        f"{_trainer}.utilities.model_helpers": ("is_overridden",),
    }
    for _module, _names in _FROM.items():
        globals().update({name: getattr(importlib.import_module(_module), name) for name in _names})
    FabricFSDPPrecision = importlib.import_module(f"{_fabric}.plugins.precision.fsdp").FSDPPrecision
