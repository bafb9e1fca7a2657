"""Fused operators for PyTorch: Triton on the GPU, compiled on the CPU, plain PyTorch everywhere else."""

from .dispatch import use_backend as use_backend
from .ops.glu import GLU as GLU
from .ops.glu import GLU_OP, PACKED_GLU
from .ops.glu import glu as glu
from .ops.glu import packed_glu as packed_glu
from .ops.rms_norm import ADD_RMS_NORM, RMS_NORM
from .ops.rms_norm import RMSNorm as RMSNorm
from .ops.rms_norm import add_rms_norm as add_rms_norm
from .ops.rms_norm import rms_norm as rms_norm
from .ops.rope import ROPE
from .ops.rope import rope as rope

OPS = (RMS_NORM, ADD_RMS_NORM, GLU_OP, PACKED_GLU, ROPE)
