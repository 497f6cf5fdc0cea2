"""What a call will read of its inputs, known before it: each value, by those that come before it.

A truth of its inputs, or of tensors that its modules have (`if mask.all()`, `if self.ready`), is a
part of its kind (see `regions.py`), and a whole number counts as one of its sizes. Whatever is read
here, the path that the call takes is compared as any other.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fmapkit.paths import Sizes, by_rule, rules_of
from fmapkit.replay.escapes import own_names
from fmapkit.torchlib.caching import remembered
from fmapkit.torchlib.nested import modules_in
from fmapkit.torchlib.side_ops import looking
from fmapkit.tracing import InputRead, read

# Of each truth that was read, it; of whole numbers, how many there were.
Truths = tuple[Any, ...]
_MOST_SIZES = 32
_MOST_NUMBERS = 64
_MOST_WAYS = 8  # to trace each of them once would cost more than to trace parts of every pass


class InputTruths:
    """Those of the calls of one form."""

    def __init__(self) -> None:
        # What is read after some truths; None where nothing is.
        self._next: dict[Truths, _ValueRead | None] = {}
        self._read: Truths = ()  # the latest that was read before a call
        self._unread = False  # some cannot be read before a call

    @property
    def nothing(self) -> bool:
        """Whether no call has read anything."""
        return self._next.get((), self) is None

    def of(self, tensors: Sequence[Tensor], sizes: Sizes) -> tuple[Truths, Sizes] | None:
        """The truths that a call is about to read, and its sizes with the numbers after them.

        None if that is not known. The tensors are all that it is given, and that its modules have.
        """
        truths: Truths = ()
        self._read = truths
        while truths in self._next:
            one = self._next[truths]
            if one is None:
                return truths, sizes
            numbers = one.numbers(sizes)
            if numbers is None:
                return None
            try:
                with looking(), torch.no_grad():
                    said, more = one.first.told(read(one.first.form, tensors, iter(numbers)))
            except Exception:  # of the functions: the model may do otherwise with such inputs
                self._unread = True
                return None
            truths, sizes = (*truths, said), (*sizes, *more)
            self._read = truths
        return None

    def learn(
        self, asked: Sequence[tuple[InputRead, Any]], sizes: Sizes
    ) -> tuple[Truths, Sizes] | None:
        """The same of a call that was traced, by what it has read in order, and what that was.

        None if something else decides what is read, or calls differ too much.
        """
        truths: Truths = ()
        before, self._read = self._read, ()
        most = len(sizes) + _MOST_NUMBERS
        for one, value in asked:
            if truths not in self._next:
                self._next[truths] = _ValueRead(one, sizes)
            known = self._next[truths]
            if known is None or not known.takes(one, sizes):
                return None
            said, more = one.told(value)
            truths, sizes = (*truths, said), (*sizes, *more)
        if self._next.setdefault(truths, None) is not None or len(sizes) > most:
            return None
        if self._unread or truths[: len(before)] != before:  # what was read is not what it reads
            return None
        few = list(self._next.values()).count(None) <= _MOST_WAYS
        return (truths, sizes) if few else None

    def like(self, other: InputTruths) -> bool:
        """Whether calls of another state read the same, as far as both are known."""
        common = self._next.keys() & other._next.keys()
        return all(_alike(self._next[truths], other._next[truths]) for truths in common)


class _ValueRead:
    """One truth, or whole numbers, for inputs of any sizes."""

    def __init__(self, first: InputRead, sizes: Sizes) -> None:
        self.first = first  # how the first call read it
        self._by_sizes = {sizes: first.numbers}
        self._rules = [rules_of(n, sizes) | {("same", n)} for n in first.numbers]

    def takes(self, other: InputRead, sizes: Sizes) -> bool:
        """Whether another call has read the same, with whole numbers that may follow its sizes."""
        if not self.first.is_like(other):
            return False
        if sizes in self._by_sizes:
            return self._by_sizes[sizes] == other.numbers
        for rules, number in zip(self._rules, other.numbers, strict=True):
            rules &= rules_of(number, sizes) | {("same", number)}
        if not all(self._rules):
            return False
        if len(self._by_sizes) >= _MOST_SIZES:
            self._by_sizes.clear()
        self._by_sizes[sizes] = other.numbers
        return True

    def like(self, other: _ValueRead) -> bool:
        """Whether it is the same as another one, as far as both are known."""
        pairs = zip(self._rules, other._rules, strict=True)
        return self.first.is_like(other.first) and all(one & two for one, two in pairs)

    def numbers(self, sizes: Sizes) -> Sequence[int] | None:
        """The whole numbers in it; None if the rules that they have kept to do not agree."""
        known = self._by_sizes.get(sizes)
        if known is not None:
            return known
        found: list[int] = []
        for rules in self._rules:
            values = {by_rule(rule, sizes) for rule in rules}
            if len(values) != 1:
                return None
            found.append(int(values.pop()))
        return found


def _alike(one: _ValueRead | None, two: _ValueRead | None) -> bool:
    return one is two is None or (one is not None and two is not None and one.like(two))


class OwnTensors:
    """Tensors that the modules of a region have: what their code may decide by, as `if self.ready`.

    Buffers, parameters and other attributes, of the modules whose code is not torch's.
    """

    def __init__(self, module: nn.Module) -> None:
        self._places: list[tuple[dict[str, Any], str]] = []
        for each in modules_in(module):
            if not _is_torchs(type(each)):
                own = each.__dict__
                for holder in (each._buffers, each._parameters):
                    self._places += [(holder, name) for name in holder]
                names = own_names(tuple(own))
                self._places += [(own, n) for n in names if isinstance(own[n], Tensor)]

    def noted(self) -> list[Callable[[], Any]]:
        """Those that there are now, None in the place of any other value, and none kept alive."""
        return [weakref.ref(t) if isinstance(t, Tensor) else type(None) for t in self._now()]

    def after(self, given: Sequence[Tensor]) -> list[Any]:
        """The same, after the tensors that a call is given."""
        return [*given, *self._now()]

    def _now(self) -> list[Any]:
        return [holder.get(name) for holder, name in self._places]


@remembered
def _is_torchs(kind: type) -> bool:
    return kind.__module__.startswith("torch.nn.modules.")
