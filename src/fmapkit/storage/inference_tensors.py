"""Inference tensors have no version counter: copy, as a pass ends, what a later write could reach.

A write needs a tensor on the same memory: what the pass was given or returned, a buffer, whatever
the model or its hooks put away. torch counts the tensors on each block of memory, and we know how
many of them are ours. Where there are others, the map becomes a copy; the rest nobody can reach.
"""

from __future__ import annotations

from collections import Counter

from fmapkit.storage.held import StoredTensor
from fmapkit.storage.passes import MapRecord, Pass
from fmapkit.torchlib.memory import storage_of, storage_users
from fmapkit.torchlib.side_ops import looking


def has_inference_tensors(current: Pass) -> bool:
    """Whether a map of the pass may have no version counter."""
    for segment in current.segments:
        if not isinstance(segment, MapRecord):
            if segment.uncounted:
                return True
        elif segment.held is not None and segment.held.version < 0:
            return True
    return False


def settle(current: Pass) -> None:
    """Make the maps of a pass that has ended safe from writes that torch does not count."""
    uncounted = [h for h in current.held() if h.tensor is not None and h.tensor.is_inference()]
    if not uncounted:
        return
    for segment in current.segments:  # their entries are made, and they hold the model's tensors
        if not isinstance(segment, MapRecord):
            segment.release()
    with looking():
        for one in uncounted:  # tensors of our own, so that they can be told from the model's
            assert one.tensor is not None
            one.tensor = one.tensor.detach()
    ours = Counter(storage_of(h.tensor) for h in uncounted if h.tensor is not None)
    for one in [h for h in uncounted if _reached(h, ours)]:
        one.snapshot()


def _reached(held: StoredTensor, ours: Counter[int]) -> bool:
    assert held.tensor is not None
    users = storage_users(held.tensor)
    return not users or users > ours[storage_of(held.tensor)]
