"""A table as HTML, for notebooks and for the page."""

from __future__ import annotations

import html
from collections.abc import Collection, Iterable, Sequence

__all__ = ["html_table"]


def html_table(
    heads: Sequence[str],
    rows: Iterable[Sequence[str]],
    *,
    right: Collection[int],
    caption: str = "",
) -> str:
    """The table, escaped.

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
