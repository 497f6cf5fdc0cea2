"""Maps without their session: copied, pickled, in a safetensors file.

copy, pickle           kept.snapshot_of -> Snapshot    values and tags, as plain data
maps.save, load        safetensors.save, load          a `Snapshot` in a file
what is read of them   kept.KeptSession                stands in for the session: a `MapSource`
"""

from fmapkit.saving.kept import KeptEntry, KeptSession, Snapshot, snapshot_of
from fmapkit.saving.safetensors import load, save
from fmapkit.saving.source import MapSource

__all__ = ["KeptEntry", "KeptSession", "MapSource", "Snapshot", "load", "save", "snapshot_of"]
