"""Analyses that sum up the maps of each layer: what those here have in common, but for the sums."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from fmapkit._warnings import warn
from fmapkit.analysis._keys import Groups, Name
from fmapkit.errors import ArgumentError

if TYPE_CHECKING:
    from fmapkit.maps import FeatureMap

__all__ = ["ByLayer"]

G = TypeVar("G")  # what is known of one set of filters
S = TypeVar("S")  # how that is read


class ByLayer(ABC, Generic[G, S]):
    """Reads what is known, layer by layer."""

    _groups: Groups[G]

    @abstractmethod
    def _read(self, name: Name) -> S:
        """What is known of the maps of one name."""

    @property
    def layers(self) -> list[str]:
        """The layers seen, in the order in which they first were."""
        return self._groups.layers

    @property
    def missed(self) -> dict[tuple[str, str], str]:
        """What was left out: the reason by (layer, kind)."""
        return dict(self._groups.missed)

    def __contains__(self, layer: object) -> bool:
        return any(name.layer == layer for name in self._groups.names)

    def __iter__(self) -> Iterator[S]:
        """All that is known, in the order in which it was first seen."""
        return iter([self._read(name) for name in self._groups.names])

    def __len__(self) -> int:
        """How many that is."""
        return len(self._groups.names)

    def __bool__(self) -> bool:
        """It is there, also when nothing has been seen."""
        return True

    def _check_state(self, state: Any) -> None:
        """Whether `load_state_dict` can take it.

        Raises:
            ArgumentError: it is of another kind or version.
        """
        if not isinstance(state, Mapping) or state.get("version") != 1 or "groups" not in state:
            raise ArgumentError(
                f"load_state_dict takes what {type(self).__name__}.state_dict() gave, of version 1"
            )

    def _leave_out(self, fm: FeatureMap, what: str, reason: str) -> None:
        """Name a map that cannot be taken in, once."""
        if (fm.layer, fm.kind) not in self._groups.missed:
            self._groups.note(fm, reason)
            warn(f"{type(self).__name__} leaves out {what}: {reason}")
