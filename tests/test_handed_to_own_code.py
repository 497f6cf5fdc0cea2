"""A value is handed to code of the model's own, which decides by it, in whatever way.

It comes from where no guard looks, and is another one in some passes.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.test_paths import Turn, hold, random

pytestmark = pytest.mark.filterwarnings("ignore::fmapkit.CaptureWarning")


class State:
    """Whose attributes no guard compares."""

    def __init__(self, value: Any) -> None:
        self.value = value


def _become(value: Any) -> Callable[[Any], None]:
    return lambda model: setattr(model.hidden, "value", value)


def _chosen(y: Tensor, value: Any) -> Tensor:
    for name in ("relu", "tanh"):
        if name == value:
            return getattr(F, name)(y)
    return y


def _matched(y: Tensor, value: Any) -> Tensor:
    match value:
        case 1:
            return torch.relu(y)
        case _:
            return torch.tanh(y)


def _guarded(y: Tensor, value: Any) -> Tensor:
    try:
        return torch.relu(y / (1 // (value - 1)))
    except ZeroDivisionError:
        return torch.tanh(y)


def _while(y: Tensor, value: Any) -> Tensor:
    while value > 1:
        y, value = torch.tanh(y), value - 1
    return torch.relu(y)


# What code does with a value, and the two that it has. Made anew for each test: nameless functions
# that are frozen are not found.
def uses() -> dict[str, tuple[Callable[[Tensor, Any], Tensor], Any, Any]]:
    return {
        "branch": (lambda y, v: torch.relu(y) if v else torch.tanh(y), True, False),
        "none": (lambda y, v: torch.relu(y if v is None else y * v), None, 2.0),
        "number of turns": (_while, 1, 3),
        "range": (lambda y, v: [y := torch.tanh(y) for _ in range(v)][-1], 1, 2),
        "and": (lambda y, v: torch.relu(y) if v and v > 1 else torch.tanh(y), 2, 0),
        "match": (_matched, 1, 2),
        "exception": (_guarded, 1, 2),
        "name": (_chosen, "relu", "tanh"),
        "getattr": (lambda y, v: getattr(torch, v)(y), "relu", "tanh"),
        "method": (lambda y, v: getattr(y, v)(), "relu", "tanh"),
        "key": (lambda y, v: {"a": torch.relu, "b": torch.tanh}[v](y), "a", "b"),
        "index": (lambda y, v: [torch.relu, torch.tanh][v](y), 0, 1),
        "of tensors": (lambda y, v: torch.relu([y, y.flip(1)][v]), 0, 1),
        "dimension": (lambda y, v: torch.relu(y.transpose(0, v)), 1, 2),
        "slice": (lambda y, v: torch.relu(y[:, v:]), 0, 1),
        "pad": (lambda y, v: torch.relu(F.pad(y, (0, 0, 0, v))), 1, 0),
        "exponent": (lambda y, v: torch.relu(y**v), 1, 2),
        "slope": (lambda y, v: F.leaky_relu(y, v), 0.1, 0.0),
        "in place": (lambda y, v: F.relu(y, inplace=v), False, True),
        "a function": (lambda y, v: v(y), torch.relu, torch.tanh),
        "a nameless function": (
            lambda y, v: v(y),
            lambda y: torch.relu(y),
            lambda y: torch.tanh(y),
        ),
        "a part of a function": (
            lambda y, v: v(y),
            functools.partial(F.leaky_relu, negative_slope=0.1),
            functools.partial(F.elu, alpha=2),
        ),
        "keywords": (lambda y, v: F.elu(y, **v), {"alpha": 1}, {"inplace": True}),
        "a row": (lambda y, v: torch.relu(y.permute(*v)), (0, 1, 2), (1, 0, 2)),
        "how many": (lambda y, v: torch.tanh(y) if len(v) > 1 else torch.relu(y), [1], [1, 2]),
        "a dtype": (lambda y, v: torch.relu(y.to(v)), torch.float32, torch.float64),
        "equal": (
            lambda y, v: torch.relu(y) if v == (1, "a") else torch.tanh(y),
            (1, "a"),
            (1, "b"),
        ),
        "formatted": (lambda y, v: getattr(torch, f"{v}h")(y), "tan", "sin"),
        "product": (lambda y, v: torch.relu(torch.cat([y] * v, 1)), 1, 2),
        "sorted": (lambda y, v: sorted([(v, torch.relu), (1, torch.tanh)], key=str)[0][1](y), 0, 2),
    }


class Own(nn.Module):
    """Hands it to a function of its own, and that to another."""

    def __init__(self, use: Callable[[Tensor, Any], Tensor], value: Any) -> None:
        super().__init__()
        self.conv = nn.Conv1d(3, 3, 1)
        self.hidden = State(value)
        self.use = State(use)

    def forward(self, x: Tensor) -> Tensor:
        return self.first(self.conv(x), self.hidden.value)

    def first(self, y: Tensor, value: Any) -> Tensor:
        return self.second(y, given=value)

    def second(self, y: Tensor, *, given: Any) -> Tensor:
        return self.use.value(y, given)


class Inner(nn.Module):
    def __init__(self, use: Callable[[Tensor, Any], Tensor]) -> None:
        super().__init__()
        self.conv = nn.Conv1d(3, 3, 1)
        self.use = State(use)

    def forward(self, x: Tensor, value: Any, **more: Any) -> Tensor:
        return self.use.value(self.conv(x), more.get("given", value))


class Child(nn.Module):
    """Hands it to a module of a class of its own, by a keyword that is none of its parameters."""

    def __init__(self, use: Callable[[Tensor, Any], Tensor], value: Any) -> None:
        super().__init__()
        self.inner = Inner(use)
        self.hidden = State(value)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x, None, given=self.hidden.value)


@pytest.mark.parametrize("kind", [Own, Child])
@pytest.mark.parametrize("name", uses())
def test_what_decides_by_what_it_is_handed_tells(name: str, kind: Any) -> None:
    use, one, other = uses()[name]
    model = kind(use, one)
    values = [one, one, one, other, other, one, other, one, one]
    hold(model, [Turn((random(3, 3, 5, n=n),), _become(v)) for n, v in enumerate(values)], most=2)


class Bound(nn.Module):
    """Which parameter a value is bound to, keys decide."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(3, 3, 1)
        self.hidden = State({"relu": True})

    def forward(self, x: Tensor) -> Tensor:
        return self.part(self.conv(x), **self.hidden.value)

    def part(self, y: Tensor, relu: bool = False, twice: bool = False, **more: int) -> Tensor:
        y = torch.relu(y) if relu else torch.tanh(y)
        for _ in more:
            y = torch.sigmoid(y)
        return torch.tanh(y) if twice else y


def test_keywords_that_python_binds() -> None:
    given = [{"relu": True}] * 3 + [{"twice": True}, {"other": 1}, {"relu": True}, {"a": 1, "b": 2}]

    hold(Bound(), [Turn((random(2, 3, 5, n=n),), _become(v)) for n, v in enumerate(given)], most=2)
