"""Where a layer's filters lie in a tensor, through reshapes, permutes and slices.

A layer makes its filters along one axis. Later operations move that axis, cut it, or split it over
several (heads × head size). `ChannelLayout` keeps exactly which filter each index stands for; an
operation that mixes filters with anything else gives None, and the tensor no longer has filters to
speak of.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple


class ChannelAxis(NamedTuple):
    """One axis of the tensor that counts filters: index i stands for filter i * stride."""

    dim: int
    size: int
    stride: int = 1

    def at(self, dim: int) -> ChannelAxis:
        """The same along another axis."""
        return ChannelAxis(dim, self.size, self.stride)


@dataclass(frozen=True, slots=True)
class ChannelLayout:
    """The filters of a tensor: filter = offset + sum of index * stride over the parts."""

    parts: tuple[ChannelAxis, ...]
    offset: int = 0

    @staticmethod
    def single(dim: int, size: int) -> ChannelLayout:
        """All filters along one axis."""
        return _single(dim, size) if type(size) is int else ChannelLayout((ChannelAxis(dim, size),))

    def fit(self, shape: Sequence[int]) -> bool:
        """Whether a tensor of this shape has them all."""
        rank = len(shape)
        for dim, size, _ in self.parts:  # noqa: SIM110  (a generator costs more than the question)
            if dim >= rank or shape[dim] != size:
                return False
        return True

    @staticmethod
    def of_all(shape: Sequence[int]) -> ChannelLayout:
        """Every value of a tensor of this shape, by its place in row-major order."""
        stride, parts = 1, []
        for dim in reversed(range(len(shape))):
            parts.append(ChannelAxis(dim, shape[dim], stride))
            stride *= shape[dim]
        return ChannelLayout(tuple(reversed(parts)))

    @staticmethod
    def of_each(shape: tuple[int, ...]) -> tuple[tuple[ChannelLayout, ...], ChannelLayout]:
        """Every axis of a tensor of this shape alone, and all of its values (`of_all`)."""
        return _of_each(shape) if _INT.issuperset(map(type, shape)) else _of_each.__wrapped__(shape)

    def split(self, shape: Sequence[int]) -> tuple[ChannelLayout | None, ...]:
        """Of places in a tensor of this shape (`of_all`): the indices along each of its axes.

        None for all of them where one part runs along several.
        """
        if 0 in shape:
            return (None,) * len(shape)
        offset, found = self.offset, []
        left = [p for p in self.parts if p.size > 1]
        for part in ChannelLayout.of_all(shape).parts:
            first, offset = divmod(offset, part.stride)
            mine = [p for p in left if part.stride <= p.stride < part.stride * part.size]
            left = [p for p in left if p not in mine]
            steps = [p._replace(stride=p.stride // part.stride) for p in mine]
            fits = all(p.stride % part.stride == 0 for p in mine)
            if not fits or first + sum((p.size - 1) * p.stride for p in steps) >= part.size:
                return (None,) * len(shape)
            found.append(ChannelLayout(tuple(steps), first))
        return tuple(found) if not left else (None,) * len(shape)

    @property
    def dim(self) -> int | None:
        """The filter axis, where it is one."""
        return self.parts[0].dim if len(self.parts) == 1 else None

    @property
    def filters(self) -> range | None:
        """The filters that stand along the axis, in order, where it is one axis."""
        if len(self.parts) != 1:
            return None
        part = self.parts[0]
        return range(self.offset, self.offset + part.size * part.stride, part.stride)

    def fitted(self, shape: Sequence[int], most: float = math.inf) -> ChannelLayout | None:
        """The same on a tensor with more of them, or fewer; None where they cannot be told then.

        A layer without weights has as many filters as it is given, a norm for one. There are no
        more than `most`.
        """
        if self.fit(shape):
            return self
        if (
            self.dim is None
            or self.dim >= len(shape)
            or self != ChannelLayout.single(self.dim, self.parts[0].size)
        ):
            return None
        size = shape[self.dim]
        return ChannelLayout.single(self.dim, size) if size <= most else None

    def _at(self, dim: int) -> ChannelAxis | None:
        return next((p for p in self.parts if p.dim == dim), None)

    def _with(self, dim: int, part: ChannelAxis | None, shift: int = 0) -> ChannelLayout:
        kept = (p for p in self.parts if p.dim != dim)
        parts = (*kept, part) if part is not None else tuple(kept)
        return ChannelLayout(tuple(sorted(parts, key=lambda p: p.dim)), self.offset + shift)

    def permute(self, order: Sequence[int]) -> ChannelLayout:
        """The tensor's axis d becomes axis `order.index(d)`."""
        moved = (p.at(order.index(p.dim)) for p in self.parts)
        return ChannelLayout(tuple(sorted(moved, key=lambda p: p.dim)), self.offset)

    def insert(self, dim: int, count: int = 1) -> ChannelLayout:
        """New axes before axis `dim`."""
        moved = (p.at(p.dim + count) if p.dim >= dim else p for p in self.parts)
        return ChannelLayout(tuple(moved), self.offset)

    def remove(self, dims: Sequence[int]) -> ChannelLayout | None:
        """Axes that are summed, averaged or squeezed away; None if they counted filters."""
        if any(p.dim in dims and p.size > 1 for p in self.parts):
            return None
        kept = (p for p in self.parts if p.dim not in dims)
        moved = (p.at(p.dim - sum(d < p.dim for d in dims)) for p in kept)
        return ChannelLayout(tuple(moved), self.offset)

    def select(self, dim: int, index: int) -> ChannelLayout:
        """One index of an axis, which goes."""
        part = self._at(dim)
        shift = 0
        if part is not None:
            shift = (index % part.size) * part.stride
        cut = self._with(dim, None, shift)
        moved = (p.at(p.dim - 1) if p.dim > dim else p for p in cut.parts)
        return ChannelLayout(tuple(moved), cut.offset)

    def slice(self, dim: int, start: int, size: int, step: int = 1) -> ChannelLayout:
        """`size` indices of an axis from `start`, every `step`-th."""
        part = self._at(dim)
        if part is None:
            return self
        return self._with(dim, ChannelAxis(dim, size, part.stride * step), start * part.stride)

    def reshape(self, before: tuple[int, ...], after: tuple[int, ...]) -> ChannelLayout | None:
        """The axes after a reshape, or None where it mixes filters with something else."""
        if _INT.issuperset(map(type, before)) and _INT.issuperset(map(type, after)):
            return _reshaped(self, before, after)
        return self._reshape(before, after)  # sizes that are symbols, which have no hash

    def at_stake(self, before: tuple[int, ...], after: tuple[int, ...]) -> tuple[int, ...]:
        """The sizes of axes by which a reshape keeps filters, or mixes them; empty if none are.

        A convolution's map that is flattened keeps its filters where it has one pixel.
        """
        if math.prod(before) == 0:
            return ()
        found: list[int] = []
        mine = {part.dim for part in self.parts}
        for old, new in _groups(before, after):
            others = [before[d] for d in old if d not in mine]
            if not new or len(others) < len(old):
                found += others
        return tuple(found)

    def _reshape(self, before: tuple[int, ...], after: tuple[int, ...]) -> ChannelLayout | None:
        if math.prod(before) == 0:
            return self if before == after else None
        parts: list[ChannelAxis] = []
        todo = {p.dim for p in self.parts if p.size > 1}
        for old, new in _groups(before, after):
            inside = [p for d in old for p in self.parts if p.dim == d and p.size > 1]
            if not inside:
                continue
            todo -= {p.dim for p in inside}
            wide_old = [d for d in old if before[d] > 1]
            wide_new = [d for d in new if after[d] > 1]
            if len(wide_old) != len(inside):  # mixed with an axis that counts no filters
                if [before[d] for d in wide_old] != [after[d] for d in wide_new]:
                    return None
                parts += [p.at(wide_new[wide_old.index(p.dim)]) for p in inside]
                continue
            if any(a.stride != b.stride * b.size for a, b in itertools.pairwise(inside)):
                if [p.size for p in inside] != [after[d] for d in wide_new]:
                    return None
                parts += [p.at(d) for p, d in zip(inside, wide_new, strict=True)]
                continue
            stride = inside[-1].stride
            for d in reversed(wide_new):
                parts.append(ChannelAxis(d, after[d], stride))
                stride *= after[d]
        if todo:
            return None
        if not parts and self.parts:  # a layer of one filter: any axis of size one will do
            ones = [p.dim for p in self.parts if p.dim < len(after) and after[p.dim] == 1]
            parts = [ChannelAxis(ones[0], 1)] if ones else []
        return ChannelLayout(tuple(sorted(parts, key=lambda p: p.dim)), self.offset)


_INT = frozenset({int})


@lru_cache(maxsize=4096)
def _reshaped(
    axes: ChannelLayout, before: tuple[int, ...], after: tuple[int, ...]
) -> ChannelLayout | None:
    """Once for all blocks of a model, which reshape alike."""
    return axes._reshape(before, after)


@lru_cache(maxsize=1024)
def _single(dim: int, size: int) -> ChannelLayout:
    return ChannelLayout((ChannelAxis(dim, size),))


@lru_cache(maxsize=1024)
def _of_each(shape: tuple[int, ...]) -> tuple[tuple[ChannelLayout, ...], ChannelLayout]:
    return tuple(
        [ChannelLayout.single(d, size) for d, size in enumerate(shape)]
    ), ChannelLayout.of_all(shape)


def _groups(before: Sequence[int], after: Sequence[int]) -> list[tuple[list[int], list[int]]]:
    """The smallest runs of old and new axes that hold the same elements."""
    groups: list[tuple[list[int], list[int]]] = []
    i = j = 0
    while i < len(before) or j < len(after):
        old: list[int] = []
        new: list[int] = []
        a = b = 1
        while True:
            if a <= b and i < len(before) and (a < b or not old):
                old.append(i)
                a *= before[i]
                i += 1
            elif b <= a and j < len(after) and (b < a or not new):
                new.append(j)
                b *= after[j]
                j += 1
            else:
                break
        groups.append((old, new))
    return groups
