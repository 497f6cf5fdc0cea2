"""Maps without their session: copied, pickled, in a safetensors file."""

from fmapkit.saving.kept import KeptEntry, KeptSession, Snapshot, snapshot_of

__all__ = ["KeptEntry", "KeptSession", "Snapshot", "snapshot_of"]
