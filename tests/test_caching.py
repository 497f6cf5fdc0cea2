"""`DictWatch`: no write to a dict goes unseen, by whatever way it is made."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from fmapkit import capture
from fmapkit.torchlib import caching
from fmapkit.torchlib.caching import DictWatch

counted = pytest.mark.skipif(caching._version is None, reason="torch has no count of writes")


class Own(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.here: Any = 0
        self.layer = nn.Linear(2, 2)


def _many_times(module: Own) -> None:
    """The interpreter writes by shorter ways where it has come by often."""
    for value in range(100):
        module.here = value + 1000


WAYS: dict[str, Callable[[Own], object]] = {
    "attribute": lambda m: setattr(m, "here", 2),
    "new attribute": lambda m: setattr(m, "there", 2),
    "object's": lambda m: object.__setattr__(m, "here", 3),
    "deleted": lambda m: delattr(m, "here"),
    "item": lambda m: m.__dict__.__setitem__("here", 4),
    "update": lambda m: m.__dict__.update(here=5),
    "or": lambda m: m.__dict__.__ior__({"here": 6}),
    "setdefault": lambda m: m.__dict__.setdefault("more", 7),
    "pop": lambda m: m.__dict__.pop("here"),
    "popitem": lambda m: m.__dict__.popitem(),
    "clear": lambda m: m.__dict__.clear(),
    "vars": lambda m: vars(m).__setitem__("here", 8),
    "training": lambda m: m.train(not m.training),
    "forward": lambda m: setattr(m, "forward", lambda x: x),
    "children": lambda m: setattr(m, "_modules", {}),
    "again and again": _many_times,
}


@counted
@pytest.mark.parametrize("way", WAYS)
def test_a_write_is_seen(way: str) -> None:
    module, other = Own(), Own()
    watch = DictWatch([other.__dict__, module.__dict__])
    assert watch.written()
    assert not watch.written()
    assert not watch.written()
    WAYS[way](module)
    assert watch.written()
    assert not watch.written()


@counted
def test_a_write_in_code_that_has_run_often_is_seen() -> None:
    module = Own()
    watch = DictWatch([module.__dict__])
    watch.written()
    for value in range(300):
        module.here = value + 1000
        assert watch.written()
        assert not watch.written()


@counted
@given(st.lists(st.tuples(st.integers(0, 2), st.sampled_from("abc"), st.integers() | st.none())))
def test_any_difference_is_seen(writes: list[tuple[int, str, int | None]]) -> None:
    dicts: list[dict[str, Any]] = [{"a": 1}, {}, {"b": None}]
    watch = DictWatch(dicts)
    watch.written()
    for at, key, value in writes:
        before = [dict(each) for each in dicts]
        if value is None:
            dicts[at].pop(key, None)
        else:
            dicts[at][key] = value
        assert watch.written() or dicts == before


def test_where_writes_are_not_counted_each_look_finds_some() -> None:
    watch = DictWatch([OrderedDict(a=1)])
    assert watch.written()
    assert watch.written()


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
        self.act: nn.Module = nn.Tanh()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.act(self.layers(x))
        return y


def _other_class(model: Block) -> None:
    model.act.__class__ = nn.Sigmoid


CHANGES: dict[str, Callable[[Block], object]] = {
    "a child": lambda m: setattr(m, "act", nn.Sigmoid()),
    "a child, past the module": lambda m: m._modules.__setitem__("act", nn.Sigmoid()),
    "a class": _other_class,
    "a forward": lambda m: setattr(m.act, "forward", torch.sigmoid),
    "one of a row": lambda m: m.layers.__setitem__(1, nn.Sigmoid()),
    "one more of a row": lambda m: m.layers.append(nn.Sigmoid()),
    "children exchanged as a whole": lambda m: setattr(
        m, "_modules", {"layers": m.layers, "act": nn.Sigmoid()}
    ),
    "an attribute": lambda m: setattr(m.layers[1], "inplace", True),
}


@pytest.mark.parametrize("counts", [True, False])
@pytest.mark.parametrize("change", CHANGES)
def test_a_model_that_changes_is_learned_anew(
    change: str, counts: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not counts:
        monkeypatch.setattr(caching, "_version", None)
    model, x = Block(), torch.randn(2, 4)
    with torch.no_grad(), capture(model) as maps:
        for _ in range(4):
            model(x)
        CHANGES[change](model)
        for _ in range(3):
            y = model(x)
            assert not maps.missed
            a = [fm for fm in maps if fm.kind == "activation"]
            assert torch.equal(a[-1].tensor, y)
            kept = change in ("one of a row", "one more of a row", "an attribute")
            expected = "Tanh" if kept else "Sigmoid"
            assert expected.lower() in str(a[-1].nonlinearity).lower()
