"""Plain values that code of the model's hands to other code of the model's.

They are noticed where they decide, and where other code has come to the place that they went to.
They are recorded at that call, too: Python itself may pick by them, and tells nobody.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fmapkit import capture
from tests import truth
from tests.checks import strayed
from tests.test_paths import hold, of, turns

pytestmark = pytest.mark.filterwarnings("ignore::fmapkit.CaptureWarning")


def _turned(x: Tensor, first: int, second: int) -> Tensor:
    return x.transpose(first, second)


class _Turned(nn.Module):
    def forward(self, x: Tensor, first: int, second: int) -> Tensor:
        return x.transpose(first, second)


class _Generated(nn.Module):
    def forward(self, x: Tensor, first: int, second: int) -> Tensor:
        return next(iter(self.each(x, first, second)))

    def each(self, x: Tensor, first: int, second: int) -> Any:
        yield x.transpose(first, second)


class Handing(nn.Module):
    """Where its filters lie is in what it hands on; nothing tells of that before the pass."""

    def __init__(self, by: str) -> None:
        super().__init__()
        self.conv = nn.Conv1d(3, 4, 1)
        self.child, self.generated = _Turned(), _Generated()
        self.by = by
        self.hidden = {"dims": (1, 2)}

    def method(self, x: Tensor, first: int, second: int) -> Tensor:
        return x.transpose(first, second)

    def forward(self, x: Tensor) -> Tensor:
        h, (first, second) = self.conv(x), self.hidden["dims"]
        if self.by == "method":
            h = self.method(h, first, second)
        elif self.by == "keywords":
            h = self.method(h, first=first, second=second)
        elif self.by == "child":
            h = self.child(h, first, second=second)
        elif self.by == "generator":
            h = self.generated(h, first, second)
        else:
            h = _turned(h, first, second)
        return torch.relu(h)


def _dims(*dims: int) -> Callable[[Any], None]:
    def change(model: Any) -> None:
        model.hidden["dims"] = dims

    return change


_BY = ["method", "keywords", "child", "generator", "function"]


@pytest.mark.parametrize("by", _BY)
def test_what_is_handed_on_is_noticed_where_it_decides(by: str) -> None:
    shapes = [(2, 3, 5)] * 3
    passes = [*turns(*shapes, before=_dims(1, 2)), *turns(*shapes, before=_dims(0, 1))]
    seen = hold(Handing(by), passes + passes, most=2)
    last = [each[-1][4] for each in seen.labels if len(each) == 2]
    assert last[:3] == [2, 2, 2]
    assert last[-2:] == [0, 0]
    assert len(last) >= 10


def _without_source() -> Any:
    names: dict[str, Any] = {}
    exec("def forward(self, x, first, second): return x.transpose(first, second)", names)
    return names["forward"]


@pytest.mark.parametrize("by", _BY[:3] + _BY[4:])
@pytest.mark.parametrize("at", [0, 3])
def test_code_that_records_nothing_comes_to_its_place(
    by: str, at: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A torch function, or one without source, set before the block or in the middle of it."""
    model, n, lost = Handing(by).eval(), 0, 0
    twins_made = Handing(by).eval()
    with capture(twins_made):  # the code has twins by now
        for _ in range(3):
            twins_made(torch.randn(2, 3, 5))
    with capture(model) as maps, torch.no_grad():
        for dims in [(1, 2)] * 4 + [(0, 1)] * 2 + [(1, 2), (0, 1)] * 3:
            if n == at:
                monkeypatch.setattr(f"{__name__}._turned", torch.transpose)
                torchs = staticmethod(torch.transpose)
                method = _without_source() if by == "keywords" else torchs
                monkeypatch.setattr(Handing, "method", method)
                monkeypatch.setattr(_Turned, "forward", _without_source())
            n += 1
            model.hidden["dims"] = dims
            x = torch.randn(2, 3, 5)
            out = model(x)
            pair = list(maps)
            if not pair:
                lost += 1
                assert strayed(maps)
                continue
            z, a = pair
            assert truth.same_bits(a.tensor, out)
            assert z.filter_dim == a.filter_dim == {(1, 2): 2, (0, 1): 0}[dims]
    assert lost <= 3


def _of_zip(self: Any, maps: list[Tensor], n: int, m: int) -> Tensor:
    return list(zip(maps, range(n), strict=False))[-1][0]


def _of_max(self: Any, maps: list[Tensor], n: int, m: int) -> Tensor:
    return max([(n, maps[1]), (1.5, maps[0])], key=lambda pair: pair[0])[1]


def _of_sorted(self: Any, maps: list[Tensor], n: int, m: int) -> Tensor:
    numbered = list(enumerate(maps))
    numbered.sort(key=lambda pair: (pair[0] + n) % 2)
    return numbered[1][1]


def _of_keys(self: Any, maps: list[Tensor], n: int, m: int) -> Tensor:
    return {n: maps[0], 3 - m: maps[1]}[1]


def _of_made_keys(self: Any, maps: list[Tensor], n: int, m: int) -> Tensor:
    return {(at + n) % 2: one for at, one in enumerate(maps)}[1]


def _of_count(self: Any, maps: list[Tensor], n: int, m: int) -> Tensor:
    return dict(enumerate(maps, n - 1))[1]


def _of_repeats(self: Any, maps: list[Tensor], n: int, m: int) -> Tensor:
    return [*([maps[1]] * (n - 1)), maps[0]][0]


_picking_lambda = lambda maps, n, m: list(zip(maps, range(n)))[-1][0]  # noqa: B905, E731


def _of_lambda(self: Any, maps: list[Tensor], n: int, m: int) -> Tensor:
    return _picking_lambda(maps, n, m)


_PICKING = [_of_zip, _of_max, _of_sorted, _of_keys, _of_made_keys, _of_count, _of_repeats]


class Picking(nn.Module):
    """Python picks a map by what a method was handed; the picking is in a class below it."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(3, 4), nn.Linear(3, 4)
        self.hidden = {"n": 1}

    def pick(self, maps: list[Tensor], n: int, m: int) -> Tensor:
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        n = self.hidden["n"]
        return torch.relu(self.pick([self.one(x), self.two(x)], n, n))


@pytest.mark.parametrize("pick", [*_PICKING, _of_lambda])
def test_what_python_picks_by_numbers_that_were_handed_on(pick: Callable[..., Tensor]) -> None:
    """`zip`, `max` and their like are no code that records: who calls them tells what it has."""

    def number(value: int) -> Callable[[Any], None]:
        return lambda model: model.hidden.update(n=value)

    model = type("Picks", (Picking,), {"pick": pick})()
    shapes = [(2, 3)] * 3
    passes = turns(*shapes, before=number(1)) + turns(*shapes, before=number(2))
    assert len({layer for layer, *_ in of_kept(hold(model, passes, most=1))}) == 2


def test_what_is_handed_on_decides_by_itself() -> None:
    """A flag that reaches a σ three calls further down."""

    class Down(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Linear(3, 4), nn.Linear(3, 4)
            self.hidden = {"way": 0}

        def pick(self, way: int, x: Tensor, other: int) -> Tensor:
            return (self.one if way == other else self.two)(x)

        def down(self, way: int, x: Tensor, other: int) -> Tensor:
            return self.pick(way, x, other)

        def forward(self, x: Tensor) -> Tensor:
            return torch.relu(self.down(self.hidden["way"], x, 0))

    def way(value: int) -> Callable[[Any], None]:
        return lambda model: model.hidden.update(way=value)

    shapes = [(2, 3)] * 3
    seen = hold(Down(), turns(*shapes, before=way(0)) + turns(*shapes, before=way(1)), most=1)
    assert [layer for layer, *_ in of_kept(seen)] == ["one"] * 3 + ["two"] * 2


def of_kept(seen: Any) -> list[tuple[Any, ...]]:
    """The same as `of`, without the passes whose maps were not kept."""
    seen.labels = [each for each in seen.labels if each]
    return of(seen, "relu")
