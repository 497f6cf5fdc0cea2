"""One feature map: a tensor with its tags, how it is read from a record, its line in a table."""

from fmapkit.map.feature_map import FeatureMap as FeatureMap
from fmapkit.map.feature_map import nbytes_of as nbytes_of
from fmapkit.map.feature_map import restored as restored
from fmapkit.map.line import row as row
from fmapkit.map.line import size as size
from fmapkit.map.pass_tag import PassTag as PassTag
from fmapkit.map.reading import read_map as read_map
from fmapkit.map.unpadded import checked_mask as checked_mask
from fmapkit.map.unpadded import kept as kept
from fmapkit.map.unpadded import positions_first as positions_first
from fmapkit.map.unpadded import unpadded as unpadded
