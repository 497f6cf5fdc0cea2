"""Tables, as text for a terminal and as HTML for notebooks and pages."""

from __future__ import annotations

import html
from collections.abc import Collection, Iterable, Sequence

__all__ = ["html_table", "text_table"]


def text_table(
    heads: Sequence[str], rows: Iterable[Sequence[str]], *, right: Collection[int]
) -> list[str]:
    """The table as lines of text.

    Args:
        heads: of the columns.
        rows: the cells.
        right: which columns are set to the right; the others to the left.
    """
    rows = list(rows)
    widths = [max(len(r[i]) for r in (heads, *rows)) for i in range(len(heads))]

    def line(row: Sequence[str]) -> str:
        cells = [
            c.rjust(w) if i in right else c.ljust(w)
            for i, (c, w) in enumerate(zip(row, widths, strict=True))
        ]
        return "  ".join(cells).rstrip()

    return [line(heads), "  ".join("─" * w for w in widths), *map(line, rows)]


def html_table(
    heads: Sequence[str],
    rows: Iterable[Sequence[str]],
    *,
    right: Collection[int],
    caption: str = "",
) -> str:
    """The table as HTML, escaped.

    Args:
        heads: of the columns.
        rows: the cells.
        right: which columns are set to the right; the others to the left.
        caption: stands above.
    """

    def cells(row: Sequence[str], tag: str) -> str:
        return "".join(
            f'<{tag} style="text-align:{"right" if i in right else "left"}">'
            f"{html.escape(c)}</{tag}>"
            for i, c in enumerate(row)
        )

    above = f"<caption>{html.escape(caption)}</caption>" if caption else ""
    body = "".join(f"<tr>{cells(r, 'td')}</tr>" for r in rows)
    head = f"<thead><tr>{cells(heads, 'th')}</tr></thead>"
    return f"<table>{above}{head}<tbody>{body}</tbody></table>"
