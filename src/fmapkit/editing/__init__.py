"""Edits as they were asked for, where they are, and one of them carried out."""

from fmapkit.editing.edits import Edits
from fmapkit.editing.positions import part_of
from fmapkit.editing.where import Where

__all__ = ["Edits", "Where", "part_of"]
