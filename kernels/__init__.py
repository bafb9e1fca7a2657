"""Fused operators for PyTorch: Triton on the GPU, compiled on the CPU, plain PyTorch everywhere else."""

from .dispatch import use_backend as use_backend
from .fuse import FusionReport as FusionReport
from .fuse import fuse as fuse
from .fuse import unfuse as unfuse
from .ops.bias_act import BIAS_ACT
from .ops.bias_act import BiasAct as BiasAct
from .ops.bias_act import bias_act as bias_act
from .ops.cross_entropy import CROSS_ENTROPY
from .ops.cross_entropy import CrossEntropyLoss as CrossEntropyLoss
from .ops.cross_entropy import cross_entropy as cross_entropy
from .ops.dropout import DROPOUT
from .ops.dropout import Dropout as Dropout
from .ops.dropout import dropout as dropout
from .ops.dropout_add import DROPOUT_ADD
from .ops.dropout_add import dropout_add as dropout_add
from .ops.dyt import DYT
from .ops.dyt import DyT as DyT
from .ops.dyt import dyt as dyt
from .ops.glu import GLU as GLU
from .ops.glu import GLU_OP, PACKED_GLU
from .ops.glu import glu as glu
from .ops.glu import packed_glu as packed_glu
from .ops.layer_norm import ADD_LAYER_NORM, LAYER_NORM
from .ops.layer_norm import LayerNorm as LayerNorm
from .ops.layer_norm import add_layer_norm as add_layer_norm
from .ops.layer_norm import layer_norm as layer_norm
from .ops.mlp import GATED_MLP, MLP_OP
from .ops.mlp import MLP as MLP
from .ops.mlp import GatedMLP as GatedMLP
from .ops.mlp import gated_mlp as gated_mlp
from .ops.mlp import mlp as mlp
from .ops.rms_norm import ADD_RMS_NORM, RMS_NORM
from .ops.rms_norm import RMSNorm as RMSNorm
from .ops.rms_norm import add_rms_norm as add_rms_norm
from .ops.rms_norm import rms_norm as rms_norm
from .ops.rope import ROPE
from .ops.rope import rope as rope
from .ops.scale_add import SCALE_ADD
from .ops.scale_add import DropPath as DropPath
from .ops.scale_add import LayerScale as LayerScale
from .ops.scale_add import scale_add as scale_add
from .ops.softmax import SOFTMAX
from .ops.softmax import Softmax as Softmax
from .ops.softmax import softmax as softmax

OPS = (
    RMS_NORM,
    ADD_RMS_NORM,
    LAYER_NORM,
    ADD_LAYER_NORM,
    GLU_OP,
    PACKED_GLU,
    ROPE,
    SOFTMAX,
    CROSS_ENTROPY,
    DROPOUT,
    BIAS_ACT,
    DROPOUT_ADD,
    SCALE_ADD,
    DYT,
    MLP_OP,
    GATED_MLP,
)
