"""One feature map: a tensor with its tags, how it is read from a record, its line in a table.

read_map(pass, record)   reading.py       the tensor as it is held, or the error that it is gone
  -> FeatureMap          feature_map.py   what one map can do; pictures are `fmapkit.drawable`'s
       repr              line.py
"""

from fmapkit.map.feature_map import FeatureMap, nbytes_of, restored
from fmapkit.map.line import row, size
from fmapkit.map.reading import read_map

__all__ = ["FeatureMap", "nbytes_of", "read_map", "restored", "row", "size"]
