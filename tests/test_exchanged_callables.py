"""What is called is exchanged between passes for another callable of the same class.

A path tells of each call what it goes to. Of callables in C, which have no code that could record,
it tells which one it is: a method of torch's class of tensors, an operator, what `operator` makes.
"""

from __future__ import annotations

import functools
import gc
import itertools
import operator
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fmapkit import capture

aten, T = torch.ops.aten, torch.Tensor
MODES = [torch.no_grad, torch.inference_mode]


class Unary(nn.Module):
    """Calls what it has as an attribute of an object that nobody compares."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.out = nn.Linear(4, 4), nn.Linear(4, 4)
        self.held: list[Any] = [None]

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.out(self.held[0](self.fc(x)))
        return y


class Binary(Unary):
    """The same with two operands, the first of which is a map."""

    def __init__(self, call: Callable[[Any, Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.call = call

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.out(self.call(self.held[0], torch.relu(self.fc(x)), x))
        return y


def _passes(model: Unary, before: Any, after: Any, maps: Any) -> Iterator[tuple[int, Tensor]]:
    """Passes with one of two callables; of each that was captured, its number and its z."""
    lost = 0
    for n in range(9):
        model.held[0] = before if n < 4 else after
        x = torch.randn(2, 4)
        model(x)
        if maps:
            yield n, F.linear(x, model.fc.weight, model.fc.bias)
        else:
            lost += 1
            assert maps.missed
    assert lost < 2


call_of = operator.attrgetter("__call__")
# By what they are: one that gives a map of no σ, and one that is a nonlinearity.
EXCHANGED: dict[str, tuple[Any, Any]] = {
    "methods": (T.neg, T.relu),
    "methods, in place": (T.neg, T.relu_),
    "special methods": (T.__neg__, T.relu),
    "overloads": (aten.neg.default, aten.relu.default),
    "operators": (aten.neg, aten.relu),
    "names of methods": (operator.methodcaller("neg"), operator.methodcaller("relu_")),
    "arguments": (operator.methodcaller("clamp", -9), operator.methodcaller("clamp", 0)),
    "keywords": (operator.methodcaller("clamp", min=-9), operator.methodcaller("clamp", min=0)),
    "static methods": (staticmethod(torch.neg), staticmethod(torch.relu)),
    "caches": (functools.cache(torch.neg), functools.cache(torch.relu)),
    "calls": (call_of(torch.neg), call_of(torch.relu)),
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("what", EXCHANGED)
def test_it_becomes_a_nonlinearity(what: str, mode: Any) -> None:
    model, (before, after) = Unary(), EXCHANGED[what]
    with mode(), capture(model) as maps:
        for n, z in _passes(model, before, after, maps):
            assert torch.equal(maps["fc", "preactivation"].tensor, z)
            found = [fm.tensor for fm in maps.select("fc", "activation")]
            assert len(found) == (n >= 4)
            assert all(torch.equal(a, z.relu()) for a in found)


@torch.no_grad()
@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize("what", EXCHANGED)
def test_no_pass_is_lost_where_it_stays(what: str, which: int) -> None:
    model = Unary()
    model.held[0] = EXCHANGED[what][which]
    with capture(model) as maps:
        for _ in range(5):
            model(torch.randn(2, 4))
            assert maps.select("fc")
    assert not maps.missed


WAYS: dict[str, Callable[[Any, Tensor, Tensor], Tensor]] = {
    "itself": lambda op, h, x: op(h, x),
    "its call": lambda op, h, x: op.__call__(h, x),
    "map": lambda op, h, x: next(map(op, [h], [x])),
    "starmap": lambda op, h, x: next(itertools.starmap(op, [(h, x)])),
    "accumulate": lambda op, h, x: list(itertools.accumulate([h, x], op))[1],
    "reduce": lambda op, h, x: functools.reduce(op, [h, x]),
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    ("before", "after"),
    [(operator.add, operator.iadd), (T.add, T.add_), (T.__add__, T.__iadd__)],
    ids=["operators", "methods", "special methods"],
)
def test_it_overwrites_a_map(before: Any, after: Any, way: str, mode: Any) -> None:
    model = Binary(WAYS[way])
    with mode(), capture(model) as maps:
        for _, z in _passes(model, before, after, maps):
            assert torch.equal(maps["fc", "preactivation"].tensor, z)
            assert torch.equal(maps["fc", "activation"].tensor, z.relu())


class Schemes(nn.Module):
    """How its layers are called, in lambdas that are defaults of its `__init__`."""

    def __init__(
        self,
        first: Any = (lambda module, x: F.relu(module(x))),
        second: Any = (lambda module, x: F.gelu(module(x))),
    ) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)
        self.first, self.second = first, second

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.second(self.b, self.first(self.a, x))
        return y


def test_lambdas_that_are_defaults_record(traced: list[None]) -> None:
    """They are no part of the function whose defaults they are, in one source with it."""
    gc.unfreeze()  # no name leads to them
    model = Schemes()
    with torch.no_grad(), capture(model) as maps:
        for n in range(6):
            if n == 3:
                traced.clear()
            x = torch.randn(2, 4)
            a = F.relu(F.linear(x, model.a.weight, model.a.bias))
            assert torch.equal(model(x), F.gelu(F.linear(a, model.b.weight, model.b.bias)))
            assert torch.equal(maps["a"].tensor, a)
    assert not traced
    assert not maps.missed
