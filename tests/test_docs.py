"""The documentation runs: every ```python block, page by page, in one namespace a page.

The fences of README.md and docs/*.md follow these rules:

- ```python runs.
- ```python raises runs and must end in an error of fmapkit's own.
- ```text right after one of these is what the block printed (or the error's message), exactly.
- Any other fence (```sh, …) is left alone. A figure or a machine's answer goes into one of those.
"""

from __future__ import annotations

import contextlib
import io
import linecache
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from fmapkit import FmapkitError

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
# Pages of commands and figures only.
WITHOUT_CODE = {"benchmarks.md", "zoo.md"}
_FENCE = re.compile(r"^```([^\n]*)\n(.*?)^```[ \t]*$", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"\]\(([^)\s]+)\)")


@dataclass(frozen=True)
class Block:
    """A fenced block: its info string, its text, and what stands between it and the one before."""

    info: str
    text: str
    line: int
    between: str


def _blocks(page: Path) -> Iterator[Block]:
    source = page.read_text(encoding="utf-8")
    end = 0
    for found in _FENCE.finditer(source):
        line = source.count("\n", 0, found.start()) + 1
        yield Block(found[1].strip(), found[2], line, source[end : found.start()])
        end = found.end()


def _run(page: Path, block: Block, namespace: dict[str, Any]) -> str:
    """What the block printed; of one that must raise, the error's message."""
    # Line numbers of a failure are those of the page.
    source = "\n" * block.line + block.text
    name = f"{page}:{block.line}"
    # As in a notebook, the source is to be had: code without it is traced in every pass.
    linecache.cache[name] = (len(source), None, source.splitlines(keepends=True), name)
    code = compile(source, name, "exec")
    printed = io.StringIO()
    if block.info == "python raises":
        with pytest.raises(FmapkitError) as caught:
            exec(code, namespace)
        return str(caught.value)
    with contextlib.redirect_stdout(printed):
        exec(code, namespace)
    return printed.getvalue()


def _lines(text: str) -> list[str]:
    return [line.rstrip() for line in text.strip("\n").splitlines()]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_code_blocks_run_and_print_what_the_page_says(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("matplotlib").use("Agg")
    monkeypatch.chdir(tmp_path)
    _no_registrations(monkeypatch)
    torch.manual_seed(0)
    namespace: dict[str, Any] = {"__name__": f"docs_{page.stem}"}
    printed: str | None = None
    ran = 0
    for block in _blocks(page):
        if block.info in ("python", "python raises"):
            printed = _run(page, block, namespace)
            ran += 1
        elif block.info == "text":
            place = f"{page.name}:{block.line}"
            assert printed is not None, f"{place}: no python block before this text block"
            assert not block.between.strip(), f"{place}: something between it and its python block"
            assert _lines(block.text) == _lines(printed), f"{page.name}:{block.line}"
            printed = None
        else:
            assert not block.info.startswith("py"), f"{page.name}:{block.line}: {block.info!r}"
            printed = None
    assert bool(ran) != (page.name in WITHOUT_CODE)
    if ran and "plot" in page.read_text(encoding="utf-8"):
        from matplotlib import pyplot

        pyplot.close("all")


def _no_registrations(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a page registers is forgotten after it."""
    from fmapkit import layers, nonlinearities

    monkeypatch.setattr(layers, "REGISTERED", dict(layers.REGISTERED))
    monkeypatch.setattr(nonlinearities, "MODULES", dict(nonlinearities.MODULES))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    prose = _FENCE.sub("", page.read_text(encoding="utf-8"))
    for target in _LINK.findall(prose):
        if "://" in target:
            continue
        name, _, anchor = target.partition("#")
        there = (page.parent / name) if name else page
        assert there.exists(), f"{page.name} links to {target}"
        if anchor:
            heads = re.findall(r"^#+ (.+)$", there.read_text(encoding="utf-8"), re.MULTILINE)
            slugs = {re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in heads}
            assert anchor in slugs, f"{page.name} links to {target}"


def test_every_page_is_reached_from_the_readme() -> None:
    linked = set(_LINK.findall((ROOT / "README.md").read_text(encoding="utf-8")))
    missing = [p.name for p in (ROOT / "docs").glob("*.md") if f"docs/{p.name}" not in linked]
    assert not missing
