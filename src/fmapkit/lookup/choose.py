"""The maps that fit, over every pass that is kept: `maps.select(...)`."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from typing import Any, NoReturn

from fmapkit.errors import (
    ArgumentError,
    UnknownLayerError,
    check_kind,
    did_you_mean,
    listed,
    near,
)
from fmapkit.layers import layer_axis
from fmapkit.lookup.records import every, read
from fmapkit.map import FeatureMap
from fmapkit.model import Names
from fmapkit.saving import KeptSession, MapSource
from fmapkit.selection import LayerSelection, only_a_pass_can_tell
from fmapkit.selectors import Selector, by_name


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
    """The maps that fit, in execution order; arguments and errors are `FeatureMaps.select`'s."""
    if kind is not None:
        check_kind(kind)
    if training is not None and not isinstance(training, bool):
        raise ArgumentError(f"training must be True, False or None, not {training!r}")
    chosen = None if layers is None else LayerSelection(source.names, layers)
    if chosen is not None:
        _check_held(chosen, source)
    asked = (kind, pass_number(source, step), training, call, nonlinearity, path)
    for at, entry in every(source):
        its = (entry.kind, at.step, at.training, entry.origin.call, entry.sigma, entry.path)
        if any(a is not None and a != b for a, b in zip(asked, its, strict=True)):
            continue
        if chosen is not None and not chosen.layer(entry.origin.name):
            continue
        found = read(source, at, entry)
        if filter is None:
            yield found
        elif found.filters is not None and filter in found.filters:
            yield found[filter]


def pass_number(source: MapSource, step: int | None) -> int | None:
    """A pass by its number; -1 is the latest of those kept."""
    if step is None or step >= 0:
        return step
    held = [p.step for p in source.store]
    return held[step] if -step <= len(held) else -1


# -- the mistakes that would give an empty list ------------------------------------------------


def _check_held(chosen: LayerSelection, source: MapSource) -> None:
    """Whether each name and pattern of a selection means something that has maps.

    A module, a type or a callable may mean nothing; and a layer may be one that did not run.
    """
    for selector in chosen.matched if isinstance(source, KeptSession) else ():
        if not isinstance(selector.given, (str, re.Pattern)) and not by_name(selector.given):
            raise ArgumentError(
                f"layers={selector!r}: maps that were loaded or copied have no modules any more; "
                "select them by name, glob, regex, or a callable of the name alone"
            )
    names = source.names
    labels = list(dict.fromkeys(e.origin.name for _, e in every(source)))
    for selector, matched in chosen.matched.items():
        if not isinstance(selector.given, (str, re.Pattern)):
            continue
        if any(chosen.fits(label, [selector]) for label in labels):
            continue
        of_layers = [names.of(m) for m in matched if layer_axis(m) is not None]
        if any(map(source.wants.layer, of_layers)):
            continue
        if of_layers:
            raise UnknownLayerError(
                f"layers={selector!r} was not selected in capture(layers=...); "
                f"held: {listed(labels)}",
                layer=of_layers[0],
                candidates=labels,
            )
        if not matched:
            _check_known(selector, names, labels)
        elif labels:
            _no_filters(selector, labels, [names.of(module) for module in matched])


def _check_known(selector: Selector, names: Names, labels: Collection[str]) -> None:
    given = selector.given
    if isinstance(given, str) and only_a_pass_can_tell(names, given):
        return
    known = list(dict.fromkeys((*labels, *filter(None, names.by_name))))
    raise UnknownLayerError(
        f"layers={selector!r} matches no layer{did_you_mean(given, known)} "
        f"({f'held: {listed(labels)}' if labels else 'no map is held yet'})",
        layer=given if isinstance(given, str) else None,
        candidates=near(given, known) or labels,
    )


def _no_filters(selector: Selector, labels: Collection[str], matched: list[str]) -> NoReturn:
    """The modules that a selector means have no filters, and what they return is not held."""
    name = matched[0]
    inside = [label for label in labels if label.startswith(f"{name}.")]
    more = f"; for the layers in it, layers={name + '.*'!r}" if inside else ""
    raise UnknownLayerError(
        f"layers={selector!r} means {listed(matched, 3)}, of which no map is held: what a module "
        f"returns is captured by capture(model, layers={name!r}, kinds='output'){more} "
        f"(held: {listed(labels)})",
        layer=name,
        candidates=inside,
    )
