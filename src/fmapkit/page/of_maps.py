"""The sections of maps: a layer each, with its z and its a, set apart by filter and made small."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fmapkit.errors import ArgumentError
from fmapkit.page.panels import Form, Panel, Section, number_panel
from fmapkit.plot import by_call, by_filter, is_signed, leading, meaning
from fmapkit.readable import ReadableMap
from fmapkit.torchlib.sharded import is_dtensor
from fmapkit.views import as_grid

Grid = tuple[int, int] | None

_ROW = 4  # a row may be so many times longer than an image is wide
_PEAK = "highest |value|"
_BAD = "NaN or infinite"


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
        panel = _panel(shown, sample, max_filters, max_side, wanted if own else None)
        if isinstance(panel, str):
            notes.append(f"{_said(fm)}: {panel}.")
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
    strongest = _panel(leading(own), sample, max_filters, max_side)
    return None if isinstance(strongest, str) else strongest.labels


def _shape(fm: ReadableMap) -> str:
    return "×".join(map(str, fm.shape)) or "scalar"


def _panel(
    fm: ReadableMap,
    sample: int,
    max_filters: int,
    max_side: int,
    wanted: Collection[int] | None = None,
) -> Panel | str:
    """One sample of a map, small enough to draw; or the reason why it cannot be drawn.

    Its facts are of all values of a filter, before they are averaged. Of more than `max_filters`,
    the `wanted` ones are kept, or else its own strongest.
    """
    tensor = _dense(fm)
    if isinstance(tensor, str):
        return tensor
    values, note = by_filter(fm, tensor, sample)
    values = (values.abs() if values.is_complex() else values).cpu().double()
    form: Form = "image" if values.ndim == 3 else "row" if values.ndim == 2 else "cell"
    values = values.reshape(values.shape[0], *(1,) * (3 - values.ndim), *values.shape[1:])
    facts = _facts(values.flatten(1))
    labels = tuple(fm.filters) if fm.filters is not None else tuple(range(len(values)))

    what = "filters" if fm.filters is not None else "entries"
    note = f"{len(values)} {what}{note}"
    if len(values) > max_filters:
        if wanted is None:
            kept = np.sort(np.argsort(-facts[_PEAK], kind="stable")[:max_filters])
        else:
            kept = np.array([i for i, label in enumerate(labels) if label in wanted])
        note += f", the {len(kept)} strongest of them here"
        values = values[torch.from_numpy(kept)]
        labels = tuple(labels[i] for i in kept)
        facts = {name: of_each[kept] for name, of_each in facts.items()}
    signed = is_signed(fm, values.numpy())
    size = (values.shape[1], values.shape[2])
    limit = max_side if form == "image" else _ROW * max_side
    block = (-(-size[0] // limit) or 1, -(-size[1] // limit) or 1)
    if block != (1, 1):
        values = F.avg_pool2d(
            values[:, None], block, ceil_mode=True, count_include_pad=False
        ).squeeze(1)
        note += f", {size[0]}×{size[1]} drawn as means of {block[0]}×{block[1]}"
    shown = [(n, of_each.tolist()) for n, of_each in facts.items() if n != _BAD or of_each.any()]
    return number_panel(
        _said(fm),
        note,
        labels,
        values.numpy(),
        form,
        signed=signed,
        facts=tuple(shown),
        block=block,
        size=size,
    )


def _said(fm: ReadableMap) -> str:
    """What a map is, and its place in a nested output."""
    return (fm.path + " " if fm.path else "") + meaning(fm)


def _dense(fm: ReadableMap) -> Tensor | str:
    tensor = fm.tensor.detach()
    if is_dtensor(tensor):
        return "not drawn: it is spread over several ranks; draw what fm.full() gives"
    if tensor.is_quantized:
        tensor = tensor.dequantize()
    if tensor.layout != torch.strided or tensor.is_nested:
        return "not drawn: it is sparse or nested"
    if tensor.device.type == "meta":
        return "not drawn: it is on the meta device, without values"
    return tensor


def _facts(values: Tensor) -> dict[str, np.ndarray[Any, Any]]:
    """Of each filter, as the page says it; the first is its strength."""
    finite = values.isfinite()
    count = finite.sum(1)
    sure = torch.where(finite, values, 0.0)
    ends = torch.where(finite, values, torch.inf), torch.where(finite, values, -torch.inf)
    if values.shape[1]:
        peak, low, high = sure.abs().amax(1), ends[0].amin(1), ends[1].amax(1)
    else:
        peak = low = high = torch.full(values.shape[:1], torch.nan)
    facts = {
        _PEAK: peak,
        "mean": sure.sum(1) / count,
        "min": torch.where(count > 0, low, torch.nan),
        "max": torch.where(count > 0, high, torch.nan),
        "share of zeros": (values == 0).double().mean(1),
        _BAD: (~finite).sum(1),
    }
    return {name: of_each.numpy() for name, of_each in facts.items()}
