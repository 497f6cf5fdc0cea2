"""Plain values by which Python itself picks, hidden where nothing announces that they changed.

None of them is an argument of a call, an index or a branch: a key of a dict, how long what a list
is zipped with is, what a function gives back to `max`, an order that is sorted by.
"""

from __future__ import annotations

import collections
import functools
import heapq
import itertools
import operator
from collections.abc import Callable
from typing import Any

import pytest
import torch.nn.functional as F
from torch import Tensor, nn

from tests.test_paths import Turn, hold, turns

pytestmark = pytest.mark.filterwarnings("ignore::fmapkit.CaptureWarning")

_Pick = Callable[[Any, Tensor, Tensor], Tensor]
_CASES: list[_Pick] = []


def case(pick: _Pick) -> _Pick:
    """A way to pick one of two layers' outputs, by what `model.hidden` has in it."""
    _CASES.append(pick)
    return pick


@case
def display(model: Any, a: Tensor, b: Tensor) -> Tensor:
    first, second = model.hidden["names"]
    return {first: a, second: b}["p"]


@case
def display_by_index(model: Any, a: Tensor, b: Tensor) -> Tensor:
    names = list(reversed(model.hidden["names"]))
    return {names[0]: a, names[1]: b}["p"]


@case
def display_by_tuples(model: Any, a: Tensor, b: Tensor) -> Tensor:
    first, second = model.hidden["ranks"]
    return {(first, 1): a, (second, 1): b}[0, 1]


@case
def display_by_floats(model: Any, a: Tensor, b: Tensor) -> Tensor:
    first, second = model.hidden["ranks"]
    return {float(first): a, float(second): b}[0.0]


@case
def display_in_display(model: Any, a: Tensor, b: Tensor) -> Tensor:
    return {"p": b, **{model.hidden["names"][0]: a}}["p"]  # noqa: PIE800


@case
def another_dict_in_a_display(model: Any, a: Tensor, b: Tensor) -> Tensor:
    later = dict.fromkeys(model.hidden["names"][:1], a)
    return {"p": b, **later}["p"]


@case
def displays_united(model: Any, a: Tensor, b: Tensor) -> Tensor:
    first, second = model.hidden["names"]
    return ({first: a} | {second: b})["p"]


@case
def display_put_into(model: Any, a: Tensor, b: Tensor) -> Tensor:
    first, _ = model.hidden["names"]
    found = {"p": b}
    found |= {first: a}
    return found["p"]


@case
def comprehension(model: Any, a: Tensor, b: Tensor) -> Tensor:
    return {n: h for n, h in zip(model.hidden["names"], (a, b), strict=True)}["p"]  # noqa: C416


@case
def dict_of_zip(model: Any, a: Tensor, b: Tensor) -> Tensor:
    return dict(zip(model.hidden["names"], (a, b), strict=True))["p"]


@case
def dict_of_pairs(model: Any, a: Tensor, b: Tensor) -> Tensor:
    first, second = model.hidden["names"]
    return dict([(first, a), (second, b)])["p"]  # noqa: C406


@case
def dict_of_a_generator(model: Any, a: Tensor, b: Tensor) -> Tensor:
    def named() -> Any:
        yield from ()
        for name, h in zip(model.hidden["names"], (a, b), strict=True):  # noqa: UP028
            yield name, h

    return dict(named())["p"]


@case
def dict_of_an_expression(model: Any, a: Tensor, b: Tensor) -> Tensor:
    names = iter(model.hidden["names"])
    return dict((next(names), h) for h in (a, b))["p"]  # noqa: C402


@case
def dict_updated(model: Any, a: Tensor, b: Tensor) -> Tensor:
    found: dict[str, Tensor] = {}
    found.update(zip(model.hidden["names"], (a, b), strict=True))
    return found["p"]


@case
def dict_enumerated(model: Any, a: Tensor, b: Tensor) -> Tensor:
    return dict(enumerate((a, b), model.hidden["ranks"][0]))[1]


@case
def ordered_dict(model: Any, a: Tensor, b: Tensor) -> Tensor:
    return collections.OrderedDict(zip(model.hidden["names"], (a, b), strict=True)).pop("p")


@case
def least_key(model: Any, a: Tensor, b: Tensor) -> Tensor:
    found = dict(zip(model.hidden["names"], (a, b), strict=True))
    return found[min(found)]


@case
def chain_map(model: Any, a: Tensor, b: Tensor) -> Tensor:
    return collections.ChainMap({model.hidden["names"][0]: a}, {"p": b})["p"]


@case
def greatest_pair(model: Any, a: Tensor, b: Tensor) -> Tensor:
    first, second = model.hidden["ranks"]
    return max((first, a), (second, b))[1]


@case
def greatest_of_a_list(model: Any, a: Tensor, b: Tensor) -> Tensor:
    first, second = model.hidden["ranks"]
    pairs = [(first, a), (second, b)]
    return max(pairs, key=operator.itemgetter(0))[1]


@case
def greatest_of_an_expression(model: Any, a: Tensor, b: Tensor) -> Tensor:
    ranks = iter(model.hidden["ranks"])
    return max(((next(ranks), h) for h in (a, b)), key=lambda pair: pair[0])[1]


@case
def greatest_by_a_lambda(model: Any, a: Tensor, b: Tensor) -> Tensor:
    ranks = iter(model.hidden["ranks"])
    return max([a, b], key=lambda _: next(ranks))


@case
def greatest_by_a_function(model: Any, a: Tensor, b: Tensor) -> Tensor:
    ranks = iter(model.hidden["ranks"])

    def rank(_: Tensor) -> Any:
        return next(ranks)

    return max([a, b], key=rank)


@case
def greatest_by_a_method(model: Any, a: Tensor, b: Tensor) -> Tensor:
    model.queue = iter(model.hidden["ranks"])
    return max([a, b], key=model.rank)


@case
def least_by_a_method_of_a_dict(model: Any, a: Tensor, b: Tensor) -> Tensor:
    ranks = dict(zip((id(a), id(b)), model.hidden["ranks"], strict=True))
    by = {rank: h for rank, h in zip((id(a), id(b)), (a, b), strict=True)}  # noqa: C416
    return by[min((id(a), id(b)), key=ranks.get)]  # type: ignore[arg-type]


@case
def least_of_a_class(model: Any, a: Tensor, b: Tensor) -> Tensor:
    ranked = [Ranked(a), Ranked(b)]
    for each, rank in zip(ranked, model.hidden["ranks"], strict=True):
        each.rank = rank
    return min(ranked).h


@case
def kept_by_a_method(model: Any, a: Tensor, b: Tensor) -> Tensor:
    model.queue = iter(model.hidden["ranks"])
    return next(filter(model.rank, [a, b]))


@case
def sorted_pairs(model: Any, a: Tensor, b: Tensor) -> Tensor:
    return sorted(zip(model.hidden["ranks"], (a, b), strict=True))[0][1]


@case
def sorted_in_place(model: Any, a: Tensor, b: Tensor) -> Tensor:
    first, second = model.hidden["ranks"]
    pairs = [(first, a), (second, b)]
    pairs.sort()
    return pairs[0][1]


@case
def sorted_by_a_lambda(model: Any, a: Tensor, b: Tensor) -> Tensor:
    ranks, found = iter(model.hidden["ranks"]), [a, b]
    found.sort(key=lambda _: next(ranks))
    return found[0]


@case
def heap(model: Any, a: Tensor, b: Tensor) -> Tensor:
    first, second = model.hidden["ranks"]
    return heapq.nsmallest(1, [(first, a), (second, b)], key=lambda pair: pair[0])[0][1]


@case
def grouped(model: Any, a: Tensor, b: Tensor) -> Tensor:
    ranks = iter(model.hidden["ranks"])
    found = {k: list(v) for k, v in itertools.groupby((a, b), key=lambda _: next(ranks))}
    return found[0][0]


@case
def zipped_with_a_range(model: Any, a: Tensor, b: Tensor) -> Tensor:
    length = model.hidden["ranks"][0] + 1
    return list(zip((a, b), range(length), strict=False))[-1][0]


@case
def zipped_with_a_list(model: Any, a: Tensor, b: Tensor) -> Tensor:
    return list(zip((a, b), model.hidden["as many"], strict=False))[-1][0]


@case
def repeated(model: Any, a: Tensor, b: Tensor) -> Tensor:
    return ([a] * model.hidden["ranks"][0] + [b])[0]


@case
def repeated_from_the_left(model: Any, a: Tensor, b: Tensor) -> Tensor:
    first, *_ = (*(model.hidden["ranks"][0] * [a]), b)
    return first


@case
def zipped_with_a_repeated_string(model: Any, a: Tensor, b: Tensor) -> Tensor:
    rest = iter((a, b))
    list(zip("." * model.hidden["ranks"][0], rest, strict=False))
    return next(rest, a)


@case
def indexed_by_a_class(model: Any, a: Tensor, b: Tensor) -> Tensor:
    at = Index()
    at.n = model.hidden["ranks"][0]
    return (a, b)[at]  # type: ignore[index]


@case
def layers_called_from_c(model: Any, a: Tensor, b: Tensor) -> Tensor:
    return next(map(nn.Module.__call__, model.hidden["layers"], (a, a)))


@case
def layers_by_a_method_caller(model: Any, a: Tensor, b: Tensor) -> Tensor:
    return next(map(operator.methodcaller("__call__", a), model.hidden["layers"]))


@case
def layers_reduced(model: Any, a: Tensor, b: Tensor) -> Tensor:
    return functools.reduce(lambda h, layer: layer(h), model.hidden["layers"], a)


class Ranked:
    """What `min` compares by a method."""

    rank = 0

    def __init__(self, h: Tensor) -> None:
        self.h = h

    def __lt__(self, other: Ranked) -> bool:
        return self.rank < other.rank


class Index:
    """What a list asks for a number."""

    n = 0

    def __index__(self) -> int:
        return self.n


class Picking(nn.Module):
    """One of two layers' outputs goes on."""

    def __init__(self, pick: _Pick) -> None:
        super().__init__()
        self.a, self.b = nn.Conv1d(3, 4, 1), nn.Conv1d(3, 4, 1)
        self.c, self.d = nn.Conv1d(4, 4, 1), nn.Conv1d(4, 4, 1)
        self.pick = (pick,)
        layers = [self.c, self.d]
        self.hidden = {"ranks": [0, 1], "names": ["p", "q"], "as many": [0], "layers": layers}
        self.queue: Any = None

    def rank(self, _: Tensor) -> Any:
        return next(self.queue)

    def forward(self, x: Tensor) -> Tensor:
        (pick,) = self.pick
        return F.relu(pick(self, self.a(x), self.b(x)))


def _exchange(model: Any) -> None:
    hidden = model.hidden
    for name in ("ranks", "names", "layers"):
        hidden[name].reverse()
    hidden["as many"] = [0] * (hidden["ranks"][0] + 1)


@pytest.mark.parametrize("pick", _CASES, ids=lambda pick: pick.__name__)
def test_a_hidden_value_picks(pick: _Pick) -> None:
    """Each pass gets the labels of what ran in it; the two in which it shows may be cut short."""
    again = turns((2, 3, 5), (2, 3, 5), (2, 3, 5))
    (exchanged,) = turns((2, 3, 5), before=_exchange)
    passes = [*again, exchanged, *again[:1], exchanged, *again[:2], exchanged]
    seen = hold(Picking(pick), passes, most=2)
    picked = [each[-1][0] for each in seen.labels if each]
    assert len(set(picked)) == 2


class Scheduled(nn.Module):
    """Numbers that change in each pass, and pick nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(3, 4, 1)
        self.state = {"step": 0}

    def forward(self, x: Tensor) -> Tensor:
        self.state["step"] += 1
        scale = min(1.0, self.state["step"] / 1000)
        for _ in zip(range(2), range(self.state["step"], 99), strict=False):
            x = x * max([scale, 0.5])
        return F.relu(self.conv(x))


def test_a_schedule_costs_no_pass() -> None:
    passes: list[Turn] = turns(*[(2, 3, 5)] * 5)
    assert not hold(Scheduled(), passes).missed


class Identified(nn.Module):
    """Tensors are told by their identities, which are other numbers in each pass."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv1d(3, 4, 1), nn.Conv1d(3, 4, 1)
        self.kept: dict[int, Tensor] = {}

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.a(x), self.b(x)
        found = {id(a): a, hash(b): b}
        self.kept[id(a)] = a
        self.kept.pop(id(a))
        return F.relu(found[id(a)] + found.get(hash(b), a))


def test_an_identity_costs_no_pass() -> None:
    passes: list[Turn] = turns(*[(2, 3, 5)] * 5)
    assert not hold(Identified(), passes).missed


class Registered(nn.Module):
    """Layers are told by their identities."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv1d(3, 4, 1), nn.Conv1d(3, 4, 1)
        self.order = [self.a, self.b]

    def forward(self, x: Tensor) -> Tensor:
        found = {id(self.a): self.a(x), id(self.b): self.b(x)}
        return F.relu(found[id(self.order[0])])


def test_the_identity_of_a_layer_picks() -> None:
    (exchanged,) = turns((2, 3, 5), before=lambda model: model.order.reverse())
    passes = [*turns(*[(2, 3, 5)] * 3), exchanged, *turns((2, 3, 5)), exchanged]
    seen = hold(Registered(), passes, most=2)
    assert {each[-1][0] for each in seen.labels if each} == {"a", "b"}
