"""Optimizers with the arguments and the state of ``torch.optim``, whose step is one pass over memory."""

from .adafactor import Adafactor as Adafactor
from .adam import Adam as Adam
from .adam import AdamW as AdamW
from .lion import Lion as Lion
from .muon import Muon as Muon
from .quantization import dequantized as dequantized
from .sgd import SGD as SGD
from .step import FusedStep as FusedStep
