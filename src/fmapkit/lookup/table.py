"""The table of maps, as text and as HTML."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fmapkit._line import row, size
from fmapkit.errors import MapStateError

if TYPE_CHECKING:
    from fmapkit.maps import FeatureMaps

__all__ = ["html", "text"]

HEADS = ("layer", "kind", "filters", "shape", "dtype", "device", "bytes", "σ")
_RIGHT = {2, 6}


def _rows(maps: FeatureMaps) -> list[tuple[str, ...]]:
    rows = []
    for at, entry in maps._latest():
        try:
            rows.append(row(maps._read(at, entry)))
        except MapStateError as error:
            state = type(error).__name__.removeprefix("Map").removesuffix("Error").lower()
            rows.append((entry.origin.name, entry.kind, "–", state, "", "", "", entry.sigma or ""))
    return rows


def _summary(maps: FeatureMaps) -> str:
    latest = maps._session.store.latest()
    if latest is None:
        return "FeatureMaps: no pass captured yet"
    kept = len(maps._session.store.passes)
    missed = f", {len(maps.missed)} missed (see maps.missed)" if maps.missed else ""
    passes = f"step {latest.step}" + (f", {kept} passes kept" if kept > 1 else "")
    return (
        f"FeatureMaps: {len(maps)} maps of {len(maps.layers)} layers, "
        f"{size(maps.nbytes)} held, {passes}{missed}"
    )


def text(maps: FeatureMaps) -> str:
    """One line for each map of the latest pass."""
    rows = _rows(maps)
    if not rows:
        return _summary(maps)
    widths = [max(len(r[i]) for r in (HEADS, *rows)) for i in range(len(HEADS))]

    def line(row: tuple[str, ...]) -> str:
        cells = [
            c.rjust(w) if i in _RIGHT else c.ljust(w)
            for i, (c, w) in enumerate(zip(row, widths, strict=True))
        ]
        return "  ".join(cells).rstrip()

    rule = "  ".join("─" * w for w in widths)
    return "\n".join([line(HEADS), rule, *map(line, rows), _summary(maps)])


def html(maps: FeatureMaps) -> str:
    """The same table for notebooks."""
    from fmapkit.page import html_table

    return html_table(HEADS, _rows(maps), right=_RIGHT, caption=_summary(maps))
