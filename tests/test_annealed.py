"""Floats that are another one in each pass, as those of a schedule, and are handed to functions.

They decide nothing by themselves: what a function of the model's does with one, its own code tells.
"""

from __future__ import annotations

import bisect
import copy
import math
import random as python_random
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fmapkit import capture
from tests import truth
from tests.checks import strayed
from tests.test_paths import Turn, labels, random

pytestmark = pytest.mark.filterwarnings("ignore::fmapkit.CaptureWarning")


class Reversed(torch.autograd.Function):
    """The identity, with gradients reversed."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, alpha: float) -> Tensor:
        ctx.alpha = alpha
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return -ctx.alpha * grads[0], None


def scaled(x: Tensor, by: float) -> Tensor:
    return x * by


def _deeper(x: Tensor, by: float) -> Tensor:
    return torch.add(scaled(x, by=by), x, alpha=by)


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x: Tensor, by: float) -> Tensor:
        return torch.relu(self.fc(x)) * by


class Looked(nn.Module):
    """Looks a tensor up, by code in C."""

    table: dict[float, Tensor]

    def forward(self, x: Tensor) -> Tensor:
        return x

    def __getattribute__(self, name: str) -> Any:
        if name == "forward":
            return object.__getattribute__(self, "table").get
        return super().__getattribute__(name)


class Annealed(nn.Module):
    """Hands a float on, `how`; it is given that, or keeps it."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = getattr(type(self), f"_{how}")
        self.one, self.two = nn.Linear(4, 4), nn.Linear(4, 4)
        self.part, self.parts = Scaled(), nn.ModuleList([Scaled(), Scaled()])
        self.last = nn.Linear(4, 3)
        self.kept = 0.0

    def forward(self, x: Tensor, by: float | None = None) -> Tensor:
        z = torch.relu(self.one(x))
        return torch.tanh(self.last(self.how(self, z, self.kept if by is None else by)))

    @staticmethod
    def by_class(x: Tensor, by: float) -> Tensor:
        return x * by

    def own(self, x: Tensor, by: float) -> Tensor:
        return x * by

    # -- decides nothing --------------------------------------------------------------------------

    def _reversed(self, x: Tensor, w: float) -> Tensor:
        return Reversed.apply(x, w)  # type: ignore[no-any-return,no-untyped-call]

    def _function(self, x: Tensor, w: float) -> Tensor:
        return scaled(x, w) + scaled(x, by=w)

    def _local_name(self, x: Tensor, w: float) -> Tensor:
        return scaled(x, w)

    def _functions(self, x: Tensor, w: float) -> Tensor:
        return _deeper(x, w)

    def _local(self, x: Tensor, w: float) -> Tensor:
        use: Callable[[Tensor, float], Tensor] = lambda t, v: t * v  # noqa: E731
        return use(x, w)

    def _methods(self, x: Tensor, w: float) -> Tensor:
        return self.own(x, w) + self.by_class(x, w) + Annealed.by_class(x, w)

    def _module(self, x: Tensor, w: float) -> Tensor:
        return self.part(x, w) + self.part(x, by=w)

    def _modules(self, x: Tensor, w: float) -> Tensor:
        for part in self.parts:
            x = part(x, w)
        return x

    def _gumbel(self, x: Tensor, w: float) -> Tensor:
        return F.gumbel_softmax(x, tau=w + 0.1)

    def _added(self, x: Tensor, w: float) -> Tensor:
        z = torch.add(x, x, alpha=w)
        return z.lerp(x, w)

    def _sloped(self, x: Tensor, w: float) -> Tensor:
        return F.leaky_relu(self.two(x), w)

    def _dropped(self, x: Tensor, w: float) -> Tensor:
        return F.dropout(x, w / 2)

    def _clamped(self, x: Tensor, w: float) -> Tensor:
        z = self.two(x)
        return z.clamp(max=w) + torch.clamp(z, w)

    def _numpy(self, x: Tensor, w: float) -> Tensor:
        return scaled(x, np.float32(w * np.ones(1))[0])

    def _math(self, x: Tensor, w: float) -> Tensor:
        return scaled(x, 2 / (1 + math.exp(-10 * w)) - 1)

    # -- decides, and leaves another mark, or is compared ------------------------------------------

    def _compares(self, x: Tensor, w: float) -> Tensor:
        return self._compared(x, w)

    def _compared(self, x: Tensor, w: float) -> Tensor:
        return torch.relu(self.one(x)) if w > 0.3 else torch.sigmoid(self.two(x))

    def _truth(self, x: Tensor, w: float) -> Tensor:
        return self._true(x, w)

    def _true(self, x: Tensor, w: float) -> Tensor:
        return torch.relu((self.one if w else self.two)(x))

    def _rounded(self, x: Tensor, w: float) -> Tensor:
        return self._looked_up(x, round(4 * w) / 4)

    def _looked_up(self, x: Tensor, w: float) -> Tensor:
        table = {0.0: self.one(x), 0.25: self.two(x)}
        return torch.relu(table.get(w, self.part.fc(x)))

    def _by_a_partial(self, x: Tensor, w: float) -> Tensor:
        pick = partial({0.0: self.one(x), 0.25: self.two(x)}.get)
        return torch.relu(pick(round(4 * w) / 4, self.part.fc(x)))

    def _by_a_module(self, x: Tensor, w: float) -> Tensor:
        pick = Looked()
        pick.table = {0.0: self.one(x), 0.25: self.two(x)}
        return torch.relu(pick(round(4 * w) / 4, self.part.fc(x)))

    def _bisected(self, x: Tensor, w: float) -> Tensor:
        return torch.relu([self.one(x), self.two(x)][bisect.bisect([0.3], w)])

    def _sorted(self, x: Tensor, w: float) -> Tensor:
        pairs = sorted([(0.3, self.one(x)), (w, self.two(x))], key=lambda pair: pair[0])
        return torch.relu(pairs[0][1])

    def _greatest(self, x: Tensor, w: float) -> Tensor:
        return torch.relu(max((0.3, 1, self.one(x)), (w, 2, self.two(x)))[2])

    def _powers(self, x: Tensor, w: float) -> Tensor:
        return self._power(x, float(round(2 * w)))

    def _power(self, x: Tensor, w: float) -> Tensor:
        return torch.relu(self.two(x) ** w)

    def _by_an_index(self, x: Tensor, w: float) -> Tensor:
        return torch.relu((self.one, self.two)[self._index(w)](x))

    def _index(self, w: float) -> int:
        return int(w > 0.3)

    def _bounded_at_zero(self, x: Tensor, w: float) -> Tensor:
        z = self.two(x)
        return z.clamp(min=max(0.0, w - 0.3))

    def _drawn(self, x: Tensor, w: float) -> Tensor:
        python_random.seed(0)
        at = python_random.choices([0, 1], [1 - w, w])[0]
        return torch.relu((self.one, self.two)[at](x))


IDLE = [
    *("reversed", "function", "functions", "local", "methods", "module", "modules", "gumbel"),
    *("added", "sloped", "dropped", "clamped", "numpy", "math"),
]
DECIDES = [
    *("compares", "truth", "rounded", "by_a_partial", "by_a_module", "bisected", "sorted"),
    *("greatest", "powers", "by_an_index", "bounded_at_zero", "drawn"),
]
# One after the other; what is special comes late, too.
GOING_UP = [n / 14 for n in range(14)]
SPECIAL = [0.1, 0.2, 0.2, 0.25, 0.3, 0.4, 0.0, 0.45, 1.0, 0.1, 0.0, 0.35, 0.5, 0.6, 0.0, 0.7]


def _passes(values: list[Any], given: bool) -> list[Turn]:
    def turn(n: int, value: Any) -> Turn:
        x = random(2, 4, n=n)
        if given:
            return Turn((x, value))
        return Turn((x,), lambda model: setattr(model, "kept", value))

    return [turn(n, value) for n, value in enumerate(values)]


def _alone(model: nn.Module, passes: list[Turn], train: bool = False, most: int = 0) -> Any:
    """Each pass has what a capture of it alone has; some may be lost, and are named."""
    alone, lost = copy.deepcopy(model), 0
    with torch.set_grad_enabled(train), capture(model) as maps:
        for n, turn in enumerate(passes):
            outputs = []
            for each in (model, alone):
                turn.before(each)
                torch.manual_seed(n)
                with capture(alone) if each is alone else nullcontext() as own:
                    outputs.append(each(*turn.args))
            assert truth.same_bits(*outputs)
            if not len(maps):
                lost += 1
                assert lost <= most, n
                assert strayed(maps)
                continue
            assert labels(maps) == labels(own), n
            for one, other in zip(maps, own, strict=True):
                assert truth.same_bits(one.tensor, other.tensor)
                assert isinstance(one.weight, Tensor) == isinstance(other.weight, Tensor)
        return maps.missed


@pytest.mark.parametrize("given", [True, False])
@pytest.mark.parametrize("how", IDLE)
def test_what_decides_nothing(how: str, given: bool, traced: list[None]) -> None:
    """It starts with zero, as most schedules do; after a few passes, nothing is traced or lost."""
    most = int(given and how in ("dropped", "clamped"))  # zero is another way, and is not told
    _alone(Annealed(how), _passes(GOING_UP, given), train=True, most=most)
    model = Annealed(how)
    with capture(model):
        for n, turn in enumerate(_passes(GOING_UP, given)):
            traced.clear()
            turn.before(model)
            model(*turn.args)
            old = how == "numpy" and np.__version__.startswith("1.")  # is traced in every pass
            assert not traced or n < 4 or old, n


@pytest.mark.parametrize("given", [True, False])
@pytest.mark.parametrize("how", IDLE)
def test_what_is_special(how: str, given: bool) -> None:
    values: list[Any] = SPECIAL if how == "dropped" else [*SPECIAL, -0.5, 2.0, 1, 0.5, 0.4, 1, 0.3]
    missed = _alone(Annealed(how), _passes(values, given), most=3)
    assert not missed or how in ("dropped", "clamped") or not given  # by a whole number


@pytest.mark.parametrize("given", [True, False])
@pytest.mark.parametrize("values", [GOING_UP, SPECIAL])
@pytest.mark.parametrize("how", DECIDES)
def test_what_decides(how: str, values: list[float], given: bool) -> None:
    """What a map goes by is what it goes by in a capture of that pass alone."""
    _alone(Annealed(how), _passes(values, given), most=4)


def test_another_function_by_the_same_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether it records what it is given is asked at each call."""

    class Table(dict[float, int]):
        def __call__(self, x: Tensor, by: float) -> Tensor:
            return x * self.get(by, 3)

    def swap(n: int) -> Callable[[Any], None]:
        others = [scaled, Table({0.5: 2}), torch.mul, scaled, lambda x, by: torch.relu(x) * by]
        return lambda _: monkeypatch.setitem(globals(), "scaled", others[n])

    passes = [
        Turn((random(2, 4, n=n), 0.1 * (n % 7)), swap([0, 0, 0, 1, 1, 0, 2, 2, 3, 4, 4, 0][n % 12]))
        for n in range(36)
    ]
    _alone(Annealed("local_name"), passes, most=5)


# -- masks ---------------------------------------------------------------------------------------


def masks() -> dict[str, Callable[[Tensor, float], Tensor]]:
    return {
        "product": lambda y, k: y * (y > k),
        "where": lambda y, k: torch.where(y > k, y, 0.0),
        "masked_fill": lambda y, k: y.masked_fill(y < k, 0.0),
        "by name": lambda y, k: y * y.gt(k),
        "the other way round": lambda y, k: y * (k < y),
    }


class Masked(nn.Module):
    """A mask is of a threshold that it is given: at zero, the product with it is a nonlinearity."""

    def __init__(self, way: Callable[[Tensor, float], Tensor]) -> None:
        super().__init__()
        self.fc, self.way = nn.Linear(3, 4), way

    def forward(self, x: Tensor, k: float) -> Tensor:
        return torch.tanh(self.way(self.fc(x), k))


class MaskedByAttribute(Masked):
    def forward(self, x: Tensor, k: float) -> Tensor:
        self.k = k
        return torch.tanh(self.way(self.fc(x), self.k))


@pytest.mark.parametrize("kind", [Masked, MaskedByAttribute])
@pytest.mark.parametrize("numbers", [(0.0, 0.5, 0.25, 0.0), (0.5, 0.25, 0.0), (0, 2, 3, 0)])
@pytest.mark.parametrize("name", masks())
def test_a_threshold_that_comes_to_zero(
    name: str, numbers: tuple[float, ...], kind: Callable[..., nn.Module]
) -> None:
    model = kind(masks()[name])
    alone = copy.deepcopy(model)
    with torch.no_grad(), capture(model) as maps:
        for n, k in enumerate((*numbers[:1] * 2, *numbers)):
            x = random(2, 3, n=n)
            model(x, k)
            with capture(alone) as own:
                alone(x, k)
            if len(maps):
                assert labels(maps) == labels(own), n
            else:
                assert maps.missed
