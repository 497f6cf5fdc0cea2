"""Maps without their session: copied, pickled, in a safetensors file."""

from fmapkit.saving.kept import KeptEntry, KeptSession, Snapshot, snapshot_of
from fmapkit.saving.source import Source

__all__ = ["KeptEntry", "KeptSession", "Snapshot", "Source", "snapshot_of"]
