"""The paths that calls of a module have taken, and the plan that holds for each.

A path is a list of items (see `items.py`). Two calls on inputs of the same sizes take the same
path if their items are equal. On inputs of other sizes, numbers in it may follow the sizes, by
rules that two calls tell (docs/how-it-works.md, "Inputs of other sizes").
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from fmapkit.paths.number_rules import (
    Rule,
    Sizes,
    are_clear,
    by_rule,
    coincidences,
    differences,
    item_at,
    kept,
    number_places,
    roundings,
    rules_of,
    sort_of,
)

_Plan = TypeVar("_Plan")

_MOST_SIZES = 32  # per path: how many sizes its items are kept for
_MOST_PATHS = 16
_MOST_NEW = 8


@dataclass(slots=True, eq=False)
class Expected:
    """A call that is under way, and the path that it is taken to take."""

    _recorded: list[Any]  # what is recorded of the pass, which grows
    _start: int  # where the call's own path begins in that
    _path: list[Any] | None  # that it is to take; None where its numbers are not known beforehand
    _checked: int = 0  # so many of its decisions are those of the path

    def taken(self) -> list[Any]:
        """What the call has decided so far."""
        return self._recorded[self._start :]

    def at(self, position: int) -> bool:
        """Whether the call has taken so many decisions, and those that were expected.

        Of two ways that a branch may go, one leaves no mark: so the number has to be the very one.
        """
        count = len(self._recorded) - self._start
        if self._path is None or count != position:
            return False
        new = self._recorded[self._start + self._checked :]
        if new != self._path[self._checked : count]:
            return False
        self._checked = count
        return True

    def until(self) -> tuple[int, bool]:
        """How far a call that has broken off took its path, and whether it did so to the last.

        What was read after its last decision in common may have been read on another way.
        """
        taken, path = self.taken(), self._path or []
        common = 0
        for one, other in zip(taken, path, strict=False):
            if one != other:
                break
            common += 1
        whole = self._path is not None and common == len(taken)
        return common + (whole and common == len(path)), whole


class _Path(Generic[_Plan]):
    """One path: its items for some sizes, and the rules that its numbers follow."""

    def __init__(
        self,
        items: list[Any],
        sizes: Sizes,
        plan: _Plan,
        moments: list[tuple[int, Any]],
        held_by: Sequence[int] | None,
    ) -> None:
        self.plan = plan  # that holds on it
        # Of the sizes by which filters were kept, or mixed: whether each is one, which is what
        # counts, and the rules that it has kept to. None where it holds for no other sizes at all.
        self._alone = held_by is None
        self._mixed = [(n == 1, {("same", n), *rules_of(n, sizes)}) for n in held_by or ()]
        self._moments = moments  # after how many items which module began; None: some ended
        self.seen = False  # a call that was not traced took it
        self.by_sizes: dict[Sizes, list[Any]] = {sizes: items}
        self._hold_to({})
        # By axis: the sizes that have been the same in all calls.
        self.constant = dict(enumerate(sizes))
        self.general = False  # holds for other sizes, as far as is known

    def holds_for(self, sizes: Sizes) -> bool:
        """Whether all numbers are known that a call on such inputs would decide by.

        A number that has always been the same may follow a size that has, too.
        """
        if not self.general or not all(are_clear(rules, sizes) for rules in self._rounded):
            return False
        if any(sort_of(by_rule(rule, sizes)) != sort for rule, sort in self._sorts):
            return False
        if any((by_rule(r, sizes) == 1) != one for one, rules in self._mixed for r in rules):
            return False
        if all(sizes[axis] == size for axis, size in self.constant.items()):
            return True
        items = next(iter(self.by_sizes.values()))
        return all(place in self.rules for place in number_places(items))

    def fits(self, items: list[Any], sizes: Sizes) -> bool:
        """Whether a call took this path, which `holds_for` its sizes, with numbers that follow."""
        whole = len(items) == len(next(iter(self.by_sizes.values())))
        still = self.rules_kept(items, sizes) if whole else None
        if still is None:
            return False
        self._hold_to(still)
        self._keep(items, sizes)
        return True

    def rules_kept(self, items: list[Any], sizes: Sizes) -> dict[tuple[int, ...], set[Rule]] | None:
        """The rules that numbers have kept to, up to where a call is; None if it has left."""
        count = len(items)
        found = differences(next(iter(self.by_sizes.values()))[:count], items)
        if found is None or any(place not in self.rules for place, _, _ in found):
            return None
        if any(sort_of(old) != sort_of(new) for _, old, new in found):
            return None
        values = {place: new for place, _, new in found}
        still: dict[tuple[int, ...], set[Rule]] = {}
        for place, rules in self.rules.items():
            if place[0] >= count:
                continue
            value = values.get(place)
            if value is None:
                value = item_at(items, place)
            still[place] = kept(rules, value, sizes)
            if not still[place]:
                return None
        return still

    def takes(self, items: list[Any], sizes: Sizes, held_by: Sequence[int] | None) -> bool:
        """A call on other sizes was traced: whether it took this path, and its plan is alike.

        That plan is `held_by` these numbers.
        """
        if self._alone or held_by is None or len(held_by) != len(self._mixed):
            return False
        pairs = zip(held_by, self._mixed, strict=True)
        mixed = [(one, kept(rules, n, sizes)) for n, (one, rules) in pairs if (n == 1) == one]
        if len(mixed) != len(held_by) or not all(rules for _, rules in mixed):
            return False
        before, known = next((s, i) for s, i in self.by_sizes.items())
        found = differences(known, items)
        if found is None or any(sort_of(old) != sort_of(new) for _, old, new in found):
            return False
        rules = dict(self.rules)
        for place, old, new in found:
            if place not in rules:
                both = rules_of(old, before) & rules_of(new, sizes)
                # Or by rounding, that no other rule tells.
                past = [(item_at(i, place), known) for known, i in self.by_sizes.items()]
                rules[place] = both or roundings([*past, (new, sizes)])
        seen = [*self.by_sizes, sizes]
        for place in number_places(items):
            if place not in rules:
                both = coincidences(item_at(items, place), seen)
                if both:
                    rules[place] = both
        for place in rules:
            value = item_at(items, place)
            rules[place] = kept(rules[place], value, sizes)
        if not all(rules.values()):
            return False
        self._mixed = mixed
        self._hold_to(rules)
        self.constant = {a: size for a, size in self.constant.items() if sizes[a] == size}
        self.general = True
        self._keep(items, sizes)
        return True

    def _hold_to(self, rules: dict[tuple[int, ...], set[Rule]]) -> None:
        self.rules = rules  # of numbers that follow the sizes: those that all calls have kept to
        self._rounded = [r for r in rules.values() if any(one[0] == "rounded" for one in r)]
        # One rule of a number tells of which sort it will be; where they disagree, the path tells.
        items = next(iter(self.by_sizes.values()))
        exact = {p: [one for one in r if one[0] != "rounded"] for p, r in rules.items()}
        self._sorts = [(min(r), sort_of(item_at(items, p))) for p, r in exact.items() if r]

    def numbers(self, items: list[Any], sizes: Sizes) -> set[tuple[int, int]] | None:
        """The whole numbers in which a call on other sizes differs; None if not in such alone."""
        before, known = next(iter(self.by_sizes.items()))
        found = differences(known, items)
        if found is None or not all(rules_of(a, before) & rules_of(b, sizes) for _, a, b in found):
            return None
        return {(old, new) for _, old, new in found}

    def deciding(self, at: int) -> tuple[Any, ...]:
        """The modules whose calls were under way after so many items."""
        running: list[Any] = []
        for position, module in self._moments:
            if position > at:
                break
            if module is not None:
                running.append(module)
            elif running and position < at:
                running.pop()
        return tuple(running)

    def _keep(self, items: list[Any], sizes: Sizes) -> None:
        # The first one stays: the others are compared with it.
        if len(self.by_sizes) >= _MOST_SIZES:
            self.by_sizes = dict(list(self.by_sizes.items())[:1])
        self.by_sizes[sizes] = items


class KnownPaths(Generic[_Plan]):
    """What is known of one kind of call: for inputs of some sizes, one path.

    A module that takes several is to be traced in each pass, so that its parts, which take one
    each, can be read by their plans.
    """

    def __init__(
        self,
        alike: Callable[[_Plan, _Plan], bool],
        held_by: Callable[[_Plan], Sequence[int] | None] = lambda plan: (),
    ) -> None:
        self._alike = alike  # do two plans say the same?
        # The numbers by which one holds, beside those of its path; None: for no other sizes.
        self._held_by = held_by
        self.paths: list[_Path[_Plan]] = []  # those that are known
        self._unruly = False  # numbers have followed no rule: each size is traced
        self._strays = 0
        self._new = 0  # calls of ever new sizes that were traced, one after the other
        self._astray: tuple[list[Any], Sizes] | None = None  # the latest call that left its path
        self._doubted = False
        # The latest call took a path that nobody has seen: the next one is to be traced.
        self.lost = False

    def doubt(self, of_others: bool) -> None:
        """A call of another module (or of another kind) has left its path: the next is traced."""
        self.lost = True
        self._doubted = self._doubted or of_others

    def turned(self, items: list[Any], sizes: Sizes) -> bool:
        """Whether a call that was traced on a doubt took another path than replayed ones had."""
        doubted, self._doubted = self._doubted, False
        path = next((p for p in self.paths if sizes in p.by_sizes), None) if doubted else None
        return path is not None and path.seen and path.by_sizes[sizes] != items

    def plan(self, sizes: Sizes) -> _Plan | None:
        """The plan by which a call may be read; None if it is to be traced."""
        path = None if self.lost else self._path(sizes)
        return path.plan if path is not None else None

    def _path(self, sizes: Sizes) -> _Path[_Plan] | None:
        for path in self.paths:
            if sizes in path.by_sizes:
                return path
        if self._unruly:
            return None
        return next((p for p in self.paths if p.holds_for(sizes)), None)

    def taken(self, items: list[Any], sizes: Sizes) -> bool:
        """Whether a call that was read by a plan took the path of that plan."""
        path = self._path(sizes)
        if path is None:
            return False
        known = path.by_sizes.get(sizes)
        if known == items or (known is None and path.fits(items, sizes)):
            path.seen = True
            self._new = 0
            return True
        self._unruly = self._unruly or known is None
        self.lost = True
        return False

    def begun(self, items: list[Any], sizes: Sizes) -> bool:
        """Whether a call under way has taken its plan's path so far, if `items` does not tell."""
        path = self._path(sizes)
        return path is not None and path.rules_kept(items, sizes) is not None

    def items(self, sizes: Sizes) -> list[Any] | None:
        """Those that a call on such inputs is taken to decide; None if they are not known yet."""
        path = self._path(sizes)
        return path.by_sizes.get(sizes) if path is not None else None

    def numbers(self, items: list[Any], sizes: Sizes) -> set[tuple[int, int]] | None:
        """Where a call took a known path but for whole numbers that may follow its sizes: those.

        Each with what it was before. None where nothing is known of that.
        """
        exact = [path.by_sizes[sizes] for path in self.paths if sizes in path.by_sizes]
        if exact:
            return set() if items in exact else None
        found = (path.numbers(items, sizes) for path in self.paths)
        return next((numbers for numbers in found if numbers is not None), None)

    def wavers(self, items: list[Any], sizes: Sizes) -> bool:
        """Whether a traced call, after one that left its path, took a third one."""
        astray, self._astray = self._astray, None
        return astray is not None and astray[1] == sizes and astray[0] != items

    @property
    def never_repeats(self) -> bool:
        """Whether each call of late was on new sizes, and its numbers followed no rule."""
        return self._new >= _MOST_NEW

    def leaves_at(self, items: list[Any], sizes: Sizes) -> tuple[int, tuple[Any, ...]]:
        """Where a call has left its path: after so many items, and who was deciding there."""
        path = self._path_before(sizes)
        if path is None:
            return 0, ()
        known = path.by_sizes.get(sizes) or next(iter(path.by_sizes.values()))
        numbers = sizes not in path.by_sizes
        at = 0
        for a, b in zip(known, items, strict=False):
            if a != b and not (numbers and differences((a,), (b,)) is not None):
                break
            at += 1
        return at, path.deciding(at)

    def _path_before(self, sizes: Sizes) -> _Path[_Plan] | None:
        exact = (p for p in self.paths if sizes in p.by_sizes)
        return next(exact, None) or next((p for p in self.paths if p.general), None)

    def strayed(self, items: list[Any], sizes: Sizes) -> bool:
        """A call has left its path: whether it is in the module's nature to do so.

        Code that does something once only, as to fill a cache, does it in the first calls.
        """
        self._strays += 1
        self._astray = items, sizes
        path = self._path_before(sizes)
        return self._strays > 1 or (path is not None and path.seen)

    def learn(
        self, items: list[Any], sizes: Sizes, plan: _Plan, moments: list[tuple[int, Any]]
    ) -> _Plan:
        """A call was traced; the plan that is to be kept for it."""
        self.lost = False
        new = not any(sizes in path.by_sizes for path in self.paths)
        for path in list(self.paths):
            if sizes in path.by_sizes:
                if path.by_sizes[sizes] == items and self._alike(path.plan, plan):
                    return path.plan
                del path.by_sizes[sizes]
                if not path.by_sizes:
                    self.paths.remove(path)
        held_by = self._held_by(plan)
        for path in self.paths:
            if self._alike(path.plan, plan) and path.takes(items, sizes, held_by):
                return path.plan
        self._new = self._new + 1 if new else 0
        if len(self.paths) >= _MOST_PATHS:
            self.paths.pop(0)
        self.paths.append(_Path(items, sizes, plan, moments, held_by))
        return plan
