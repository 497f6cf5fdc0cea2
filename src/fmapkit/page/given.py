"""What is given to a page beside the maps: analyses, each with sections of its own, and figures."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Iterable
from typing import Any

from fmapkit.page.panels import Section

__all__ = ["analysis_sections"]


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
        sections.append(Section(type(analysis).__name__, html=_table(analysis)))
        if hasattr(analysis, "_page_sections"):
            sections += analysis._page_sections()
    return sections


def _table(analysis: Any) -> str:
    shown = getattr(analysis, "_repr_html_", None)
    if callable(shown):
        return str(shown())
    return f"<pre>{html.escape(repr(analysis))}</pre>"


def _figure(figure: Any) -> str:
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=110)
    data = base64.b64encode(file.getvalue()).decode("ascii")
    return f'<img alt="figure" src="data:image/png;base64,{data}">'
