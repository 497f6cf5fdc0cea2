"""Edits as they were asked for, where they are, and one of them carried out."""

from fmapkit.editing.positions import part_of
from fmapkit.editing.requested import RequestedEdits
from fmapkit.editing.where import Where

__all__ = ["RequestedEdits", "Where", "part_of"]
