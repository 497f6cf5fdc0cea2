"""Kinds of values that Python itself goes through, and picks by: hidden, and changed unannounced.

Each stands where a list stands in `test_picked.py`. Beside them: code that hands on numbers which
change in each pass, where they pick nothing.
"""

from __future__ import annotations

import array
import collections
import dataclasses
import enum
import heapq
import operator
import random
import types
from collections.abc import Callable, Iterator
from decimal import Decimal
from fractions import Fraction
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fmapkit import capture
from tests.test_paths import hold, turns

pytestmark = pytest.mark.filterwarnings("ignore::fmapkit.CaptureWarning")


class Color(enum.Enum):
    RED = 0
    BLUE = 1


class Pair(NamedTuple):
    first: Any
    second: Any


class Order(NamedTuple):
    batch: int
    filters: int
    length: int


class Names(list[Any]):
    pass


@dataclasses.dataclass(frozen=True)
class Key:
    number: int


@dataclasses.dataclass
class Plain:
    first: int
    second: int


class Iterable:
    """What gives an iterator of Python's own."""

    def __init__(self, names: Any) -> None:
        self.names = names

    def __iter__(self) -> Iterator[Any]:
        return iter(self.names)


class Delegating(Iterable):
    """What hands on another one's elements."""

    def __iter__(self) -> Iterator[Any]:
        yield from self.names


# By a name: what makes the value of two ranks, which are 0 and 1 or 1 and 0.
_KINDS: dict[str, Callable[[int, int], Any]] = {
    "deque": lambda r, s: collections.deque([r, s]),
    "named tuple": Pair,
    "list of a class": lambda r, s: Names([r, s]),
    "array of numpy": lambda r, s: np.array([r, s]),
    "array": lambda r, s: array.array("i", [r, s]),
    "bytearray": lambda r, s: bytearray([r, s]),
    "ordered dict": lambda r, s: collections.OrderedDict({r: 0, s: 0}),
    "default dict": lambda r, s: collections.defaultdict(int, {r: 0, s: 0}),
    "counter": lambda r, s: collections.Counter({r: 2, s: 1}),
    "user's list": lambda r, s: collections.UserList([r, s]),
    "user's dict": lambda r, s: collections.UserDict({r: 0, s: 0}),
    "iterable": lambda r, s: Iterable([r, s]),
    "iterable deque": lambda r, s: Iterable(collections.deque([r, s])),
    "delegating": lambda r, s: Delegating(collections.deque([r, s])),
}
_Pick = Callable[[Any, Tensor, Tensor], Tensor]


class Picking(nn.Module):
    """One of two layers' outputs goes on, by what `hidden` has in it."""

    def __init__(self, pick: _Pick, make: Callable[[int, int], Any]) -> None:
        super().__init__()
        self.a, self.b = nn.Conv1d(3, 4, 1), nn.Conv1d(3, 4, 1)
        self.pick, self.make = (pick,), (make,)
        self.hidden = {"rank": 0, "value": make(0, 1)}

    def exchange(self) -> None:
        rank = 1 - self.hidden["rank"]
        self.hidden.update(rank=rank, value=self.make[0](rank, 1 - rank))

    def forward(self, x: Tensor) -> Tensor:
        (pick,) = self.pick
        return F.relu(pick(self.hidden["value"], self.a(x), self.b(x)))


def _picks(pick: _Pick, make: Callable[[int, int], Any]) -> None:
    again = turns((2, 3, 5), (2, 3, 5), (2, 3, 5))
    (exchanged,) = turns((2, 3, 5), before=lambda model: model.exchange())
    passes = [*again, exchanged, *again[:1], exchanged, *again[:2], exchanged]
    seen = hold(Picking(pick, make), passes, most=2)
    assert len({str(each[-1]) for each in seen.labels if each}) == 2


@pytest.mark.parametrize("kind", _KINDS)
def test_what_zip_goes_through(kind: str) -> None:
    _picks(lambda value, a, b: dict(zip(value, (a, b), strict=True))[0], _KINDS[kind])


def _reversed(value: Any, a: Tensor, b: Tensor) -> Tensor:
    return dict(zip(reversed(value), (b, a), strict=True))[0]


def _iterator(value: Any, a: Tensor, b: Tensor) -> Tensor:
    return dict(zip(iter(value), (a, b), strict=True))[0]


def _views(value: Any, a: Tensor, b: Tensor) -> Tensor:
    return dict(zip(value.keys(), (a, b), strict=True))[0]


def _contents(value: Any, a: Tensor, b: Tensor) -> Tensor:
    return dict(zip(value.values(), (a, b), strict=True))[0]


def _attributes(value: Any, a: Tensor, b: Tensor) -> Tensor:
    return dict(zip(vars(value).values(), (a, b), strict=True))[0]


def _unpacked(value: Any, a: Tensor, b: Tensor) -> Tensor:
    return operator.itemgetter(*value)((a, b))[0]


def _merged(value: Any, a: Tensor, b: Tensor) -> Tensor:
    return {0: b, **types.MappingProxyType(dict.fromkeys(value, a))}[0]


def _columns(value: Any, a: Tensor, b: Tensor) -> Tensor:
    columns = (value, (a, b))
    return dict(zip(*columns, strict=True))[0]


def _members(value: Any, a: Tensor, b: Tensor) -> Tensor:
    return {Color.RED: a, Color.BLUE: b}[value[0]]


def _keys(value: Any, a: Tensor, b: Tensor) -> Tensor:
    first, second = value
    return {first: a, second: b}[Key(0)]


def _classes(value: Any, a: Tensor, b: Tensor) -> Tensor:
    return {int: a, str: b}[value[0]]


def _texts(value: Any, a: Tensor, b: Tensor) -> Tensor:
    return {0: a, 1: b}[value[0]]


def _sets(value: Any, a: Tensor, b: Tensor) -> Tensor:
    return {value: a, frozenset((1 - next(iter(value)),)): b}[frozenset((0,))]


def _objects(value: Any, a: Tensor, b: Tensor) -> Tensor:
    found = np.empty(2, dtype=object)
    found[0], found[1] = a, b
    return found[value][0]


def _axes(value: Any, a: Tensor, b: Tensor) -> Tensor:
    return a.permute(value)


def _unpacked_axes(value: Any, a: Tensor, b: Tensor) -> Tensor:
    return a.permute(*value)


def _smallest(value: Any, a: Tensor, b: Tensor) -> Tensor:
    return heapq.nsmallest(1, (a, b), Ranks(value).next)[0]


def _assigned(value: Any, a: Tensor, b: Tensor) -> Tensor:
    ranks = iter(value)
    rank = lambda _: next(ranks)  # noqa: E731
    return min((a, b), key=rank)


def _until(value: Any, a: Tensor, b: Tensor) -> Tensor:
    ranks = iter(value)
    return dict(zip(iter(Ranks(ranks).next, None), (a, b), strict=False))[0]


def _rows(value: Any, a: Tensor, b: Tensor) -> Tensor:
    rows = [a]
    rows = rows * value[0]
    return [*rows, b][0]


def _rows_in_place(value: Any, a: Tensor, b: Tensor) -> Tensor:
    rows = [a]
    rows *= value[0]
    return [*rows, b][0]


def _rows_made(value: Any, a: Tensor, b: Tensor) -> Tensor:
    return (tuple([a]) * value[0] + (b,))[0]  # noqa: C409


class Ranks:
    """What gives one rank after the other."""

    def __init__(self, ranks: Any) -> None:
        self.ranks = iter(ranks)

    def next(self, _: Any = None) -> Any:
        return next(self.ranks, None)


_list: Callable[[int, int], Any] = lambda r, s: [r, s]  # noqa: E731
_WAYS: list[tuple[_Pick, Callable[[int, int], Any]]] = [
    (_reversed, _list),
    (_iterator, _list),
    (_views, lambda r, s: {r: 0, s: 0}),
    (_contents, lambda r, s: {"first": r, "second": s}),
    (_attributes, Plain),
    (_unpacked, lambda r, s: collections.deque([r, s])),
    (_merged, lambda r, s: collections.deque([r])),
    (_columns, lambda r, s: collections.deque([r, s])),
    (_members, lambda r, s: [Color(r), Color(s)]),
    (_keys, lambda r, s: [Key(r), Key(s)]),
    (_classes, lambda r, s: [(int, str)[r]]),
    (_sets, lambda r, s: frozenset((r,))),
    (_texts, lambda r, s: [Decimal(r)]),
    (_texts, lambda r, s: [Fraction(r)]),
    (_objects, lambda r, s: np.array([r, s])),
    (_objects, lambda r, s: np.array([bool(r), bool(s)])),
    (_axes, lambda r, s: Order(0, 1 + r, 1 + s)),
    (_unpacked_axes, lambda r, s: np.array([0, 1 + r, 1 + s])),
    (_smallest, _list),
    (_assigned, _list),
    (_until, _list),
    (_rows, _list),
    (_rows_in_place, _list),
    (_rows_made, _list),
]


@pytest.mark.parametrize(("pick", "make"), _WAYS, ids=lambda of: getattr(of, "__name__", ""))
def test_a_hidden_value_of_another_kind_picks(pick: _Pick, make: Callable[[int, int], Any]) -> None:
    _picks(pick, make)


# -- what picks nothing costs no pass --------------------------------------------------------------


_state: dict[str, Any] = {}


class Meter:
    """A mean that is logged."""

    def __init__(self) -> None:
        self.last = 0.0

    def __str__(self) -> str:
        return f"{self.last:.3f}"

    def __float__(self) -> float:
        return self.last

    def __len__(self) -> int:
        return int(1000 * self.last)


def _lambda(h: Tensor) -> Tensor:
    now = lambda: _state["step"] / 100  # noqa: E731
    return h * now()


def _inner(h: Tensor) -> Tensor:
    def now() -> float:
        return _state["step"] / 100

    return h * now()


def _logged(h: Tensor) -> Tensor:
    meter = _state["meter"]
    meter.last = random.random()
    _state["log"] = f"{meter} of {len(meter)}"
    _state["line"] = ", ".join(f"{key} {value}" for key, value in (("step", _state["step"]),))
    return h * float(meter)


def _bar(h: Tensor) -> Tensor:
    _state["line"] = "#" * _state["step"] + "." * (99 - _state["step"])
    _state["zeros"] = [0.0] * _state["step"]
    return h


def _counted(h: Tensor) -> Tensor:
    _state["counts"]["passes"] += 1
    return h * len({**_state["counts"], **dict(_state["counts"])})


def _noted(h: Tensor) -> Tensor:
    metrics = {"loss": random.random()}
    _state["metrics"] = {**metrics, **dict(sorted(metrics.items()))}
    _state["all"].update(metrics)
    return h


def _least(h: Tensor) -> Tensor:
    _state["losses"]["last"] = random.random()
    best = min(_state["losses"], key=_state["losses"].get)
    return h if min(_state["losses"], key=lambda name: _state["losses"][name]) == best else -h


def _extended(h: Tensor) -> Tensor:
    _state["noise"] = []
    _state["noise"].extend(random.random() for _ in range(2))
    _state["window"] = collections.deque((random.random() for _ in range(3)), maxlen=2)
    return h * float(np.fromiter((random.random() for _ in range(3)), float).mean())


def _seen(h: Tensor) -> Tensor:
    seen: set[int] = set()
    _note(h, seen)
    return _note(h + 1, seen)


def _note(h: Tensor, seen: set[int]) -> Tensor:
    seen.add(id(h))
    return h


def _mixed(h: Tensor) -> Tensor:
    return h[np.random.permutation(len(h))] * sum([random.random()] * 2)


def _otherwise(h: Tensor) -> Tensor:
    """Classes that say otherwise, made anew in each pass."""

    class Mapping(collections.UserDict):  # type: ignore[type-arg]
        def __init__(self) -> None: ...

        def keys(self) -> Any:
            return ["a"]

        def __getitem__(self, key: str) -> int:
            return 7

    class Text(str):
        def __str__(self) -> str:
            raise KeyError

        __repr__ = __str__

    class Ordered(collections.OrderedDict[str, int]):
        def items(self) -> Any:
            raise KeyError

    return h * dict(Mapping())["a"] * {Text("a"): 1}["a"] * dict(Ordered(a=1))["a"]


_USES = [
    _lambda,
    _inner,
    _logged,
    _bar,
    _counted,
    _noted,
    _least,
    _extended,
    _seen,
    _mixed,
    _otherwise,
]


class Ordinary(nn.Module):
    """Numbers change in each pass, and pick nothing."""

    def __init__(self, use: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.conv = nn.Conv1d(3, 4, 1)
        self.use = (use,)

    def forward(self, x: Tensor) -> Tensor:
        (use,) = self.use
        _state["step"] += 1
        return F.relu(use(self.conv(x)))


@pytest.mark.parametrize("use", _USES, ids=lambda use: use.__name__)
def test_what_picks_nothing_costs_no_pass(
    use: Callable[[Tensor], Tensor], traced: list[None]
) -> None:
    """The first passes are traced: of helpers in helpers each tells of others, and lists grow."""
    _state.update(step=0, meter=Meter(), counts=collections.Counter(), all={}, losses={"first": 2})
    model = Ordinary(use)
    with capture(model) as maps, torch.no_grad():
        for _ in range(6):
            model(torch.ones(2, 3, 5))
            assert len(maps)
    assert len(traced) <= 4
    assert not [m for m in maps.missed if "took a way" in m.reason]
