"""Tables, as text for a terminal and as HTML for notebooks and pages."""

from __future__ import annotations

import html
from abc import ABC, abstractmethod
from collections.abc import Collection, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Table:
    """What something shows of itself."""

    heads: tuple[str, ...]  # of the columns
    rows: Sequence[tuple[str, ...]]  # the cells, a line each
    right: Collection[int]  # which columns are set to the right; the others to the left
    last: str  # the line below, or all there is to say where there are no rows

    def text(self) -> str:
        """For a terminal."""
        if not self.rows:
            return self.last
        widths = [max(map(len, column)) for column in zip(self.heads, *self.rows, strict=True)]

        def line(row: Sequence[str]) -> str:
            cells = [
                c.rjust(w) if i in self.right else c.ljust(w)
                for i, (c, w) in enumerate(zip(row, widths, strict=True))
            ]
            return "  ".join(cells).rstrip()

        under = "  ".join("─" * w for w in widths)
        return "\n".join([line(self.heads), under, *map(line, self.rows), self.last])

    def html(self) -> str:
        """For a notebook, escaped."""

        def cells(row: Sequence[str], tag: str) -> str:
            return "".join(
                f'<{tag} style="text-align:{"right" if i in self.right else "left"}">'
                f"{html.escape(c)}</{tag}>"
                for i, c in enumerate(row)
            )

        body = "".join(f"<tr>{cells(row, 'td')}</tr>" for row in self.rows)
        return (
            f"<table><caption>{html.escape(self.last)}</caption>"
            f"<thead><tr>{cells(self.heads, 'th')}</tr></thead><tbody>{body}</tbody></table>"
        )


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
