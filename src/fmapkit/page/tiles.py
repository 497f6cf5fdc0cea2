"""One sample of a map, set apart by filter and made small enough to draw."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fmapkit.plot import by_filter
from fmapkit.readable import ReadableMap
from fmapkit.torchlib.sharded import is_dtensor

Form = Literal["image", "row", "cell"]
_ROW = 4  # a row may be so many times longer than an image is wide


@dataclass(frozen=True, slots=True)
class Facts:
    """Of each filter, from all its values: float64 or int64 of shape (filters,)."""

    peak: np.ndarray[Any, Any]  # the highest |value| of the finite ones
    mean: np.ndarray[Any, Any]
    low: np.ndarray[Any, Any]
    high: np.ndarray[Any, Any]
    zeros: np.ndarray[Any, Any]  # share of values that are 0
    bad: np.ndarray[Any, Any]  # how many values are NaN or infinite

    @property
    def both_signs(self) -> bool:
        """Whether both signs count alike: of a tanh, and not of what a GELU leaves below 0."""
        low, high = (np.nan_to_num(a) for a in (self.low, self.high))
        return bool(low.size and low.min() < -0.5 * abs(high.max()))


@dataclass(frozen=True, slots=True)
class Tiles:
    """What is drawn of one map.

    Attributes:
        values: float64 (filters, height, width): all of them, or means of blocks.
        form: an image for each filter, a row, or a single value.
        facts: of each, from the values before they were averaged.
        block: (height, width) of the blocks.
        size: (height, width) of a map before it was averaged.
        note: what the tiles are, of how many, and what was left out.
    """

    values: np.ndarray[Any, Any]
    form: Form
    labels: tuple[int, ...]
    facts: Facts
    block: tuple[int, int]
    size: tuple[int, int]
    note: str


def tiles_of(
    fm: ReadableMap,
    sample: int,
    max_filters: int,
    max_side: int,
    wanted: Collection[int] | None = None,
) -> Tiles | str:
    """The tiles of one map; or the reason why it cannot be drawn.

    Args:
        max_filters: of more, those with the highest |value| are kept.
        max_side: larger images are averaged over blocks until no side is longer.
        wanted: keep these filters in place of its own strongest.

    Raises:
        ArgumentError: there is no such sample.
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
            kept = np.sort(np.argsort(-facts.peak, kind="stable")[:max_filters])
        else:
            kept = np.array([i for i, label in enumerate(labels) if label in wanted])
        note += f", the {len(kept)} strongest of them here"
        values = values[torch.from_numpy(kept)]
        labels = tuple(labels[i] for i in kept)
        facts = Facts(*(getattr(facts, name)[kept] for name in Facts.__slots__))
    size = (values.shape[1], values.shape[2])
    limit = max_side if form == "image" else _ROW * max_side
    block = (-(-size[0] // limit) or 1, -(-size[1] // limit) or 1)
    if block != (1, 1):
        values = F.avg_pool2d(
            values[:, None], block, ceil_mode=True, count_include_pad=False
        ).squeeze(1)
        note += f", {size[0]}×{size[1]} drawn as means of {block[0]}×{block[1]}"
    return Tiles(values.numpy(), form, labels, facts, block, size, note)


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


def _facts(values: Tensor) -> Facts:
    finite = values.isfinite()
    count = finite.sum(1)
    sure = torch.where(finite, values, 0.0)
    if not values.shape[1]:
        nothing = np.full(values.shape[0], np.nan)
        return Facts(*(nothing,) * 5, count.numpy())
    low = torch.where(finite, values, torch.inf).amin(1)
    high = torch.where(finite, values, -torch.inf).amax(1)
    return Facts(
        sure.abs().amax(1).numpy(),
        (sure.sum(1) / count).numpy(),
        torch.where(count > 0, low, torch.nan).numpy(),
        torch.where(count > 0, high, torch.nan).numpy(),
        (values == 0).double().mean(1).numpy(),
        (~finite).sum(1).numpy(),
    )
