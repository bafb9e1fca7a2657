"""Fused operators for PyTorch: Triton on the GPU, compiled on the CPU, plain PyTorch everywhere else."""

from .dispatch import use_backend as use_backend
from .fuse import FusionReport as FusionReport
from .fuse import fold as fold
from .fuse import fuse as fuse
from .fuse import fused as fused
from .fuse import plan as plan
from .fuse import unfold as unfold
from .fuse import unfuse as unfuse
from .ops.add_modulated_norm import ADD_MODULATED_LAYER_NORM, ADD_MODULATED_RMS_NORM
from .ops.add_modulated_norm import add_modulated_layer_norm as add_modulated_layer_norm
from .ops.add_modulated_norm import add_modulated_rms_norm as add_modulated_rms_norm
from .ops.batch_norm import BATCH_NORM_ACT
from .ops.batch_norm import BatchNormAct2d as BatchNormAct2d
from .ops.batch_norm import batch_norm_act as batch_norm_act
from .ops.bias_act import BIAS_ACT
from .ops.bias_act import BiasAct as BiasAct
from .ops.bias_act import bias_act as bias_act
from .ops.binary_cross_entropy import BINARY_CROSS_ENTROPY
from .ops.binary_cross_entropy import BCEWithLogitsLoss as BCEWithLogitsLoss
from .ops.binary_cross_entropy import binary_cross_entropy_with_logits as binary_cross_entropy_with_logits
from .ops.cross_entropy import CROSS_ENTROPY
from .ops.cross_entropy import CrossEntropyLoss as CrossEntropyLoss
from .ops.cross_entropy import cross_entropy as cross_entropy
from .ops.dice_bce_loss import DICE_BCE_LOSS
from .ops.dice_bce_loss import DiceBCELoss as DiceBCELoss
from .ops.dice_bce_loss import dice_bce_loss as dice_bce_loss
from .ops.dice_bce_loss import dice_loss as dice_loss
from .ops.dropout import DROPOUT
from .ops.dropout import Dropout as Dropout
from .ops.dropout import dropout as dropout
from .ops.dropout_add import DROPOUT_ADD
from .ops.dropout_add import dropout_add as dropout_add
from .ops.dyt import DYT
from .ops.dyt import DyT as DyT
from .ops.dyt import dyt as dyt
from .ops.gated_add import GATED_ADD
from .ops.gated_add import gated_add as gated_add
from .ops.gated_rms_norm import GATED_RMS_NORM
from .ops.gated_rms_norm import RMSNormGated as RMSNormGated
from .ops.gated_rms_norm import gated_rms_norm as gated_rms_norm
from .ops.glu import GLU as GLU
from .ops.glu import GLU_OP, PACKED_GLU
from .ops.glu import glu as glu
from .ops.glu import packed_glu as packed_glu
from .ops.group_norm import GROUP_NORM
from .ops.group_norm import GroupNorm as GroupNorm
from .ops.group_norm import GroupNormAct as GroupNormAct
from .ops.group_norm import group_norm as group_norm
from .ops.image_normalize import IMAGE_NORMALIZE
from .ops.image_normalize import ImageNormalize as ImageNormalize
from .ops.image_normalize import image_normalize as image_normalize
from .ops.l2_normalize import L2_NORMALIZE
from .ops.l2_normalize import l2_normalize as l2_normalize
from .ops.layer_norm import ADD_LAYER_NORM, LAYER_NORM
from .ops.layer_norm import LayerNorm as LayerNorm
from .ops.layer_norm import add_layer_norm as add_layer_norm
from .ops.layer_norm import layer_norm as layer_norm
from .ops.layer_norm_2d import LAYER_NORM_2D
from .ops.layer_norm_2d import LayerNorm2d as LayerNorm2d
from .ops.layer_norm_2d import layer_norm_2d as layer_norm_2d
from .ops.linear_cross_entropy import LINEAR_CROSS_ENTROPY
from .ops.linear_cross_entropy import LinearCrossEntropyLoss as LinearCrossEntropyLoss
from .ops.linear_cross_entropy import linear_cross_entropy as linear_cross_entropy
from .ops.linear_distillation import LINEAR_DISTILLATION
from .ops.linear_distillation import LinearDistillationLoss as LinearDistillationLoss
from .ops.linear_distillation import linear_distillation_loss as linear_distillation_loss
from .ops.linear_log_probs import linear_log_probs as linear_log_probs
from .ops.log_softmax import LOG_SOFTMAX
from .ops.log_softmax import LogSoftmax as LogSoftmax
from .ops.log_softmax import log_softmax as log_softmax
from .ops.mlp import GATED_MLP, MLP_OP
from .ops.mlp import MLP as MLP
from .ops.mlp import GatedMLP as GatedMLP
from .ops.mlp import gated_mlp as gated_mlp
from .ops.mlp import mlp as mlp
from .ops.modulated_norm import MODULATED_LAYER_NORM, MODULATED_RMS_NORM
from .ops.modulated_norm import AdaLayerNormContinuous as AdaLayerNormContinuous
from .ops.modulated_norm import AdaLayerNormZero as AdaLayerNormZero
from .ops.modulated_norm import AdaLayerNormZeroSingle as AdaLayerNormZeroSingle
from .ops.modulated_norm import modulated_layer_norm as modulated_layer_norm
from .ops.modulated_norm import modulated_rms_norm as modulated_rms_norm
from .ops.preference_losses import cpo_loss as cpo_loss
from .ops.preference_losses import dpo_loss as dpo_loss
from .ops.preference_losses import grpo_loss as grpo_loss
from .ops.preference_losses import ipo_loss as ipo_loss
from .ops.preference_losses import kto_loss as kto_loss
from .ops.preference_losses import orpo_loss as orpo_loss
from .ops.preference_losses import sequence_log_probs as sequence_log_probs
from .ops.preference_losses import simpo_loss as simpo_loss
from .ops.qk_norm_rope import QK_NORM_ROPE
from .ops.qk_norm_rope import qk_norm_rope as qk_norm_rope
from .ops.rms_norm import ADD_RMS_NORM, RMS_NORM
from .ops.rms_norm import RMSNorm as RMSNorm
from .ops.rms_norm import add_rms_norm as add_rms_norm
from .ops.rms_norm import rms_norm as rms_norm
from .ops.rope import ROPE
from .ops.rope import rope as rope
from .ops.rope_qkv import ROPE_QKV
from .ops.rope_qkv import rope_qkv as rope_qkv
from .ops.rotary_tables import axial_tables as axial_tables
from .ops.rotary_tables import grid_positions as grid_positions
from .ops.rotary_tables import llama3_frequencies as llama3_frequencies
from .ops.rotary_tables import mrope_tables as mrope_tables
from .ops.rotary_tables import rotary_frequencies as rotary_frequencies
from .ops.rotary_tables import rotary_tables as rotary_tables
from .ops.rotary_tables import yarn_attention_factor as yarn_attention_factor
from .ops.rotary_tables import yarn_frequencies as yarn_frequencies
from .ops.scale_add import SCALE_ADD
from .ops.scale_add import DropPath as DropPath
from .ops.scale_add import LayerScale as LayerScale
from .ops.scale_add import scale_add as scale_add
from .ops.sigmoid_focal_loss import SIGMOID_FOCAL_LOSS
from .ops.sigmoid_focal_loss import SigmoidFocalLoss as SigmoidFocalLoss
from .ops.sigmoid_focal_loss import sigmoid_focal_loss as sigmoid_focal_loss
from .ops.soft_target_cross_entropy import SOFT_TARGET_CROSS_ENTROPY
from .ops.soft_target_cross_entropy import SoftTargetCrossEntropy as SoftTargetCrossEntropy
from .ops.soft_target_cross_entropy import soft_target_cross_entropy as soft_target_cross_entropy
from .ops.softmax import SOFTMAX
from .ops.softmax import Softmax as Softmax
from .ops.softmax import softmax as softmax

OPS = (
    ADD_LAYER_NORM,
    ADD_MODULATED_LAYER_NORM,
    ADD_MODULATED_RMS_NORM,
    ADD_RMS_NORM,
    BATCH_NORM_ACT,
    BIAS_ACT,
    BINARY_CROSS_ENTROPY,
    CROSS_ENTROPY,
    DICE_BCE_LOSS,
    DROPOUT,
    DROPOUT_ADD,
    DYT,
    GATED_ADD,
    GATED_MLP,
    GATED_RMS_NORM,
    GLU_OP,
    GROUP_NORM,
    IMAGE_NORMALIZE,
    L2_NORMALIZE,
    LAYER_NORM,
    LAYER_NORM_2D,
    LINEAR_CROSS_ENTROPY,
    LINEAR_DISTILLATION,
    LOG_SOFTMAX,
    MLP_OP,
    MODULATED_LAYER_NORM,
    MODULATED_RMS_NORM,
    PACKED_GLU,
    QK_NORM_ROPE,
    RMS_NORM,
    ROPE,
    ROPE_QKV,
    SCALE_ADD,
    SIGMOID_FOCAL_LOSS,
    SOFTMAX,
    SOFT_TARGET_CROSS_ENTROPY,
)
