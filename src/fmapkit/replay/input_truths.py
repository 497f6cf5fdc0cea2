"""What a call will read of its inputs, known before it: each truth, by those that come before it.

A call whose branches are decided by its inputs alone (`if mask.all()`) need not be traced in every
pass. What it decides is read before it, and is a part of its kind (see `regions.py`). Whatever is
read here, the path that the call takes is compared as any other.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fmapkit.paths import Sizes, by_rule, rules_of
from fmapkit.torchlib.side_ops import looking
from fmapkit.tracing import InputRead, read

__all__ = ["InputTruths", "Truths"]

Truths = tuple[bool, ...]
_MOST_SIZES = 32
_MOST_WAYS = 8  # to trace each of them once would cost more than to trace parts of every pass


class InputTruths:
    """Those of the calls of one form."""

    def __init__(self) -> None:
        # What is read after some truths; None where nothing is.
        self._next: dict[Truths, _Truth | None] = {}
        self._read: Truths = ()  # the latest that was read before a call
        self._unread = False  # some cannot be read before a call

    def of(self, tensors: Sequence[Tensor], sizes: Sizes) -> Truths | None:
        """What a call is about to read.

        Args:
            tensors: all that it is given.
            sizes: of these.

        Returns:
            None if that is not known.
        """
        truths: Truths = ()
        self._read = truths
        while truths in self._next:
            truth = self._next[truths]
            if truth is None:
                return truths
            numbers = truth.numbers(sizes)
            if numbers is None:
                return None
            try:
                with looking(), torch.no_grad():
                    truths = *truths, bool(read(truth.form, tensors, iter(numbers)))
            except Exception:  # of the functions: the model may do otherwise with such inputs
                self._unread = True
                return None
            self._read = truths
        return None

    def learn(self, asked: Sequence[tuple[InputRead, bool]], sizes: Sizes) -> Truths | None:
        """A call was traced.

        Args:
            asked: what it has read of its inputs, in order, and what that was.
            sizes: of its inputs.

        Returns:
            The truths; None if something else decides what is read, or calls differ too much.
        """
        truths: Truths = ()
        before, self._read = self._read, ()
        for one, found in asked:
            if truths not in self._next:
                self._next[truths] = _Truth(one, sizes)
            truth = self._next[truths]
            if truth is None or not truth.takes(one, sizes):
                return None
            truths = *truths, found
        if self._next.setdefault(truths, None) is not None:
            return None
        if self._unread or truths[: len(before)] != before:  # what was read is not what it reads
            return None
        return truths if list(self._next.values()).count(None) <= _MOST_WAYS else None

    def like(self, other: InputTruths) -> bool:
        """Whether calls of another state read the same, as far as both are known."""
        common = self._next.keys() & other._next.keys()
        return all(_alike(self._next[truths], other._next[truths]) for truths in common)


class _Truth:
    """One truth, for inputs of any sizes.

    Attributes:
        form: the functions that give it.
    """

    def __init__(self, first: InputRead, sizes: Sizes) -> None:
        self.form = first.form
        self._first = first
        self._by_sizes = {sizes: first.numbers}
        self._rules = [rules_of(n, sizes) | {("same", n)} for n in first.numbers]

    def takes(self, other: InputRead, sizes: Sizes) -> bool:
        """Whether another call has read the same, with whole numbers that may follow its sizes."""
        if not self._first.is_like(other):
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

    def like(self, other: _Truth) -> bool:
        """Whether it is the same as another one, as far as both are known."""
        pairs = zip(self._rules, other._rules, strict=True)
        return self._first.is_like(other._first) and all(one & two for one, two in pairs)

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


def _alike(one: _Truth | None, two: _Truth | None) -> bool:
    return one is two is None or (one is not None and two is not None and one.like(two))
