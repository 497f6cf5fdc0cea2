"""`capture(stop=True)`: the forward ends at the last wanted map, and every wanted map is right."""

from __future__ import annotations

import copy
import pickle
import warnings
from contextlib import ExitStack
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fmapkit import ArgumentError, CaptureWarning, FeatureMap, capture
from tests import truth


class Counting(nn.Module):
    """A linear layer that counts its calls."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 4))
        self.seen: list[int] = []  # an attribute that changes would have the next pass traced

    @property
    def calls(self) -> int:
        return len(self.seen)

    @calls.setter
    def calls(self, value: int) -> None:
        self.seen[:] = [1] * value

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append(1)
        return F.linear(x, self.weight)


class Stack(nn.Module):
    """Proven; σ as a module, in place or not, or as a function."""

    def __init__(self, style: str) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)
        self.act = nn.ReLU(inplace=style == "module_")
        self.style = style
        self.tail = Counting()

    def sigma(self, x: Tensor) -> Tensor:
        return F.relu(x) if self.style == "function" else self.act(x)

    def forward(self, x: Tensor) -> Tensor:
        x = self.sigma(self.a(x))
        x = self.sigma(self.b(x))
        x = self.sigma(self.c(x))
        return self.tail(x)


class Branching(Stack):
    """Unproven: traced in every pass."""

    def forward(self, x: Tensor) -> Tensor:
        if float(x.sum()) > 1e9:
            return x
        try:
            return super().forward(x)
        except Exception:  # must not swallow what ends the pass
            return x


class Blocks(nn.Module):
    """Unproven at the top, proven below."""

    def __init__(self, style: str) -> None:
        super().__init__()
        self.body = Stack(style)
        self.tail = Counting()

    def forward(self, x: Tensor) -> Tensor:
        return self.tail(self.body(x) if float(x.sum()) < 1e9 else x)


@pytest.mark.parametrize("style", ["module", "module_", "function"])
@pytest.mark.parametrize("kind", [Stack, Branching, Blocks])
@pytest.mark.parametrize("layer", ["a", "b", "c"])
@pytest.mark.parametrize("train", [False, True])
def test_ends_after_the_last_wanted_map(
    kind: type[nn.Module], style: str, layer: str, train: bool
) -> None:
    torch.manual_seed(0)
    model = kind(style)
    name = f"body.{layer}" if kind is Blocks else layer
    bare = copy.deepcopy(model)
    before = truth.fingerprint(model)
    with torch.set_grad_enabled(train), capture(model, name, stop=True) as maps:
        for n in range(4):
            x = torch.randn(3, 4)
            with capture(bare) as whole:
                expected = bare(x)
            got = model(x)
            if n == 0:
                assert torch.equal(got, expected)
            else:
                assert got is None
            for kind_ in ("preactivation", "activation"):
                assert torch.equal(maps[name, kind_].tensor, whole[name, kind_].tensor)
            assert len(maps) == 2
            assert maps.missed == []
    assert model.tail.calls == 1
    assert bare.tail.calls == 4
    model.tail.calls = 0
    truth.assert_nothing_left(before, model)
    assert torch.equal(model(x), bare(x))


def test_every_call_of_a_layer_is_waited_for() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.act, self.tail = nn.Linear(4, 4), nn.ReLU(), Counting()

        def forward(self, x: Tensor) -> Tensor:
            return self.tail(self.act(self.fc(self.act(self.fc(x)))))

    model = Twice()
    with capture(model, "fc", stop=True) as maps:
        for _ in range(3):
            model(torch.randn(2, 4))
            assert [fm.call for fm in maps.select(kind="activation")] == [0, 1]
    assert model.tail.calls == 1


def test_what_a_norm_stands_before_is_waited_for() -> None:
    # The convolution's own result is not yet its preactivation.
    model = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.ReLU(inplace=True), Counting())
    for options in ({"kinds": "preactivation"}, {"kinds": "activation"}, {}):
        model[3].calls = 0
        with capture(model, "0", stop=True, **options) as maps:
            for _ in range(3):
                x = torch.randn(2, 4)
                model(x)
                for fm in maps:
                    z = model[1](model[0](x))
                    assert torch.equal(fm.tensor, z if fm.kind == "preactivation" else z.relu())
        assert model[3].calls == 1


def test_outputs_of_blocks() -> None:
    model = nn.Sequential(nn.Sequential(nn.Linear(4, 4), nn.ReLU()), Counting())
    with capture(model, "0", stop=True) as maps:
        for _ in range(3):
            x = torch.randn(2, 4)
            model(x)
            assert torch.equal(maps["0"].tensor, F.relu(model[0][0](x)))
    assert model[1].calls == 1


def test_a_first_pass_that_fails_does_not_count() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.Tanh(), Counting())
    with capture(model, ["0", "2"], stop=True) as maps:
        handle = model[2].register_forward_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            model(torch.randn(2, 4))
        handle.remove()
        for _ in range(3):
            model(torch.randn(2, 4))
            assert len(maps) == 4
    assert model[4].calls == 1


def test_a_changed_model_runs_to_its_end_once() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), Counting())
    with capture(model, "0", stop=True) as maps:
        for _ in range(2):
            model(torch.randn(2, 4))
        model[1] = nn.Tanh()
        for _ in range(2):
            model(torch.randn(2, 4))
            assert maps["0"].nonlinearity == "tanh"
    assert model[2].calls == 2


@pytest.mark.parametrize("own", [False, True])
def test_a_forward_of_the_instance_and_copies(own: bool) -> None:
    model = Stack("module_")
    if own:
        model.forward = Other(model)
    plain = dict(model.__dict__)
    x = torch.randn(2, 4)
    expected = model(x)
    with capture(model, "a", stop=True) as maps:
        for _ in range(3):
            model(x)
        twins: list[Any] = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
        for twin in twins:
            assert torch.equal(twin(x), expected)
            twin.a.weight.data.zero_()  # its own, not the model's
        assert torch.equal(maps["a"].tensor, F.relu(model.a(x)))
    model.tail.calls = plain["tail"].calls if "tail" in plain else model.tail.calls
    assert ("forward" in model.__dict__) == own
    assert torch.equal(model(x), expected)


class Other:
    """A forward set on an instance."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def __call__(self, x: Tensor) -> Tensor:
        return type(self.model).forward(self.model, x)


def test_two_captures_on_one_model() -> None:
    model, x = Stack("module"), torch.randn(2, 4)
    with capture(model, "a", stop=True) as a, capture(model) as everything:
        for _ in range(3):
            model(x)
        assert a.layers == ["a"]
        assert everything.layers[0] == "a"
    assert "forward" not in model.__dict__


@pytest.mark.parametrize("outer_first", [True, False])
def test_captures_made_before_the_first_is_entered(outer_first: bool) -> None:
    """Each stands before what is there when it is entered, and nothing of either stays."""
    net = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    bare, x = truth.fingerprint(net), torch.randn(3, 4)
    first, second = (capture(net, "0", stop=True) for _ in range(2))
    maps, others = first.__enter__(), second.__enter__()
    net(x)
    for _ in range(3):
        x = torch.randn(3, 4)
        assert net(x) is None
        for each in (maps, others):
            z = each["0", "preactivation"].tensor
            assert torch.equal(z, F.linear(x, net[0].weight, net[0].bias))
            assert each.missed == []  # it has all that it wants
    for one in (first, second) if outer_first else (second, first):
        one.__exit__(None, None, None)
    assert torch.equal(net(x), copy.deepcopy(net)(x))
    truth.assert_nothing_left(bare, net)


CUT = "another capture, with stop=True, ended the pass"


@pytest.mark.parametrize("style", ["module", "module_", "function"])
@pytest.mark.parametrize("kind", [Stack, Branching, Blocks])
@pytest.mark.parametrize("layer", ["a", "b", "c"])
@pytest.mark.parametrize("outer", [False, True])
@pytest.mark.parametrize("warm", [0, 2])
@pytest.mark.parametrize("train", [False, True])
def test_the_end_of_a_pass_is_named_by_other_captures(
    kind: type[nn.Module], style: str, layer: str, outer: bool, warm: int, train: bool
) -> None:
    """Once. What they hold of such a pass is right, and so is all of the next whole one."""
    torch.manual_seed(0)
    model = kind(style)
    bare = copy.deepcopy(model)
    before = truth.fingerprint(model)
    name = f"body.{layer}" if kind is Blocks else layer
    stopping = capture(model, name, stop=True)
    with torch.set_grad_enabled(train), warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        with ExitStack() as rest, ExitStack() as stops:
            if not outer:
                stopped = stops.enter_context(stopping)
            maps = rest.enter_context(capture(model))
            for _ in range(warm):
                model(torch.randn(3, 4))
            if outer:
                stopped = stops.enter_context(stopping)
            whole_ones = 1 if outer or not warm else 0
            for n in range(4):
                x = torch.randn(3, 4)
                with capture(copy.deepcopy(bare)) as whole:
                    whole._session.asked.model(x)
                ended = model(x) is None
                assert ended == (n >= whole_ones)
                flags = [m.inplace for m in model.modules() if hasattr(m, "inplace")]
                assert flags == [style == "module_"]
                truth.modes()
                expected = {(fm.layer, fm.kind): fm.tensor for fm in whole}
                found = {(fm.layer, fm.kind): fm.tensor for fm in maps}
                assert len(found) == len(maps)
                for key, tensor in found.items():
                    assert torch.equal(tensor, expected[key])
                if not ended:
                    assert found.keys() == expected.keys()
                    assert maps.missed == []
                else:
                    assert (name, "preactivation") in found
                    assert found.keys() < expected.keys()
                    assert [m.layer for m in maps.missed] == [""]
                    assert CUT in maps.missed[0].reason
                assert torch.equal(stopped[name].tensor, expected[name, "activation"])
                assert stopped.missed == []
            stops.close()
            for _ in range(3):
                x = torch.randn(3, 4)
                with capture(copy.deepcopy(bare)) as whole:
                    out = whole._session.asked.model(x)
                assert torch.equal(model(x), out)
                expected = {(fm.layer, fm.kind): fm.tensor for fm in whole}
                found = {(fm.layer, fm.kind): fm.tensor for fm in maps}
                assert found.keys() == expected.keys()
                for key, tensor in found.items():
                    assert torch.equal(tensor, expected[key])
            assert len(maps.missed) == 1
    assert len([w for w in warned if CUT in str(w.message)]) == 1
    for part in model.modules():
        if isinstance(part, Counting):
            part.calls = 0
    truth.assert_nothing_left(before, model)


def test_the_end_of_a_part_is_named_by_a_capture_around_it() -> None:
    """The part returns None, and whatever the rest makes of it is not captured."""

    class Around(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.part, self.last = Stack("module_"), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            out = self.part(x)
            return self.last(x if out is None else out)

    model = Around()
    x = torch.randn(3, 4)
    with pytest.warns(CaptureWarning, match=CUT):
        _end_of_a_part(model, x)


def _end_of_a_part(model: Any, x: Tensor) -> None:
    with capture(model) as maps, torch.no_grad():
        with capture(model.part, "a", stop=True):
            model(x)
            assert maps.missed == []
            for _ in range(3):
                assert torch.equal(model(x), F.linear(x, model.last.weight, model.last.bias))
                assert maps.layers == ["part.a"]
        assert [(m.layer, CUT in m.reason) for m in maps.missed] == [("", True)]
        model(x)
        assert maps.layers == ["part.a", "part.b", "part.c", "part.tail", "last"]


@pytest.mark.parametrize("style", ["module", "module_", "function"])
@pytest.mark.parametrize("kind", [Stack, Branching, Blocks])
@pytest.mark.parametrize("layers", [("a", "b"), ("b", "a"), ("b", "b")])
@pytest.mark.parametrize("late", [False, True])
def test_the_last_of_several_ends_the_pass(
    kind: type[nn.Module], style: str, layers: tuple[str, str], late: bool
) -> None:
    torch.manual_seed(0)
    model = kind(style)
    bare = copy.deepcopy(model)
    names = [f"body.{layer}" if kind is Blocks else layer for layer in layers]
    with torch.no_grad(), capture(model, names[0], stop=True) as first:
        if late:
            model(torch.randn(3, 4))
            assert model(torch.randn(3, 4)) is None
        with capture(model, names[1], stop=True) as second:
            for n in range(4):
                x = torch.randn(3, 4)
                with capture(copy.deepcopy(bare)) as whole:
                    whole._session.asked.model(x)
                assert (model(x) is None) == (n > 0)  # the first pass of each is a whole one
                for name, maps in zip(names, (first, second), strict=True):
                    for kind_ in ("preactivation", "activation"):
                        assert torch.equal(maps[name, kind_].tensor, whole[name, kind_].tensor)
                    assert maps.missed == []
        tail: Any = model.tail
        calls = tail.calls
        model(torch.randn(3, 4))
        assert tail.calls == calls == 1 + late


class _Nothing:
    def __repr__(self) -> str:
        return "nothing"

    def update(self, fm: Any) -> None:
        pass


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.inference_mode])
@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize(
    "options",
    [{}, {"dtype": torch.float64}, {"filters": 0}, {"keep": 0, "analyses": _Nothing()}],
    ids=str,
)
def test_what_another_capture_does_for_itself_ends_no_pass(
    options: dict[str, Any], first: bool, mode: Any
) -> None:
    net, x = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2)), torch.randn(3, 4)
    both = [options, {"layers": "0", "stop": True}]
    one, other = both if first else both[::-1]
    with mode(), capture(net, **one):
        net(x), net(x)
        with capture(net, **other):
            assert net(x) is not None
            for _ in range(3):
                assert net(x) is None


def test_bad_arguments() -> None:
    with pytest.raises(ArgumentError, match="say layers="):
        capture(nn.ReLU(), stop=True)


@pytest.mark.parametrize(
    ("layers", "kinds"),
    [("", "output"), (["0", ""], ("activation",)), ("*", "output"), ("3", "preactivation")],
)
def test_the_last_wanted_map_is_what_the_model_returns(layers: Any, kinds: Any) -> None:
    """There is nothing left to stop: the call returns as any other."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 5)).eval()
    with torch.no_grad(), capture(model, layers, kinds=kinds, stop=True) as maps:
        for _ in range(6):
            x = torch.randn(2, 3, 8, 8)
            model(x)
            last = list(maps)[-1].tensor
            h = F.relu(F.conv2d(x, model[0].weight, model[0].bias)).flatten(1)
            assert torch.equal(last, F.linear(h, model[3].weight, model[3].bias))
    assert not maps.missed


@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize("both", [False, True])
def test_a_pass_that_another_capture_ends_is_shown_to_analyses(both: bool, first: bool) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2), nn.ReLU()).eval()
    seen: list[tuple[str, int]] = []

    class Notes:
        def update(self, fm: FeatureMap) -> None:
            seen.append((fm.layer, fm.step))

    low = capture(model, "0", kinds="activation", analyses=Notes(), stop=both)
    high = capture(model, "2", kinds="activation", analyses=Notes(), stop=True)
    with torch.no_grad(), low if first else high, high if first else low:
        for _ in range(5):
            model(torch.randn(2, 4))
    assert sorted(seen) == [(layer, step) for layer in ("0", "2") for step in range(5)]
