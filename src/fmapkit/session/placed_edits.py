"""Edits of what modules are given and return, in a pass that is replayed.

The plan tells what a trace has told before: where filters lie, as long as the pass has taken the
plan's path; and whether another tensor went on, on which it rests what is overwritten later.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from fmapkit.editing import RequestedEdits
from fmapkit.model import Names
from fmapkit.provenance import ChannelLayout
from fmapkit.replay import ReplayRun
from fmapkit.storage import Pass
from fmapkit.torchlib.side_ops import clone
from fmapkit.tracing import Place, PlacedEdits, goes_on_in


class ReplayedEdits(PlacedEdits):
    """The edits of one call of a region that is all of a pass."""

    def __init__(
        self,
        names: Names,
        edits: RequestedEdits,
        current: Pass,
        run: ReplayRun,
        on_path: Callable[[int], bool],
    ) -> None:
        super().__init__(names, edits, current)
        self._run = run
        self._on_path = on_path  # after so many decisions, as its plan has them

    def input(self, module: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any] | None:
        with self._run.paused():
            return super().input(module, args, kwargs)

    def output(self, module: nn.Module, output: Any) -> tuple[Any, dict[str, Tensor]]:
        with self._run.paused():
            return super().output(module, output)

    def _axes(self, place: Place, tensor: Tensor) -> ChannelLayout | None:
        axes, _, position = self._run.plan.placed.get(place, (None, False, 0))
        return axes if axes is not None and self._on_path(position) else None

    def _goes_on(
        self, place: Place, axes: ChannelLayout | None, tensor: Tensor, new: Tensor | None
    ) -> None:
        run = self._run
        known = run.plan.placed.get(place)
        if known is None or goes_on_in(tensor, new):
            run.stray("an edit")
        elif known[1] and new is None:
            # What comes may write to it, and the plan tells of no map in its memory that it does.
            if run.uncounted:
                run.stray("an edit")
            else:
                run.exchange(tensor, clone)
