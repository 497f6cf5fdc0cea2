"""Python picks by a whole number that follows what a call is given: a size, or a number.

The first passes pick tensors of one kind, so that a rule for the number fits; a later one does not.
"""

from __future__ import annotations

import bisect
import collections
import heapq
import itertools
import operator
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fmapkit import FeatureMaps, capture
from tests.test_paths import Turn, hold, random

pytestmark = pytest.mark.filterwarnings("ignore::fmapkit.CaptureWarning")


class Place:
    def __init__(self, number: int) -> None:
        self.number = number

    def __index__(self) -> int:
        return self.number


class Ranked:
    def __init__(self, number: int, tensor: Tensor) -> None:
        self.number, self.tensor = number, tensor

    def __lt__(self, other: Ranked) -> bool:
        return self.number < other.number


class Several:
    def __init__(self, outs: list[Tensor]) -> None:
        self.outs = outs


def stored(outs: list[Tensor], k: int) -> Tensor:
    row = [outs[0]] * 6
    row[k] = outs[5]
    return row[5]


def stored_in(outs: list[Tensor], k: int) -> Tensor:
    several = Several([outs[0]] * 6)
    several.outs[k] = outs[5]
    return several.outs[5]


def deleted(outs: list[Tensor], k: int) -> Tensor:
    several = Several(list(outs))
    del several.outs[k + 1 :]
    return several.outs[-1]


def inserted(outs: list[Tensor], k: int) -> Tensor:
    row = [outs[0]] * 5
    row.insert(k, outs[5])
    return row[5]


def rotated(outs: list[Tensor], k: int) -> Tensor:
    row = collections.deque(outs)
    row.rotate(-k)
    return row[0]


def heap(outs: list[Tensor], k: int) -> Tensor:
    row: list[Any] = []
    for n, out in enumerate(outs):
        heapq.heappush(row, ((n - k) % 6, n, out))
    return row[0][2]


def repeated(outs: list[Tensor], k: int) -> Tensor:
    row = [out for out in outs[5:] for _ in range(1)]
    return (row * (k - 1) + outs[:1] * 9)[3]


def called(function: Callable[[int], Tensor], k: int) -> Tensor:
    return function(k)


# What picks one of six, made anew for each test: nameless functions that are frozen are not found.
# Where k is 5, it picks the last, which alone is the output of a layer.
def ways() -> dict[str, Callable[[list[Tensor], int], Tensor]]:
    return {
        "list": lambda outs, k: outs[k],
        "tuple": lambda outs, k: tuple(outs)[k],
        "from the end": lambda outs, k: outs[k - 6],
        "display": lambda outs, k: [*outs][k],
        "slice": lambda outs, k: outs[k:][0],
        "slice of an attribute": lambda outs, k: Several(outs).outs[k : k + 1][0],
        "attribute": lambda outs, k: Several(outs).outs[k],
        "dict": lambda outs, k: dict(enumerate(outs))[k],
        "keys of a display": lambda outs, k: {5: outs[0], k: outs[k]}.get(5, outs[0]),
        "keys of a comprehension": lambda outs, k: {n + k: o for n, o in enumerate(outs)}[2 * k],
        "keys of zip": lambda outs, k: dict(zip([k, 9], [outs[5], outs[0]], strict=True)).get(
            5, outs[0]
        ),
        "mapped pairs": lambda outs, k: dict(map(lambda n: ((n + k) % 6, outs[n]), range(6)))[4],  # noqa: C417
        "pairs": lambda outs, k: dict([(k, outs[5]), (9, outs[0])]).get(5, outs[0]),  # noqa: C406
        "tuple as a key": lambda outs, k: {(n, 0): o for n, o in enumerate(outs)}[k, 0],
        "__getitem__": lambda outs, k: outs.__getitem__(k),
        "pop": lambda outs, k: list(outs).pop(k),
        "a method by name": lambda outs, k: called(list(outs).pop, k),
        "get": lambda outs, k: dict(enumerate(outs)).get(k, outs[0]),
        "setdefault": lambda outs, k: {5: outs[5]}.setdefault(k, outs[0]),
        "insert": inserted,
        "rotate": rotated,
        "stored": stored,
        "stored in an attribute": stored_in,
        "deleted": deleted,
        "heap": heap,
        "islice": lambda outs, k: next(itertools.islice(outs, k, None)),
        "itemgetter": lambda outs, k: operator.itemgetter(k)(outs),
        "operator.getitem": lambda outs, k: operator.getitem(outs, k),
        "cycle": lambda outs, k: list(itertools.islice(itertools.cycle(outs), k + 1))[-1],
        "greatest": lambda outs, k: max(zip([k, 4.5], [outs[5], outs[0]], strict=True))[1],
        "greatest of pairs": lambda outs, k: max([(k, 0, outs[5]), (4, 1, outs[0])])[2],
        "key": lambda outs, k: max(enumerate(outs), key=lambda pair: (pair[0] - k - 1) % 6)[1],
        "sorted": lambda outs, k: sorted(enumerate(outs), key=lambda pair: (pair[0] - k) % 6)[0][1],
        "sorted pairs": lambda outs, k: sorted([(k, 1, outs[5]), (4, 0, outs[0])])[1][2],
        "smallest": lambda outs, k: heapq.nsmallest(k + 1, enumerate(outs))[-1][1],
        "bisected": lambda outs, k: outs[bisect.bisect_left([0, 1, 2, 3, 4, 5], k)],
        "__index__": lambda outs, k: outs[Place(k)],
        "__lt__": lambda outs, k: max(Ranked(k, outs[5]), Ranked(4, outs[0])).tensor,
        "filtered": lambda outs, k: next(filter(lambda pair: pair[0] == k, enumerate(outs)))[1],
        "dropped": lambda outs, k: next(itertools.dropwhile(lambda p: p[0] < k, enumerate(outs)))[
            1
        ],
        "repeated": lambda outs, k: ([outs[5]] * (k - 1) + [outs[0]] * 9)[3],
        "repeated by name": repeated,
        "chained": lambda outs, k: next(iter(itertools.chain(outs[k:], outs[:k]))),
        "unpacked": lambda outs, k: (lambda first, *rest: first)(*outs[k:]),
        "range": lambda outs, k: outs[range(6)[k]],
    }


# A lambda that is new gets its twin in the first two.
PASSES = 2, 2, 2, 3, 4, 5, 4, 5


class Picks(nn.Module):
    """A σ after one of six tensors."""

    def __init__(self, way: Callable[[list[Tensor], int], Tensor]) -> None:
        super().__init__()
        self.conv = nn.Conv1d(3, 3, 1)
        self.way = way

    def forward(self, x: Tensor, k: int) -> Tensor:
        outs = [*(x * n for n in range(1, 6)), self.conv(x)]
        return F.relu(self.way(outs, k))


class PicksBySize(Picks):
    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(x, x.shape[0])


@pytest.mark.parametrize("name", ways())
def test_what_is_picked_by_a_number_that_is_given(name: str) -> None:
    passes = [Turn((random(2, 3, 5, n=k), k)) for k in PASSES]
    hold(Picks(ways()[name]), passes, most=2)


@pytest.mark.parametrize("name", ["list", "attribute", "dict", "slice", "pop", "itemgetter", "key"])
def test_what_is_picked_by_a_size(name: str) -> None:
    passes = [Turn((random(k, 3, 5, n=k),)) for k in PASSES]
    hold(PicksBySize(ways()[name]), passes, most=2)


class Follows(nn.Module):
    """Numbers that follow a size, where nothing is picked by them."""

    def __init__(self, way: Callable[[Tensor, Any], Tensor]) -> None:
        super().__init__()
        self.conv = nn.Conv1d(3, 3, 1)
        self.way = way

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.way(self.conv(x), x.shape))


def following() -> dict[str, Callable[[Tensor, Any], Tensor]]:
    return {
        "unpacked": lambda y, shape: y.reshape(*[shape[0] * shape[1], shape[2]]).view(*shape),
        "shape": lambda y, shape: y.new_ones([*shape[:-1], shape[2]]) * y,
        "by name": lambda y, shape: y[: shape[0]] + y.new_zeros(size=(shape[0], 1, shape[2])),
        "map": lambda y, shape: y.view(*map(int, shape)),
        "zip": lambda y, shape: y * sum(n + m for n, m in itertools.pairwise(shape)),
        "generator": lambda y, shape: y.view(*(n for n in shape)),
        "split": lambda y, shape: torch.cat(y.split([1, shape[2] - 1], dim=2), 2),
        "kept": lambda y, shape: Several([y]).outs[0].narrow(2, 0, shape[2]),
        "greatest": lambda y, shape: F.pad(y, (0, max(shape[2], 4) - shape[2])),
    }


@pytest.mark.parametrize("name", following())
def test_numbers_by_which_nothing_is_picked_follow_sizes(name: str, traced: list[None]) -> None:
    model = Follows(following()[name])
    sizes: Sequence[tuple[int, int]] = [(2, 7), (3, 9), (4, 11), (5, 13), (6, 15), (7, 17), (8, 19)]
    with capture(model) as maps, torch.no_grad():
        for n, (batch, length) in enumerate(sizes):
            if n == 4:
                del traced[:]
            model(random(batch, 3, length, n=length))
        assert not maps.missed
    assert not traced


# With 0, 1 or −1, these do something else than with other numbers.
def special() -> dict[str, Callable[[Tensor, int], Tensor]]:
    return {
        "pad": lambda y, k: F.pad(y, (0, 0, 0, k)),
        "pad before": lambda y, k: F.pad(y, (0, 0, k, 0)),
        "repeat": lambda y, k: y.repeat(1, k, 1),
        "expand": lambda y, k: y.unsqueeze(1).expand(2, k, 3, 5).reshape(2, -1, 5),
        "repeat_interleave": lambda y, k: y.repeat_interleave(k, 1),
        "roll": lambda y, k: y.roll(k, 1),
        "slice": lambda y, k: y[:, k:],
    }


class Special(nn.Module):
    def __init__(self, way: Callable[[Tensor, int], Tensor]) -> None:
        super().__init__()
        self.conv = nn.Conv1d(3, 3, 1)
        self.way = way

    def forward(self, x: Tensor, k: int) -> Tensor:
        return F.relu(self.way(self.conv(x), k))


@pytest.mark.parametrize("numbers", [(1, 2, 0), (0, 2, 1), (2, 3, 1), (1, 0, 2), (2, 1, 3)])
@pytest.mark.parametrize("name", special())
def test_numbers_with_which_functions_do_something_else(
    name: str, numbers: tuple[int, ...]
) -> None:
    passes = [Turn((random(2, 3, 5, n=n), k)) for n, k in enumerate(numbers[:1] * 2 + numbers)]
    hold(Special(special()[name]), passes, most=1)


class ByTensor(nn.Module):
    """A number comes as a tensor with no axis, or as an array with none: torch reads it."""

    def __init__(self, way: Callable[[Tensor, Tensor, Any], Tensor]) -> None:
        super().__init__()
        self.a, self.b, self.way = nn.Linear(8, 8), nn.Linear(8, 8), way
        self.number: Any = None

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.way(self.a(x), self.b(x), self.number))


def _dropped(a: Tensor, b: Tensor, p: Any) -> Tensor:
    y = F.dropout(a, p, True)  # a itself where p is 0
    y += 1
    return y


BY_TENSOR: dict[str, tuple[Callable[[Tensor, Tensor, Any], Tensor], Any, Any]] = {
    "dropout": (_dropped, torch.tensor(0.5), torch.tensor(0.0)),
    "stack": (lambda a, b, n: torch.stack([a, b], n), torch.tensor(2), torch.tensor(3)),
    "cat": (lambda a, b, n: torch.cat(tensors=[a, b], dim=n), torch.tensor(2), torch.tensor(1)),
    "mean": (lambda a, b, n: a.mean(n, keepdim=True), torch.tensor(2), torch.tensor(1)),
    "slice": (lambda a, b, n: a[..., n:], np.array(4), np.array(0)),
}


@pytest.mark.parametrize("name", BY_TENSOR)
def test_a_number_that_comes_as_a_tensor(name: str) -> None:
    way, usual, other = BY_TENSOR[name]
    model = ByTensor(way)

    def labels(maps: FeatureMaps) -> list[Any]:
        return [(fm.layer, fm.kind, fm.filter_dim, fm.shape) for fm in maps]

    kinds = "response", "activation"
    with torch.inference_mode(), capture(model, kinds=kinds) as maps:
        for n in range(8):
            model.number = other if n in (4, 5) else usual
            x = torch.randn(2, 3, 8)
            out = model(x)
            if not len(maps):  # lost, by name, in the pass that finds it
                assert maps.missed
                continue
            a = F.linear(x, model.a.weight, model.a.bias)
            assert torch.equal(maps["a", "response"].tensor, a)
            assert torch.equal(maps.select(kind="activation")[-1].tensor, out)
            copied = ByTensor(way)
            copied.number = model.number
            with capture(copied, kinds=kinds) as alone:
                copied(x)
            assert labels(maps) == labels(alone)
    assert len(maps.missed) <= 1
