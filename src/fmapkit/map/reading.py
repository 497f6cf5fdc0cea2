"""The map of a record: read from what a pass holds."""

from __future__ import annotations

import math
from typing import cast

from torch import Tensor

from fmapkit.errors import MapStateError
from fmapkit.kinds import Kind
from fmapkit.map.feature_map import FeatureMap
from fmapkit.provenance import WeightRows
from fmapkit.storage import MapRecord, NotYet, Pass


def read_map(at: Pass, entry: MapRecord, made: bool = False) -> FeatureMap:
    """The map that an entry of a pass holds.

    Args:
        made: it has just been made, and is shown to an analysis.

    Raises:
        MapStateError: its memory was written to, or let go.
    """
    origin, axes = entry.origin, entry.axes
    what = f"the {entry.kind} of layer {origin.name!r} (step {at.step}, call {origin.call})"
    assert entry.held is not None
    edited = None
    try:
        tensor = entry.held.read(what)
        if entry.edited is not None:
            edited = entry.edited.read(f"the edit of {what}")
    except MapStateError as error:
        error.about(layer=origin.name, kind=entry.kind, call=origin.call, step=at.step)
        raise
    if axes is not None and entry.picked is None and type(tensor) is Tensor:
        axes = axes.fitted(tensor.shape, origin.made.most if origin.made is not None else math.inf)
    dim = axes.dim if axes is not None else None
    filters: range | tuple[int, ...] | None = axes.filters if axes is not None else None
    if entry.picked is not None:
        filters = entry.picked
    rows = None
    if origin.made is not None and entry.kind not in ("input", "output"):
        rows = WeightRows(what, origin, axes, entry.picked, at.weights, at.buffers)
    return FeatureMap(
        tensor=tensor,
        kind=cast("Kind", entry.kind),
        layer=origin.name,
        call=origin.call,
        step=at.step,
        training=at.training,
        nonlinearity=entry.sigma,
        path=entry.path,
        filter_dim=dim,
        filters=filters if dim is not None else None,
        edited=edited,
        ids=at.ids,
        heads=entry.heads,
        block=at.block,
        _gradient=NotYet() if made else entry.held.gradient,
        _rows=rows,
    )
