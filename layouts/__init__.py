"""Where bytes live and how they move."""

from .alignment import PaddingReport as PaddingReport
from .alignment import pad_to_multiple as pad_to_multiple
from .alignment import unpad as unpad
from .audit import audit as audit
from .bin_packing import first_fit_decreasing as first_fit_decreasing
from .flat import FlatParameters as FlatParameters
from .flat import flatten_parameters as flatten_parameters
from .freed_memory import keep_freed_memory as keep_freed_memory
from .memory_format import FormatRecord as FormatRecord
from .memory_format import FormatReport as FormatReport
from .memory_format import channels_last as channels_last
from .memory_format import undo_channels_last as undo_channels_last
from .packed_batch import PackedBatch as PackedBatch
from .packing import PackCollate as PackCollate
from .packing import pack as pack
from .packing import unpack as unpack
from .pinned.collate import SlabCollate as SlabCollate
from .pinned.loader import PinnedLoader as PinnedLoader
from .pinned.report import LoaderReport as LoaderReport
from .report import Convolutions as Convolutions
from .report import Event as Event
from .report import LayoutReport as LayoutReport
