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

    def of(self, tensors: Sequence[Tensor], sizes: Sizes) -> Truths | None:
        """What a call is about to read.

        Args:
            tensors: all that it is given.
            sizes: of these.

        Returns:
            None if that is not known.
        """
        truths: Truths = ()
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
                return None
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
        for one, found in asked:
            if truths not in self._next:
                self._next[truths] = _Truth(one, sizes)
            truth = self._next[truths]
            if truth is None or not truth.takes(one, sizes):
                return None
            truths = *truths, found
        if self._next.setdefault(truths, None) is not None:
            return None
        return truths if list(self._next.values()).count(None) <= _MOST_WAYS else None


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
