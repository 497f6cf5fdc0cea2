"""The table of maps."""

from __future__ import annotations

from fmapkit.errors import MapStateError
from fmapkit.lookup.records import latest, read
from fmapkit.map import row, size
from fmapkit.saving import MapSource
from fmapkit.tables import Table

HEADS = ("layer", "kind", "filters", "shape", "dtype", "device", "bytes", "σ")
_RIGHT = {2, 6}


def _rows(source: MapSource) -> list[tuple[str, ...]]:
    rows = []
    for at, entry in latest(source):
        try:
            rows.append(row(read(source, at, entry)))
        except MapStateError as error:
            state = type(error).__name__.removeprefix("Map").removesuffix("Error").lower()
            rows.append((entry.origin.name, entry.kind, "–", state, "", "", "", entry.sigma or ""))
    return rows


def _summary(source: MapSource) -> str:
    store = source.store
    at = store.latest()
    if at is None:
        return "FeatureMaps: no pass captured yet"
    kept, found = len(store.passes), latest(source)
    missed = f", {len(source.missed)} missed (see maps.missed)" if source.missed else ""
    passes = f"step {at.step}" + (f", {kept} passes kept" if kept > 1 else "")
    return (
        f"FeatureMaps: {len(found)} maps of {len({e.origin.name for _, e in found})} layers, "
        f"{size(store.nbytes)} held, {passes}{missed}"
    )


def maps_table(source: MapSource) -> Table:
    """One line for each map of the latest pass."""
    return Table(HEADS, _rows(source), _RIGHT, _summary(source))
