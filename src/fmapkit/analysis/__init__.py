"""Running analyses: they see every captured map, and keep none.

Pass them to `capture(model, analyses=[...])`. Anything with `update(fm)` is one: see `Analysis`.
"""

from fmapkit.analysis.dead import DeadFilters
from fmapkit.analysis.firings import LayerFirings
from fmapkit.analysis.protocol import Analysis
from fmapkit.analysis.statistics import Statistics
from fmapkit.analysis.summary import LayerStatistics

__all__ = ["Analysis", "DeadFilters", "LayerFirings", "LayerStatistics", "Statistics"]
