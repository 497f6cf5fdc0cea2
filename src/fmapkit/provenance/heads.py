"""Heads of attention: which filters of which layer are a head's queries, keys and values."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from fmapkit.provenance.labels import ChannelLabel, Label
from fmapkit.provenance.layout import ChannelAxis, ChannelLayout


@dataclass(frozen=True, slots=True)
class Projection:
    """What makes the queries, keys or values of attention.

    Attributes:
        layer: the layer whose filters they are, as it returns them: before what is done to them
            on the way, such as a rotation by their position.
        filters: for each head, which of its filters.
    """

    layer: str
    filters: tuple[range, ...]


@dataclass(frozen=True, slots=True)
class Heads:
    """Where the queries, keys and values of attention come from; None where no data tells.

    ```python
    query = maps["h.0.attn", "attention"].heads.query
    edit = {edits.Where(query.layer, "response", query.filters[3]): edits.zero()}
    ```

    Of grouped queries, there are fewer heads of keys and values: head i has the keys of head
    i · (heads of keys) // (heads of queries).
    """

    query: Projection | None = None
    key: Projection | None = None
    value: Projection | None = None


def projection(tag: Label, shape: Sequence[int]) -> Projection | None:
    """Whose filters a tensor of queries, keys or values has, head by head.

    Args:
        shape: its own. The last two axes are positions and what is in a head, in any order; the one
            before them counts heads.
    """
    if not isinstance(tag, ChannelLabel) or tag.axes is None or tag.origin.kind != "layer":
        return None
    found = _by_head(tag.axes, len(shape), len(shape) > 2 and shape[-3] == 1)
    return Projection(tag.origin.name, found) if found is not None else None


@lru_cache(maxsize=1024)
def _by_head(axes: ChannelLayout, rank: int, single: bool) -> tuple[range, ...] | None:
    """Once for all layers of a model, which are alike."""
    parts = sorted(axes.parts, key=lambda part: part.dim)
    if len(parts) == 1 and single:
        parts = [ChannelAxis(rank - 3, 1), *parts]
    if len(parts) != 2:
        return None
    head, inner = parts
    if head.dim >= rank - 2 or inner.dim < rank - 2:
        return None
    starts = [axes.offset + i * head.stride for i in range(head.size)]
    span = inner.size * inner.stride
    return tuple(range(start, start + span, inner.stride) for start in starts)
