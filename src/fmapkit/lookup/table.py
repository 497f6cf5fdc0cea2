"""The table of maps, as text and as HTML."""

from __future__ import annotations

from fmapkit.errors import MapStateError
from fmapkit.lookup.records import latest, read
from fmapkit.map import row, size
from fmapkit.saving import MapSource
from fmapkit.tables import html_table, text_table

__all__ = ["maps_as_html", "maps_as_text"]

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


def maps_as_text(source: MapSource) -> str:
    """One line for each map of the latest pass."""
    rows = _rows(source)
    if not rows:
        return _summary(source)
    return "\n".join([*text_table(HEADS, rows, right=_RIGHT), _summary(source)])


def maps_as_html(source: MapSource) -> str:
    """The same table for notebooks."""
    return html_table(HEADS, _rows(source), right=_RIGHT, caption=_summary(source))
