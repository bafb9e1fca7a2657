"""Where bytes live and how they move."""

from .audit import audit as audit
from .report import Convolutions as Convolutions
from .report import Event as Event
from .report import LayoutReport as LayoutReport
