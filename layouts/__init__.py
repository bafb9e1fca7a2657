"""Where bytes live and how they move."""

from .audit import audit as audit
from .memory_format import FormatRecord as FormatRecord
from .memory_format import FormatReport as FormatReport
from .memory_format import channels_last as channels_last
from .memory_format import undo_channels_last as undo_channels_last
from .report import Convolutions as Convolutions
from .report import Event as Event
from .report import LayoutReport as LayoutReport
