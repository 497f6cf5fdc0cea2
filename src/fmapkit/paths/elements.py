"""What is recorded of what Python itself goes through: the plain values in it, in order.

That is what `zip` is given, what `*` and `**` unpack, what a dict is made of. Where a value is an
argument of other code, most of these kinds need no look: what that code makes of them is recorded.

No code of a model's runs here: contents are read past what a subclass may say.
"""

from __future__ import annotations

import array
import collections
import operator
import types
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import numpy as np
import torch

from fmapkit.paths.items import FORMS, ITEM_OF, class_of, flat, ignore, item_of_class, row
from fmapkit.torchlib.caching import remembered

_MOST = 1024  # numbers of an array: so many at most go with as many tensors
_NONE: dict[Any, Any] = {}
_VIEWS = tuple(map(type, (_NONE.keys(), _NONE.values(), _NONE.items())))
_ITERATORS = tuple(
    type(made)
    for made in (
        *(iter([]), reversed([]), iter(()), iter(""), iter("\u00e9"), iter(b""), iter(bytearray())),
        *(reversed(()), iter(_NONE), iter(_NONE.values()), iter(_NONE.items()), iter(set())),
        *(reversed(_NONE), reversed(_NONE.values()), reversed(_NONE.items()), iter(range(0))),
        *(iter(collections.deque()), reversed(collections.deque())),
    )
)
_ROWS = frozenset((list, tuple, str, bytes, collections.deque))
WRAPPERS = frozenset((types.MethodWrapperType, types.WrapperDescriptorType))
_Contents = Callable[[Any], Iterable[Any]]


@remembered
def contents_of(kind: type) -> _Contents | None:
    """What gives the elements of values of a class; None where they are not to be had so."""
    if issubclass(kind, collections.OrderedDict):
        return collections.OrderedDict.items
    for of, contents in _CONTENTS.items():
        if issubclass(kind, of):
            return contents
    return None


@remembered
def picks_by_index(kind: type) -> bool:
    """Whether Python itself picks an element of values of a class, by an index or a key."""
    return kind is not torch.Size and contents_of(kind) is not None


@remembered
def item_of_elements(kind: type) -> Callable[[Any], Any]:
    """What makes an item of what values of a class hold."""
    if kind in (tuple, list):
        return partial(row, part=_column)  # of columns, as those of `zip(*columns)`
    if kind not in (set, frozenset):
        item_of = ITEM_OF.get(kind) or item_of_class(kind)
        if item_of is not ignore:
            return item_of
    contents = contents_of(kind)
    if contents is None:
        return ignore

    return lambda given: (class_of(kind), *[flat(each, 1) for each in contents(given)])


def _column(given: Any) -> Any:
    """The same of one that is neither a plain value nor a tensor."""
    kind = type(given)
    if kind in (tuple, list) or contents_of(kind) is None:
        return flat(given, 1)
    return item_of_elements(kind)(given)


def keys_of(given: Any, pairs: bool) -> Any:
    """What is recorded of the keys of a mapping, or of a row of `pairs`, too; None of others."""
    kind = type(given)
    if issubclass(kind, (dict, _VIEWS[2])):
        contents: Any = contents_of(kind)
        return (class_of(kind), *[flat(key, 1) for key, _ in contents(given)])
    if pairs and kind in (list, tuple) and all(type(p) is tuple and len(p) == 2 for p in given):
        return (kind, *[flat(key, 1) for key, _ in given])
    return None


def _left(iterator: Any) -> list[Any]:
    """What an iterator has yet to give: it stays where it is."""
    _, (given, *_), *at = iterator.__reduce__()
    return [type(given), *at, *(given if type(given) in _ROWS else [given])]


def _data_of(given: Any, kind: type) -> Any:
    """What a container of Python's library holds; nothing where its class makes it otherwise."""
    data = object.__getattribute__(given, "__dict__").get("data")
    return data if type(data) is kind else kind()


def _array(given: Any) -> list[Any]:
    """Numbers by which something may be picked are few, and whole, and in a row.

    Of others, which are data, the shape says how many there are.
    """
    if given.ndim != 1 or given.dtype.kind in "fc" or given.size > _MOST:
        return [given.shape]
    numbers: list[Any] = np.ndarray.tolist(given)
    return numbers


_CONTENTS: dict[type, _Contents] = {
    dict: dict.items,
    list: list.__iter__,
    tuple: tuple.__iter__,
    str: str.__iter__,
    set: set.__iter__,
    frozenset: frozenset.__iter__,
    collections.deque: collections.deque.__iter__,
    types.MappingProxyType: lambda given: list(given.items()),
    collections.UserDict: lambda given: _data_of(given, dict).items(),
    collections.UserList: lambda given: _data_of(given, list),
    bytearray: bytearray.__iter__,
    array.array: lambda given: array.array.tolist(given[:_MOST]),
    np.ndarray: _array,
    **dict.fromkeys(_VIEWS, iter),
    **dict.fromkeys(_ITERATORS, _left),
}


def forms(append: Callable[[Any], None], given: Any) -> None:
    """A tensor is indexed by something: of tensors in that, the form tells what comes out."""
    kind = type(given)
    if kind in FORMS:
        append(FORMS[kind](given))
    elif kind is tuple or kind is list:
        for each in given:
            if type(each) in FORMS:
                append(FORMS[type(each)](each))


def taking(append: Callable[[Any], None], function: Any) -> Any:
    """A function that code in C, or a name, calls: one that takes elements looks by which index."""
    named = type(function) in WRAPPERS and function.__name__ == "__getitem__"
    if not named and function is not operator.getitem:
        return function

    def looked_at(*given: Any) -> Any:
        for at in given[-1:]:
            forms(append, at)
        return function(*given)

    return looked_at
