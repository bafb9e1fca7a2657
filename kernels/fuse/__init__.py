"""Finding the joints of a model, testing a swap on numbers, swapping, undoing."""

from .fuse import fuse as fuse
from .fuse import plan as plan
from .fuse import unfuse as unfuse
from .report import FusionReport as FusionReport
