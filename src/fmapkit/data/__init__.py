"""Features of a whole data set (extra: `data`): `extract` writes them, `Features` reads them."""

from typing import TYPE_CHECKING

from fmapkit._lazy import lazy

if TYPE_CHECKING:
    from fmapkit.data._arrays import FeatureArray, StoredArray
    from fmapkit.data.extraction import extract, stream
    from fmapkit.data.features import Features
    from fmapkit.data.loader import RowLoader

__all__ = ["FeatureArray", "Features", "RowLoader", "StoredArray", "extract", "stream"]

# Imported when asked for: each needs what the others do not.
_HOMES = {
    "_arrays": "FeatureArray StoredArray",
    "extraction": "extract stream",
    "features": "Features",
    "loader": "RowLoader",
}

__getattr__, __dir__ = lazy(__name__, _HOMES)
