"""Early stop: the forward ends once every wanted map of the first, complete pass is there.

The way out is an exception, raised by our hooks and caught by the pair around the model's own call,
which then returns None.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fmapkit.storage import MapRecord, Pass


class StoppedError(BaseException):
    """All wanted maps are there. Not an `Exception`: a forward that catches those lets it pass."""

    def __init__(self, stop: EarlyStop) -> None:
        super().__init__("fmapkit: every wanted map is there")
        self.stop = stop


def _tag(entry: MapRecord) -> Any:
    return entry.origin.name, entry.origin.call, entry.kind, entry.path, entry.sigma


class EarlyStop:
    """Knows what is still wanted in a pass."""

    def __init__(self) -> None:
        # Whether another capture that ends passes still wants something of this one.
        self.awaited: Callable[[], bool] = bool
        self._wanted: frozenset[Any] | None = None  # by the first complete pass
        self._missing: set[Any] = set()
        self.ended = False
        self._over = False  # the model has run to its end

    def begin(self) -> None:
        self._missing = set(self._wanted or ())
        self.ended = self._over = False

    def run_out(self) -> None:
        """The model has run to its end: there is nothing to stop."""
        self._over = True

    def saw(self, entry: MapRecord) -> None:
        """A map is there."""
        self._missing.discard(_tag(entry))

    @property
    def complete(self) -> bool:
        """Whether all that the first one had is there."""
        return bool(self._wanted) and not self._missing

    def learn(self, whole: Pass) -> None:
        """A pass went through to its end; the first one's maps are what is wanted."""
        if self._wanted is None:
            self._wanted = frozenset(map(_tag, whole.entries()))

    def forget(self) -> None:
        """The model has changed: the next pass is a complete one."""
        self._wanted = None
        self._missing.clear()

    def check(self) -> None:
        """End the pass if all that the first one had is there.

        Raises:
            StoppedError: it is, and no other capture that ends passes waits for more.
        """
        if self.complete:
            self.end()

    def end(self) -> None:
        """End the pass.

        Raises:
            StoppedError: no other capture that ends passes waits for more; if one does, it will end
                this one.
        """
        if self._over or self.awaited():
            return
        self.ended = True
        raise StoppedError(self)
