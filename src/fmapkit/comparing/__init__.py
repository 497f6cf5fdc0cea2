"""Where do two runs part? `compare(maps_a, maps_b)`: two captures, layer by layer.

| file | what it does |
| --- | --- |
| `matching.py` | which map of the one belongs to which of the other |
| `difference.py` | how far two maps are apart |
| `comparison.py` | `compare`, and what it gives: a table, what departs first, a picture |
"""

from fmapkit.comparing.comparison import Comparison, compare
from fmapkit.comparing.difference import Difference
from fmapkit.comparing.matching import Match

__all__ = ["Comparison", "Difference", "Match", "compare"]
