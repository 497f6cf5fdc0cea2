"""What tells maps of one pass apart, and what they are called in a table."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fmapkit.maps import FeatureMap


@dataclass(frozen=True, slots=True)
class MapTag:
    """What tells a map from all others of its pass."""

    layer: str
    path: str
    kind: str
    call: int
    nonlinearity: str
    filters: tuple[int, ...]  # the first, the last and the number of them; empty without an axis

    @classmethod
    def of(cls, fm: FeatureMap) -> MapTag:
        there = fm.filters
        filters = (there[0], there[-1], len(there)) if there else ()
        return cls(fm.layer, fm.path, fm.kind, fm.call, fm.nonlinearity or "", filters)

    @property
    def place(self) -> str:
        """The layer, and where in its output."""
        return (self.layer or "(model)") + self.path

    @property
    def label(self) -> str:
        """What it is called where nothing is known of other maps."""
        plain = self.kind in ("activation", "output")
        return self.place + ("" if plain else f" {self.kind}") + f" #{self.call}" * bool(self.call)


def labels(tags: Sequence[MapTag]) -> list[str]:
    """A label for each, all different: of an activation the layer, of an output where that is free.

    More is said only where it is needed: the call from the second one on, σ, the filters.
    """
    activations = {tag.place for tag in tags if tag.kind == "activation"}
    found: list[str] = []
    for tag in tags:
        label = tag.label
        if tag.kind == "output" and tag.place in activations:
            label = f"{tag.place} output" + f" #{tag.call}" * bool(tag.call)
        part = f"{tag.filters[0]} to {tag.filters[1]}" if tag.filters else "the whole"
        choices = [label, f"{label} ({tag.nonlinearity})", f"{label} ({part})"]
        choices += [f"{label} ({tag.nonlinearity}, {part}, {n})" for n in range(len(tags))]
        found.append(next(choice for choice in choices if choice not in found))
    return found
