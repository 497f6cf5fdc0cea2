"""Where maps come from, as look-ups, tables and copies see it."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Protocol

from fmapkit.missed import Missed
from fmapkit.model import Names
from fmapkit.storage import PassStore, StorageConversion


class AskedFor(Protocol):
    """What `capture` was asked for."""

    @property
    def asked_kinds(self) -> Collection[str]:
        """The kinds."""

    @property
    def retention(self) -> StorageConversion:
        """The form in which maps are stored."""

    def layer(self, name: str) -> bool:
        """Whether maps of a layer were asked for."""

    def asked(self, kind: str, layer: str) -> bool:
        """Whether such a map was asked for."""


class MapSource(Protocol):
    """The passes of a capture; `Session` is one, and `KeptSession`."""

    @property
    def names(self) -> Names:
        """Of the model's modules."""

    @property
    def wants(self) -> AskedFor:
        """What was asked for."""

    @property
    def store(self) -> PassStore:
        """The passes that are kept."""

    @property
    def steps(self) -> int:
        """How many passes there were."""

    @property
    def missed(self) -> Sequence[Missed]:
        """What was not captured."""
