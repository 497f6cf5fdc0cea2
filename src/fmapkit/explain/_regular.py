"""Whether fields lie regularly along an axis: their size, their stride, where the first begins."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

__all__ = ["Regular", "regular"]


@dataclass(frozen=True, slots=True)
class Regular:
    """How the fields of a map lie along one axis of the input.

    Attributes:
        size: locations that the largest of them has, where no border cuts it.
        stride: how far one is from the next.
        offset: where the first begins: negative in the padding.
    """

    size: int
    stride: Fraction
    offset: int


def regular(starts: Sequence[int], stops: Sequence[int], length: int) -> Regular | None:
    """What can be told of the fields along an axis; None where the borders cut too many of them.

    Args:
        starts: the first location that each field has.
        stops: the one after its last.
        length: locations of the input along the axis.
    """
    count = len(starts)
    if count == 0:
        return None
    if all(a == 0 for a in starts) and all(b == length for b in stops):
        return None
    # Locations whose field no border cuts, at either end: from the first such to the last.
    first = next((i for i, a in enumerate(starts) if a > 0), count)
    last = next((i for i in reversed(range(count)) if stops[i] < length), -1)
    for period in range(1, count):
        lower = _step(starts[first:], period)
        upper = _step(stops[: last + 1], period)
        if lower is None or lower != upper or lower <= 0:
            continue
        begins = _extended(starts, range(first, count), period, lower)
        ends = _extended(stops, range(last + 1), period, upper)
        sizes = [b - a for a, b in zip(begins, ends, strict=True)]
        return Regular(max(sizes), Fraction(lower, period), begins[0])
    return None


def _step(values: Sequence[int], period: int) -> int | None:
    """By how much values grow in each period; None if by different amounts, or there is but one."""
    steps = {b - a for a, b in zip(values, values[period:], strict=False)}
    # One step alone says nothing of whether the next is the same.
    return steps.pop() if len(steps) == 1 and len(values) > 2 * period else None


def _extended(values: Sequence[int], known: range, period: int, step: int) -> list[int]:
    """The first period of values, told from those that are known."""
    found = []
    for phase in range(period):
        at = next(i for i in known if i % period == phase)
        found.append(values[at] - (at - phase) // period * step)
    return found
