"""Whether fields lie regularly along an axis: their size, their stride, where the first begins."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction


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

    The last fields tell where fields begin, the first ones where they end. What follows from them
    must be so of all others, where no border cuts them.

    Args:
        starts: the first location that each field has.
        stops: the one after its last; equal to the start where the field is empty.
        length: locations of the input along the axis.
    """
    filled = [i for i, (a, b) in enumerate(zip(starts, stops, strict=True)) if b > a]
    if not filled or all(starts[i] == 0 for i in filled) or all(stops[i] == length for i in filled):
        return None
    first, last = filled[0], filled[-1]
    for period in range(1, (last - first) // 2 + 1):
        step = starts[last] - starts[last - period]
        if step <= 0 or stops[first + period] - stops[first] != step:
            continue
        begins = _extended(starts, range(last - period + 1, last + 1), period, step)
        ends = _extended(stops, range(first, first + period), period, step)
        found = [
            (begins[i % period] + i // period * step, ends[i % period] + i // period * step)
            for i in range(len(starts))
        ]
        if _agree(found, starts, stops, length, period):
            sizes = [b - a for a, b in found[:period]]
            return Regular(max(sizes), Fraction(step, period), begins[0])
    return None


def _extended(values: Sequence[int], known: range, period: int, step: int) -> list[int]:
    """The first period of values, told from a later one."""
    found = {i % period: values[i] - i // period * step for i in known}
    return [found[phase] for phase in range(period)]


def _agree(
    found: Sequence[tuple[int, int]],
    starts: Sequence[int],
    stops: Sequence[int],
    length: int,
    period: int,
) -> bool:
    """Whether fields are so wherever no border cuts them, and that is known of enough of them."""
    filled = [i for i in range(len(found)) if stops[i] > starts[i]]  # not of padding alone
    begin = [i for i in filled if 0 <= found[i][0] < length]
    end = [i for i in filled if 0 < found[i][1] <= length]
    return (
        min(len(begin), len(end)) > period + 1
        and all(starts[i] == found[i][0] for i in begin)
        and all(stops[i] == found[i][1] for i in end)
    )
