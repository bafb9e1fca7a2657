"""Finding the joints of a model, testing a swap on numbers, swapping, undoing."""

from .fold import fold as fold
from .fold import unfold as unfold
from .fuse import fuse as fuse
from .fuse import fused as fused
from .fuse import plan as plan
from .fuse import unfuse as unfuse
from .report import FusionReport as FusionReport
