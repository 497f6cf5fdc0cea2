"""What a survey of 408 real models found: each case as small as it gets."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fmapkit import capture

pytestmark = pytest.mark.filterwarnings("ignore::fmapkit.CaptureWarning")


def tags(maps: Any) -> list[tuple[Any, ...]]:
    return [(fm.layer, fm.kind, fm.nonlinearity) for fm in maps]


# -- a class of torch's gets another forward in the block -----------------------------------------

EXCHANGED: dict[str, tuple[type[nn.Module], Any]] = {
    "another σ": (nn.GELU, lambda self, x: torch.relu(x)),
    "none any more": (nn.GELU, lambda self, x: x + 0),
    "from none": (nn.Dropout, lambda self, x: torch.relu(x)),
    "after a layer": (nn.Linear, lambda self, x: torch.tanh(F.linear(x, self.weight, self.bias))),
    "of a norm": (nn.LayerNorm, lambda self, x: F.silu(x)),
}


@pytest.mark.parametrize("what", EXCHANGED)
def test_a_forward_of_torchs_that_is_exchanged(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    kind, forward = EXCHANGED[what]
    layers = [nn.Linear(4, 4), nn.GELU(), nn.Dropout(), nn.LayerNorm(4), nn.Linear(4, 4)]
    model, x = nn.Sequential(*layers).eval(), torch.randn(2, 4)
    with torch.no_grad(), capture(model) as maps:
        for _ in range(3):
            model(x)
        before = tags(maps)
        with monkeypatch.context() as patch:
            patch.setattr(kind, "forward", forward)
            for _ in range(3):
                model(x)
            seen = tags(maps)
        for _ in range(2):
            model(x)
        assert tags(maps) == before
    with monkeypatch.context() as patch:
        patch.setattr(kind, "forward", forward)
        with torch.no_grad(), capture(model) as fresh:
            model(x)
        assert seen == tags(fresh) != before


# -- modules that are put into the model in the block ---------------------------------------------


@pytest.mark.parametrize(
    "asked", [{"kinds": "output"}, {"layers": "1"}, {"layers": ["1", "2"], "kinds": "output"}]
)
def test_what_new_modules_return_is_held(asked: dict[str, Any]) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
    x = torch.randn(2, 4)
    with torch.no_grad(), capture(model, **asked) as maps:
        model(x)
        model[1] = nn.Tanh()
        model[2] = nn.Sequential(nn.Linear(4, 4), nn.Sigmoid())
        for _ in range(3):
            model(x)
            with capture(model, **asked) as fresh:
                model(x)
            assert tags(maps) == tags(fresh)
            first = F.linear(x, model[0].weight, model[0].bias)  # type: ignore[arg-type]
            assert torch.equal(maps["1"].tensor, torch.tanh(first))
    assert not maps.missed


# -- σ by hand, through a reshape to the shape that there is --------------------------------------


class Snake(nn.Module):
    def __init__(self, how: str) -> None:
        super().__init__()
        self.alpha, self.how = nn.Parameter(torch.ones(1, 4, 1)), how

    def forward(self, x: Tensor) -> Tensor:
        shape = x.shape
        if self.how == "same":
            x = x.reshape(shape[0], shape[1], -1)
        elif self.how == "other":  # one filter's values are not beside each other any more
            x = x.reshape(shape[0], -1, shape[1]).reshape(shape)
        x = x + (self.alpha + 1e-9).reciprocal() * torch.sin(self.alpha * x).pow(2)
        return x.reshape(shape)


@pytest.mark.parametrize(("how", "sigma"), [("none", "Snake"), ("same", "Snake"), ("other", None)])
def test_a_reshape_to_the_same_shape_keeps_a_sigma(how: str, sigma: str | None) -> None:
    model = nn.Sequential(nn.Conv1d(1, 4, 3), Snake(how), nn.Conv1d(4, 1, 3))
    with torch.no_grad(), capture(model) as maps:
        for size in (12, 12, 14):
            x = torch.randn(2, 1, size)
            model(x)
            assert maps["0", "preactivation"].nonlinearity == sigma
            assert torch.equal(maps["0", "preactivation"].tensor, model[0](x))
            if sigma is not None:
                assert torch.equal(maps["0"].tensor, model[1](model[0](x)))


# -- one event that many parts decide by ----------------------------------------------------------


class Part(nn.Module):
    """Decides by what nothing announces."""

    def __init__(self, merged: list[int]) -> None:
        super().__init__()
        self.base, self.low, self.act = nn.Linear(4, 4), nn.Linear(4, 4), nn.SiLU()
        self.merged = [merged]

    def forward(self, x: Tensor) -> Tensor:
        if self.merged[0]:
            return self.act(self.base(x))
        return self.act(self.base(x) + self.low(x))


class Traced(nn.Module):
    """Decides by data itself, so that its parts are replayed each for itself."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.merged: list[int] = []
        self.parts = nn.ModuleList(Part(self.merged) for _ in range(count))

    def forward(self, x: Tensor) -> Tensor:
        for part in self.parts:
            x = part(x)
        return x if x.sum() > 1e9 else x * 1


@pytest.mark.parametrize("count", [2, 8])
def test_what_many_parts_decide_by_loses_as_few_passes_as_one(count: int) -> None:
    model = Traced(count)
    with torch.no_grad(), capture(model) as maps:
        lost = 0
        for n in range(60):
            if n % 5 == 0 and n:
                model.merged[:] = [] if model.merged else [1]
            x = torch.randn(2, 4)
            model(x)
            lost += not maps
            if maps:
                last = maps.select(kind="activation")[-1]
                assert torch.equal(last.tensor, model(x))
    assert lost <= 3
    assert {m.why.name for m in maps.missed} <= {"NEW_PATH", "NEW_PATH_INSIDE"}


def test_a_pass_that_is_not_kept_has_no_outputs() -> None:
    model = Traced(3)
    kinds = ("preactivation", "activation", "output")
    with torch.no_grad(), capture(model, kinds=kinds, keep="all") as maps:
        for n in range(12):
            model.merged[:] = [1] * (n // 3 % 2)
            known = len(maps.missed)
            model(torch.randn(2, 4))
            if len(maps.missed) > known:
                assert maps.select(step=n) == []
            else:
                assert len(maps.select(step=n, kind="activation")) == 3


# -- an attribute that takes the place of its class's ---------------------------------------------


class Flagged(nn.Module):
    flag: Any = False

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.b(x)) if self.flag else torch.relu(self.a(x))


@pytest.mark.parametrize("value", [True, 1, "yes"])
def test_an_attribute_that_is_set_for_the_first_time_announces_itself(value: Any) -> None:
    model, x = nn.Sequential(*[Flagged() for _ in range(3)]), torch.randn(2, 4)
    with torch.no_grad(), capture(model) as maps:
        for flag in (None, None, value, value, False, value, False):
            if flag is not None:
                for part in model:
                    part.flag = flag
            model(x)
            name = "b" if flag else "a"
            assert [fm.layer for fm in maps.select(kind="activation")] == [
                f"{n}.{name}" for n in range(3)
            ]
        for part in model:
            del part.flag
        model(x)
        assert len(maps) == 6
    assert not maps.missed
