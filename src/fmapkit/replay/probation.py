"""Modules that took several ways: traced until they have taken one and the same for long.

Code that leaves its path often does so once, and for good. Where a module that is replayed again
leaves it once more, all are traced again, for twice as many passes: of n passes, no more than
log₂(n / 32) + 1 are lost so, whatever the model does.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn

from fmapkit.paths import Sizes, differences

_FIRST = 32  # passes on one path
_MOST_SIZES = 8  # of a module's calls: how many its items are kept for


class Probation:
    """Those of one model."""

    def __init__(self) -> None:
        self._needed = _FIRST
        self._watched: dict[nn.Module, _Steadiness] = {}
        self._trusted: set[nn.Module] = set()  # are replayed again

    def watch(self, modules: Iterable[nn.Module]) -> None:
        """These have left their path, and are traced from now on."""
        for module in modules:
            self._watched[module] = _Steadiness()

    def watches(self, module: nn.Module) -> bool:
        """Whether a module is traced for no other reason."""
        return module in self._watched

    def trusts(self, modules: Iterable[nn.Module]) -> bool:
        """Whether one of these is replayed again, after it had left its path."""
        return not self._trusted.isdisjoint(modules)

    def called(self, module: nn.Module, sizes: Sizes, items: list[Any]) -> None:
        """A call of a watched module has ended; the items are of all that it called, too."""
        self._watched[module].calls.append((sizes, items))

    def end_pass(self, whole: bool) -> list[nn.Module]:
        """A pass has ended, seen as a `whole` or not: which modules are to be replayed again."""
        for steadiness in self._watched.values():
            steadiness.end_pass(whole)
        found = [m for m, s in self._watched.items() if s.passes >= self._needed]
        self._trusted.update(found)
        for module in found:
            del self._watched[module]
        return found

    def withdraw(self) -> list[nn.Module]:
        """One of those that are replayed again has left its path again; what is to be traced."""
        found = list(self._trusted)
        self._trusted.clear()
        self._needed *= 2
        self.watch(found)
        return found

    def drop(self, modules: Iterable[nn.Module]) -> None:
        """These are to be traced for another reason."""
        for module in modules:
            self._watched.pop(module, None)
            self._trusted.discard(module)

    def clear(self) -> None:
        """The model has other modules than it had."""
        self._watched.clear()
        self._trusted.clear()


class _Steadiness:
    """How steadily a module takes one path."""

    def __init__(self) -> None:
        self.passes = 0  # in a row, on one path
        # Of the pass that is under way: the sizes of its inputs, and its items.
        self.calls: list[tuple[Sizes, list[Any]]] = []
        self._by_sizes: dict[tuple[Sizes, ...], list[list[Any]]] = {}
        self._latest: list[list[Any]] = []

    def end_pass(self, whole: bool) -> None:
        """A pass has ended; if not all of it was seen, it tells nothing."""
        calls, self.calls = self.calls, []
        if not whole:
            return
        self.passes += 1
        if not calls:  # whether it is called, others decide
            return
        sizes = tuple([sizes for sizes, _ in calls])
        items = [items for _, items in calls]
        known = self._by_sizes.get(sizes)
        same = known == items if known is not None else self._follows(items)
        if not same:
            self.passes = 1
        if (not same) if known is not None else len(self._by_sizes) >= _MOST_SIZES:
            self._by_sizes.clear()
        self._by_sizes[sizes], self._latest = items, items

    def _follows(self, items: list[list[Any]]) -> bool:
        """Whether a pass on other sizes took the path of the latest, but for whole numbers."""
        pairs = zip(self._latest, items, strict=False)
        return len(items) == len(self._latest) and all(differences(*p) is not None for p in pairs)
