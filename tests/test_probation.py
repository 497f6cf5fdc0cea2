"""A module that took several ways is replayed again once it has taken one and the same for long."""

from __future__ import annotations

import copy
import math
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fmapkit import capture
from fmapkit.instrumentation.pair import Pair
from fmapkit.replay import probation
from fmapkit.torchlib.call_override import standing_before
from tests.test_paths import Turn, hold, random

pytestmark = pytest.mark.filterwarnings("ignore::fmapkit.CaptureWarning")

_TRACED_BEFORE = 32  # passes on one path, before it is trusted again


class Switch(nn.Module):
    """What it decides by, nothing announces."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(3, 4), nn.Linear(3, 4)
        self.way = [0]

    def forward(self, x: Tensor) -> Tensor:
        if self.way[0] == 1:
            return torch.tanh(self.two(x))
        if self.way[0] == 2:
            return torch.sigmoid(self.two(torch.relu(self.one(x)[:, :3])))
        return torch.relu(self.one(x))


class Around(nn.Module):
    """The switch is a part; `by_data`: what calls it is traced in every pass."""

    def __init__(self, by_data: bool = False, switches: int = 1) -> None:
        super().__init__()
        self.by_data = by_data
        self.first = nn.Sequential(nn.Linear(3, 3), nn.ReLU())
        self.parts = nn.ModuleList(
            nn.Sequential(Switch(), nn.Linear(4, 3), nn.SiLU()) for _ in range(switches)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        if self.by_data and float(x.sum()) > 1e9:
            return x
        for part in self.parts:
            x = x + part(x)
        return x

    def turn(self, *ways: int) -> None:
        """Set the way that each of its switches takes."""
        for part, way in zip(self.parts, ways, strict=True):
            part[0].way[0] = way  # type: ignore[index,union-attr,operator]


def _sites(*ways: int) -> list[str]:
    layers = {0: ["one"], 1: ["two"], 2: ["one", "two"]}
    found = ["first.0"]
    for n, way in enumerate(ways):
        found += [f"parts.{n}.0.{layer}" for layer in layers[way]] + [f"parts.{n}.1"]
    return found


def _run(
    model: Around, ways: Callable[[int], tuple[int, ...]], passes: int, traced: list[None]
) -> tuple[list[int], list[int]]:
    """Which passes had no maps or not all of them, and which were traced; the others are right."""
    bare, lost, seen = copy.deepcopy(model), [], []
    with torch.no_grad(), capture(model, kinds="activation") as maps:
        for n in range(passes):
            taken = ways(n)
            model.turn(*taken)
            bare.turn(*taken)
            x = random(2 + n % 2, 3, n=n)
            traced.clear()
            out, named = model(x), len(maps.missed)
            seen += [n] * bool(traced)
            assert torch.equal(out, bare(x))
            if maps.layers != _sites(*taken):
                assert named
                assert all("took a way" in m.reason for m in maps.missed)
                lost.append(n)
                continue
            with capture(bare, kinds="activation") as own:
                bare(x)
            for map_, truth in zip(maps, own, strict=True):
                assert (map_.layer, map_.nonlinearity) == (truth.layer, truth.nonlinearity)
                assert torch.equal(map_.tensor, truth.tensor)
            del own, map_, truth  # the next block begins anew
    return lost, seen


@pytest.mark.parametrize("by_data", [False, True])
def test_a_switch_for_good(by_data: bool, traced: list[None]) -> None:
    """It costs the pass in which it is made, and is traced for some passes, not for ever."""
    model = Around(by_data)
    lost, seen = _run(model, lambda n: (int(n > 5),), 60, traced)
    assert lost == [6]
    after = [n for n in seen if n > 6]
    assert len(after) <= _TRACED_BEFORE + 4 if not by_data else len(after) == 53
    if by_data and sys.version_info >= (3, 11):  # on 3.10, a function in it is no site: hooks stay
        # The part is one region again: what is in it has no hooks but its taps.
        with torch.no_grad(), capture(model):
            for n in range(60):
                model.turn(int(n > 5))
                model(random(2, 3, n=n))
            around = {
                m for m in model.modules() if any(isinstance(h, Pair) for h in standing_before(m))
            }
            assert around == {model, model.first, model.parts, model.parts[0]}


@pytest.mark.parametrize("by_data", [False, True])
@pytest.mark.parametrize("late", [0, 1, 2, 3, 5])
def test_another_way_as_soon_as_it_is_trusted(
    late: int, by_data: bool, traced: list[None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whenever it leaves again, one pass is lost, and the next time it takes twice as long."""
    monkeypatch.setattr(probation, "_FIRST", 4)
    ways, way, at = [], 0, 3
    for n in range(260):
        if n == at:  # it goes on for as long as it takes, and a bit
            way, at = (way + 1) % 3, n + 2 ** len(bin(n)) + late
        ways.append(way)
    lost, _ = _run(Around(by_data), lambda n: (ways[n],), 260, traced)
    assert len(lost) <= 2 + math.log2(260 / 4)


def _random(chance: float) -> Callable[[int], tuple[int, ...]]:
    rows = torch.rand(250, 4, generator=torch.Generator().manual_seed(0))
    return lambda n: tuple(int(r < chance) for r in rows[n].tolist())


@pytest.mark.parametrize("chance", [0.02, 0.2])
def test_many_parts_that_take_several_ways_at_random(
    chance: float, traced: list[None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Together they lose what one does."""
    monkeypatch.setattr(probation, "_FIRST", 8)
    model, once = Around(by_data=True, switches=4), 4  # each may stray once, before it is watched
    lost, _ = _run(model, _random(chance), 250, traced)
    assert len(lost) <= 2 * once + math.log2(250 / 8) + 1


def test_data_that_decides_is_watched_for_ever(traced: list[None]) -> None:
    class Exit(Around):
        def forward(self, x: Tensor) -> Tensor:
            return x if float(self.first(x).abs().sum()) > 1e3 else super().forward(x)

    torch.manual_seed(0)
    model = Exit()
    assert float(model.first(1e6 * torch.ones(2, 3)).abs().sum()) > 1e3
    with torch.no_grad(), capture(model) as maps:
        for n in range(90):
            model.turn(n > 5)
            traced.clear()
            model(random(2, 3, n=n) if n % 40 != 39 else 1e6 * torch.ones(2, 3))
            assert traced
            assert len(maps) == (2 if n % 40 == 39 else 8) or n == 6


def test_a_value_that_is_annealed_comes_to_rest(traced: list[None]) -> None:
    """Till then the module is traced, since each pass has an attribute and a path of its own."""

    class Annealed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.slope = nn.Linear(3, 4), 1

        def forward(self, x: Tensor) -> Tensor:
            return torch.relu(self.fc(x).roll(self.slope, 1))

    model = Annealed()
    passes = [
        Turn((random(2, 3, n=n),), lambda m, n=n: setattr(m, "slope", min(n, 12)))
        for n in range(60)
    ]
    assert not hold(copy.deepcopy(model), passes).missed
    with torch.no_grad(), capture(model):
        for turn in passes:
            turn.before(model)
            traced.clear()
            model(*turn.args)
        assert not traced


def test_a_part_that_is_called_past_the_module_it_is_in(traced: list[None]) -> None:
    """As the module is a region again, its part keeps the hooks by which it is seen."""

    class Past(Around):
        def forward(self, x: Tensor) -> Tensor:
            x = super().forward(x)
            return x + self.parts[0][2](x)  # type: ignore[index,operator]

    model: Any = Past(by_data=True)
    with torch.no_grad(), capture(model, kinds="activation") as maps:
        for n in range(60):
            model.turn(int(n > 5))
            x = random(2, 3, n=n)
            model(x)
            if n not in (1, 6):  # the first that tells
                assert [m.layer for m in maps][-2:] == ["parts.0.1", "parts.0.2"], n
                assert len(maps) == 4
