"""Scripted functions: named where one is called, however the model gets at it, and only there."""

from __future__ import annotations

import copy
import threading
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fmapkit import CaptureWarning, capture


@torch.jit.script
def squash(x: Tensor, limit: float) -> Tensor:
    return (x / limit).tanh() * limit


def by_helper(x: Tensor) -> Tensor:
    return squash(x, 3.0)


TABLE: dict[str, list[Any]] = {"squash": [squash]}


class Net(nn.Module):
    """Calls what it is given, between two layers."""

    def __init__(self, reach: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(4, 4))
        self.inner.reach = reach  # type: ignore[assignment]
        self.last = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.inner.reach(self.inner(x)))  # type: ignore[operator]


REACHES: dict[str, Callable[[Tensor], Tensor]] = {
    "by name": lambda x: squash(x, 3.0),
    "by keyword": lambda x: squash(limit=3.0, x=x),
    "helper": by_helper,
    "table": lambda x: TABLE["squash"][0](x, 3.0),
    "map": lambda x: next(map(squash, [x], [3.0])),
    "namespace": lambda x: globals()["squash"](x, 3.0),
    "traced": torch.jit.trace(lambda x: x.tanh(), torch.ones(2, 4), check_trace=False),
}


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CaptureWarning)
        yield
    for kind in (torch.jit.ScriptFunction, torch._C.ScriptMethod):
        assert "fmapkit" not in getattr(kind.__call__, "__module__", "")


@pytest.mark.parametrize("way", REACHES)
def test_a_called_one_is_named_once(way: str) -> None:
    model, x = Net(REACHES[way]), torch.randn(2, 4)
    bare = copy.deepcopy(model) if way != "traced" else model
    want = bare(x)
    with capture(model) as maps:
        for _ in range(3):
            assert torch.equal(model(x), want)
    (missed,) = maps.missed
    assert missed.layer == ""
    assert "which is scripted" in missed.reason


def test_one_that_is_not_called_is_not_named() -> None:
    class Perhaps(Net):
        def forward(self, x: Tensor) -> Tensor:
            y = self.inner(x)
            return self.last(squash(y, 2.0) if x.sum() > 100 else torch.relu(y))

    model = Perhaps(by_helper)
    with capture(model) as maps:
        model(torch.zeros(2, 4))
        assert maps.missed == []
        model(torch.full((2, 4), 100.0))
        assert [m.layer for m in maps.missed] == [""]


def test_a_scripted_module_outside_of_the_model_s_modules() -> None:
    class Inner(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.tanh()

    scripted = torch.jit.script(Inner())
    model = Net(by_helper)
    model.inner.reach = lambda x: scripted(x)  # type: ignore[assignment]
    with capture(model) as maps:
        model(torch.ones(2, 4))
    assert [(m.layer, "Inner.forward" in m.reason) for m in maps.missed] == [("", True)]


def test_calls_outside_of_passes_and_by_other_threads_are_not_the_model_s() -> None:
    model = Net(torch.relu)
    x = torch.ones(2, 4)

    class Meanwhile(Net):
        def forward(self, x: Tensor) -> Tensor:
            thread = threading.Thread(target=squash, args=(x.detach(), 2.0))
            thread.start()
            thread.join()
            return super().forward(x)

    for kind in (Net, Meanwhile):
        model = kind(torch.relu)
        with capture(model) as maps:
            squash(x, 2.0)
            model(x)
            squash(x, 2.0)
        assert maps.missed == []


def test_two_blocks_leave_torch_s_own_call_together() -> None:
    first, second = Net(by_helper), Net(by_helper)
    x = torch.ones(2, 4)
    outer = capture(first)
    with outer as maps:
        with capture(second) as others:
            first(x)
        second(x)
        first(x)
    assert len(maps.missed) == 1
    assert not [m for m in others.missed if "scripted" in m.reason]


def test_a_scripted_part_is_named_in_the_pass_that_calls_it() -> None:
    class Either(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.plain = nn.Linear(4, 4)
            self.scripted = torch.jit.script(nn.Sequential(nn.Linear(4, 4), nn.ReLU()))
            self.uses = {"scripted": False}

        def forward(self, x: Tensor) -> Tensor:
            x = torch.relu(self.plain(x))
            return self.scripted(x) if self.uses["scripted"] else x  # type: ignore[no-any-return]

    model = Either()
    with capture(model) as maps, torch.no_grad():
        for _ in range(3):
            model(torch.randn(2, 4))
        assert list(maps.missed) == []
        model.uses["scripted"] = True
        for _ in range(2):
            model(torch.randn(2, 4))
        assert "scripted" in {m.layer for m in maps.missed}
        assert maps["plain"].nonlinearity == "relu"
