"""Maps without their session: copied, pickled, in a safetensors file."""

from fmapkit.saving.kept import KeptEntry, KeptSession, Snapshot, snapshot_of
from fmapkit.saving.safetensors import load, save
from fmapkit.saving.source import MapSource

__all__ = ["KeptEntry", "KeptSession", "MapSource", "Snapshot", "load", "save", "snapshot_of"]
