"""Running analyses: they see every captured map, and keep none.

Pass them to `capture(model, analyses=[...])`. Anything with `update(fm)` is one: see `Analysis`.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from fmapkit.session import Analysis

if TYPE_CHECKING:
    from fmapkit.analysis.dead import DeadFilters
    from fmapkit.analysis.firings import LayerFirings
    from fmapkit.analysis.similarity import Similarity
    from fmapkit.analysis.statistics import Statistics
    from fmapkit.analysis.summary import LayerStatistics
    from fmapkit.analysis.top import TopInputs
    from fmapkit.analysis.tops import Context, Hit, LayerTops, Patch

__all__ = [
    "Analysis",
    "Context",
    "DeadFilters",
    "Hit",
    "LayerFirings",
    "LayerStatistics",
    "LayerTops",
    "Patch",
    "Similarity",
    "Statistics",
    "TopInputs",
]

# Imported when asked for: `import fmapkit` needs the protocol only, and should not pay for them.
_HOMES = {
    "DeadFilters": "dead",
    "LayerFirings": "firings",
    "LayerStatistics": "summary",
    "Similarity": "similarity",
    "Statistics": "statistics",
    "TopInputs": "top",
    **dict.fromkeys(["Context", "Hit", "LayerTops", "Patch"], "tops"),
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
