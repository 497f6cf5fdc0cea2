"""Maps without their session: copied, pickled, in a safetensors file."""

from fmapkit.saving.kept import KeptEntry as KeptEntry
from fmapkit.saving.kept import KeptSession as KeptSession
from fmapkit.saving.kept import MapSource as MapSource
from fmapkit.saving.kept import Snapshot as Snapshot
from fmapkit.saving.kept import snapshot_of as snapshot_of
from fmapkit.saving.safetensors import load as load
from fmapkit.saving.safetensors import save as save
