"""What a survey of 408 real models found: each case as small as it gets."""

from __future__ import annotations

import contextlib
import copy
import functools
import sys
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fmapkit import capture
from fmapkit.replay import LightMode
from tests import truth
from tests.checks import check

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


# -- indices and sizes that are data, or constants ------------------------------------------------


class Window(nn.Module):
    """An index of a constant and of a slice whose bound is data."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 8)

    def forward(self, x: Tensor) -> Tensor:
        h = self.layer(x)
        start = x.argmax(-1)[0]
        return torch.relu(h[torch.arange(2), start : start + 3])


@pytest.mark.parametrize("inference", [False, True])
def test_a_bound_of_a_slice_is_data_beside_a_constant(inference: bool) -> None:
    model = Window()
    with torch.inference_mode(inference), torch.no_grad(), capture(model) as maps:
        for at in (0, 0, 0, 2, 1, 3, 0):
            x = torch.zeros(3, 4)
            x[0, at] = 1
            out = model(x)
            assert torch.equal(maps["layer"].tensor, out)
            assert list(maps["layer"].filters or ()) == [at, at + 1, at + 2]
    assert not maps.missed


class Rows(nn.Module):
    """Sizes and bounds that are tensors, made of plain numbers."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 4)
        self.how = how

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(self.first(x))
        if self.how == "divided":
            half: Any = torch.div(h.size(1), 2, rounding_mode="trunc")
            h = h.view(h.size(0), half, 2, h.size(2))
        elif self.how == "made":
            h = h.view(h.size(0), torch.tensor(2), 2, h.size(2))
        elif self.how == "bounds":
            h = h[:, : torch.tensor(2)]
        else:
            ones = torch.ones(3)
            ones[0] = torch.zeros(())  # a constant, into a constant
            h = h[:, : int(ones.sum())]
        return torch.tanh(self.second(h))


@pytest.mark.parametrize("inference", [False, True])
@pytest.mark.parametrize("how", ["divided", "made", "bounds", "written"])
def test_tensors_made_of_numbers_are_no_data(how: str, inference: bool, traced: list[None]) -> None:
    if how == "written" and inference:
        pytest.skip("nobody counts writes to inference tensors")
    model, bare = Rows(how), Rows(how)
    bare.load_state_dict(model.state_dict())
    with torch.inference_mode(inference), torch.no_grad(), capture(model) as maps:
        for n in range(5):
            x = torch.randn(2, 4, 8, generator=torch.Generator().manual_seed(n))
            assert torch.equal(model(x), bare(x))
            assert len(maps) == 4
    assert len(traced) == 1
    assert not maps.missed


class WrittenTo(nn.Module):
    """A tensor that was made of numbers, and then written to by data."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.one, self.two, self.three = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)
        self.how = how

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(self.one(x))
        flag = torch.zeros(1)
        if self.how == "add_":
            flag.add_(x.sum())
        elif self.how == "out":
            flag = torch.zeros(())
            torch.sum(x, (0, 1), out=flag)
        elif self.how == "view":
            flag.view(-1)[0] = x.sum()
        else:
            flag.fill_(1).mul_(x.sum())
        return torch.tanh(self.two(h)) if flag > 0 else torch.sigmoid(self.three(h))


@pytest.mark.parametrize("inference", [False, True])
@pytest.mark.parametrize("how", ["add_", "out", "view", "filled"])
def test_a_constant_that_data_is_written_to(how: str, inference: bool) -> None:
    model = WrittenTo(how)
    with torch.inference_mode(inference), torch.no_grad(), capture(model) as maps:
        for sign in (1, 1, 1, -1, 1, -1, -1, 1):
            model(sign * torch.ones(2, 4))
            assert maps.layers == (["one", "two"] if sign > 0 else ["one", "three"])
    assert not maps.missed


@pytest.mark.parametrize("inference", [False, True])
def test_chance_is_no_constant(inference: bool) -> None:
    class Chance(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            if torch.normal(0.0, 1.0, (1,)) > 0:
                return torch.tanh(self.one(x))
            return torch.relu(self.two(x))

    torch.manual_seed(0)
    model, seen = Chance(), set()
    with torch.inference_mode(inference), torch.no_grad(), capture(model) as maps:
        for _ in range(12):
            model(torch.ones(2, 4))
            assert len(maps) == 2
            seen.update(maps.layers)
    assert seen == {"one", "two"}
    assert not maps.missed


# -- in place -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "reshape",
    [
        lambda z: z.unsqueeze_(1),
        lambda z: z.unsqueeze_(0),
        lambda z: z.t_(),
        lambda z: z.transpose_(0, 1),
        lambda z: z.resize_(4, 3),
        lambda z: z.unsqueeze_(1).squeeze_(1),
        lambda z: z.swapaxes_(0, 1),
    ],
)
def test_another_shape_in_place(reshape: Any) -> None:
    class Reshaped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Linear(4, 4), nn.LazyLinear(4)

        def forward(self, x: Tensor) -> Tensor:
            z = self.one(x)
            reshape(z)
            return torch.relu(self.two(torch.sigmoid(z)))

    model = Reshaped()
    with torch.no_grad():
        model(torch.randn(3, 4))
        with capture(model) as maps:
            for _ in range(3):
                model(torch.randn(3, 4))
                assert [fm.layer for fm in maps if fm.nonlinearity == "relu"] == ["two", "two"]
                assert sum(fm.nonlinearity == "sigmoid" for fm in maps) == 2
    assert not maps.missed


# -- checks that only raise, within `finally` -----------------------------------------------------


class Checked(nn.Module):
    """Decides by data whether to raise."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.on = nn.Linear(4, 4), nn.Linear(4, 4), False

    def body(self, x: Tensor) -> Tensor:
        h = torch.relu(self.one(x))
        if not torch.isfinite(h).all():
            raise AssertionError
        return torch.tanh(self.two(h))


class Finally(Checked):
    def forward(self, x: Tensor) -> Tensor:
        self.on = True
        try:
            return self.body(x)
        finally:
            self.on = False


class FinallyWithin(Checked):
    def forward(self, x: Tensor) -> Tensor:
        try:
            for _ in range(2):
                try:
                    y = self.body(x)
                finally:
                    self.on = not self.on
        finally:
            if self.on:
                self.on = False
        return y


class Handled(Checked):
    def forward(self, x: Tensor) -> Tensor:
        try:
            return self.body(x)
        except AssertionError:
            return torch.sigmoid(self.two(x))
        finally:
            self.on = False


class Swallowed(Checked):
    def forward(self, x: Tensor) -> Tensor:
        y = x
        try:
            y = self.body(x)
        finally:
            return torch.sigmoid(self.two(y))  # noqa: B012


class Suppressed(Checked):
    def forward(self, x: Tensor) -> Tensor:
        with contextlib.suppress(AssertionError):
            return self.body(x)
        return torch.sigmoid(self.two(x))


class FinallyHandled(Checked):
    def forward(self, x: Tensor) -> Tensor:
        try:
            try:
                return self.body(x)
            finally:
                self.on = False
        except AssertionError:
            return torch.sigmoid(self.two(x))


class RaisedOtherwiseAndHandled(Checked):
    def forward(self, x: Tensor) -> Tensor:
        try:
            try:
                return self.body(x)
            except AssertionError as error:
                raise ValueError("no") from error
        except ValueError:
            return torch.sigmoid(self.two(x))


class RaisedOtherwise(Checked):
    def forward(self, x: Tensor) -> Tensor:
        try:
            return self.body(x)
        except AssertionError as error:
            raise ValueError("no") from error


HANDLING = [Handled, Swallowed, Suppressed, FinallyHandled, RaisedOtherwiseAndHandled]


@pytest.mark.parametrize("kind", [Finally, FinallyWithin, *HANDLING])
def test_who_handles_an_exception(kind: type[Checked], traced: list[None]) -> None:
    model, counts = kind(), []
    with torch.no_grad(), capture(model) as maps:
        for n in range(8):
            before = len(traced)
            x = torch.randn(2, 4)
            model(x)
            counts.append(len(traced) - before)
            assert "one" in maps.layers
            if kind in HANDLING and n == 5:
                model(torch.full((2, 4), float("nan")))
                assert [fm.nonlinearity for fm in maps if fm.layer == "two"][:1] == ["sigmoid"]
    known = sys.version_info >= (3, 11)  # before it, bytecode does not tell what is handled
    assert bool(counts[-1]) is (kind in HANDLING or not known)
    assert not maps.missed


class RunsPartsWhileHandling(nn.Module):
    """A part that returns nothing runs while an exception is handled, beside what data decides."""

    class Keeps(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lin = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> None:
            torch.sigmoid(self.lin(x))

    def __init__(self) -> None:
        super().__init__()
        self.one, self.keeps = nn.Linear(4, 4), self.Keeps()

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.one(x))
        if h.sum() > 1e9:
            return h
        try:
            raise KeyError
        except KeyError:
            self.keeps(h)
        return h


def test_a_part_that_returns_nothing_while_an_exception_is_handled_has_not_failed() -> None:
    model = RunsPartsWhileHandling()
    with torch.no_grad(), capture(model, kinds="activation") as maps:
        for _ in range(5):
            model(torch.randn(2, 4))
            assert maps.layers == ["one", "keeps.lin"]
    assert not maps.missed


def test_an_exception_that_becomes_another_one(traced: list[None]) -> None:
    model = RaisedOtherwise()
    with torch.no_grad(), capture(model) as maps:
        for _ in range(4):
            model(torch.randn(2, 4))
            assert len(maps) == 4
        with pytest.raises(ValueError, match="no"):
            model(torch.full((2, 4), float("nan")))
        model(torch.randn(2, 4))
        assert len(maps) == 4


# -- a class's own call ---------------------------------------------------------------------------


class Aggregation(nn.Module):
    """Its call checks, and does something of its own."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.layer, self.kind, self.hidden = nn.Linear(4, 4), kind, [False]

    def __call__(self, x: Tensor, dim: int = -1) -> Tensor:
        if dim >= x.dim():
            raise ValueError(dim)
        if self.kind == "past":
            return self.forward(x)
        out: Tensor = super().__call__(x)
        if self.kind == "hidden" and self.hidden[0]:
            return torch.tanh(out)
        return torch.sigmoid(out) if self.kind != "only" else out

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.layer(x))


class Aggregating(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.one, self.agg, self.two = nn.Linear(4, 4), Aggregation(kind), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.two(self.agg(torch.relu(self.one(x)))))


@pytest.mark.parametrize("kind", ["only", "more", "past"])
def test_a_call_of_its_own(kind: str, traced: list[None]) -> None:
    torch.manual_seed(0)
    check(Aggregating(kind), [(torch.randn(2, 4),) for _ in range(6)], missed=kind == "past")
    assert len(traced) <= 3


def test_a_call_of_its_own_that_decides() -> None:
    torch.manual_seed(0)
    model = Aggregating("hidden")
    with torch.no_grad(), capture(model) as maps:
        for n in range(12):
            model.agg.hidden[0] = n in (4, 5, 9)
            model(torch.randn(2, 4))
            if len(maps):
                own = [fm.nonlinearity for fm in maps if fm.layer.startswith((":", "agg:"))]
                assert own[:1] == ["tanh" if model.agg.hidden[0] else "sigmoid"] or maps.missed
    assert {m.reason.split(";")[0] for m in maps.missed} <= {
        "in a pass, it took a way through its code that no earlier pass had taken"
    }


# -- torch's own functions that hand on -----------------------------------------------------------


@pytest.mark.parametrize("function", [F.sigmoid, F.tanh])
@pytest.mark.parametrize("by", ["name", "attribute", "partial", "local"])
def test_functions_that_hand_on_are_tapped(
    function: Any, by: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Gate(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Linear(4, 4), nn.Linear(4, 4)
            self.gate = function if by != "partial" else functools.partial(function)

        def forward(self, x: Tensor) -> Tensor:
            x = F.relu(self.one(x))
            if by == "name":
                x = F.sigmoid(self.two(x)) if function is F.sigmoid else F.tanh(self.two(x))
            elif by == "local":
                gate = self.gate
                x = gate(self.two(x))
            else:
                x = self.gate(self.two(x))
            return x

    made: list[None] = []
    init = LightMode.__init__
    monkeypatch.setattr(LightMode, "__init__", lambda *a: made.append(None) or init(*a))
    check(Gate(), [(torch.randn(2, 4),) for _ in range(5)])
    if sys.version_info >= (3, 11):  # before it, no code tells where a call is
        assert not made


@pytest.mark.skipif(not hasattr(F, "grouped_mm"), reason="torch has it from 2.10 on")
@pytest.mark.parametrize("by", ["name", "attribute", "local"])
def test_grouped_products_are_tapped(by: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # As mixtures of experts call it in transformers. The light mode sees all functions there are.
    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up = nn.Parameter(torch.randn(2, 8, 16))
            self.down = nn.Parameter(torch.randn(2, 16, 8))
            self.product: Any = F.grouped_mm

        def forward(self, x: Tensor) -> Tensor:
            ends = torch.tensor([4, 8], dtype=torch.int32)
            if by == "name":
                x = F.relu(F.grouped_mm(x, self.up, offs=ends))
                return F.grouped_mm(x, self.down, offs=ends)
            if by == "attribute":
                x = F.relu(self.product(x, self.up, offs=ends))
                return self.product(x, self.down, offs=ends)
            product = self.product
            return product(F.relu(product(x, self.up, offs=ends)), self.down, offs=ends)

    torch.manual_seed(0)
    made: list[None] = []
    init = LightMode.__init__
    monkeypatch.setattr(LightMode, "__init__", lambda *a: made.append(None) or init(*a))
    check(Experts(), [(torch.randn(8, 8),) for _ in range(5)])
    assert not made


# -- parameters that are lent for a call ----------------------------------------------------------


class Weighted(nn.Module):
    """A parameter is an argument of a function."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.layer = nn.Parameter(torch.randn(4, 4)), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(F.linear(torch.relu(self.layer(x)), self.weight))


class Deciding(nn.Module):
    """Is traced in each pass; its parts are replayed."""

    def __init__(self) -> None:
        super().__init__()
        self.parts = nn.ModuleList([Weighted() for _ in range(4)])

    def forward(self, x: Tensor) -> Tensor:
        for part in self.parts:
            x = part(x) if x.sum() < 1e9 else x
        return x


@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize("kind", [Weighted, Deciding])
def test_functional_call_now_and_then(kind: type[nn.Module], first: bool) -> None:
    torch.manual_seed(0)
    model = kind()
    lent = {name: p.detach() * 1.01 for name, p in model.named_parameters()}
    x, counts = torch.randn(2, 4), set()
    with torch.no_grad(), capture(model) as maps:
        for functional in [first] * 3 + [not first] * 6 + [first, not first, first]:
            if functional:
                torch.func.functional_call(model, lent, (x,))
            else:
                model(x)
            counts.add(len(maps))
    assert len(counts) == 1
    assert not maps.missed


# -- what decides by data in one mode alone -------------------------------------------------------


class Dropping(nn.Module):
    """Leaves layers out by chance: in training, in eval mode, or in both."""

    def __init__(self, modes: tuple[bool, ...]) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Linear(4, 4), nn.ReLU(inplace=True))
        self.layers = nn.ModuleList([nn.Linear(4, 4) for _ in range(3)])
        self.modes = modes

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for layer in self.layers:
            if self.training in self.modes and torch.rand([]) < 0.4:
                continue
            x = F.gelu(layer(x))
        return x


_ORDERS = {
    "by epochs": [True] * 4 + [False] * 4 + [True] * 3 + [False] * 5,
    "eval first": [False] * 4 + [True] * 4 + [False] * 5 + [True] * 2,
    "in turn": [True, False] * 8,
}


@pytest.mark.parametrize("order", _ORDERS)
@pytest.mark.parametrize("modes", [(True,), (False,), (True, False), ()])
@pytest.mark.parametrize("within", [False, True])
def test_chance_in_one_mode(
    order: str, modes: tuple[bool, ...], within: bool, traced: list[None]
) -> None:
    torch.manual_seed(0)
    model: nn.Module = Dropping(modes)
    if within:
        model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), model, nn.Linear(4, 4), nn.Sigmoid())
    bare = copy.deepcopy(model)
    counts: dict[bool, list[int]] = {True: [], False: []}
    with torch.no_grad(), capture(model) as maps:
        for n, training in enumerate(_ORDERS[order]):
            model.train(training)
            bare.train(training)
            before = len(traced)
            x = torch.randn(2, 4, generator=torch.Generator().manual_seed(n))
            true = truth.run_pass(bare, (x,), train=False, seed_=n, witness=True)
            seen = truth.run_pass(model, (x,), train=False, seed_=n)
            truth.assert_same_pass(true, seen)
            truth.assert_captured_exactly_once(maps, true.truth)
            counts[training].append(len(traced) - before)
    assert not maps.missed
    for mode, each in counts.items():
        assert all(each) if mode in modes else sum(each) <= 2


# -- attributes by which a forward of torch's decides, which code of the model's calls ------------


class Derived(nn.ReLU):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)


class ByName(nn.Module):
    def __init__(self, inplace: bool) -> None:
        super().__init__()
        self.inplace = inplace

    def forward(self, x: Tensor) -> Tensor:
        return nn.ReLU.forward(self, x)  # type: ignore[arg-type]


def _helped(module: Any, x: Tensor) -> Tensor:
    return nn.ELU.forward(module, x)


class Helped(nn.Module):
    def __init__(self, inplace: bool) -> None:
        super().__init__()
        self.inplace, self.alpha = inplace, 1.0

    def forward(self, x: Tensor) -> Tensor:
        return _helped(self, x)


@pytest.mark.parametrize("by_data", [False, True])
@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize("kind", [Derived, ByName, Helped])
def test_in_place_now_and_then(kind: Any, first: bool, by_data: bool) -> None:
    class Around(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.act, self.two = nn.Linear(4, 4), kind(first), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            y = self.act(self.one(x))
            if by_data and float(y.sum()) > 1e9:
                return y
            return self.two(y)

    torch.manual_seed(0)
    model = Around()
    with torch.no_grad(), capture(model) as maps:
        for n, other in enumerate((0, 1, 0, 0, 1, 1, 0, 1, 0)):
            model.act.inplace = first is not bool(other)
            model.train(n % 4 > 1)
            x = torch.randn(3, 4, generator=torch.Generator().manual_seed(n))
            model(x)
            z = F.linear(x, model.one.weight, model.one.bias)
            assert torch.equal(maps["one", "preactivation"].tensor, z)
    assert not maps.missed
