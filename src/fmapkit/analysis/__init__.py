"""Running analyses: they see every captured map, and keep none.

    analysis.update(fm)          dead.py, statistics.py, similarity.py, top_inputs.py
      -> ByLayer, Groups           _by_layer.py, _keys.py    whose sums the map goes to
      -> Mergeable                 _by_layer.py              of several runs, of all ranks
      -> sums                      _moments.py, _strongest.py, _pairs.py
    analysis["conv1"], a table   summary.py, layer_tops.py
    analysis.plot(), a page      drawn.py, _inputs.py (what a data set has)

Pass them to `capture(model, analyses=[...])`. Anything with `update(fm)` is one: see `Analysis`.
"""

from typing import TYPE_CHECKING

from fmapkit._lazy import lazy
from fmapkit.session import Analysis

if TYPE_CHECKING:
    from fmapkit.analysis.dead import DeadFilters
    from fmapkit.analysis.layer_tops import Context, Hit, LayerTops, Patch
    from fmapkit.analysis.similarity import Similarity
    from fmapkit.analysis.statistics import Statistics
    from fmapkit.analysis.summary import LayerFirings, LayerStatistics
    from fmapkit.analysis.top_inputs import TopInputs

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
    "dead": "DeadFilters",
    "similarity": "Similarity",
    "statistics": "Statistics",
    "summary": "LayerFirings LayerStatistics",
    "layer_tops": "Context Hit LayerTops Patch",
    "top_inputs": "TopInputs",
}

__getattr__, __dir__ = lazy(__name__, _HOMES)
