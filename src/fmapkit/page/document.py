"""The page around the sections; what is written to the file."""

from __future__ import annotations

import base64
import io
import json
import os
import re
from collections.abc import Iterable, Sequence
from html import escape
from importlib import resources
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from fmapkit.errors import ArgumentError, check_positive
from fmapkit.missed import Missed
from fmapkit.page.encoding import png
from fmapkit.page.of_maps import map_sections
from fmapkit.page.panels import Section
from fmapkit.plot import latest_maps, spread_pixels
from fmapkit.readable import ReadableMaps


class PageMaps(ReadableMaps, Protocol):
    """The maps that a page shows, with their table and what was missed."""

    @property
    def missed(self) -> Sequence[Missed]:
        """What was not captured."""

    def _repr_html_(self) -> str: ...


def write_maps(
    maps: PageMaps,
    path: str | os.PathLike[str],
    layers: Any = None,
    *,
    image: Any = None,
    sample: int = 0,
    max_filters: int = 1024,
    max_side: int = 56,
    grid: tuple[int, int] | None = None,
    mean: float | Sequence[float] | None = None,
    std: float | Sequence[float] | None = None,
    analyses: Any = (),
    title: str | None = None,
) -> Path:
    """Write the maps of the latest pass, for one sample, as one self-contained HTML file.

    The page has the layers in the order of execution, each with its maps by filter, on one colour
    scale a map. Values are kept in eight bits, and larger images as means of blocks, so a value
    that is pointed at is right to half of a 254th of its map's scale; what the page says of a whole
    filter (highest |value|, mean, zeros) is worked out from all its values, to six digits.

    Args:
        maps: what `capture` gave.
        path: of the file; what is there is written over.
        layers: which layers: anything that `maps.select(layers=...)` takes; None for all.
        image: what the model was given: (H, W), (C, H, W) or a batch (N, C, H, W), of one or
            three channels. Whole numbers are 0 to 255; others 0 to 1, or they are spread over
            that range, and the page says so.
        sample: which sample of the batch.
        max_filters: how many filters of a map go in; of more, those with the highest |value|.
        max_side: larger images go in as means of blocks of pixels, in pixels a side.
        grid: of maps of tokens that are patches of an image: their rows and columns. Tokens
            before these, such as the class token, are left out.
        mean: of the image's channels, where it was normalised by it; with `std`.
        std: of the image's channels.
        analyses: analyses and Matplotlib figures that go in below the maps.
        title: of the page.

    Returns:
        The path.

    Raises:
        NoPassError: there are no maps yet.
        MapLookupError: `layers` selects none of the captured ones.
        MapStateError: a map cannot be read any more.
        ArgumentError: there is no such sample, a number is not positive, no map has the tokens
            of `grid`, or the image has another shape.
    """
    check_positive(max_filters=max_filters, max_side=max_side)
    if (mean is None) != (std is None):
        raise ArgumentError("mean= and std= go together: the image is (x - mean) / std")
    found = latest_maps(maps, layers, "show")
    sections = [] if image is None else [_image(*spread_pixels(image, mean, std, sample))]
    sections.append(_table(maps))
    sections += map_sections(found, sample, max_filters, max_side, grid)
    sections += analysis_sections(analyses)
    subtitle = f"sample {sample} of step {found[0].step}"
    return _write(path, title or "Feature maps", subtitle, sections)


def write_analysis(
    analysis: Any, path: str | os.PathLike[str], *, title: str | None = None
) -> Path:
    """Write what analyses know, as one self-contained HTML file.

    Args:
        analysis: an analysis, or several.
        path: of the file; what is there is written over.
        title: of the page; None for the name of the analysis.

    Returns:
        The path.
    """
    sections = analysis_sections(analysis)
    return _write(path, title or sections[0].name, "", sections)


def analysis_sections(analyses: Any) -> list[Section]:
    """The sections of one analysis, or of several; a Matplotlib figure counts as one.

    An analysis is shown by its table: its `_repr_html_`, or its `repr`. Where it has a method
    `_page_sections`, what that gives comes below.
    """
    several = isinstance(analyses, Iterable) and not hasattr(analyses, "update")
    sections: list[Section] = []
    for analysis in analyses if several else [analyses]:
        if hasattr(analysis, "savefig"):
            sections.append(Section("figure", html=_figure(analysis)))
            continue
        shown = getattr(analysis, "_repr_html_", None)
        html = str(shown()) if callable(shown) else f"<pre>{escape(repr(analysis))}</pre>"
        sections.append(Section(type(analysis).__name__, html=html))
        if hasattr(analysis, "_page_sections"):
            sections += analysis._page_sections()
    return sections


def _figure(figure: Any) -> str:
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=110)
    data = base64.b64encode(file.getvalue()).decode("ascii")
    return f'<img alt="figure" src="data:image/png;base64,{data}">'


def _table(maps: PageMaps) -> Section:
    notes = [f"{missed.layer or '(model)'}: {missed.reason}." for missed in maps.missed]
    note = "Not captured: " + " ".join(notes) if notes else ""
    return Section("All maps", note=note, html=maps._repr_html_())


def _image(shades: np.ndarray[Any, Any], note: str) -> Section:
    shown = png(np.rint(shades * 255).astype(np.uint8))
    picture = f'<img class="given" alt="what the model was given" src="{shown}">'
    return Section("What the model was given", note=note, html=picture)


def _write(
    path: str | os.PathLike[str], title: str, subtitle: str, sections: Sequence[Section]
) -> Path:
    assets = resources.files("fmapkit.page") / "assets"
    names = ("page.html", "page.css", "page.js")
    text = {name: (assets / name).read_text(encoding="utf-8") for name in names}
    data = json.dumps({"sections": [s.written() for s in sections]}, separators=(",", ":"))
    # In a script element only "</script" and "<!--" end what is JSON; "<" can be written so.
    parts = {
        "title": escape(title),
        "subtitle": escape(subtitle),
        "style": text["page.css"],
        "script": text["page.js"],
        "data": data.replace("<", "\\u003c"),
    }
    page = re.sub(r"\{\{(\w+)\}\}", lambda found: parts[found[1]], text["page.html"])
    target = Path(path)
    target.write_text(page, encoding="utf-8")
    return target
