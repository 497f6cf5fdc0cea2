"""Running analyses that ride along, and what is kept of them so that a resumed run goes on.

A run is one process's part of one call. With each unit that it commits, the state of its analyses
after that unit is in the store, in the place of the one before. A later run takes over the states
of earlier ones, and says so in its own records.
"""

from __future__ import annotations

import copy
import io
import uuid
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch

from fmapkit import Analysis, FeatureMap
from fmapkit.data._manifest import UnitRecord
from fmapkit.data._place import Place, node_of
from fmapkit.errors import ArgumentError, StoreError
from fmapkit.map import unpadded


def live_runs(records: Mapping[int, UnitRecord]) -> list[str]:
    """The runs whose analyses no later run has taken over, in the order of their first unit."""
    runs = list(dict.fromkeys(record.run for record in records.values() if record.run))
    gone = {run for record in records.values() for run in record.absorbed}
    return [run for run in runs if run not in gone]


class Riding:
    """Some analyses, in one run."""

    def __init__(self, analyses: Any, resumable: bool) -> None:
        one = hasattr(analyses, "update")
        self.analyses: list[Any] = [analyses] if one else list(analyses)
        for analysis in self.analyses:
            if not isinstance(analysis, Analysis):
                raise ArgumentError(f"analyses= takes objects with update(fm), not {analysis!r}")
            keeps = hasattr(analysis, "state_dict") and hasattr(analysis, "load_state_dict")
            if resumable and not keeps:
                raise ArgumentError(
                    f"{type(analysis).__name__} has no state_dict and load_state_dict, so an "
                    "interrupted run could not go on with what it has seen; add them, or give "
                    "resume=False"
                )
        # Whether their state has to be kept: each must have one.
        self._keeps = resumable and bool(self.analyses)
        self.run = uuid.uuid4().hex[:12] if self._keeps else ""
        self.absorbed: tuple[str, ...] = ()
        self._last: str | None = None

    @property
    def names(self) -> list[str]:
        """For the fingerprint."""
        return [type(analysis).__qualname__ for analysis in self.analyses]

    def resume(self, place: Place, records: Mapping[int, UnitRecord], rank: int, size: int) -> None:
        """Take over what earlier runs have seen; of several ranks, each takes its share of runs."""
        if not self._keeps:
            return
        mine = live_runs(records)[rank::size]
        fresh = [copy.deepcopy(a) for a in self.analyses] if len(mine) > 1 else []
        for at, run in enumerate(mine):
            last = max(unit for unit, record in records.items() if record.run == run)
            content = place.read_bytes(f"analyses/{run}/{node_of(last)}")
            states = torch.load(io.BytesIO(content), weights_only=True)
            for analysis, new, state in zip(
                self.analyses, fresh or self.analyses, states, strict=True
            ):
                if at == 0:
                    analysis.load_state_dict(state)
                    continue
                if not hasattr(analysis, "merge"):
                    raise StoreError(
                        f"{len(mine)} runs have written to {place}, and {type(analysis).__name__} "
                        "has no merge(other) to put together what they have seen; begin anew at "
                        "another place"
                    )
                other = copy.deepcopy(new)
                other.load_state_dict(state)
                analysis.merge(other)
        self.absorbed = tuple(mine)

    def beside(self, unit: int) -> tuple[dict[str, bytes], tuple[str, ...]]:
        """What is written before a unit's record, and what has to go after it."""
        if not self._keeps:
            return {}, ()
        content = io.BytesIO()
        torch.save([analysis.state_dict() for analysis in self.analyses], content)
        path = f"analyses/{self.run}/{node_of(unit)}"
        stale = (self._last,) if self._last else tuple(f"analyses/{r}" for r in self.absorbed)
        self._last = path
        return {path: content.getvalue()}, stale

    def show(
        self, maps: Iterable[FeatureMap], mask: torch.Tensor | None, start: int, samples: int
    ) -> None:
        """Show the maps of a pass; those of sequences without their padding: rows are tokens.

        Args:
            mask: which positions are no padding.
            start: number of the batch's first sample in the data set: inputs go by these numbers.
        """
        maps = list(maps) if self.analyses else []
        if not maps:
            return
        numbers = torch.arange(start, start + samples)
        with torch.autocast(maps[0].device.type, enabled=False):
            for fm in maps:
                shown = _shown(fm, mask, numbers)
                for analysis in self.analyses:
                    analysis.update(shown)

    def tidy(self, place: Place, records: Mapping[int, UnitRecord]) -> None:
        """Remove the states of runs that others have taken over."""
        live = set(live_runs(records))
        for run in place.children("analyses"):
            if run not in live:
                place.remove(f"analyses/{run}")


def _shown(fm: FeatureMap, mask: torch.Tensor | None, numbers: torch.Tensor) -> FeatureMap:
    if fm.filter_dim != 0:
        fm = replace(fm, ids=numbers.to(fm.device))
    return fm if mask is None else unpadded(fm, mask)
