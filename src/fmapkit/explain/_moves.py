"""Operators that only move elements: what lies where afterwards tells what they did.

Each element is given a number, and the operator itself moves the numbers.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fmapkit.explain._fields import NONE, Call, Rule, least, lowest
from fmapkit.explain._probe import probe
from fmapkit.torchlib.operators import tree_map

# Arguments that say where elements go; those of all others are what moves.
_PLACES = ("index", "indices", "mask", "repeats")


def _moved(call: Call) -> list[Tensor | None]:
    pieces: list[Tensor] = []
    count = 1

    def numbered(value: Any) -> Any:
        nonlocal count
        if not isinstance(value, Tensor):
            return value
        field = call.of(value)
        if field is None:
            return torch.zeros(value.shape, dtype=torch.float64, device=value.device)
        first, count = count, count + value.numel()
        pieces.append(field.flatten(1))
        numbers = torch.arange(first, count, dtype=torch.float64, device=value.device)
        return numbers.reshape(value.shape)

    given = {
        name: value if name in _PLACES else tree_map(numbered, value)
        for name, value in call.given.items()
    }
    given = {n: 0 if n == "value" and not isinstance(v, Tensor) else v for n, v in given.items()}
    given.pop("dtype", None)
    where = call.run(given)
    index = _places_field(call)
    if not pieces:
        return [None if index is None else least([index], r.shape) for r in call.results]
    none = pieces[0].new_full((len(pieces[0]), 1), NONE)
    fields = torch.cat([none, *pieces], 1)
    results = where if isinstance(where, (list, tuple)) else [where]
    return [least([fields[:, w.long()], index], w.shape) for w in results]


def _places_field(call: Call) -> Tensor | None:
    """Of the numbers that say where elements go: all of them may matter to every result."""
    found: list[Tensor | None] = []
    for name in _PLACES:
        value = call.get(name)
        for one in value if isinstance(value, (list, tuple)) else [value]:
            field = call.of(one)
            if field is None:
                continue
            if field.dim() > 1 and field[0].numel() != 1:
                call.assumed(call.name)
            found.append(field.flatten(1).amin(1))
    return least(found, ())


def _embedded(call: Call) -> list[Tensor | None]:
    """Rows of a table, picked one by one."""
    indices, table = call.given["indices"], call.given["weight"]
    picked, rows = call.of(indices), call.of(table)
    if rows is not None and picked is not None:
        rows = rows.amin(1).reshape(len(rows), *[1] * indices.dim(), -1)  # it may be any of them
    elif rows is not None:
        rows = rows[:, indices]
    own = None if picked is None else picked.unsqueeze(-1)
    return [least([own, rows], call.results[0].shape)]


def _gathered(call: Call) -> list[Tensor | None]:
    """Along one axis, each result from a place of its own."""
    value, index, axis = call.given["self"], call.given["index"], call.given["dim"]
    picked, field = call.of(index), call.of(value)
    if picked is None:
        return _moved(call)
    if field is not None:  # it may be any place along the axis
        field = field.amin(axis % max(value.dim(), 1) + 1, keepdim=True)
        field = _within(field, index)
    return [least([picked, field], call.results[0].shape)]


def _scattered(call: Call) -> list[Tensor | None]:
    """Along one axis, each value to a place of its own; the others are summed or overwritten."""
    value, index = call.given["self"], call.given["index"]
    placed, axis = call.of(index), call.given["dim"] % max(value.dim(), 1)
    sizes = [[n for a, n in enumerate(t.shape) if a != axis] for t in (value, index)]
    if placed is None or sizes[0] != sizes[1]:  # its places are known, or it leaves some rows alone
        return _moved(call) if call.name == "scatter" and not call.get("reduce") else probe(call)
    fields = [call.of(value), lowest(placed, [axis])]
    if (sent := call.of(call.get("src"))) is not None:
        fields.append(lowest(_within(sent, index), [axis]))
    return [least(fields, call.results[0].shape)]


def _within(field: Tensor, index: Tensor) -> Tensor:
    """The part of a field that an index of as many axes has places for."""
    for axis, size in enumerate(index.shape[: field.dim() - 1], 1):
        field = field.narrow(axis, 0, min(size, field.shape[axis]))
    return field


def _put_at(call: Call) -> list[Tensor | None]:
    return probe(call) if call.get("accumulate") or call.get("reduce") else _moved(call)


# The operators of each rule.
RULES: dict[Rule, str] = {
    _moved: """
        cat stack index index_select constant_pad_nd reflection_pad1d reflection_pad2d
        reflection_pad3d replication_pad1d replication_pad2d replication_pad3d roll flip repeat
        im2col tril triu slice_scatter select_scatter diagonal_scatter as_strided_scatter
        upsample_nearest1d upsample_nearest2d upsample_nearest3d _upsample_nearest_exact1d
        _upsample_nearest_exact2d _upsample_nearest_exact3d unfold_copy pixel_shuffle
        pixel_unshuffle channel_shuffle _unsafe_index take masked_select masked_scatter
        diag_embed index_copy _reshape_copy
    """,
    _embedded: "embedding",
    _gathered: "gather",
    _put_at: "index_put _index_put_impl _unsafe_index_put",
    _scattered: "scatter scatter_add scatter_reduce",
}
