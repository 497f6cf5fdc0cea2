"""One feature map: a tensor with its tags, how it is read from a record, its line in a table."""

from fmapkit.map.feature_map import FeatureMap, nbytes_of, restored
from fmapkit.map.line import row, size
from fmapkit.map.reading import read_map

__all__ = ["FeatureMap", "nbytes_of", "read_map", "restored", "row", "size"]
