"""What a capture was asked for: layers, kinds, filters; and when a pass may end early."""

from fmapkit.selection.arguments import check_in_range as check_in_range
from fmapkit.selection.arguments import given_filters as given_filters
from fmapkit.selection.arguments import indices as indices
from fmapkit.selection.early_stop import EarlyStop as EarlyStop
from fmapkit.selection.early_stop import StoppedError as StoppedError
from fmapkit.selection.selection import LayerSelection as LayerSelection
from fmapkit.selection.selection import Selection as Selection
from fmapkit.selection.selection import only_a_pass_can_tell as only_a_pass_can_tell
