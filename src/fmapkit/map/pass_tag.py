"""Passes, told apart by the maps that come of them."""

from __future__ import annotations

from dataclasses import dataclass

from fmapkit.map.feature_map import FeatureMap
from fmapkit.storage import Block


@dataclass(frozen=True, slots=True)
class PassTag:
    """Which pass a map is of."""

    step: int
    block: Block | None = None

    @classmethod
    def of(cls, fm: FeatureMap) -> PassTag:
        return cls(fm.step, fm.block)

    def since(self, last: PassTag) -> int:
        """How many passes have begun since the last one; of a new block, all in that.

        Blocks that are open at once are of the same passes, and so are those that nobody knows:
        there, a step that is lower than the last one tells of a new block.
        """
        known = last.block is not None and last.block is not self.block and last.block.ended
        return self.step + 1 if known or self.step < last.step else self.step - last.step
