"""What a capture was asked for: layers, kinds, filters; and when a pass may end early."""

from fmapkit.selection.arguments import given_filters, indices
from fmapkit.selection.early_stop import EarlyStop, StoppedError
from fmapkit.selection.selection import (
    KINDS,
    LayerSelection,
    Selection,
    only_a_pass_can_tell,
)

__all__ = [
    "KINDS",
    "EarlyStop",
    "LayerSelection",
    "Selection",
    "StoppedError",
    "given_filters",
    "indices",
    "only_a_pass_can_tell",
]
