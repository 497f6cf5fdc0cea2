"""What a selection means to maps that are there: the mistakes that would give an empty list."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection
from typing import NoReturn

from fmapkit.errors import ArgumentError, UnknownLayerError, did_you_mean, listed, near
from fmapkit.layers import layer_axis
from fmapkit.model import Names
from fmapkit.selection import LayerSelection, only_a_pass_can_tell
from fmapkit.selectors import Selector, by_name

__all__ = ["check_held", "check_only_names"]


def check_held(
    chosen: LayerSelection, names: Names, labels: Collection[str], wanted: Callable[[str], bool]
) -> None:
    """Whether each name and pattern of a selection means something that has maps.

    A module, a type or a callable may mean nothing; and a layer may be one that did not run.

    Args:
        chosen: the selection.
        names: of the model.
        labels: of the maps that are held.
        wanted: whether a layer was asked for in the capture.

    Raises:
        UnknownLayerError: one means no layer, or only modules that have no map of their own.
    """
    for selector, matched in chosen.matched.items():
        if not isinstance(selector.given, (str, re.Pattern)):
            continue
        if any(chosen.fits(label, [selector]) for label in labels):
            continue
        of_layers = [names.of(m) for m in matched if layer_axis(m) is not None]
        if any(map(wanted, of_layers)):
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


def check_only_names(chosen: LayerSelection) -> None:
    """Refuse selectors that look at the modules themselves, where these are gone.

    Raises:
        ArgumentError: there is one.
    """
    for selector in chosen.matched:
        if not isinstance(selector.given, (str, re.Pattern)) and not by_name(selector.given):
            raise ArgumentError(
                f"layers={selector!r}: maps that were loaded or copied have no modules any more; "
                "select them by name, glob, regex, or a callable of the name alone"
            )


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
