"""One map by its key, what a selection means to maps that are there, and the table of maps."""

from fmapkit.lookup.by_key import Found, find, parse
from fmapkit.lookup.by_selector import check_held, check_only_names
from fmapkit.lookup.gather import _device, gather

__all__ = ["Found", "_device", "check_held", "check_only_names", "find", "gather", "parse"]
