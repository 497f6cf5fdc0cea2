"""The documentation runs: every ```python block, page by page, in one namespace a page.

The fences of README.md and of docs follow these rules:

- ```python runs.
- ```python raises runs and must end in an error of fmapkit's own; its message stands below it.
- ```text right after one of these is what the block printed (or the error's message), exactly;
  '…' stands for anything in quotes, such as a checksum.
- Any other fence (```sh, ```py, …) is left alone. A figure or a machine's answer goes into one.

A page that takes more than the library says so above its title, and a section that does below its
own: `<!-- needs: lightning, torch 2.11 -->`. Where one of these is missing or older, the blocks of
the page, or of the section, are left out.
"""

from __future__ import annotations

import contextlib
import importlib
import inspect
import io
import linecache
import pkgutil
import re
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

import fmapkit
import fmapkit.errors
from fmapkit import FmapkitError

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *sorted(DOCS.rglob("*.md"))]
# Pages of commands, figures and links only.
WITHOUT_CODE = {DOCS / name for name in ("benchmarks.md", "developers.md", "zoo.md")}
WITHOUT_CODE |= set((DOCS / "reference").glob("*.md"))
_FENCE = re.compile(r"^```([^\n]*)\n(.*?)^```[ \t]*$", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"\]\(([^)\s]+)\)")
_NEEDS = re.compile(r"<!-- needs: (.*?) -->")
_HEADING = re.compile(r"^#.*$", re.MULTILINE)
# Where mkdocstrings puts what a module has: `::: fmapkit.capture`.
_REFERENCE = re.compile(r"^::: ", re.MULTILINE)


def _id(page: Path) -> str:
    return str(page.relative_to(ROOT))


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


def _missing(text: str) -> str:
    """Which of the packages that the text says it needs is not here, or is older."""
    for names in _NEEDS.findall(text):
        for need in names.split(", "):
            name, _, least = need.partition(" ")
            try:
                pytest.importorskip(name, least or None, reason=f"{name} is not installed")
            except pytest.skip.Exception as skipped:
                return str(skipped)
    return ""


def _lines(text: str) -> list[str]:
    return [line.rstrip() for line in text.strip("\n").splitlines()]


def _fits(expected: list[str], found: list[str]) -> bool:
    """Whether they are the same but for what '…' stands for."""
    pattern = re.escape("\n".join(expected)).replace(re.escape("'…'"), "'[^']*'")
    return re.fullmatch(pattern, "\n".join(found)) is not None


@pytest.mark.parametrize("page", PAGES, ids=_id)
def test_code_blocks_run_and_print_what_the_page_says(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("matplotlib").use("Agg")
    missing = _missing(_HEADING.split(page.read_text(encoding="utf-8"), 1)[0])
    if missing:
        pytest.skip(missing)
    monkeypatch.chdir(tmp_path)
    _no_registrations(monkeypatch)
    torch.manual_seed(0)
    namespace: dict[str, Any] = {"__name__": f"docs_{page.stem}"}
    printed: str | None = None
    raised = ""
    ran = 0
    for block in _blocks(page):
        *before, below = _HEADING.split(block.between)
        missing = _missing(below) or ("" if before else missing)
        if missing:
            printed = None
            continue
        assert not raised or block.info == "text", f"{raised}: what it raises is not said"
        raised = f"{page.name}:{block.line}" if block.info == "python raises" else ""
        if block.info in ("python", "python raises"):
            printed = _run(page, block, namespace)
            ran += 1
        elif block.info == "text":
            place = f"{page.name}:{block.line}"
            assert printed is not None, f"{place}: no python block before this text block"
            assert not block.between.strip(), f"{place}: something between it and its python block"
            expected, found = _lines(block.text), _lines(printed)
            assert expected == found or _fits(expected, found), f"{page.name}:{block.line}"
            printed = None
        else:
            assert not block.info.startswith("python"), f"{page.name}:{block.line}: {block.info!r}"
            printed = None
    assert not raised, f"{raised}: what it raises is not said"
    if missing and not ran:
        pytest.skip(missing)
    assert bool(ran) != (page in WITHOUT_CODE)
    if ran and "plot" in page.read_text(encoding="utf-8"):
        from matplotlib import pyplot

        pyplot.close("all")


def _no_registrations(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a page registers is forgotten after it."""
    from fmapkit import layers, nonlinearities

    monkeypatch.setattr(layers, "REGISTERED", dict(layers.REGISTERED))
    monkeypatch.setattr(nonlinearities, "MODULES", dict(nonlinearities.MODULES))


@pytest.mark.parametrize("page", PAGES, ids=_id)
def test_links_lead_somewhere(page: Path) -> None:
    prose = _FENCE.sub("", page.read_text(encoding="utf-8"))
    for target in _LINK.findall(prose):
        if "://" in target:
            continue
        name, _, anchor = target.partition("#")
        there = (page.parent / name) if name else page
        assert there.exists(), f"{page.name} links to {target}"
        if anchor and not _REFERENCE.search(there.read_text(encoding="utf-8")):
            heads = re.findall(r"^#+ (.+)$", there.read_text(encoding="utf-8"), re.MULTILINE)
            slugs = {re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in heads}
            assert anchor in slugs, f"{page.name} links to {target}"


def test_every_page_is_in_the_navigation_of_the_site() -> None:
    named = set(re.findall(r"[\w/-]+\.md", (ROOT / "mkdocs.yml").read_text(encoding="utf-8")))
    assert named == {str(page.relative_to(DOCS)) for page in DOCS.rglob("*.md")}


def test_images_are_all_shown() -> None:
    shown = {
        (page.parent / target).resolve()
        for page in PAGES
        for target in _LINK.findall(page.read_text(encoding="utf-8"))
    }
    assert [image.name for image in DOCS.rglob("*.png") if image.resolve() not in shown] == []


def _public() -> Iterator[tuple[str, Any]]:
    """Every public name: by its module and its own name."""
    packages = [fmapkit]
    for found in pkgutil.iter_modules(fmapkit.__path__):
        if found.ispkg and not found.name.startswith("_") and found.name not in _INNER:
            packages.append(importlib.import_module(f"fmapkit.{found.name}"))
    packages += [fmapkit.edits, fmapkit.errors]
    for package in packages:
        for name in package.__all__:
            try:
                found = getattr(package, name)
            except ImportError as error:  # of an integration whose package is missing
                warnings.warn(str(error), stacklevel=1)
                continue
            if inspect.isclass(found) or inspect.isroutine(found):  # no alias, no module
                yield f"{package.__name__}.{name}", found


# Packages that are no face of the library's.
_INNER = {
    *("cli", "compiled", "editing", "instrumentation", "lookup", "map", "model", "page"),
    *(
        "paths",
        "provenance",
        "replay",
        "saving",
        "selection",
        "session",
        "storage",
        "torchlib",
        "tracing",
    ),
}


def test_every_public_name_is_in_the_reference() -> None:
    pages = "\n".join(p.read_text(encoding="utf-8") for p in (DOCS / "reference").glob("*.md"))
    said = set(re.findall(r"^::: (\S+)$", pages, re.MULTILINE))
    names = {name.rpartition(".")[2] for name in said}
    missing = [name for name, _ in _public() if name.rpartition(".")[2] not in names]
    assert missing == []


def test_every_public_name_has_a_docstring() -> None:
    missing = []
    for name, found in _public():
        if not inspect.getdoc(found):
            missing.append(name)
        if inspect.isclass(found):
            for member, value in vars(found).items():
                ours = inspect.isfunction(value) or isinstance(value, property)
                if ours and not member.startswith("_") and not inspect.getdoc(value):
                    missing.append(f"{name}.{member}")
    assert missing == []
