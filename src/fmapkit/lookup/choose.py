"""The maps that fit, over every pass that is kept: `maps.select(...)`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from fmapkit.errors import ArgumentError, check_kind
from fmapkit.lookup.by_selector import check_held, check_only_names
from fmapkit.lookup.records import every, read
from fmapkit.map import FeatureMap
from fmapkit.saving import KeptSession, MapSource
from fmapkit.selection import LayerSelection

__all__ = ["choose", "pass_number"]


def choose(
    source: MapSource,
    layers: Any,
    kind: str | None,
    filter: int | None,
    call: int | None,
    step: int | None,
    nonlinearity: str | None,
    path: str | None,
    training: bool | None,
) -> Iterator[FeatureMap]:
    """The maps that fit, in execution order; the arguments are those of `FeatureMaps.select`.

    Raises:
        ArgumentError: an argument is of no allowed form.
        UnknownLayerError: a name or a pattern in `layers` means no layer that has maps.
    """
    if kind is not None:
        check_kind(kind)
    if training is not None and not isinstance(training, bool):
        raise ArgumentError(f"training must be True, False or None, not {training!r}")
    chosen = None if layers is None else _chosen(source, layers)
    step = pass_number(source, step)
    for at, entry in every(source):
        origin = entry.origin
        if kind is not None and entry.kind != kind:
            continue
        if step is not None and at.step != step:
            continue
        if training is not None and at.training != training:
            continue
        if call is not None and origin.call != call:
            continue
        if nonlinearity is not None and entry.sigma != nonlinearity:
            continue
        if path is not None and entry.path != path:
            continue
        if chosen is not None and not chosen.layer(origin.name):
            continue
        found = read(source, at, entry)
        if filter is None:
            yield found
        elif found.filters is not None and filter in found.filters:
            yield found[filter]


def _chosen(source: MapSource, layers: Any) -> LayerSelection:
    chosen = LayerSelection(source.names, layers)
    if isinstance(source, KeptSession):
        check_only_names(chosen)
    labels: dict[str, None] = dict.fromkeys(e.origin.name for _, e in every(source))
    check_held(chosen, source.names, list(labels), source.wants.layer)
    return chosen


def pass_number(source: MapSource, step: int | None) -> int | None:
    """A pass by its number; -1 is the latest of those kept."""
    if step is None or step >= 0:
        return step
    held = [p.step for p in source.store]
    return held[step] if -step <= len(held) else -1
