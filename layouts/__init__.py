"""Where bytes live and how they move."""

from .pinned.collate import SlabCollate as SlabCollate
from .pinned.loader import PinnedLoader as PinnedLoader
from .pinned.report import LoaderReport as LoaderReport
