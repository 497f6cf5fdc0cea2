"""Watched passes that do what an earlier one did are followed, and may depart anywhere.

The truths are the witness, a bare twin, and the same passes with following switched off.
"""

from __future__ import annotations

import gc
import warnings
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fmapkit import CaptureWarning, capture
from fmapkit._following import Follower
from fmapkit._functions import describe
from fmapkit._script import _MOST_ROADS, _PATIENCE
from fmapkit._scripts import Scripts
from tests.checks import check, images

# -- models that no proof covers: a branch on data, which mostly goes the same way ----------------


class Plain(nn.Module):
    """Layers, a unit, a leaf, functions; twice the same nonlinearity without a layer before it."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 6)
        self.norm = nn.LayerNorm(6)
        self.unit = nn.Sequential(nn.Linear(6, 6), nn.ReLU(inplace=True), nn.Linear(6, 6))
        self.act = nn.GELU()
        self.one, self.two = nn.Tanh(), nn.Tanh()
        self.last = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.norm(self.first(x)))
        x = x + self.unit(x)
        if x.isnan().any():
            return x
        a, b = x.chunk(2, dim=-1)
        x = torch.cat([F.silu(a), b.sigmoid()], -1)
        noise = torch.arange(6) / 6
        x = self.one(noise) + self.two(noise) + x
        return self.last(x.transpose(0, 1).contiguous().transpose(0, 1))


class InPlace(nn.Module):
    """Writes into what is held, in the scope's own code."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 4, 3, padding=1)
        self.bn = nn.BatchNorm2d(4)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn(self.conv(x))
        z = self.conv2(self.relu(y))
        z += y
        if z.mean() > 1e6:
            return z
        z[:, 0] = 0
        F.relu_(z)
        return torch.sigmoid_(z.clone()).flatten(1)


class Squash(nn.Module):
    """One nonlinearity written out by hand, with a branch on data."""

    def __init__(self, power: float) -> None:
        super().__init__()
        self.power = power

    def forward(self, x: Tensor) -> Tensor:
        if bool((x > 1e6).any()):
            return x
        return x * torch.sigmoid(x) ** self.power


class HandWritten(nn.Module):
    """Nonlinearities written by hand, one in another one; a norm written by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.squash = Squash(2.0)
        self.norm = HandNorm()
        self.outer = Around()

    def forward(self, x: Tensor) -> Tensor:
        x = self.squash(self.first(x))
        return self.outer(self.norm(x)) if x.sum() < 1e6 else x


class HandNorm(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        if bool(x.isinf().any()):
            return x
        return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()


class Around(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = Squash(1.0)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) - 0.5 if x.numel() else x


class Nested(nn.Module):
    """Scopes in scopes, with dicts and several results; a weight used by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.parts = nn.ModuleList([Plain(), Plain()])
        self.weight = nn.Parameter(torch.randn(4, 3))

    def forward(self, x: Tensor) -> dict[str, Any]:
        first = self.parts[0](x)
        back = F.relu(first @ self.weight.t()) if first.sum() < 1e6 else x
        return {"out": self.parts[1](back), "more": [first, back.max(-1)]}


MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "plain": (Plain, (5, 4)),
    "in place": (InPlace, (2, 2, 4, 4)),
    "hand-written": (HandWritten, (3, 4)),
    "nested": (Nested, (5, 4)),
}


# -- what is looked at ----------------------------------------------------------------------------


def seen(maps: Any) -> list[tuple[Any, ...]]:
    """All that a map says of itself."""
    return [
        (fm.layer, fm.kind, fm.call, fm.nonlinearity, fm.filter_dim, fm.filters, fm.tensor.clone())
        for fm in maps
    ]


def assert_equal(found: list[tuple[Any, ...]], expected: list[tuple[Any, ...]]) -> None:
    assert [f[:-1] for f in found] == [e[:-1] for e in expected]
    for f, e in zip(found, expected, strict=True):
        assert torch.equal(f[-1], e[-1]), f[:-1]


@contextmanager
def watch(monkeypatch: pytest.MonkeyPatch, depart: int = -1) -> Iterator[dict[str, int]]:
    """Count the steps that are followed; make the n-th one a departure.

    Yields:
        `steps` so far, and how many `departures` there were.
    """
    counts = {"steps": 0, "departures": 0}

    def due() -> bool:
        counts["steps"] += 1
        return counts["steps"] == depart

    originals = {n: getattr(Follower, n) for n in ("call", "enter", "leave", "leaf", "unit_left")}

    def call(self: Any, func: Any, args: Any, kwargs: Any) -> Any:
        known = describe(func)
        if not known.silent and known.opened is None and due():
            self._written(known, args, kwargs)
            return self._otherwise(func, args, kwargs)
        return originals["call"](self, func, args, kwargs)

    def enter(self: Any, module: Any, args: Any, kwargs: Any) -> Any:
        if due():
            self.depart()
            return ""
        return originals["enter"](self, module, args, kwargs)

    def leave(self: Any, module: Any, output: Any) -> Any:
        if due():
            self.depart()
            return False
        return originals["leave"](self, module, output)

    def leaf(self: Any, stand: Any, args: Any, kwargs: Any) -> Any:
        if due():
            self.depart()
            return stand.inner(*args, **kwargs)
        return originals["leaf"](self, stand, args, kwargs)

    def unit_left(self: Any, run: Any, output: Any) -> Any:
        if due():
            self.depart()
            return False
        return originals["unit_left"](self, run, output)

    departs = Follower.depart

    def departing(self: Any) -> None:
        counts["departures"] += 1
        departs(self)

    with monkeypatch.context() as patch:
        for name, replacement in (
            ("call", call),
            ("enter", enter),
            ("leave", leave),
            ("leaf", leaf),
            ("unit_left", unit_left),
            ("depart", departing),
        ):
            patch.setattr(Follower, name, replacement)
        yield counts


KINDS = ("input", "response", "preactivation", "activation", "output")


@pytest.mark.parametrize("kinds", [("preactivation", "activation"), KINDS], ids=["pairs", "all"])
@pytest.mark.parametrize("name", MODELS)
def test_wherever_a_pass_departs_it_is_as_if_it_had_been_traced(
    name: str, kinds: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    make, shape = MODELS[name]
    torch.manual_seed(0)
    model = make().eval()
    (x,), (y,) = images(*shape, n=2)

    def passes(depart: int = -1) -> tuple[list[tuple[Any, ...]], dict[str, int]]:
        with torch.no_grad(), capture(model, kinds=kinds) as maps:
            for _ in range(3):
                model(x)
            with watch(monkeypatch, depart) as counts:
                model(y)
            found = seen(maps)
            # The road that was noted from there on is as good as the first one.
            for _ in range(2):
                model(y)
                assert_equal(seen(maps), found)
            assert not list(maps.missed)
        return found, counts

    with monkeypatch.context() as patch:
        patch.setattr(Scripts, "_of", lambda *_: None)
        traced, counts = passes()
        assert counts["steps"] == 0
    followed, counts = passes()
    assert counts["departures"] == 0
    assert counts["steps"] > 10
    assert_equal(followed, traced)
    for step in range(1, counts["steps"] + 1):
        found, known = passes(step)
        assert known["departures"] == 1, step
        assert_equal(found, traced)


@pytest.mark.parametrize("train", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("name", [name for name in MODELS if name != "hand-written"])
def test_pairs_are_true_and_nothing_is_changed(name: str, train: bool) -> None:
    make, shape = MODELS[name]
    torch.manual_seed(0)
    check(make().train(train), images(*shape, n=5), train=train)


# -- what is the same -----------------------------------------------------------------------------


class Sized(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.project = nn.Linear(4, 8)

    def forward(self, x: Tensor) -> Tensor:
        if x.isnan().any():
            return x
        rows, words, _ = x.shape
        heads = self.project(x).view(rows, words, 2, 4).transpose(1, 2)
        return torch.relu(heads).transpose(1, 2).reshape(rows, words, 8)[:, : words - 1]


def test_other_sizes_are_no_departure(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model = Sized().eval()
    with torch.no_grad(), capture(model) as maps, watch(monkeypatch) as counts:
        for rows, words in ((2, 3), (2, 3), (2, 3), (5, 7), (1, 2), (3, 9)):
            model(torch.randn(rows, words, 4))
            assert maps["project"].tensor.shape == (rows, 2, words, 4)
            assert maps["project"].nonlinearity == "relu"
        assert counts["departures"] == 0


class Picks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.project = nn.Linear(4, 8)

    def forward(self, x: Tensor, first: int) -> Tensor:
        half = self.project(x)[:, first : first + 4]
        return torch.relu(half) if x.sum() < 1e6 else half


def test_a_number_that_picks_other_filters_is_another_road(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    torch.manual_seed(0)
    model = Picks().eval()
    with torch.no_grad(), capture(model) as maps, watch(monkeypatch) as counts:
        for n, first in enumerate((0, 0, 0, 4, 2, 4, 0, 2)):
            model(torch.randn(3, 4), first)
            assert maps["project"].filters == range(first, first + 4)
            assert counts["departures"] == (0, 0, 0, 1, 2, 2, 2, 2)[n]


class TwoRoads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(4, 4), nn.Linear(4, 4)
        self.acts = nn.ModuleList([nn.Tanh(), nn.Tanh()])

    def forward(self, x: Tensor) -> Tensor:
        at = int(x.sum() > 0)
        noise = torch.linspace(-1, 1, 4)
        return self.acts[at](noise) + torch.relu((self.left, self.right)[at](x))


def test_each_road_is_noted_once_and_followed_then(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model = TwoRoads().eval()
    with torch.no_grad(), capture(model) as maps:
        for at in (0, 0, 1, 1):
            model(torch.full((2, 4), at - 0.5))
        with watch(monkeypatch) as counts:
            for at in (0, 1, 1, 0, 1):
                model(torch.full((2, 4), at - 0.5))
                assert maps.layers == [f"acts.{at}", ("left", "right")[at]]
        assert counts["departures"] == 0


class Changes(nn.Module):
    """Another road in each pass."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(12))
        self.step = 0

    def forward(self, x: Tensor) -> Tensor:
        self.step += 1
        for n, layer in enumerate(self.layers):
            if self.step >> n & 1:
                x = torch.relu(layer(x))
        return x


def test_who_never_does_the_same_is_not_followed_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    check(Changes().eval(), images(2, 4, n=_PATIENCE + 6), train=False)
    model = Changes().eval()
    with torch.no_grad(), capture(model) as maps, watch(monkeypatch) as counts:
        for _ in range(_PATIENCE + 6):
            model(torch.randn(2, 4))
        before = counts["departures"]
        model(torch.randn(2, 4))
        assert counts["departures"] == before <= _PATIENCE
        (script,) = maps._session.scripts._known.values()
        assert not script.worth_it
        assert script._strayed <= _MOST_ROADS


class Generated(nn.Module):
    """Its weights are other tensors in each pass, and one is used transposed, by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(4, 5), nn.Linear(5, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.one(x))
        x = torch.tanh(x @ self.two.weight.t())
        return torch.sigmoid(self.one(x)) if x.sum() < 1e6 else x


@pytest.mark.parametrize("how", ["functional_call", "assigned"])
def test_parameters_that_others_take_the_place_of(
    how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    model = Generated().eval()
    died: list[weakref.ref[Tensor]] = []
    with torch.no_grad(), capture(model) as maps, watch(monkeypatch) as counts:
        for _ in range(6):
            new = {name: torch.randn_like(p) for name, p in model.named_parameters()}
            died += map(weakref.ref, new.values())
            x = torch.randn(3, 4)
            if how == "functional_call":
                torch.func.functional_call(model, new, (x,))
            else:
                model.one.weight = nn.Parameter(new["one.weight"])
                model.two.weight = nn.Parameter(new["two.weight"])
                new |= dict(model.named_parameters())
                model(x)
            assert [fm.layer for fm in maps.select(kind="activation")] == ["one", "two", "one"]
            z = F.linear(x, new["one.weight"], new["one.bias"])
            first = maps.select(layer="one", kind="preactivation", call=0)
            assert [torch.equal(fm.tensor, z) for fm in first] == [True]
        assert counts["departures"] == 0
    assert not list(maps.missed)
    del new
    gc.collect()
    assert sum(ref() is not None for ref in died) <= 4  # the latest ones


class Ties(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.one(x))
        return torch.tanh(self.two(x)) if x.sum() < 1e6 else x


def test_weights_that_are_tied_later(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model = Ties().eval()
    with torch.no_grad(), capture(model) as maps:
        for n in range(9):
            if n == 3:
                model.two.weight = model.one.weight
            if n == 6:
                model.two.weight = nn.Parameter(torch.randn(4, 4))
            model(torch.randn(2, 4))
            assert maps.layers == ["one", "two"]


# -- what stands before calls ---------------------------------------------------------------------


def test_what_runs_outside_of_a_pass_is_named_while_passes_are_followed() -> None:
    torch.manual_seed(0)
    model = Plain().eval()
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore", CaptureWarning)
        with capture(model) as maps:
            for _ in range(4):
                model(torch.randn(2, 4))
            assert not list(maps.missed)
            model.first(torch.randn(2, 4))
            assert [m.layer for m in maps.missed] == ["first"]


def test_a_hook_that_is_set_while_passes_are_followed_has_its_say() -> None:
    torch.manual_seed(0)
    model = Plain().eval()
    with torch.no_grad(), capture(model) as maps:
        for _ in range(4):
            model(torch.randn(2, 4))
        handle = model.first.register_forward_hook(lambda m, a, out: out * 0)
        model(torch.randn(2, 4))
        assert not maps["first", "preactivation"].tensor.count_nonzero()
        handle.remove()
        for _ in range(3):
            model(torch.randn(2, 4))
            assert maps["first", "preactivation"].tensor.count_nonzero()


class Stops(Plain):
    error: BaseException | None = None

    def forward(self, x: Tensor) -> Tensor:
        x = super().forward(x)
        if self.error is not None:
            raise self.error
        return x


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, RuntimeError])
def test_a_pass_that_breaks_off_is_followed_no_further(error: type[BaseException]) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(Stops(), nn.Linear(3, 3)).eval()
    inner: Any = model[0]
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore", CaptureWarning)
        with capture(model) as maps:
            for _ in range(4):
                model(torch.randn(2, 4))
            inner.error = error()
            with pytest.raises(error):
                model(torch.randn(2, 4))
            inner.error = None
            way = maps._session._placing.way
            assert way.follower is None
            bare = inner.first(torch.ones(2, 4))  # by itself, before the next pass
            assert torch.equal(
                bare, F.linear(torch.ones(2, 4), inner.first.weight, inner.first.bias)
            )
            for _ in range(3):
                model(torch.randn(2, 4))
                assert len(maps.select(layer="0.first", step=-1)) == 2


# -- memory ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("read", [False, True])
@pytest.mark.parametrize("proven", [False, True])
def test_the_oldest_pass_goes_as_the_newest_comes(proven: bool, read: bool) -> None:
    """At any time, about one pass is held: what has come, and of the other what has not gone."""
    torch.manual_seed(0)
    layers = [m for _ in range(10) for m in (nn.Linear(4, 4), nn.ReLU())]
    model = nn.Sequential(*layers) if proven else nn.Sequential(*layers, Squash(1.0))
    with torch.no_grad(), capture(model) as maps:
        for _ in range(4):
            model(torch.randn(2, 4))
        if read:
            assert len(list(maps)) >= 20
        entries = maps._session.store.passes[-1].entries() if read else []
        gc.collect()
        before = sum(isinstance(o, Tensor) for o in gc.get_objects())
        alive: list[int] = []
        for layer in layers[::2]:  # hooks of others: learned anew, and let go all the same
            layer.register_forward_pre_hook(
                lambda *_: alive.append(sum(isinstance(o, Tensor) for o in gc.get_objects()))
            )
        model(torch.randn(2, 4))
        assert max(alive) <= before + 6, (before, alive)
        assert all(e.held is None or e.held.tensor is None for e in entries)


def test_the_oldest_pass_is_gone_when_the_newest_has_ended() -> None:
    torch.manual_seed(0)
    model = Plain().eval()
    with torch.no_grad(), capture(model) as maps:
        for _ in range(4):
            model(torch.randn(2, 4))
        old = [weakref.ref(fm.tensor.untyped_storage()) for fm in maps]
        assert len(old) > 5
        model(torch.randn(2, 4))
        gc.collect()
        assert not [s for s in old if s() is not None]
