"""`kinds=` and `filters=` as they were given, checked."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from fmapkit.errors import ArgumentError, FilterRangeError, check_kind, is_int, listed
from fmapkit.kinds import KINDS


def given_kinds(kinds: Any) -> frozenset[str]:
    """`kinds=` as it is kept; an error where there is no such kind."""
    given = (
        [kinds] if isinstance(kinds, str) else list(kinds) if isinstance(kinds, Iterable) else None
    )
    if not given:
        raise ArgumentError(
            f"kinds must name some of {listed(KINDS)}, not {kinds!r}", candidates=KINDS
        )
    for kind in given:
        check_kind(kind)
    return frozenset(given)


def given_filters(filters: Any) -> Any:
    """`filters=` as it is kept: None, indices, or a dict of layer -> indices; else an error."""
    if filters is None:
        return None
    if isinstance(filters, Mapping):
        if not filters:
            raise ArgumentError("filters={} picks nothing; None, the default, means all")
        return {str(k): indices(v) for k, v in filters.items()}
    return indices(filters)


def check_in_range(filters: Iterable[int], count: int, layer: str) -> None:
    """Refuse filters that a layer does not have."""
    for index in filters:
        if not -count <= index < count:
            raise FilterRangeError(
                f"filters={index} is out of range for layer {layer!r}, which has {count} filters "
                f"(0 to {count - 1})",
                layer=layer,
                filter=index,
                candidates=range(count),
            )


def indices(value: Any, argument: str = "filters") -> tuple[int, ...]:
    """One index or several, as a tuple; an error where it is neither."""
    if is_int(value):
        return (value,)
    if isinstance(value, (Sequence, set)) and not isinstance(value, str):
        found = tuple(value)
        if found and all(map(is_int, found)):
            return found
    raise ArgumentError(
        f"{argument} must be an int, several ints, a range, or a dict of layer -> these, "
        f"not {value!r}"
    )
