"""Whole numbers that follow the sizes of the inputs, as in `x.view(batch, length, -1)`."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator, Sequence
from fractions import Fraction
from itertools import product
from typing import Any

Sizes = tuple[int, ...]
Rule = tuple[Any, ...]

# What sizes are divided by: strides, patches and windows, one after the other.
_DIVISORS = sorted(
    n
    for a, b, c, d in product(range(13), range(4), range(3), range(3))
    if 2 <= (n := 2**a * 3**b * 5**c * 7**d) <= 4096
)
# Smaller numbers are dimensions and indices, as a rule, and may be decisions.
_LEAST_ROUNDED = 5
_MOST_ADDED = 2  # times the divisor: what padding adds to a size, or kernels take


def sort_of(value: int | Fraction) -> int:
    """Tells numbers apart at which functions do something else: none, once, the last one, −2.

    To pad by 0 is to pad nothing, to repeat once is to repeat nothing, so the filters stay.
    """
    return int(value) if -1 <= value <= 1 else 2 if value > 0 else -2


def rules_of(value: int, sizes: Sizes) -> set[Rule]:
    """What a number may be of the inputs' sizes: one of them and a bit, a multiple, a product."""
    found: set[Rule] = set()
    for at, size in enumerate(sizes):
        found.add(("more", at, value - size))
        if size:
            found.add(("times", at, Fraction(value, size)))
        for other in range(at, len(sizes)):
            if size and sizes[other]:
                found.add(("product", at, other, Fraction(value, size * sizes[other])))
    return found


def coincidences(value: int, known: Sequence[Sizes]) -> set[Rule]:
    """What a number may be that was the same for all these sizes, and may follow them all the same.

    Of 3 × 8 and 2 × 12 pixels, there are as many.
    """
    if value == 0:
        return set()
    changed = {at for at, sizes in enumerate(zip(*known, strict=True)) if len(set(sizes)) > 1}
    rules = {rule for rule in rules_of(value, known[0]) if changed.intersection(rule[1:-1])}
    for sizes in known:
        rules = kept(rules, value, sizes)
    rules = rules or roundings([(value, sizes) for sizes in known])
    return rules | {("same", value)} if rules else set()


def roundings(seen: Sequence[tuple[int, Sizes]]) -> set[Rule]:
    """What a number may be of one size by division: (size + a) // c, as (length + 1) // 2.

    A rule tells the size, c, and the least and the greatest a that all calls have kept to.
    """
    found: set[Rule] = set()
    if min(value for value, _ in seen) < _LEAST_ROUNDED:
        return found
    for at in range(len(seen[0][1])):
        pairs = [(value, sizes[at]) for value, sizes in seen]
        if len({size for _, size in pairs}) == 1:
            continue
        value, size = pairs[0]
        first = bisect_left(_DIVISORS, size / (value + 1 + _MOST_ADDED))
        last = bisect_right(_DIVISORS, size / (value - _MOST_ADDED))
        for c in _DIVISORS[first:last]:
            least = max(c * value - size for value, size in pairs)
            most = min(c * value - size for value, size in pairs) + c - 1
            least, most = max(least, -_MOST_ADDED * c), min(most, _MOST_ADDED * c)
            if least <= most:
                found.add(("rounded", at, c, least, most))
    return found


def kept(rules: Iterable[Rule], value: Any, sizes: Sizes) -> set[Rule]:
    """Those of a number's rules that it has kept to once more."""
    found: set[Rule] = set()
    for rule in rules:
        if rule[0] == "rounded":
            _, at, c, least, most = rule
            least = max(least, c * value - sizes[at])
            most = min(most, c * value - sizes[at] + c - 1)
            if least <= most:
                found.add(("rounded", at, c, least, most))
        elif value == by_rule(rule, sizes):
            found.add(rule)
    return found


def are_clear(rules: Iterable[Rule], sizes: Sizes) -> bool:
    """Whether the rules of a number all give the same."""
    found: set[Any] = set()
    for rule in rules:
        if rule[0] == "rounded":
            _, at, c, least, most = rule
            found |= {(sizes[at] + least) // c, (sizes[at] + most) // c}
        else:
            found.add(by_rule(rule, sizes))
    return len(found) == 1


def by_rule(rule: Rule, sizes: Sizes) -> int | Fraction:
    """The number that a rule gives: a fraction where it gives no whole one."""
    kind, at, *rest = rule
    if kind == "same":
        return int(at)
    if kind == "more":
        return int(sizes[at] + rest[0])
    if kind == "times":
        return Fraction(sizes[at] * rest[0])
    return Fraction(sizes[at] * sizes[rest[0]] * rest[1])


def number_places(items: Sequence[Any], place: tuple[int, ...] = ()) -> Iterator[tuple[int, ...]]:
    """The places of all whole numbers in a path."""
    for at, item in enumerate(items):
        if type(item) is int:
            yield (*place, at)
        elif type(item) is tuple:
            yield from number_places(item, (*place, at))


def differences(
    known: Sequence[Any], items: Sequence[Any], place: tuple[int, ...] = ()
) -> list[tuple[tuple[int, ...], int, int]] | None:
    """Where two paths differ, in whole numbers alone; None if they differ otherwise."""
    if len(known) != len(items):
        return None
    found: list[tuple[tuple[int, ...], int, int]] = []
    for at, (a, b) in enumerate(zip(known, items, strict=True)):
        if a is b or a == b:
            continue
        if type(a) is not type(b):
            return None
        if type(a) is int:
            found.append(((*place, at), a, b))
        elif type(a) is tuple:
            inner = differences(a, b, (*place, at))
            if inner is None:
                return None
            found += inner
        else:
            return None
    return found


def item_at(items: Sequence[Any], place: tuple[int, ...]) -> Any:
    """What is at a place in a path, in a part of an item perhaps."""
    found: Any = items
    for at in place:
        found = found[at]
    return found
