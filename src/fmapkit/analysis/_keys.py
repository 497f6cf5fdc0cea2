"""Which maps belong together, and how they are looked up: what the analyses here have in common."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from fmapkit.errors import (
    AmbiguousMapError,
    KindNotCapturedError,
    MapLookupError,
    NoActivationError,
    NoPassError,
    UnknownLayerError,
    check_kind,
    listed,
    no_layer,
)
from fmapkit.selectors import selectors

if TYPE_CHECKING:
    from fmapkit.maps import FeatureMap

Filters = tuple[int, ...] | None


@dataclass(frozen=True, slots=True)
class Name:
    """What maps have in common that are taken together, whatever their pass and call."""

    layer: str
    kind: str
    nonlinearity: str | None = None
    path: str = ""

    def __str__(self) -> str:
        return f"the {self.kind} of layer {self.layer!r}" + (f" at {self.path}" * bool(self.path))


G = TypeVar("G")


class Groups(Generic[G]):
    """What is known of each name, and of each set of filters under it.

    A layer's output that is split has a map for each part. Parts with no filter in common are kept
    apart; those with some in common but not all are left out, since a filter that is counted in
    one place only would look as if it had run less often.
    """

    def __init__(self, what: str) -> None:
        self.what = what  # "stats", for messages
        self.names: dict[Name, dict[Filters, G]] = {}
        self.missed: dict[tuple[str, str], str] = {}
        self._known: dict[Any, tuple[Name, Filters]] = {}

    def place(self, fm: FeatureMap) -> tuple[Name, Filters]:
        """Where a map belongs."""
        tags = (fm.layer, fm.kind, fm.nonlinearity, fm.path, fm.filters, fm.filter, fm.filter_dim)
        found = self._known.get(tags)
        # The number of filters along the axis can only be another if `filters` does not say it.
        if found is not None and (fm.filters is not None or fm.filter_dim is None):
            return found
        name = Name(fm.layer, fm.kind, fm.nonlinearity, fm.path)
        filters: Filters = None
        if fm.filters is not None and fm.filter_dim is not None:
            filters = tuple(fm.filters)
        elif fm.filter_dim is not None:
            filters = tuple(range(fm.shape[fm.filter_dim]))
        elif fm.filter is not None:
            filters = (fm.filter,)
        self._known[tags] = (name, filters)
        return name, filters

    def clash(self, name: Name, filters: Filters) -> str:
        """Why filters do not go with those that the name has; empty where they do."""
        groups = self.names.get(name, {})
        if filters in groups:
            return ""
        for other in groups:
            if other is None or filters is None or set(other) & set(filters):
                return (
                    f"{name} had {_said(other)} before and has {_said(filters)} now: maps are "
                    f"taken together filter by filter; {self.what}.reset() begins anew"
                )
        return ""

    def __iter__(self) -> Iterator[tuple[Name, Filters, G]]:
        """Every name, with each of its sets of filters and what is known of them."""
        for name, groups in self.names.items():
            for filters, known in groups.items():
                yield name, filters, known

    # -- look-ups ------------------------------------------------------------------------------

    @property
    def layers(self) -> list[str]:
        """The layers, in the order in which they were first seen."""
        return list(dict.fromkeys(name.layer for name in self.names))

    def find(self, key: Any) -> Name:
        """The one name that a key means; the errors are those of `ByLayer.__getitem__`."""
        layer, kind, path = self._parse(key)
        of_layer = [n for n in self.names if n.layer == layer]
        if not of_layer:
            self._unknown(layer, kind)
        found = [n for n in of_layer if n.kind == (kind or "activation")]
        if kind is None and not found and all(n.kind == "output" for n in of_layer):
            found = of_layer
        if not found:
            self._missing(layer, kind, of_layer)
        if path is not None:
            fitting = [n for n in found if n.path == path]
            if not fitting:
                raise MapLookupError(
                    f"{found[0]} has no path {path!r}; seen: {listed(n.path for n in found)}",
                    candidates=(n.path for n in found),
                )
            found = fitting
        if len(found) > 1:
            choices = ", ".join(
                f"(kind={n.kind!r}, nonlinearity={n.nonlinearity!r}, path={n.path!r})"
                for n in found[:8]
            )
            raise AmbiguousMapError(
                f"{self.what}[{key!r}] could mean {len(found)}: {choices}; choose with "
                f"{self.what}.select(layer={layer!r}, nonlinearity=…, path=…)",
                layer=layer,
                kind=kind,
                candidates=[
                    {"kind": n.kind, "nonlinearity": n.nonlinearity, "path": n.path} for n in found
                ],
            )
        return found[0]

    def _parse(self, key: Any) -> tuple[str, str | None, str | None]:
        parts = key if isinstance(key, tuple) else (key,)
        if not 1 <= len(parts) <= 3 or not all(isinstance(p, str) for p in (parts[0], *parts[2:])):
            raise MapLookupError(
                f"{self.what}[{key!r}]: the key is a layer's name, (layer, kind) or "
                "(layer, kind, path)"
            )
        kind = parts[1] if len(parts) > 1 else None
        if kind is not None:
            check_kind(kind, KindNotCapturedError, parts[0])
        return parts[0], kind, parts[2] if len(parts) > 2 else None

    def _unknown(self, layer: str, kind: str | None) -> None:
        for (other, its), reason in self.missed.items():
            if other == layer and kind in (None, its):
                raise UnknownLayerError(
                    f"the {its} of layer {layer!r} was left out: {reason}", layer=layer
                )
        if not self.names:
            raise NoPassError(
                f"nothing of {layer!r} yet: no map has been seen; call the model inside "
                f"`with capture(model, analyses=[{self.what}])` first",
                layer=layer,
            )
        raise no_layer(layer, self.layers, "seen")

    def _missing(self, layer: str, kind: str | None, there: list[Name]) -> None:
        kinds = list(dict.fromkeys(n.kind for n in there))
        if kind is None or kind == "activation":
            raise NoActivationError(
                f"no activation of layer {layer!r} has been seen: no nonlinearity follows it, or "
                f"it was not captured; ask for {self.what}[{layer!r}, {kinds[0]!r}]",
                layer=layer,
                kind="activation",
                candidates=kinds,
            )
        raise KindNotCapturedError(
            f"no {kind} of layer {layer!r} has been seen; seen of it: {listed(kinds)}",
            layer=layer,
            kind=kind,
            candidates=kinds,
        )

    def select(
        self, layer: Any, kind: str | None, nonlinearity: str | None, path: str | None
    ) -> list[Name]:
        """Every name that fits; arguments and errors are those of `ByLayer.select`."""
        if kind is not None:
            check_kind(kind)
        chosen = None if layer is None else selectors(layer)
        return [
            n
            for n in self.names
            if (chosen is None or any(s.matches(n.layer, None) for s in chosen))
            and kind in (None, n.kind)
            and nonlinearity in (None, n.nonlinearity)
            and path in (None, n.path)
        ]

    def parts(self, name: Name) -> tuple[Filters, list[G]]:
        """All filters of a name, and what is known of each set, the lowest filter first."""
        sets = sorted(self.names[name].items(), key=lambda item: item[0] or ())
        if sets[0][0] is None:
            return None, [known for _, known in sets]
        return tuple(f for of, _ in sets for f in of or ()), [known for _, known in sets]


def _said(filters: Filters) -> str:
    if filters is None:
        return "no filter axis"
    if len(filters) == 1:
        return f"1 filter ({filters[0]})"
    if filters == tuple(range(filters[0], filters[-1] + 1)):
        return f"{len(filters)} filters ({filters[0]} to {filters[-1]})"
    return (
        f"{len(filters)} filters ({', '.join(map(str, filters[:8]))}{', …' * (len(filters) > 8)})"
    )
