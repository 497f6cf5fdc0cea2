"""Look-ups: one map by its key, all that fit a selection, one of all ranks, the table of them.

maps[key]      by_key.parse -> by_key.find       the record that is meant, or why there is none
maps.select    choose.choose -> by_selector      every record that fits; a name that means none
maps.gather    gather.gather                     the batches of all ranks
print(maps)    table.maps_as_text
                 -> records.latest, records.read records of a `MapSource`, and the map of each
"""

from fmapkit.lookup.by_key import find, parse
from fmapkit.lookup.choose import choose, pass_number
from fmapkit.lookup.gather import _device, gather
from fmapkit.lookup.records import Found, every, latest, read
from fmapkit.lookup.table import maps_as_html, maps_as_text

__all__ = [
    "Found",
    "_device",
    "choose",
    "every",
    "find",
    "gather",
    "latest",
    "maps_as_html",
    "maps_as_text",
    "parse",
    "pass_number",
    "read",
]
