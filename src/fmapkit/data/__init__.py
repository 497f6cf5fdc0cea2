"""Features of a whole data set (extra: `data`): `extract` writes them, `Features` reads them."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fmapkit.data._arrays import FeatureArray, StoredArray
    from fmapkit.data.extraction import extract
    from fmapkit.data.features import Features
    from fmapkit.data.live import stream
    from fmapkit.data.loader import RowLoader

__all__ = ["FeatureArray", "Features", "RowLoader", "StoredArray", "extract", "stream"]

# Imported when asked for: each needs what the others do not.
_HOMES = {
    "FeatureArray": "_arrays",
    "Features": "features",
    "RowLoader": "loader",
    "StoredArray": "_arrays",
    "extract": "extraction",
    "stream": "live",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
