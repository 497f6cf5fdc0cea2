"""The end of a pass: what becomes of its maps, and who is shown them."""

from __future__ import annotations

from collections.abc import Iterable

from fmapkit.missed import NotSupportedError, Reason
from fmapkit.replay import ReplayRun
from fmapkit.session.state import PassState
from fmapkit.storage import (
    Budget,
    MapRecord,
    Pass,
    PassStore,
    has_inference_tensors,
    settle,
)
from fmapkit.torchlib.modes import without_modes


class KeptMaps:
    """Keeps the maps of the passes that have ended."""

    def __init__(self, live: PassState, store: PassStore, budget: Budget | None) -> None:
        asked = live.asked
        self._wants = wants = asked.wants
        self._analyses = asked.analyses
        self._live = live
        self._misses = live.misses
        self._store = store
        self._budget = budget
        self._check = asked.check
        # With keep=0, maps go as they are seen; what a check is to look at stays to the end.
        self._fleeting = store.fleeting and asked.check is None
        copies = bool(wants.conversion) or wants.filters is not None
        put_away = copies or self._analyses or store.fleeting or budget or asked.check is not None
        self._only_references = not put_away

    def keep(self, current: Pass, failed: bool) -> None:
        """A pass has ended.

        Raises:
            BudgetError: its maps are more than was allowed.
            NonFiniteError: the check has found something.
            Exception: whatever an analysis raises.
        """
        if not self._only_references or has_inference_tensors(current):
            with without_modes():  # another capture's tracer may be on
                self._put_away(current, failed)

    def _put_away(self, current: Pass, failed: bool) -> None:
        conversion = self._wants.conversion
        if conversion:
            self._store_as_asked(current)
        conversion.end()
        if self._check is not None:
            for layer, why in self._check.look(current):
                self._misses.add(layer, why)
        if self._analyses and not failed:
            runs = [
                s for s in current.segments if isinstance(s, ReplayRun) and s.analyses is not None
            ]
            for run in runs:  # of which they have seen most, or all
                self._show(current, run.fresh(self._fleeting))
            if not runs:
                self._show(current, current.entries())
        if self._check is not None:
            self._keep_what_was_asked_for(current)
        if self._store.fleeting:
            current.release()
            conversion.buffers.drop()
        elif has_inference_tensors(current):
            settle(current)
        if self._budget is not None and not failed:
            self._budget.check(self._store)
        if self._check is not None and not failed:
            self._check.raise_found()

    def _keep_what_was_asked_for(self, current: Pass) -> None:
        """Let go of what was held to be looked at alone."""
        wants = self._wants
        current.keep_only(lambda entry: wants.asked(entry.kind, entry.origin.name))
        if not wants.asked_gradients:
            for held in current.held():
                held.gradient = None

    def _store_as_asked(self, current: Pass) -> None:
        """Another form for each map, as asked; one that cannot have it is named, and let go."""
        refused: dict[int, str] = {}
        for held in current.held():
            try:
                self._wants.put_away(held)
            except NotSupportedError as error:
                refused[id(held)] = str(error)
        for entry in current.without(refused) if refused else ():
            why = refused.get(id(entry.held)) or refused[id(entry.edited)]
            self._misses.add(entry.origin.name, why)

    def stream(self, run: ReplayRun) -> None:
        """Show the latest maps of a run while the model runs.

        With keep=0, a map lives no longer than that.
        """
        current = self._live.current
        assert current is not None
        self._show(current, run.fresh(self._fleeting))

    def _show(self, current: Pass, entries: Iterable[MapRecord]) -> None:
        """Have the analyses see some maps; should they call the model, we look away."""
        if self._wants.checks:
            asked = self._wants.asked
            entries = [e for e in entries if asked(e.kind, e.origin.name)]
        thread, self._live.thread = self._live.thread, 0
        try:
            for layer, why in self._analyses.see(current, entries):
                self._misses.add(layer, why)
        finally:
            self._live.thread = thread

    def name_spoiled(self, current: Pass) -> None:
        """Name the maps whose gradient nobody can tell."""
        for entry in current.entries():
            gradient = entry.held.gradient if entry.held is not None else None
            if gradient is not None and gradient.spoiled:
                self._misses.add(entry.origin.name, Reason.GRADIENT_OF_VIEW.text())
