"""Whether fields lie regularly along an axis: their size, their stride, where the first begins."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction


@dataclass(frozen=True, slots=True)
class Regular:
    """How the fields of a map lie along one axis of the input.

    Attributes:
        begins: where each field of the first period begins: negative in the padding.
        ends: the location after its last.
        step: how far a period is from the next.
    """

    begins: tuple[int, ...]
    ends: tuple[int, ...]
    step: int

    @property
    def size(self) -> int:
        """Locations that the largest of them has, where no border cuts it."""
        return max(b - a for a, b in zip(self.begins, self.ends, strict=True))

    @property
    def stride(self) -> Fraction:
        """How far one is from the next."""
        return Fraction(self.step, len(self.begins))

    @property
    def offset(self) -> int:
        """Where the first begins."""
        return self.begins[0]

    def fields(self, count: int) -> list[tuple[int, int]]:
        """Where each of so many begins and ends, borders or not."""
        turns = [divmod(i, len(self.begins)) for i in range(count)]
        return [(self.begins[i] + n * self.step, self.ends[i] + n * self.step) for n, i in turns]

    def holds(self, starts: Sequence[int], stops: Sequence[int], length: int) -> bool:
        """Whether fields, as in `regular`, are so wherever no border cuts them, or a part of it."""
        found = self.fields(len(starts))
        begin, end = _uncut(found, starts, stops, length)
        return (
            all(starts[i] == found[i][0] for i in begin)
            and all(stops[i] == found[i][1] for i in end)
            and all(
                first <= starts[i] and stops[i] <= last
                for i, (first, last) in enumerate(found)
                if stops[i] > starts[i]
            )
        )


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
        found = Regular(tuple(begins), tuple(ends), step)
        known = _uncut(found.fields(len(starts)), starts, stops, length)
        if min(map(len, known)) > period + 1 and found.holds(starts, stops, length):
            return found
    return None


def _extended(values: Sequence[int], known: range, period: int, step: int) -> list[int]:
    """The first period of values, told from a later one."""
    found = {i % period: values[i] - i // period * step for i in known}
    return [found[phase] for phase in range(period)]


def _uncut(
    found: Sequence[tuple[int, int]], starts: Sequence[int], stops: Sequence[int], length: int
) -> tuple[list[int], list[int]]:
    """Of which fields the border cuts no beginning, and no end; of none that are padding alone."""
    filled = [i for i in range(len(found)) if stops[i] > starts[i]]
    begin = [i for i in filled if 0 <= found[i][0] < length]
    end = [i for i in filled if 0 < found[i][1] <= length]
    return begin, end
