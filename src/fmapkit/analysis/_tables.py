"""How an analysis shows itself: a table, as text, in notebooks and on a page."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from fmapkit.tables import html_table, text_table

if TYPE_CHECKING:
    import os
    from pathlib import Path

__all__ = ["Shown", "Table", "Tabular"]


@dataclass(frozen=True, slots=True)
class Table:
    """What an analysis shows of itself, as text and as HTML.

    Attributes:
        heads: of the columns.
        rows: a line for each layer, or for each filter.
        left: how many of the first columns are set to the left.
        last: the line below, or all there is to say where there are no rows.
    """

    heads: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]
    left: int
    last: str

    @property
    def _right(self) -> range:
        return range(self.left, len(self.heads))

    def text(self) -> str:
        """For a terminal."""
        lines = text_table(self.heads, self.rows, right=self._right) if self.rows else []
        return "\n".join([*lines, self.last])

    def html(self) -> str:
        """For a notebook."""
        return html_table(self.heads, self.rows, right=self._right, caption=self.last)


class Shown(ABC):
    """Shows itself by a table."""

    __slots__ = ()

    @abstractmethod
    def _table(self) -> Table:
        """What is known; waits for the device."""

    def __repr__(self) -> str:
        return self._table().text()

    def _repr_html_(self) -> str:
        return self._table().html()


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
