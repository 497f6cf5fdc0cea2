"""Edits as they were asked for, where they are, and one of them carried out."""

from fmapkit.editing.positions import part_of as part_of
from fmapkit.editing.requested import RequestedEdits as RequestedEdits
from fmapkit.editing.where import Where as Where
