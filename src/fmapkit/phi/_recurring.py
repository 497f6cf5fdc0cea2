"""One capture for many single calls: what it has recorded stays, and between calls nothing is set.

A capture's block traces the model in its first pass. A function that captures one pass whenever it
is called would trace it each time. So its session is not closed between two calls but rests: all
that it has set on modules, functions and torch is taken off, and put back before the next call.
What was recorded is checked as before any other pass.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from fmapkit.capture import capture
from fmapkit.map import FeatureMap, read_map
from fmapkit.maps import FeatureMaps
from fmapkit.missed import Missed
from fmapkit.model import Names, unwrap
from fmapkit.session import Rest, Session
from fmapkit.torchlib.compiled_modules import compiled_roots, plain
from fmapkit.torchlib.transforms import returned


def can_stop(model: nn.Module) -> bool:
    """Whether a pass of it can be ended where the maps are there.

    Compiled code runs to its end. So does what other ranks take part in: they would wait.
    """
    inner = plain(model)
    return not compiled_roots(model) and unwrap(inner) is inner and not Names(inner).collective()


class Recurring:
    """A capture that is entered again and again, for a call each time, by one thread.

    Args:
        made: the capture; it is used up by this.

    Attributes:
        maps: of the latest call; to be cleared by whoever has read them.
        inside: a call is under way.
    """

    def __init__(self, made: capture) -> None:
        self._made = made
        self._session: Session = made._session
        self._rest: Rest | None = None
        self.names: Names = self._session.names
        self._before = False
        self.inside = False
        self.maps: FeatureMaps
        # Whoever reads the maps says what is not there.
        self._session.parts.misses.quiet()

    @property
    def missed(self) -> list[Missed]:
        """What ran in some call and was not captured; nobody was warned of it."""
        return self._session.missed

    @property
    def captured(self) -> bool:
        """Whether the call that is under way was a pass that could be captured."""
        return self._session.store.latest() is not None

    def found(self) -> list[FeatureMap]:
        """The maps of the call that is under way, in execution order."""
        latest = self._session.store.latest()
        return [read_map(latest, entry) for entry in latest.entries()] if latest else []

    @property
    def alone(self) -> bool:
        """Whether no other capture is open in this thread that would see the call."""
        return self._session.alone()

    def label_of(self, layer: Any) -> str:
        """The name that the maps of a layer have, which is given by a name or as a module."""
        if isinstance(layer, nn.Module):
            return self.names.of(unwrap(layer))
        return self.names.canonical(layer)

    def __enter__(self) -> FeatureMaps:
        """Set again what was set when the latest call ended."""
        session = self._session
        # Whoever else is open would hold what lives in a torch.func transform.
        self._before = returned.on
        if self._rest is None:
            self.maps = self._made.__enter__()
        else:
            session.wake(self._rest)
        returned.on = session.alone()
        self.inside = True
        return self.maps

    def __exit__(self, *error: object) -> None:
        self.inside = False
        returned.on = self._before
        self._rest = self._session.rest()
