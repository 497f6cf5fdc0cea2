"""What the site shows in another way than the pages have it."""

from __future__ import annotations

from typing import Any


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Blocks that must raise are titled; what stands after the word `python` is no option there."""
    return markdown.replace("```python raises\n", '```python title="raises"\n')
