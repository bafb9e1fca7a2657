"""Other libraries of fused kernels, as providers of the ``ops`` benchmark: one file for each."""

from __future__ import annotations

from .apex import APEX
from .cut_cross_entropy import CUT_CROSS_ENTROPY
from .flag_gems import FLAG_GEMS
from .flash_attn import FLASH_ATTN
from .liger import LIGER
from .peer import Peer as Peer
from .quack import QUACK
from .transformer_engine import TRANSFORMER_ENGINE
from .xformers import XFORMERS

PEERS: tuple[Peer, ...] = (
    LIGER,
    QUACK,
    FLASH_ATTN,
    APEX,
    CUT_CROSS_ENTROPY,
    TRANSFORMER_ENGINE,
    XFORMERS,
    FLAG_GEMS,
)
