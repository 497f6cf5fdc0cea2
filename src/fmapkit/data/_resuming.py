"""Going on with what is in a store: whether it is of the same call and data, and what is left.

What running analyses had seen is taken over in `_riding.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fmapkit.data._batches import Batch
from fmapkit.data._fingerprint import differences, digest
from fmapkit.data._manifest import Manifest
from fmapkit.data._place import Place
from fmapkit.errors import StoreMismatchError


def begun(
    place: Place, asked: Mapping[str, Any], resume: bool, batches_per_commit: int | None
) -> Manifest | None:
    """What an earlier run of the same call has begun; None where nothing is there.

    Raises:
        StoreMismatchError: something else is there, or nothing may be.
    """
    found = place.manifest()
    if found is None:
        return None
    if not resume:
        raise StoreMismatchError(
            f"{place} holds features already, and resume=False begins anew: remove it, or give "
            "another place"
        )
    if words := differences(found.asked, asked):
        raise StoreMismatchError(
            f"{place} holds features of another call: {'; '.join(words)}. Give another place, or "
            "the same model and arguments"
        )
    if batches_per_commit not in (None, found.batches_per_unit) and not found.complete:
        raise StoreMismatchError(
            f"{place} was begun with batches_per_commit={found.batches_per_unit}, and goes on with "
            f"that only, not with {batches_per_commit}"
        )
    return found


def check_batch(batch: Batch, expected: str, place: Place) -> None:
    """Whether a batch is the one that the loader gave before.

    Raises:
        StoreMismatchError: it has another digest than expected.
    """
    if expected and digest(batch.data) != expected:
        raise StoreMismatchError(
            f"batch {batch.number} of the loader is not the one that {place} was made of: other "
            "data, another order, or augmentation by chance. Give the same data in the same "
            "order, or check=False where they are meant to differ"
        )


class Share:
    """Which batches are this rank's: of the units that are not done, each one in turn."""

    def __init__(self, done: set[int], batches: int, rank: int, size: int) -> None:
        self._done = done
        self._batches = batches
        self._rank = rank
        self._size = size
        self._unit = -1
        self._open = -1  # how many units before this one were not done
        self._mine = False

    def __call__(self, number: int) -> bool:
        """Whether a batch is; asked for batches in order."""
        unit = number // self._batches
        if unit != self._unit:
            self._unit = unit
            self._open += unit not in self._done
            self._mine = unit not in self._done and self._open % self._size == self._rank
        return self._mine
