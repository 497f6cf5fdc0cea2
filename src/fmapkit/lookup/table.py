"""The table of maps, as text and as HTML."""

from __future__ import annotations

from fmapkit.errors import MapStateError
from fmapkit.lookup.records import latest, read
from fmapkit.map import row, size
from fmapkit.saving import Source

__all__ = ["html", "text"]

HEADS = ("layer", "kind", "filters", "shape", "dtype", "device", "bytes", "σ")
_RIGHT = {2, 6}


def _rows(source: Source) -> list[tuple[str, ...]]:
    rows = []
    for at, entry in latest(source):
        try:
            rows.append(row(read(source, at, entry)))
        except MapStateError as error:
            state = type(error).__name__.removeprefix("Map").removesuffix("Error").lower()
            rows.append((entry.origin.name, entry.kind, "–", state, "", "", "", entry.sigma or ""))
    return rows


def _summary(source: Source) -> str:
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


def text(source: Source) -> str:
    """One line for each map of the latest pass."""
    rows = _rows(source)
    if not rows:
        return _summary(source)
    widths = [max(len(r[i]) for r in (HEADS, *rows)) for i in range(len(HEADS))]

    def line(row: tuple[str, ...]) -> str:
        cells = [
            c.rjust(w) if i in _RIGHT else c.ljust(w)
            for i, (c, w) in enumerate(zip(row, widths, strict=True))
        ]
        return "  ".join(cells).rstrip()

    rule = "  ".join("─" * w for w in widths)
    return "\n".join([line(HEADS), rule, *map(line, rows), _summary(source)])


def html(source: Source) -> str:
    """The same table for notebooks."""
    from fmapkit.page import html_table

    return html_table(HEADS, _rows(source), right=_RIGHT, caption=_summary(source))
