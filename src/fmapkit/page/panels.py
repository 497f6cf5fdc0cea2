"""What a page draws, and how each of it is written down for `assets/page.js`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal

import numpy as np

from fmapkit.page.encoding import packed, quantised

Form = Literal["image", "row", "cell"]  # of each filter an image, a row, or a single value
Colours = Literal["signed", "positive", "states"]
# A fact: its name, and its number for each tile.
Fact = tuple[str, Sequence[float]]


@dataclass(frozen=True, slots=True)
class Panel:
    """Tiles on one scale, one for each filter."""

    heading: str  # what the values are: "z", "a = relu(z)", "mean"
    note: str  # what the tiles are, of how many
    labels: tuple[int, ...]
    # uint8 (filters, height, width); what a code means, `step` and `zero` say, or `words`.
    codes: np.ndarray[Any, Any]
    form: Form
    colours: Colours
    facts: tuple[Fact, ...] = ()  # further numbers of each tile; the first is the one to sort by
    step: float = 0.0  # between two codes; 0 with `words`
    zero: int = 0  # the code of the value 0
    words: tuple[tuple[str, str], ...] = ()  # what each code is called, its colour; for "states"
    block: tuple[int, int] = (1, 1)  # how many values, down and across, one pixel is the mean of
    size: tuple[int, int] = (1, 1)  # of a tile before it was averaged
    axis: str = ""  # what a place along the last axis is called, such as "inputs"; of images ""
    places: tuple[str, ...] = ()  # a name for each place along the last axis, where it has names

    def written(self) -> dict[str, Any]:
        found = {field.name: getattr(self, field.name) for field in fields(self)}
        del found["codes"]
        return {
            **found,
            "shape": self.codes.shape,
            "data": packed(self.codes),
            "facts": [[name, [_number(v) for v in values]] for name, values in self.facts],
        }


@dataclass(frozen=True, slots=True)
class Section:
    """One layer of the page, or one table."""

    name: str  # what it is found by: the layer's name
    tags: str = ""  # what stands beside the name: shape, dtype, σ
    panels: tuple[Panel, ...] = ()
    note: str = ""  # a sentence in place of panels, or above them
    html: str = ""  # more of it, escaped already

    def written(self) -> dict[str, Any]:
        found = {field.name: getattr(self, field.name) for field in fields(self)}
        return {**found, "panels": [panel.written() for panel in self.panels]}


def number_panel(
    heading: str,
    note: str,
    labels: tuple[int, ...],
    values: np.ndarray[Any, Any],
    form: Form,
    *,
    signed: bool,
    **more: Any,
) -> Panel:
    """A panel of numbers, (filters, height, width), on one scale."""
    codes, zero, step = quantised(values, signed=signed)
    colours: Colours = "signed" if signed else "positive"
    return Panel(heading, note, labels, codes, form, colours, step=step, zero=zero, **more)


def _number(value: float) -> float | str:
    """As JSON takes it: to six digits; what is no number, as a word."""
    if not math.isfinite(value):
        return str(value)
    return int(value) if float(value).is_integer() else float(f"{value:.6g}")
