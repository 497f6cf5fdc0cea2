"""The sizes that a known step rests on.

What the results of most functions carry depends on what they are given, and on how many axes that
has. With some, sizes have a say: of two summands, the one that is as large as the sum gives it its
filters; a reshape keeps the filters apart, or mixes them with positions; the filters of a weight
that the model computed are as many as it has rows now.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from fmapkit._form import ones
from fmapkit._functions import Function
from fmapkit._operands import FREE, Source
from fmapkit._origin import Flow, Lookup, Tag
from fmapkit._vocabulary import (
    KEEP_SHAPE,
    LINEAR_BINARY,
    LINEAR_KEEPERS,
    METADATA,
    NONLINEAR_POINTWISE,
    NORM_AXIS,
    PRODUCTS,
    REDUCTIONS,
    RESHAPES,
    words,
)
from fmapkit._weighted import weighs

__all__ = ["Ones", "Sizes", "makes_sizes", "rests_on"]

POINTWISE = LINEAR_KEEPERS | LINEAR_BINARY | PRODUCTS | NONLINEAR_POINTWISE | {"max", "min"}
_SIZED = RESHAPES | words(
    """expand expand_as broadcast_to repeat tile repeat_interleave copy __setitem__ index_add
    index_copy index_put scatter scatter_add masked_scatter"""
)


# Sized by what they are given beside the filters.
_INDEXED = words("__getitem__ gather take_along_dim tensor_split")
_NO_NEW_SIZES = POINTWISE | REDUCTIONS | KEEP_SHAPE | frozenset(NORM_AXIS) | METADATA


class Sizes:
    """All sizes: of what a call is given, and of what it returns, if that is known yet.

    Args:
        given: the tensors.
    """

    __slots__ = ("_shapes",)

    def __init__(self, given: Sequence[Tensor]) -> None:
        self._shapes = [t.shape for t in given]

    def hold(self, given: Sequence[Tensor]) -> bool:
        """Whether these are of the same sizes."""
        return [t.shape for t in given] == self._shapes


class Ones:
    """Where sizes are 1, or 0: nothing else can tell what is broadcast."""

    __slots__ = ("_ones",)

    def __init__(self, given: Sequence[Tensor]) -> None:
        self._ones = [ones(t.shape) for t in given]

    def hold(self, given: Sequence[Tensor]) -> bool:
        """Whether the same axes of these are of size 1."""
        return [ones(t.shape) for t in given] == self._ones


class _Largest:
    """Of a pointwise function, the first operand with filters that is as large as the result."""

    __slots__ = ("_places",)

    def __init__(self, places: list[int]) -> None:
        self._places = places  # those before it with filters, and it

    def hold(self, given: Sequence[Tensor]) -> bool:
        """Whether it is the same one."""
        shape, places = given[-1].shape, self._places
        if given[places[-1]].shape != shape:
            return False
        return len(places) == 1 or all(given[p].shape != shape for p in places[:-1])


class _Filters:
    """As many filters as the results of a layer, or a norm, had."""

    __slots__ = ("_parts",)

    def __init__(self, tags: Sequence[Tag]) -> None:
        self._parts = [
            (place - len(tags), part.dim, part.size)
            for place, tag in enumerate(tags)
            if isinstance(tag, Flow) and tag.axes is not None
            for part in tag.axes.parts
        ]

    def hold(self, given: Sequence[Tensor]) -> bool:
        """Whether the results, which come last, have as many."""
        return all(given[place].shape[dim] == size for place, dim, size in self._parts)


def rests_on(
    known: Function,
    operands: Sequence[Tensor],
    results: Sequence[Tensor],
    tags: Sequence[Tag],
    tag: Lookup,
    source: Source,
) -> Any:
    """The sizes that what a call's results carry rests on, as something that tells if they `hold`.

    Args:
        known: the function.
        operands: the tensors that it was given.
        results: those that it returned.
        tags: what these carry.
        tag: what a tensor carries.
        source: tells where a tensor is from.

    Returns:
        None where no size has a say.
    """
    name = known.name
    if known.sigma is not None or not any(t is not None for t in tags):
        return None
    carrying = [i for i, t in enumerate(operands) if tag(t) is not None]
    if name in NORM_AXIS or weighs(name):
        found = _Filters(tags)
        sizes = {p.size for t in tags if isinstance(t, Flow) and t.axes for p in t.axes.parts}
        fixed = {t.shape[0] for t in operands if t.dim() and _stays(t, name, source)}
        return found if not sizes <= fixed else None
    if name in POINTWISE:
        if len(operands) < 2:
            return None
        full = [i for i in carrying if operands[i].shape == results[0].shape]
        if len(results) != 1 or not full:
            return Sizes([*operands, *results])
        return _Largest(carrying[: carrying.index(full[0]) + 1])
    if name not in _SIZED and not (name in _INDEXED and any(source(t) == FREE for t in operands)):
        return None
    if all(getattr(tag(operands[i]), "axes", None) is None for i in carrying):
        return None
    return Sizes([*operands, *results])


def makes_sizes(known: Function, rests: Any) -> bool:
    """Whether a call may give a size to a result that is neither 1 nor of what it was given.

    Args:
        known: the function.
        rests: what `rests_on` said of it.
    """
    if rests is not None and not isinstance(rests, _Largest):
        return True
    return known.sigma is None and known.name not in _NO_NEW_SIZES


def _stays(tensor: Tensor, name: str, source: Source) -> bool:
    """Whether it is a parameter, or what a norm keeps for each filter."""
    found = source(tensor)
    return found == -1 or (found == FREE and name in NORM_AXIS and tensor.dim() == 1)
