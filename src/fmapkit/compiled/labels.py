"""What a compiled graph's maps are: which of its outputs, of which layer, claimed by what.

Told by a trace of the graph (`compiled/graph.py`), and read in each of its runs, which need none of
torch's tracing tools.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from fmapkit.replay import Effects, SiteMap


@dataclass(frozen=True, slots=True)
class GraphMap(SiteMap):
    """One map of a compiled graph.

    Attributes:
        place: of its tensor among the graph's outputs; from -1 downwards, among its inputs.
    """

    place: int
    copied: bool


@dataclass(frozen=True, slots=True)
class Labels:
    """What a graph's maps are, given what its inputs carry.

    Attributes:
        sources: the map that tells of each tensor to be held; maps may share one.
        places: of these tensors, as in `GraphMap`.
        slots: of each map, which tensor it is.
        picking: of some map, only some filters are held.
    """

    maps: tuple[GraphMap, ...]
    effects: Effects
    sources: tuple[GraphMap, ...] = field(init=False)
    places: tuple[int, ...] = field(init=False)
    slots: tuple[int, ...] = field(init=False)
    picking: bool = field(init=False)

    def __post_init__(self) -> None:
        keys = [(m.place, m.picked) for m in self.maps]
        first = dict(zip(reversed(keys), reversed(self.maps), strict=True))
        order = list(dict.fromkeys(keys))
        put = object.__setattr__  # as frozen dataclasses do
        put(self, "sources", tuple([first[key] for key in order]))
        put(self, "places", tuple([place for place, _ in order]))
        put(self, "slots", tuple(map(order.index, keys)))
        put(self, "picking", any(picked is not None for _, picked in order))
