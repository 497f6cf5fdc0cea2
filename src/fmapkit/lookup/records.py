"""The records that a source of maps holds, the map of each, and the table of them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from fmapkit.errors import MapStateError
from fmapkit.map import FeatureMap, read_map, row, size
from fmapkit.model import Names
from fmapkit.saving import KeptEntry, MapSource
from fmapkit.storage import MapRecord, Pass
from fmapkit.tables import Table
from fmapkit.torchlib.sharded import Parts, is_dtensor, splits

Found = tuple[Pass, MapRecord]


def latest(source: MapSource) -> list[Found]:
    """The records of the latest pass, in execution order."""
    at = source.store.latest()
    return _of(source, at) if at is not None else []


def every(source: MapSource) -> list[Found]:
    """The records of all passes that are kept."""
    return [found for at in source.store for found in _of(source, at)]


def _of(source: MapSource, at: Pass) -> list[Found]:
    asked = source.wants.asked
    return [(at, e) for e in at.entries() if asked(e.kind, e.origin.name)]


def read(source: MapSource, at: Pass, entry: MapRecord, made: bool = False) -> FeatureMap:
    """The map of a record (see `read_map`), and whether its tensor is one rank's part."""
    if isinstance(entry, KeptEntry):
        return entry.map
    result = read_map(at, entry, made)
    parts = _parts(source.names, entry, result)
    return result if parts is None else replace(result, parts=parts)


def _parts(names: Names, entry: MapRecord, found: FeatureMap) -> Parts | None:
    """Whether the tensor may be one rank's part: where the layer's weights are `DTensor`s."""
    module = names.module_of(entry.origin.name)
    if module is None or is_dtensor(found.tensor):
        return None
    spread = [p for p in names.parameters_of(module).values() if is_dtensor(p)]
    if not spread:
        return None
    weight: Any = spread[0]
    mesh = weight.device_mesh
    if mesh.size() == 1 or (names.lent and mesh.ndim == 1):
        return None  # FSDP spreads it between passes only: the layer runs with the whole weight
    mesh, total = splits(weight), weight.shape[0]
    cut = found.filters is not None and len(found.filters) < total
    if mesh is None or not cut or entry.picked is not None:
        return Parts(unknown=True)
    return Parts(mesh, total)


_HEADS = ("layer", "kind", "filters", "shape", "dtype", "device", "bytes", "σ")
_RIGHT = {2, 6}


def maps_table(source: MapSource) -> Table:
    """One line for each map of the latest pass."""
    rows, found, newest = [], latest(source), source.store.latest()
    for at, entry in found:
        try:
            rows.append(row(read(source, at, entry)))
        except MapStateError as error:
            state = type(error).__name__.removeprefix("Map").removesuffix("Error").lower()
            rows.append((entry.origin.name, entry.kind, "–", state, "", "", "", entry.sigma or ""))
    if newest is None:
        return Table(_HEADS, rows, _RIGHT, "FeatureMaps: no pass captured yet")
    kept, layers = len(source.store.passes), {e.origin.name for _, e in found}
    missed = f", {len(source.missed)} missed (see maps.missed)" if source.missed else ""
    passes = f"step {newest.step}" + (f", {kept} passes kept" if kept > 1 else "")
    summary = (
        f"FeatureMaps: {len(found)} maps of {len(layers)} layers, "
        f"{size(source.store.nbytes)} held, {passes}{missed}"
    )
    return Table(_HEADS, rows, _RIGHT, summary)
