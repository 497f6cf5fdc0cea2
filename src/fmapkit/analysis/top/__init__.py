"""The inputs that excite each filter most.

TopInputs.update(fm)      top_inputs.py -> strongest.py   the k strongest scores so far
TopInputs[layer]          layer_tops.LayerTops            what is known of a layer
  .patches(), .plot()     inputs.py                       inputs of a data set, and their parts
"""

from fmapkit.analysis.top.layer_tops import Context, Hit, LayerTops, Patch
from fmapkit.analysis.top.top_inputs import TopInputs

__all__ = ["Context", "Hit", "LayerTops", "Patch", "TopInputs"]
