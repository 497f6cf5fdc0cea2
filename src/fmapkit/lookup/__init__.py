"""Look-ups: one map by its key, all that fit a selection, one of all ranks, the table of them."""

from fmapkit.lookup.by_key import find as find
from fmapkit.lookup.by_key import parse as parse
from fmapkit.lookup.choose import choose as choose
from fmapkit.lookup.choose import pass_number as pass_number
from fmapkit.lookup.gather import gather as gather
from fmapkit.lookup.records import every as every
from fmapkit.lookup.records import latest as latest
from fmapkit.lookup.records import maps_table as maps_table
from fmapkit.lookup.records import read as read
