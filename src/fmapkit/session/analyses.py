"""Running analyses: who sees each map of a capture, and how an error of theirs gets out."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Set
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from fmapkit.errors import ArgumentError, MapStateError
from fmapkit.instrumentation import without_the_models
from fmapkit.reasons import Reason
from fmapkit.storage import MapRecord, Pass
from fmapkit.torchlib.modes import without_modes

if TYPE_CHECKING:
    from fmapkit.map import FeatureMap


@runtime_checkable
class Analysis(Protocol):
    """Sees every captured map and keeps none.

    `update` is called once for each map of each captured pass, in execution order, without
    gradients. The model may overwrite the map's memory as soon as `update` returns: work out what
    is needed, and keep no reference to `fm.tensor`. What `update` raises is raised by the model's
    call. An `update` that reads a value on the host (`.item()`, a branch on a tensor) makes the
    model wait for its device. The model's modes (autocast, inference, function modes) are off in
    it, and its own calls of the captured model are not captured.
    """

    def update(self, fm: FeatureMap) -> None:
        """Take one map in."""


class Analyses:
    """The analyses of one capture.

    Raises:
        ArgumentError: something has no `update`.
    """

    def __init__(self, given: Any) -> None:
        one = (hasattr(given, "update") and not isinstance(given, Set)) or isinstance(given, type)
        several = list(given) if isinstance(given, Iterable) and not one else [given]
        for analysis in several:
            wrong = isinstance(analysis, (type, Mapping, Set))  # of which some have an `update`
            if wrong or not callable(getattr(analysis, "update", None)):
                hint = " (a class: make an instance first)" if isinstance(analysis, type) else ""
                raise ArgumentError(
                    "analyses must be objects with an update(fm: FeatureMap), such as "
                    f"fmapkit.analysis.Statistics(), not {analysis!r}{hint}"
                )
        self._all = several
        # Makes the `FeatureMap` that they see; set while the block is open.
        self.view: Callable[[Pass, MapRecord], Any] | None = None
        self.raised: BaseException | None = None  # by an analysis; no fault of ours

    def __bool__(self) -> bool:
        return bool(self._all)

    def see(self, current: Pass, entries: Iterable[MapRecord]) -> Iterator[tuple[str, str]]:
        """Show them some maps, in order.

        The model's modes are off meanwhile: what analyses compute is no part of its graph, is not
        counted as its own, and can go on being written to whatever mode the next pass has.

        Yields:
            What they could not be shown: (layer, why).
        """
        self.raised = None  # its traceback holds what ran then
        if self.view is None:
            return
        for entry in entries:
            with without_modes(), without_the_models():
                try:
                    fm = self.view(current, entry)
                except MapStateError as error:
                    yield entry.origin.name, Reason.ANALYSES_DID_NOT_SEE.text(error=error)
                    continue
                try:
                    for analysis in self._all:
                        analysis.update(fm)
                except Exception as error:
                    self.raised = error
                    raise
