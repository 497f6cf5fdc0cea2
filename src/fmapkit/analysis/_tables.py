"""How an analysis shows itself: by a table, as text, in notebooks and on a page."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fmapkit.tables import Shown

if TYPE_CHECKING:
    import os
    from pathlib import Path

__all__ = ["Tabular"]


class Tabular(Shown):
    """Shows itself by a table, and as a page."""

    def to_html(self, path: str | os.PathLike[str], *, title: str | None = None) -> Path:
        """Write what is known as a page to share, one self-contained HTML file.

        Args:
            path: of the file; what is there is written over.
            title: of the page; None for the name of the class.

        Returns:
            The path.
        """
        from fmapkit import page

        return page.write_analysis(self, path, title=title)
