"""Where a NaN or an infinite value was: the record that `NonFiniteError` carries."""

from __future__ import annotations

import math
from dataclasses import dataclass

from fmapkit.kinds import Kind
from fmapkit.readable import ReadableMap


@dataclass(frozen=True, slots=True)
class NonFinite:
    """The first map of a pass, or the first gradient of a backward, that has such a value.

    Attributes:
        layer: the layer of the map; of an output, the module.
        kind: of the map.
        filter: the first filter that has one; None where the map has no filter axis.
        call: which call of the layer.
        step: which pass.
        path: place in a nested output; else "".
        value: the value: NaN, or plus or minus infinity.
        filters: every filter of the map that has one.
        gradient: it is the gradient with respect to the map, in backward.
        largest: the largest finite magnitude in what came before it; None if nothing did.
        largest_in: where that was.
        response_finite: of a preactivation: the response of the same layer was finite, so what
            stands between layer and nonlinearity has made the value.
        map: the map, where it is held.
    """

    layer: str
    kind: Kind
    filter: int | None
    call: int
    step: int
    path: str
    value: float
    filters: tuple[int, ...]
    gradient: bool
    largest: float | None
    largest_in: str | None
    response_finite: bool
    map: ReadableMap | None = None

    def __str__(self) -> str:
        value = "a NaN" if math.isnan(self.value) else f"{self.value:+}"
        there = f" in filter {self.filter}" if self.filter is not None else ""
        if len(self.filters) > 1:
            there += f" and {len(self.filters) - 1} more"
        first = "in backward" if self.gradient else "of the pass"
        whose = named(self.layer, self.kind, self.path)
        before = "nothing came before it"
        if self.largest is not None:
            before = (
                f"the largest finite value before it is {self.largest:.4g}, in {self.largest_in}"
            )
        between = ""
        if self.response_finite:
            between = (
                "; the response of that layer is finite, so what stands between it and the "
                "nonlinearity (a norm, a scale, a sum) has made the value"
            )
        return (
            f"{'the gradient of ' * self.gradient}{whose} (step {self.step}, call {self.call}) has "
            f"{value}{there}, the first {first}{between}; {before}"
        )


def named(layer: str, kind: str, path: str) -> str:
    """A map, as a message calls it."""
    return f"the {kind} of layer {layer + path!r}" if layer else f"the {kind}{path} of the model"
