"""The sections of maps: a layer each, with its z and its a."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fmapkit.page.panels import Panel, Section, facts_shown, number_panel
from fmapkit.page.tiles import tiles_of

if TYPE_CHECKING:
    from fmapkit.maps import FeatureMap

__all__ = ["map_sections"]


def map_sections(
    found: list[FeatureMap], sample: int, max_filters: int, max_side: int
) -> list[Section]:
    """A section for each call of each layer, in the order of execution.

    Raises:
        ArgumentError: there is no such sample.
    """
    groups: dict[tuple[str, int], list[FeatureMap]] = {}
    for fm in found:
        groups.setdefault((fm.layer, fm.call), []).append(fm)
    return [_section(group, sample, max_filters, max_side) for group in groups.values()]


def _section(group: list[FeatureMap], sample: int, max_filters: int, max_side: int) -> Section:
    first = group[0]
    panels: list[Panel] = []
    notes: list[str] = []
    for fm in group:
        drawn = tiles_of(fm, sample, max_filters, max_side)
        if isinstance(drawn, str):
            notes.append(f"{_meaning(fm)}: {drawn}.")
            continue
        panels.append(
            number_panel(
                _meaning(fm),
                _shape(fm) + ", " + drawn.note if fm.shape != first.shape else drawn.note,
                drawn.labels,
                drawn.values,
                drawn.form,
                signed=fm.kind != "activation" or drawn.facts.both_signs,
                facts=facts_shown(drawn.facts),
                block=drawn.block,
                size=drawn.size,
            )
        )
    tags = [_shape(first), str(first.dtype).removeprefix("torch."), str(first.device)]
    if first.call:
        tags.insert(0, f"call {first.call}")
    return Section(first.layer or "(model)", " · ".join(tags), tuple(panels), " ".join(notes))


def _shape(fm: FeatureMap) -> str:
    return "×".join(map(str, fm.shape)) or "scalar"


def _meaning(fm: FeatureMap) -> str:
    name = fm.path + " " if fm.path else ""
    if fm.kind == "preactivation":
        return name + "z"
    if fm.kind == "activation":
        return f"{name}a = {fm.nonlinearity or 'σ'}(z)"
    return name + fm.kind
