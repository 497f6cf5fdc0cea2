"""Whole numbers that follow the sizes of the inputs, as in `x.view(batch, length, -1)`."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from typing import Any

__all__ = ["Rule", "Sizes", "by_rule", "coincidences", "holds", "rules_of"]

Sizes = tuple[int, ...]
Rule = tuple[Any, ...]


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
    rules = {rule for rule in rules if all(holds(rule, value, sizes) for sizes in known)}
    return rules | {("same", value)} if rules else set()


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


def holds(rule: Rule, value: Any, sizes: Sizes) -> bool:
    """Whether a number keeps to a rule."""
    return bool(value == by_rule(rule, sizes))
