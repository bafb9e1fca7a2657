"""Fused operators for PyTorch: Triton on the GPU, compiled on the CPU, plain PyTorch everywhere else."""

from .dispatch import use_backend as use_backend
from .fuse import FusionReport as FusionReport
from .fuse import fuse as fuse
from .fuse import unfuse as unfuse
from .ops.cross_entropy import CROSS_ENTROPY
from .ops.cross_entropy import CrossEntropyLoss as CrossEntropyLoss
from .ops.cross_entropy import cross_entropy as cross_entropy
from .ops.dropout import DROPOUT
from .ops.dropout import Dropout as Dropout
from .ops.dropout import dropout as dropout
from .ops.gated_add import GATED_ADD
from .ops.gated_add import gated_add as gated_add
from .ops.gated_rms_norm import GATED_RMS_NORM
from .ops.gated_rms_norm import RMSNormGated as RMSNormGated
from .ops.gated_rms_norm import gated_rms_norm as gated_rms_norm
from .ops.glu import GLU as GLU
from .ops.glu import GLU_OP, PACKED_GLU
from .ops.glu import glu as glu
from .ops.glu import packed_glu as packed_glu
from .ops.l2_normalize import L2_NORMALIZE
from .ops.l2_normalize import l2_normalize as l2_normalize
from .ops.layer_norm import ADD_LAYER_NORM, LAYER_NORM
from .ops.layer_norm import LayerNorm as LayerNorm
from .ops.layer_norm import add_layer_norm as add_layer_norm
from .ops.layer_norm import layer_norm as layer_norm
from .ops.modulated_norm import (
    ADD_MODULATED_LAYER_NORM,
    ADD_MODULATED_RMS_NORM,
    MODULATED_LAYER_NORM,
    MODULATED_RMS_NORM,
)
from .ops.modulated_norm import AdaLayerNormContinuous as AdaLayerNormContinuous
from .ops.modulated_norm import add_modulated_layer_norm as add_modulated_layer_norm
from .ops.modulated_norm import add_modulated_rms_norm as add_modulated_rms_norm
from .ops.modulated_norm import modulated_layer_norm as modulated_layer_norm
from .ops.modulated_norm import modulated_rms_norm as modulated_rms_norm
from .ops.rms_norm import ADD_RMS_NORM, RMS_NORM
from .ops.rms_norm import RMSNorm as RMSNorm
from .ops.rms_norm import add_rms_norm as add_rms_norm
from .ops.rms_norm import rms_norm as rms_norm
from .ops.rope import ROPE
from .ops.rope import rope as rope
from .ops.softmax import SOFTMAX
from .ops.softmax import Softmax as Softmax
from .ops.softmax import softmax as softmax

OPS = (
    RMS_NORM,
    ADD_RMS_NORM,
    LAYER_NORM,
    ADD_LAYER_NORM,
    MODULATED_LAYER_NORM,
    MODULATED_RMS_NORM,
    ADD_MODULATED_LAYER_NORM,
    ADD_MODULATED_RMS_NORM,
    GATED_ADD,
    GATED_RMS_NORM,
    L2_NORMALIZE,
    GLU_OP,
    PACKED_GLU,
    ROPE,
    SOFTMAX,
    CROSS_ENTROPY,
    DROPOUT,
)
