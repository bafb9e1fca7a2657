"""Fused operators for PyTorch: Triton on the GPU, compiled on the CPU, plain PyTorch everywhere else."""

from .dispatch import use_backend as use_backend
from .ops.cross_entropy import CROSS_ENTROPY
from .ops.cross_entropy import CrossEntropyLoss as CrossEntropyLoss
from .ops.cross_entropy import cross_entropy as cross_entropy
from .ops.rms_norm import ADD_RMS_NORM, RMS_NORM
from .ops.rms_norm import RMSNorm as RMSNorm
from .ops.rms_norm import add_rms_norm as add_rms_norm
from .ops.rms_norm import rms_norm as rms_norm
from .ops.softmax import SOFTMAX
from .ops.softmax import Softmax as Softmax
from .ops.softmax import softmax as softmax

OPS = (RMS_NORM, ADD_RMS_NORM, SOFTMAX, CROSS_ENTROPY)
