"""Faults that `python -m tests.fuzz` found, each as the model that shows it."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fmapkit import EditError, capture, edits
from fmapkit.missed import Reason
from fmapkit.paths.items import MARK
from fmapkit.paths.twins import Twins, is_twin, twin_of
from tests.checks import tags


class _Again(nn.Module):
    """Calls itself so many times, which a counter says."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)
        self.times, self.left = 1, 1

    def forward(self, x: Tensor) -> Tensor:
        x = self.fc(x).tanh()
        if self.left:
            self.left -= 1
            x = self(x)
        return x


class _Around(nn.Module):
    """Decides by data, so that its parts are units."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner, self.last = inner, nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        if float(x.sum()) > 1e9:
            return x
        return torch.sigmoid(self.last(self.inner(x)))


def test_a_unit_that_calls_itself_ends_with_its_outermost_call() -> None:
    model = _Around(_Again())
    with capture(model) as maps, torch.no_grad():
        for times in (0, 1, 2, 2, 0, 1):
            model.inner.left = times
            x = torch.randn(3, 4)
            expected = [("inner.fc", n, "tanh") for n in range(times + 1)]
            model(x)
            assert [tag[:3] for tag in tags(maps)] == [*expected, ("last", 0, "sigmoid")]
            z = F.linear(x, model.inner.fc.weight, model.inner.fc.bias)
            assert torch.equal(
                maps.select("inner.fc", "preactivation", call=0, step=-1)[0].tensor, z
            )
    assert list(maps.missed) == []


class _Bent(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.where(x > 0, x, 0.1 * x)


class _Keeper(nn.Module):
    """Keeps a tensor of one pass for the next, so it is traced in each."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)
        self.before: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        now = torch.sigmoid(self.fc(x))
        x = now if self.before is None else now + self.before
        self.before = now
        return x


def test_modules_have_hooks_again_after_a_pass_that_is_not_captured() -> None:
    model = nn.Sequential(nn.Linear(4, 4), _Bent(), _Keeper())
    with capture(model, every=2) as maps, torch.no_grad():
        for _ in range(5):
            model(torch.randn(2, 4))
            assert [tag[:3] for tag in tags(maps)] == [("0", 0, "_Bent"), ("2.fc", 0, "sigmoid")]
    assert list(maps.missed) == []


class _Halt(BaseException):
    """No `Exception`."""


class _Strict(nn.Module):
    def __init__(self, error: type[BaseException]) -> None:
        super().__init__()
        self.fc, self.options, self.error = nn.Linear(4, 4), {"raises": False}, error

    def forward(self, x: Tensor) -> Tensor:
        x = self.fc(x).tanh()
        if self.options["raises"]:
            raise self.error
        return self.fc(x).tanh()


class _Lenient(nn.Module):
    """Handles what its part raises; it is traced in each pass, since it decides by data."""

    def __init__(self, error: type[BaseException]) -> None:
        super().__init__()
        self.first, self.part = nn.Linear(4, 4), _Strict(error)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        if float(x.sum()) > 1e9:
            return x
        try:
            x = self.part(x)
        except self.part.error:
            x = x * 2
        return self.part.fc(x).relu()


@pytest.mark.parametrize("error", [KeyError, _Halt, KeyboardInterrupt])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_a_part_whose_exception_is_handled_loses_one_pass_and_is_named(
    mode: Any, error: type[BaseException]
) -> None:
    model = _Lenient(error)
    shown = []
    with capture(model) as maps, mode():
        for raises in (False, False, True, True, False, True):
            model.part.options["raises"] = raises
            model(torch.randn(2, 4))
            shown.append([tag[:3] for tag in tags(maps)])
    whole = [("part.fc", 0, "tanh"), ("part.fc", 1, "tanh"), ("part.fc", 2, "relu")]
    short = [("part.fc", 0, "tanh"), ("part.fc", 1, "relu")]
    assert shown[:2] + shown[3:] == [whole, whole, short, whole, short]
    assert shown[2] in ([], short[:1])  # what is sure
    reasons = {m.layer: m.reason for m in maps.missed}
    assert (reasons[""], reasons["part"]) == (Reason.BROKEN_OFF.text(), Reason.NEW_PATH.text())


def test_a_part_that_has_raised_before_it_was_learned_loses_no_pass() -> None:
    model = _Lenient(KeyError)
    shown = []
    with capture(model) as maps:
        for raises in (True, True, False, True, False):
            model.part.options["raises"] = raises
            model(torch.randn(2, 4))
            shown.append([tag[:3] for tag in tags(maps)])
    whole = [("part.fc", 0, "tanh"), ("part.fc", 1, "tanh"), ("part.fc", 2, "relu")]
    short = [("part.fc", 0, "tanh"), ("part.fc", 1, "relu")]
    assert shown == [short, short, whole, short, whole]
    assert not maps.missed


def _zero() -> int:
    return 0


def _one() -> int:
    return 1


def _chosen() -> int:
    return 0


class _Chooses(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.fc(x)
        first = _zero() or _one()
        return torch.relu(x) if _chosen() == first else torch.tanh(x)


def test_code_that_is_given_to_another_function_within_the_block_stays_there() -> None:
    model, before, shown = _Chooses(), _chosen.__code__, []
    try:
        with capture(model) as maps, torch.no_grad():
            for other in (_zero, _one, _one, _zero, _one):
                _chosen.__code__ = other.__code__
                with capture(model) as inner:
                    model(torch.randn(2, 4))
                shown.append(([t[2] for t in tags(maps)], [t[2] for t in tags(inner)]))
        assert _chosen() == 1
        assert _chosen.__code__ is _one.__code__
    finally:
        _chosen.__code__ = before
    for (outer, inner_), sigma in zip(shown, ("tanh", "relu", "relu", "tanh", "relu"), strict=True):
        assert inner_ == [sigma]
        assert outer in ([], [sigma])
    assert shown[-1][0] == ["relu"]


class _Turned(nn.Module):
    """Changes the order of axes in place between a layer and σ."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.fc, self.how = nn.Linear(4, 3), how

    def forward(self, x: Tensor) -> Tensor:
        z = self.fc(x)
        if self.how == "t_":
            z.t_()
        else:
            getattr(z, self.how)(0, -1)
        return torch.relu(z)


@pytest.mark.parametrize("how", ["t_", "transpose_", "swapaxes_", "swapdims_"])
@pytest.mark.parametrize("detach", [True, False])
def test_axes_that_change_their_order_in_place_are_followed(how: str, detach: bool) -> None:
    model, x = _Turned(how), torch.randn(2, 4)
    with capture(model, detach=detach) as maps:
        for _ in range(3):
            out = model(x)
            assert tags(maps) == [("fc", 0, "relu", range(3))]
            z, a = maps["fc", "preactivation"], maps["fc"]
            assert (z.filter_dim, a.filter_dim) == (0, 0)
            assert torch.equal(z.tensor, model.fc(x).t())
            assert torch.equal(a.tensor, out)


class _Picky(nn.Module):
    def __init__(self, how: str) -> None:
        super().__init__()
        self.a, self.b, self.how, self.first = nn.Linear(4, 4), nn.Linear(4, 4), how, [True]

    def forward(self, x: Tensor) -> Tensor:
        p, q, first = self.a(x), self.b(x), self.first[0]
        if self.how == "generator":
            h = next(t for t in (p, q) if (t is p) == first)
        elif self.how == "list":
            (h,) = [t for t in (p, q) if (t is p) == first]
        elif self.how == "dict":
            h = {id(t): t for t in (p, q) if (t is p) == first}.popitem()[1]
        else:
            (h,) = [t for ts in ([p] * first, [q] * (not first)) for t in ts]
        return torch.relu(h)


@pytest.mark.parametrize("how", ["generator", "list", "dict", "nested"])
def test_what_a_comprehension_leaves_out_is_a_decision(how: str) -> None:
    model, shown = _Picky(how), []
    with capture(model, kinds="activation") as maps, torch.no_grad():
        for first in (True, True, False, False, True, False):
            model.first[0] = first
            model(torch.randn(2, 4))
            shown.append(([tag[0] for tag in tags(maps)], "a" if first else "b"))
    assert [found for found, _ in shown if found] == [[true] for found, true in shown if found]
    assert [bool(found) for found, _ in shown] == [True, True, False, True, True, True]


def test_the_gradient_of_a_preactivation_whose_axes_were_turned_in_place() -> None:
    model = nn.Sequential(_Turned("t_"))
    kinds = ("response", "preactivation")
    with capture(model, gradients=True, kinds=kinds) as maps:
        for _ in range(3):
            x = torch.randn(2, 4)
            model(x).square().sum().backward()
            z = model[0].fc(x)
            true = torch.autograd.grad(torch.relu(z).square().sum(), z)[0]
            assert torch.equal(maps["0.fc", "preactivation"].grad, true.t())
            assert torch.equal(maps["0.fc", "response"].grad, true)


class _Bounded(nn.Module):
    """Tensors of one number say which filters σ gets."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.fc, self.how, self.start = nn.Linear(4, 8), how, torch.tensor(0)
        self.given = 0  # a plain attribute that changes along with it

    def forward(self, x: Tensor) -> Tensor:
        z, at = self.fc(x), self.start
        if self.how == "slice":
            z = z[:, at : at + 2]
        elif self.how == "narrow":
            z = z.narrow(1, at, 2)
        elif self.how == "keyword":
            z = torch.narrow(z, dim=1, start=at, length=2)
        else:
            z = z.split([at + 1, 7 - at], 1)[1]
        return torch.relu(z)


@pytest.mark.parametrize("how", ["slice", "narrow", "keyword", "split"])
def test_filters_that_tensors_of_one_number_pick(how: str) -> None:
    model = _Bounded(how)
    with capture(model, kinds="preactivation") as maps, torch.no_grad():
        for start in (0, 0, 3, 3, 0, 3, 0):
            model.start, model.given = torch.tensor(start), start
            x = torch.randn(2, 4)
            model(x)
            z = maps["fc", "preactivation"]
            for place, filter_ in enumerate(z.filters or ()):
                assert torch.equal(z.tensor[:, place], model.fc(x)[:, filter_])
            if how != "split":
                assert z.filters == range(start, start + 2)


@pytest.mark.parametrize("in_place", [True, False])
def test_constants_written_at_an_index_keep_the_layer(in_place: bool) -> None:
    class Filled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            z, first = self.fc(x), torch.tensor([0])
            z = z.index_fill_(0, first, 0.5) if in_place else z.index_fill(0, first, 0.5)
            return torch.relu(z)

    model = Filled()
    with capture(model) as maps, torch.no_grad():
        for _ in range(2):
            model(torch.randn(2, 4))
            assert tags(maps) == [("fc", 0, "relu", range(3))]


def _added(x: Tensor, weight: Tensor) -> Tensor:
    return torch.addmm(x, x, weight)


def test_a_function_of_two_models_is_tapped_for_each() -> None:
    """Their twins may have equal code, though they take other attributes to be fixed."""
    own, file = _added.__code__, _added.__code__.co_filename
    first, second = Twins(lambda code: frozenset()), Twins(lambda code: frozenset({"more"}))
    for twins in (first, second):
        assert twins.exchange(_added)
        twins.clear()
    twin = twin_of(own, _added.__globals__, frozenset())
    assert twin is not None
    (place,) = twin.calls
    try:
        assert first.exchange(_added)
        first.tap([f"{file}|{place}"])
        assert f"{MARK}tapped" in _added.__code__.co_names
    finally:
        first.clear()
    assert _added.__code__ is own


class _HandSwish(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * (x + 3).clamp(0, 6) / 6


class _SoftSign(nn.Module):
    """Has no function in it that is a nonlinearity."""

    def forward(self, x: Tensor) -> Tensor:
        return x / (1 + x.abs())


class _Part(nn.Module):
    def __init__(self, act: nn.Module) -> None:
        super().__init__()
        self.fc, self.act = nn.Linear(4, 4), act

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.fc(x))


class _Later(nn.Module):
    """Decides by data from some pass on."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.decides = nn.Linear(4, 4), nn.Linear(4, 4), False

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.b(x) if self.decides and float(x.sum()) < 1e9 else self.a(x))


class _HooksItsPart(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.part, self.hooks = _Later(), _Part(_HandSwish()), False

    def forward(self, x: Tensor) -> Tensor:
        if float(x.sum()) > 1e9:
            return x
        x, handle = self.first(x), None
        if self.hooks:
            handle = self.part.register_forward_hook(lambda module, args, out: out * 0.5)
        x = self.part(x)
        if handle is not None:
            handle.remove()
        return x


def test_a_part_that_ceases_to_be_one_whole_within_a_pass_is_seen_in_it() -> None:
    """Another part has begun to decide by data, and a hook has come: two parts of that pass."""
    model = _HooksItsPart()
    with capture(model) as maps, torch.no_grad():
        for new in (False, False, False, True, False, True):
            model.first.decides = model.hooks = new
            x = torch.randn(2, 4)
            model(x)
            first = ("first.b" if new else "first.a", 0, "relu")
            assert [tag[:3] for tag in tags(maps)] == [first, ("part.fc", 0, "_HandSwish")]
            z = maps["part.fc", "preactivation"].tensor
            assert torch.equal(maps["part.fc"].tensor, _HandSwish()(z))
    assert list(maps.missed) == []


class _ReachesInto(nn.Module):
    """Calls parts of its part."""

    def __init__(self, act: nn.Module) -> None:
        super().__init__()
        self.part, self.last, self.how = _Part(act), nn.Linear(4, 4), 0

    def forward(self, x: Tensor) -> Tensor:
        if float(x.sum()) > 1e9:
            return x
        if self.how == 0:
            x = self.part(x)
        elif self.how == 1:
            x = self.part.act(self.part.fc(x))
        else:
            x = self.part.act(x)
        return torch.tanh(self.last(x))


@pytest.mark.parametrize("act", [_HandSwish, _SoftSign, nn.GELU])
def test_a_nonlinearity_that_is_called_past_its_part_is_named_once(act: type[nn.Module]) -> None:
    name = "gelu" if act is nn.GELU else act.__name__
    model = _ReachesInto(act())
    whole = [("part.fc", 0, name), ("last", 0, "tanh")]
    with capture(model) as maps, torch.no_grad():
        for how, missing in ((0, False), (0, False), (1, act is not nn.GELU), (1, False)):
            model.how = how
            model(torch.randn(2, 4))
            assert [tag[:3] for tag in tags(maps)] == (whole[1:] if missing else whole)
    assert {m.layer for m in maps.missed} == {"part.fc", "part.act"}
    with capture(model) as maps, torch.no_grad():
        for how in (0, 0, 2, 2):
            model.how = how
            model(torch.randn(2, 4))
        assert [tag[:3] for tag in tags(maps)] == [("part.act", 0, name), whole[1]]
    assert {m.layer for m in maps.missed} == {"part.act"}


class _RootMeanSquare(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4))

    def forward(self, x: Tensor) -> Tensor:
        return x * x.pow(2).mean(-1, keepdim=True).add(1e-6).rsqrt() * self.weight


@pytest.mark.parametrize("act", [torch.relu, Tensor.relu, Tensor.relu_, F.silu])
def test_an_edit_beside_a_hand_written_norm_is_made_in_every_pass(act: Any) -> None:
    """A way that the trial of a norm had recorded twice was none that later passes took."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.norm = nn.Linear(4, 4), _RootMeanSquare()

        def forward(self, x: Tensor) -> Tensor:
            return act(self.norm(self.fc(x)))

    model = nn.Sequential(nn.Linear(4, 4), Block())
    first, block = copy.deepcopy(model)
    edit = {("1.fc", "preactivation"): edits.scale(0.5)}
    with capture(model, edit=edit) as maps, torch.no_grad():
        for _ in range(6):
            x = torch.randn(3, 4)
            out = model(x)
            z = block.norm(block.fc(first(x)))
            assert torch.equal(maps["1.fc", "preactivation"].tensor, z)
            assert torch.equal(out, act(z * 0.5))
    assert list(maps.missed) == []


class _SameAfter(nn.Module):
    """Handles what its part raises; one layer runs before that part and after it."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.part = nn.Linear(4, 4), _Strict(KeyError)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.sigmoid(self.fc(x))
        if float(x.sum()) > 1e9:
            return x
        try:
            x = self.part(x)
        except KeyError:
            x = x * 2
        return torch.sigmoid(self.fc(x))


@pytest.mark.parametrize("layer", ["fc", "part.fc"])
def test_an_edit_is_refused_where_an_exception_has_left_it_undone(layer: str) -> None:
    model = _SameAfter()
    edit = {(layer, "activation"): edits.zero()}
    with capture(model, edit=edit) as maps, torch.no_grad():
        for raises in (False, False, True, True, False, True):
            model.part.options["raises"] = raises
            lost = raises and len(maps.missed) == 0
            if lost and layer == "fc":
                with pytest.raises(EditError, match="edits after that may not have been made"):
                    model(torch.ones(2, 4))
            else:
                out = model(torch.ones(2, 4))
                assert bool((out == 0).all()) is (layer == "fc")
            assert all(fm.edited is not None for fm in maps.select(layer, "activation", step=-1))


class _CallsUnbound(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return Tensor.relu(self.fc(x))


def test_a_method_that_is_called_by_its_class_is_read_in_every_pass() -> None:
    model = _Around(_CallsUnbound())
    with capture(model) as maps, torch.no_grad():
        for _ in range(5):
            model(torch.randn(3, 4))
            assert [t[:3] for t in tags(maps)] == [("inner.fc", 0, "relu"), ("last", 0, "sigmoid")]
    assert list(maps.missed) == []


class _Looked(nn.Module):
    """Any look at it runs code of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.second = nn.Linear(4, 4), nn.Linear(4, 4), False

    def __getattribute__(self, name: str) -> Any:
        if name == "a" and self.__dict__.get("second"):
            return self.b
        return super().__getattribute__(name)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.a(x))


def test_code_that_each_look_at_a_module_runs_is_no_way_of_the_model() -> None:
    model = _Around(_Looked())
    with capture(model) as maps, torch.no_grad():
        for second, batch in ((True, 2), (True, 3), (True, 3), (False, 3), (True, 2), (False, 2)):
            model.inner.second = second
            model(torch.randn(batch, 4))
            layer = "inner.b" if second else "inner.a"
            assert [t[:3] for t in tags(maps)] == [(layer, 0, "relu"), ("last", 0, "sigmoid")]
    assert list(maps.missed) == []


class _MakesAClass(nn.Module):
    """Makes a class in each pass, and another one if it is told to."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.base = nn.Linear(4, 4), {"kind": nn.ReLU}

    def forward(self, x: Tensor) -> Tensor:
        class Act(self.base["kind"]):  # type: ignore[misc]
            pass

        return Act()(self.fc(x))  # type: ignore[no-any-return]


def test_a_class_that_is_made_in_each_pass_is_the_same_if_its_bases_are() -> None:
    model = _MakesAClass()
    with capture(model) as maps, torch.no_grad():
        for _ in range(4):
            model(torch.randn(2, 4))
            assert tags(maps) == [("fc", 0, "relu", range(4))]
        assert list(maps.missed) == []
        model.base["kind"] = nn.Tanh
        for lost in (True, False):
            model(torch.randn(2, 4))
            assert tags(maps) == ([] if lost else [("fc", 0, "tanh", range(4))])


class HandlesAll(nn.Module):
    """Handles whatever one of its parts raises, the refusal of an edit included."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        try:
            h = self.fc(x)
            return torch.where(h > 0, h, 0.1 * h)
        except ValueError:
            return x


def test_an_edit_whose_refusal_the_model_handles_is_refused_as_the_pass_ends() -> None:
    edit = {("fc", "preactivation"): edits.scale(0.5)}
    model = HandlesAll()
    refused = pytest.raises(EditError, match="its preactivation is compared before")
    with capture(model, edit=edit), torch.no_grad(), refused:
        model(torch.ones(2, 4))


class LeftWaiting(nn.Module):
    """A generator that lives longer than a pass: each pass goes on where the last one left it."""

    def __init__(self) -> None:
        super().__init__()
        self.parts = nn.ModuleList([nn.Linear(4, 4) for _ in range(3)])
        self.act = nn.Sigmoid()
        self.way: Any = None

    def turns(self) -> Any:
        x = yield
        while True:
            x = yield self.act(self.parts[0](x))
            x = yield self.act(self.parts[1](x))
            x = yield self.act(self.parts[2](x))

    def forward(self, x: Tensor) -> Any:
        if self.way is None:
            self.way = self.turns()
            next(self.way)
        return self.way.send(x)


@pytest.mark.parametrize("before", [0, 1, 2])
def test_where_a_generator_goes_on_is_a_decision(before: int) -> None:
    model = LeftWaiting()
    with torch.no_grad():
        for _ in range(before):
            model(torch.ones(2, 4))
        with capture(model) as maps:
            for step in range(9):
                out = model(torch.ones(2, 4))
                shown = list(maps.select(kind="activation", step=step))
                assert [fm.layer for fm in shown] in ([], [f"parts.{(before + step) % 3}"])
                assert shown == [] or torch.equal(shown[0].tensor, out)
                assert shown or maps.missed


class SetsInPlace(nn.Module):
    """Has a module of torch's work in place, or not, by what was drawn in the pass."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.conv = nn.Conv2d(3, 3, 1)
        self.act = nn.ReLU()
        self.draws = iter([False, False, False, True, True, False, True, False])

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv(x)
        if self.how == "assigned" or self.how == "set":
            self.act.inplace = bool(int(next(self.draws)))
        else:
            self.act.inplace, self.last = bool(int(next(self.draws))), 0
        out: Tensor = self.act(h)
        return out


@pytest.mark.parametrize("how", ["assigned", "set", "in a tuple"])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_an_attribute_of_torchs_own_that_is_set_in_a_pass_is_a_decision(
    how: str, mode: Any
) -> None:
    model = SetsInPlace(how)
    with mode(), capture(model) as maps:
        for step in range(8):
            x = torch.randn(2, 3, 4, 4)
            z = model.conv(x).detach().clone()
            model(x)
            for fm in maps.select(kind="preactivation", step=step):
                assert torch.equal(fm.tensor, z)


class Reloaded(nn.Module):
    """Asks a function that is given other code between passes, as a reload in a notebook does."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh((self.first if 0 < _chosen() < 2 else self.second)(x))


@pytest.mark.parametrize("end", [Twins.clear, Twins.rest])
@pytest.mark.parametrize("both", [False, True])
def test_a_function_that_is_given_other_code_gets_a_twin_of_that(end: Any, both: bool) -> None:
    own, other, twins = _chosen.__code__, _one.__code__, Twins()
    try:
        assert twins.exchange(_chosen)
        assert not both or twins.exchange(_one)  # so that the other code is a twin's
        _chosen.__code__ = _one.__code__
        twins.set_again()
        assert is_twin(_chosen.__code__)
        assert _chosen() == 1
        end(twins)
        assert _chosen.__code__ is _one.__code__ is other
    finally:
        _chosen.__code__ = own


@pytest.mark.parametrize("edited", [False, True])
def test_a_function_that_is_given_other_code_records_in_the_same_pass(edited: bool) -> None:
    own = _chosen.__code__
    model = Reloaded()
    where = [edits.Where(name, optional=True) for name in ("first", "second")]
    edit: Any = dict.fromkeys(where, edits.scale(0.5)) if edited else None
    try:
        with torch.no_grad(), capture(model, edit=edit) as maps:
            for step in range(10):
                _chosen.__code__ = (_one if step % 2 else _zero).__code__
                model(torch.randn(2, 4))
                if step > 3:
                    layer = "first" if step % 2 else "second"
                    assert [fm.layer for fm in maps.select(step=step)] == [layer, layer]
        assert _chosen.__code__ is _one.__code__
    finally:
        _chosen.__code__ = own
