"""How an analysis shows itself: by a table, as text, in notebooks and on a page."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fmapkit._lazy import LazyMethod
from fmapkit.tables import Shown

if TYPE_CHECKING:
    from fmapkit import page

__all__ = ["Tabular"]


class Tabular(Shown):
    """Shows itself by a table, and as a page."""

    if TYPE_CHECKING:
        to_html = page.write_analysis
        """Write what is known as a page to share, one HTML file: `fmapkit.page.write_analysis`."""
    else:
        to_html = LazyMethod("fmapkit.page", "write_analysis")
