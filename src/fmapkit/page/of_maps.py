"""The sections of maps: a layer each, with its z and its a."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from fmapkit.errors import ArgumentError
from fmapkit.page.panels import Panel, Section
from fmapkit.page.tiles import map_panel, said_of
from fmapkit.plot import by_call, leading
from fmapkit.readable import ReadableMap
from fmapkit.views import as_grid

Grid = tuple[int, int] | None


def map_sections(
    found: Sequence[ReadableMap], sample: int, max_filters: int, max_side: int, grid: Grid
) -> list[Section]:
    """A section for each call of each layer, in the order of execution."""
    if grid is not None and not any(_of_tokens(fm, grid) for fm in found):
        raise ArgumentError(
            f"grid={grid} takes maps of shape (samples, tokens, filters) with {grid[0] * grid[1]} "
            "tokens or more, and there is none"
        )
    return [_section(group, sample, max_filters, max_side, grid) for group in by_call(found)]


def _of_tokens(fm: ReadableMap, grid: tuple[int, int]) -> bool:
    """Whether the map is one of tokens, of which so many may be patches of an image."""
    if fm.filters is None or fm.filter_dim is None or fm.tensor.dim() != 3:
        return False
    return fm.filter_dim % 3 == 2 and fm.shape[1] >= grid[0] * grid[1]


def _section(
    group: list[ReadableMap], sample: int, max_filters: int, max_side: int, grid: Grid
) -> Section:
    first = group[0]
    wanted = _wanted(group, sample, max_filters, max_side)
    panels: list[Panel] = []
    notes: list[str] = []
    for fm in group:
        patches = grid if grid is not None and _of_tokens(fm, grid) else None
        shown = fm if patches is None else as_grid(fm, *patches)
        own = fm.kind != "input"  # an input's are other filters
        panel = map_panel(shown, sample, max_filters, max_side, wanted if own else None)
        if isinstance(panel, str):
            notes.append(f"{said_of(fm)}: {panel}.")
            continue
        note = panel.note
        if patches is not None:
            before = fm.shape[1] - patches[0] * patches[1]
            note += f", tokens as {patches[0]}×{patches[1]}"
            note += f" without the first {before}" * (before > 0)
        if fm.shape != first.shape:
            note = f"{_shape(fm)}, {note}"
        panels.append(replace(panel, note=note))
    tags = [_shape(first), str(first.dtype).removeprefix("torch."), str(first.device)]
    if first.call:
        tags.insert(0, f"call {first.call}")
    return Section(first.layer or "(model)", " · ".join(tags), tuple(panels), " ".join(notes))


def _wanted(
    group: list[ReadableMap], sample: int, max_filters: int, max_side: int
) -> tuple[int, ...] | None:
    """The filters that are kept of all maps of a layer: its activation's strongest, if any."""
    own = [fm for fm in group if fm.filters is not None and fm.kind != "input"]
    if not any(len(fm) > max_filters for fm in own):
        return None
    strongest = map_panel(leading(own), sample, max_filters, max_side)
    return None if isinstance(strongest, str) else strongest.labels


def _shape(fm: ReadableMap) -> str:
    return "×".join(map(str, fm.shape)) or "scalar"
