"""What is proven to take one road is replayed; what is not is watched in every pass."""

from __future__ import annotations

import copy
import importlib
import sys
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fmapkit import capture
from fmapkit._hooks import Hooks
from fmapkit._names import Names
from fmapkit._proof import Proofs
from fmapkit._watch import Watch
from tests.checks import check, images


class Base(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)
        self.act = nn.ReLU(inplace=True)
        self.token = nn.Parameter(torch.zeros(1, 4))
        self.register_buffer("shift", torch.ones(4))
        self.deep = True


class OfAParameter(Base):
    """A method of a parameter or a buffer is the tensor's own."""

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat([self.token.expand(x.shape[0], -1), x], 1)[:, 4:] + self.shift.relu()
        return self.b(self.act(self.a(x)))


class OfTheStructure(Base):
    """`_modules` is compared as a whole before each pass."""

    def __init__(self) -> None:
        super().__init__()
        self.parts = nn.ModuleList([nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4)])

    def forward(self, x: Tensor) -> Tensor:
        for part in self.parts._modules.values():
            x = part(x)
        for _, child in self.parts._modules.items():
            x = child(x)
        return x


class ByAttribute(Base):
    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.a(x)) if self.deep else self.a(x)
        return F.gelu(self.b(x))


class ByData(Base):
    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.a(x)) if x.sum() > 0 else torch.tanh(self.b(x))


class ByABuffer(Base):
    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.a(x)) if self.shift.sum().item() > 2 else torch.tanh(self.b(x))


class ByAnItem(Base):
    def forward(self, x: Tensor) -> Tensor:
        layers = [self.a, self.b]
        return self.act(layers[int(x.sum() > 0)](x))


class ByPopping(Base):
    def forward(self, x: Tensor) -> Tensor:
        layers = {"a": self.a, "b": self.b}
        return self.act(layers.pop("a" if x.sum() > 0 else "b")(x))


def _proven(model: nn.Module) -> bool:
    return Proofs(lambda hook: False).proven(model)


@pytest.mark.parametrize("kind", [OfAParameter, OfTheStructure, ByAttribute])
def test_one_road(kind: type[Base]) -> None:
    model = kind()
    assert _proven(model)
    check(model.eval(), images(3, 4), train=False)
    check(model.train(), images(3, 4))


@pytest.mark.parametrize("kind", [ByData, ByABuffer, ByAnItem, ByPopping])
def test_roads_that_depend_on_data(kind: type[Base]) -> None:
    model = kind()
    assert not _proven(model)
    passes = [(x[0] + sign,) for x, sign in zip(images(3, 4, n=6), [2, -2] * 3, strict=True)]
    check(model.eval(), passes, train=False)


def test_what_is_swapped_in_a_loop_over_the_structure() -> None:
    model = OfTheStructure().eval()
    x = torch.randn(3, 4)
    with torch.no_grad(), capture(model) as maps:
        model(x), model(x)
        model.parts[1] = nn.Sigmoid()
        bare = copy.deepcopy(model)
        assert torch.equal(model(x), bare(x))
        assert [fm.nonlinearity for fm in maps.select(kind="activation", step=-1)] == [
            "sigmoid"
        ] * 2


class Gated(Base):
    """Its road depends on an attribute of a child, and on a parameter that may be None."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Base()
        self.first: nn.Module | None = None
        self.register_parameter("gate", None)
        self.scale = None

    def forward(self, x: Tensor) -> Tensor:
        # The same modules run, whichever way it goes: no tap tells.
        x = self.act(self.a(x)) if self.inner.deep else self.act(self.b(x))
        if self.gate is not None:
            x = self.act(x * self.gate)
        if self.scale is not None:
            x = torch.tanh(x * self.scale)
        return x


def test_what_a_road_depends_on_may_lie_anywhere() -> None:
    model, x = Gated().eval(), torch.randn(3, 4)
    assert _proven(model)

    def deeper(deep: bool) -> None:
        model.inner.deep = deep

    changes = [
        (lambda: deeper(False), ["b"]),
        (lambda: deeper(True), ["a"]),
        (lambda: setattr(model, "gate", nn.Parameter(torch.ones(4))), ["a", "act"]),
        (lambda: setattr(model, "scale", nn.Parameter(torch.ones(4))), ["a", "act", ":tanh"]),
        (lambda: setattr(model, "gate", None), ["a", ":tanh"]),
        (lambda: setattr(model, "scale", None), ["a"]),
    ]
    with torch.no_grad(), capture(model) as maps:
        model(x), model(x)
        for change, layers in changes:
            change()
            for _ in range(2):
                model(x)
                found = maps.select(kind="activation", step=-1)
                assert [fm.layer for fm in found] == layers
        assert maps.missed == []


class Kept(Base):
    """What σ overwrites is there in the next pass: a buffer, an attribute, one of a list."""

    def __init__(self, where: str) -> None:
        super().__init__()
        self.register_buffer("memory", torch.randn(4))
        self.plain = torch.randn(4)
        self.several = [torch.randn(4)]
        self.where = where

    def forward(self, x: Tensor) -> Tensor:
        if self.where == "buffer":
            F.relu(self.memory, inplace=True)
        elif self.where == "attribute":
            torch.relu_(self.plain)
        elif self.where == "list":
            torch.relu_(self.several[0])
        else:
            torch.relu_(self.memory.copy_(x[0]))
        return self.b(self.act(self.a(x + self.memory + self.plain + self.several[0])))


@pytest.mark.parametrize("where", ["buffer", "attribute", "list", "method"])
@pytest.mark.parametrize("inside", [False, True])
def test_what_a_module_keeps_is_overwritten_all_the_same(where: str, inside: bool) -> None:
    model: nn.Module = Kept(where).eval()
    if inside:
        model = nn.Sequential(nn.Linear(4, 4), model)
    bare = copy.deepcopy(model)
    with torch.no_grad(), capture(model) as maps:
        for x in torch.randn(4, 3, 4):
            assert torch.equal(model(x), bare(x))
            for kept in ("memory", "plain"):
                twins = [getattr(m[1] if inside else m, kept) for m in (model, bare)]
                assert torch.equal(*twins)
        assert maps.missed == []


def test_that_dynamo_was_imported_is_no_change_of_the_model(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """torch imports it by itself, in the middle of somebody's first block, say."""
    mark = "torch._dynamo.repro.after_dynamo"  # what the first torch.compile imports
    there = importlib.import_module(mark)
    monkeypatch.delitem(sys.modules, mark)
    model = ByAttribute()
    watch = Watch(model, Hooks(object(), lambda *args: None))
    monkeypatch.setitem(sys.modules, mark, there)
    assert not watch.changed()
    model.act.compile()
    assert watch.changed()


def _put_last(model: nn.Sequential) -> None:
    model._modules["0"] = model._modules.pop("0")


def _rename(model: nn.Sequential) -> None:
    """The last of its parent: children and their order stay."""
    model[0]._modules["last"] = model[0]._modules.pop("2")


def _move_over(model: nn.Sequential) -> None:
    """The same children under the same names, one after the other, of other parents."""
    first, second = model[0]._modules, model[1]._modules
    kept = dict(second)
    second.clear()
    second["2"] = first.pop("2")
    second.update(kept)


def _other_class(model: nn.Sequential) -> None:
    model[0][1].__class__ = nn.GELU


def _own_forward(model: nn.Sequential) -> None:
    model[1][0].forward = lambda x: x


@pytest.mark.parametrize(
    "change",
    [
        _put_last,
        _rename,
        _move_over,
        _other_class,
        _own_forward,
        lambda model: model.append(nn.Tanh()),
        lambda model: model[0].__setitem__(1, nn.ReLU()),
        lambda model: model[0].pop(2),
        lambda model: model[0]._modules.update({"1": None}),
        lambda model: model[1][0].add_module("child", nn.ReLU()),
        lambda model: model[0][0].register_forward_hook(lambda *_: None),
    ],
)
def test_what_a_watch_sees(change: Callable[[nn.Sequential], object]) -> None:
    """Whatever a proof rests on; and nothing while nothing changes."""

    class Held(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x

    model = nn.Sequential(
        nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4)), nn.Sequential(Held())
    )
    watch = Watch(model, Hooks(object(), lambda *args: None))
    assert not watch.changed()
    model(torch.ones(1, 4))
    model.double().eval()
    assert not watch.changed()
    change(model)
    assert watch.changed()


def _swap(model: nn.Sequential) -> None:
    model[0].weight = nn.Parameter(torch.zeros(4, 4))


def _exchange(model: nn.Sequential) -> None:
    mine, other = model[0]._parameters, model[2]._parameters
    mine["bias"], other["bias"] = other["bias"], mine["bias"]


def _hand_over(model: nn.Sequential) -> None:
    """The same parameters in the same order, the last of one module now the first of another."""
    mine, other = model[0]._parameters, model[2]._parameters
    kept = dict(other)
    other.clear()
    other["first"] = mine.pop("bias")
    other.update(kept)


@pytest.mark.parametrize(
    "change",
    [
        _swap,
        _exchange,
        _hand_over,
        lambda model: model[1].register_parameter("gate", nn.Parameter(torch.ones(1))),
        lambda model: model[2].register_parameter("gate", nn.Parameter(torch.ones(1))),
        lambda model: model[2].register_parameter("bias", None),
        lambda model: model[0]._parameters.clear(),
    ],
)
def test_parameters_that_are_not_what_they_were(change: Callable[[nn.Sequential], object]) -> None:
    """They are read again before the next pass, and only then."""
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
    names = Names(model)
    before = names.version
    names.update()
    assert names.version == before
    change(model)
    names.update()
    assert names.version == before + 1
    for module in model:
        for key, parameter in module._parameters.items():
            if parameter is not None:
                assert names.owners(parameter) == [(module, key)]
    names.update()
    assert names.version == before + 1
