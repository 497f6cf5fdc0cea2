"""State that a model keeps outside of itself: an in-place σ must change it as if nobody watched.

Each case is made twice from one seed. One twin runs bare, the other one is captured; what they
return, what they keep and what a hand-made copy of z says must be equal, bit for bit.
"""

from __future__ import annotations

import copy
import enum
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fmapkit import capture
from tests.checks import strayed

STATE = torch.empty(4, 4)
F4 = ("linear", (2, 4))


@dataclass
class Case:
    """A model, and how to set and read what it keeps elsewhere."""

    model: nn.Module
    keep: Callable[[Tensor], object]
    kept: Callable[[], Any]


def _nothing(value: Tensor) -> None:
    """There is nothing to set."""


class OfModule(nn.Module):
    """A tensor of the Python module."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        F.relu_(STATE)
        return self.a(x + STATE)


def of_module() -> Case:
    return Case(OfModule(), STATE.copy_, lambda: STATE)


def of_closure() -> Case:
    memory = torch.empty(4, 4)

    class OfClosure(OfModule):
        def forward(self, x: Tensor) -> Tensor:
            memory.add_(x)
            return self.a(torch.tanh_(memory))

    return Case(OfClosure(), memory.copy_, lambda: memory)


def returned() -> Case:
    memory = torch.empty(4, 4)

    class Returned(OfModule):
        def forward(self, x: Tensor) -> Tensor:
            self.a(x)
            return torch.relu_(memory)  # the caller may go on writing to it

    return Case(Returned(), memory.copy_, lambda: memory)


def of_object() -> Case:
    class Holder:
        memory = torch.empty(4, 4)

    class OfObject(OfModule):
        def __init__(self) -> None:
            super().__init__()
            self.holder = Holder()

        def forward(self, x: Tensor) -> Tensor:
            memory = self.holder.memory
            F.hardtanh_(memory)
            return self.a(x + memory)

    return Case(OfObject(), Holder.memory.copy_, lambda: Holder.memory)


def of_numpy() -> Case:
    array = np.empty((4, 4), np.float32)

    class OfNumPy(OfModule):
        def forward(self, x: Tensor) -> Tensor:
            memory = torch.from_numpy(array)
            F.relu_(memory)
            return self.a(x)

    return Case(OfNumPy(), lambda t: np.copyto(array, t.numpy()), lambda: torch.tensor(array))


def of_grad() -> Case:
    leaf = torch.empty(4, 4, requires_grad=True)
    leaf.grad = torch.empty(4, 4)

    class OfGrad(OfModule):
        def forward(self, x: Tensor) -> Tensor:
            memory = leaf.grad
            torch.sigmoid_(memory)
            return self.a(x)

    return Case(OfGrad(), leaf.grad.copy_, lambda: leaf.grad)


def of_list() -> Case:
    kept: list[Tensor] = []

    class OfList(OfModule):
        def forward(self, x: Tensor) -> Tensor:
            y = self.a(x)
            kept.append(y)
            F.relu_(y)
            return self.a(x)

    return Case(OfList(), _nothing, lambda: kept[-1])


def of_dict() -> Case:
    kept: dict[str, Tensor] = {}

    class OfDict(OfModule):
        def forward(self, x: Tensor) -> Tensor:
            y = self.a(x)
            kept["y"] = y
            F.relu_(y)
            return self.a(x)

    return Case(OfDict(), _nothing, lambda: kept["y"])


def of_unpacked() -> Case:
    kept: list[Tensor] = []

    class OfUnpacked(OfModule):
        def forward(self, x: Tensor) -> Tensor:
            both = [x, kept]
            mine, other = both
            y = self.a(mine)
            other.append(y)
            F.relu_(y)
            return self.a(x)

    return Case(OfUnpacked(), _nothing, lambda: kept[-1])


class OfAttribute(OfModule):
    """A list that the module has, by another name."""

    def __init__(self) -> None:
        super().__init__()
        self.lists: list[list[Tensor]] = [[]]

    def forward(self, x: Tensor) -> Tensor:
        both = self.lists
        kept = both[0] if self.training else []
        y = self.a(x)
        kept.append(y)
        F.relu_(y)
        return self.a(x)


def of_attribute() -> Case:
    model = OfAttribute()
    return Case(model, _nothing, lambda: model.lists[0][-1])


def added() -> Case:
    class Added(OfAttribute):
        def forward(self, x: Tensor) -> Tensor:
            kept = self.lists[0]
            y = self.a(x)
            kept += [y]
            F.relu_(y)
            return self.a(x)

    model = Added()
    return Case(model, _nothing, lambda: model.lists[0][-1])


def given() -> Case:
    """A list of the caller's."""
    kept: list[Tensor] = []

    class Inner(OfModule):
        def forward(self, x: Tensor, skips: list[Tensor]) -> Tensor:
            y = self.a(x)
            skips.append(y)
            F.relu_(y)
            return self.a(x)

    class Given(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Inner()

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x, kept)

    return Case(Given(), _nothing, lambda: kept[-1])


def of_its_own() -> Case:
    """A list that is made in the call: whoever reads it reads it from the output."""

    class OfItsOwn(OfModule):
        def forward(self, x: Tensor) -> Tensor:
            skips = [x]
            skips.append(self.a(x))
            shortcut = x
            shortcut += self.a(x)
            y = torch.zeros(8, 4)
            y[:4] = shortcut
            F.relu_(skips[1])
            F.relu_(y)
            return torch.cat([*skips, y])

    return Case(OfItsOwn(), _nothing, lambda: torch.zeros(1))


CASES = [
    *(of_module, of_closure, returned, of_object, of_numpy, of_grad),
    *(of_list, of_dict, of_unpacked, of_attribute, added, given, of_its_own),
]


def run(case: Case, passes: int, grad: bool) -> list[tuple[Any, Any]]:
    generator = torch.Generator().manual_seed(1)
    case.keep(torch.randn(4, 4, generator=generator))
    found = []
    for _ in range(passes):
        with torch.set_grad_enabled(grad):
            out = case.model(torch.randn(4, 4, generator=generator))
        found.append((out.detach().clone(), case.kept().detach().clone()))
        case.keep(case.kept().detach() - 0.5)  # so that σ has something to change in each pass
    return found


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("make", CASES)
def test_state_is_what_it_would_have_been(make: Callable[[], Case], grad: bool) -> None:
    torch.manual_seed(0)
    bare = run(make(), 4, grad)
    torch.manual_seed(0)
    case = make()
    with capture(case.model) as maps:
        seen = run(case, 4, grad)
    # Of an argument that grows, a later pass has to be seen before it is traced in each.
    assert strayed(maps) <= (make is given)
    for (out, kept), (out_seen, kept_seen) in zip(bare, seen, strict=True):
        assert torch.equal(out, out_seen)
        assert torch.equal(kept, kept_seen)


def test_what_is_held_of_it() -> None:
    """z is a copy, since σ overwrites it; a is the state itself."""
    case = of_closure()
    before = torch.randn(4, 4)
    x = torch.randn(4, 4)
    with torch.no_grad(), capture(case.model) as maps:
        for _ in range(3):
            case.keep(before)
            case.model(x)
            (z,) = maps.select(kind="preactivation", nonlinearity="tanh")
            (a,) = maps.select(kind="activation", nonlinearity="tanh")
            assert torch.equal(z.tensor, before + x)
            assert torch.equal(a.tensor, torch.tanh(before + x))
            assert a.tensor.data_ptr() == case.kept().data_ptr()


class OfItsClass(nn.Dropout):
    """Whether it works in place says its class."""

    inplace = False

    def __init__(self, p: float) -> None:
        super().__init__(p)
        del self.inplace


class InASlot(nn.Dropout):
    """The same lies in no dict."""

    __slots__ = ("inplace",)


def _of_class(module: Any, inplace: bool) -> None:
    type(module).inplace = inplace


def _of_object(module: Any, inplace: bool) -> None:
    module.inplace = inplace


def _of_numpy(module: Any, inplace: bool) -> None:
    module.inplace = np.bool_(inplace)


def _filled(module: Any, inplace: bool) -> None:
    module.inplace.fill_(inplace)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize(
    ("make", "switch"),
    [
        (lambda: OfItsClass(0.5), _of_class),
        (lambda: InASlot(0.5), _of_object),
        (lambda: nn.Dropout(0.5, np.bool_(False)), _of_numpy),
        (lambda: nn.Dropout(0.5, torch.tensor(False)), _filled),
    ],
    ids=["class", "slot", "numpy", "tensor"],
)
def test_torchs_own_code_decides_by_what_is_no_plain_attribute(
    make: Callable[[], nn.Module], switch: Callable[[Any, bool], None], mode: Any
) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), make(), nn.Linear(4, 4))
    try:
        with mode(), capture(model) as maps:
            for n in range(8):
                switch(model[2], n > 3)
                x = torch.randn(2, 4)
                model(x)
                a = torch.tanh(nn.functional.linear(x, model[0].weight, model[0].bias))
                assert torch.equal(maps["0", "activation"].tensor, a)
    finally:
        switch(model[2], False)


def _storage(h: Tensor) -> Callable[[], Tensor]:
    memory = h.untyped_storage()
    return lambda: torch.empty(0).set_(memory, 0, h.shape)


def _dlpack(h: Tensor) -> Callable[[], Tensor]:
    other = torch.from_dlpack(h)
    return lambda: other


def _capsule(h: Tensor) -> Callable[[], Tensor]:
    other = torch.utils.dlpack.from_dlpack(torch.utils.dlpack.to_dlpack(h))
    return lambda: other


def _array(h: Tensor) -> Callable[[], Tensor]:
    other = np.from_dlpack(h)  # type: ignore[arg-type]
    return lambda: torch.as_tensor(other)


SHARED = [_storage, _dlpack, _capsule, _array]


class Shares(nn.Module):
    """Keeps the memory of a tensor that is overwritten, and returns what lies there then."""

    def __init__(self, share: Callable[[Tensor], Callable[[], Tensor]], function: bool) -> None:
        super().__init__()
        self.fc, self.act = nn.Linear(4, 4), nn.ReLU(inplace=True)
        self.share, self.function = share, function

    def forward(self, x: Tensor) -> Tensor:
        h = self.fc(x).detach()
        there = self.share(h)
        if self.function:
            torch.relu_(h)
        else:
            self.act(h)
        return there().clone()


@pytest.mark.parametrize("mode", [torch.no_grad, torch.enable_grad, torch.inference_mode])
@pytest.mark.parametrize("function", [False, True])
@pytest.mark.parametrize("share", SHARED)
def test_memory_that_was_handed_out(share: Any, function: bool, mode: Any) -> None:
    model = Shares(share, function)
    with mode(), capture(model) as maps:
        for _ in range(6):
            x = torch.randn(2, 4)
            z = F.linear(x, model.fc.weight, model.fc.bias)
            assert torch.equal(model(x), z.relu())
            assert torch.equal(maps["fc", "preactivation"].tensor, z)
            assert torch.equal(maps["fc", "activation"].tensor, z.relu())


class Written(nn.Module):
    """Writes to a tensor before its in-place σ, and tells how often that was written to."""

    def __init__(self, writes: int, function: bool) -> None:
        super().__init__()
        self.fc, self.act = nn.Linear(4, 4), nn.ReLU(inplace=True)
        self.writes, self.function = writes, function

    def forward(self, x: Tensor) -> tuple[Tensor, int, int, int]:
        h = self.fc(x)
        for _ in range(self.writes):
            h += 1
        before = h._version
        for n in range(2):
            if self.function:
                F.relu(h, inplace=True)
            else:
                self.act(h)
            if not n:
                h -= 0.5
        view = h[:1]
        view *= 2
        return h.clone(), before, h._version, view._version


@pytest.mark.parametrize("kinds", [None, ("response", "preactivation", "activation")])
@pytest.mark.parametrize("function", [False, True])
@pytest.mark.parametrize("writes", [0, 1, 3, 20])
def test_writes_are_counted_as_in_the_bare_model(writes: int, function: bool, kinds: Any) -> None:
    model = Written(writes, function)
    bare = copy.deepcopy(model)
    asked = {} if kinds is None else {"kinds": kinds}
    with torch.no_grad(), capture(model, **asked) as maps:
        for _ in range(6):
            x = torch.randn(2, 4)
            given, *counted = model(x)
            true, *expected = bare(x)
            assert torch.equal(given, true)
            assert counted == expected
            z = F.linear(x, model.fc.weight, model.fc.bias)
            for fm in maps.select(kind="response"):
                assert torch.equal(fm.tensor, z)
            for _ in range(writes):
                z = z + 1
            for n, pair in enumerate((z, z.relu() - 0.5)):
                assert torch.equal(maps.select(kind="preactivation")[n].tensor, pair)


@pytest.mark.parametrize("function", [False, True])
def test_a_gradient_of_an_input_stays(function: bool) -> None:
    """An in-place σ on what the model is given, which was a leaf before."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.act, self.fc = nn.ReLU(inplace=True), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.fc(F.relu(x, inplace=True) if function else self.act(x))
            return y

    model = Net()
    with torch.no_grad(), capture(model):
        for _ in range(6):
            x = torch.randn(2, 4)
            x.grad = grad = torch.ones(2, 4)
            x.kept, name = "kept", weakref.ref(x)  # type: ignore[attr-defined]
            expected = F.linear(x.relu(), model.fc.weight, model.fc.bias)
            assert torch.equal(model(x), expected)
            assert x.grad is grad
            assert name() is x
            assert x.kept == "kept"  # type: ignore[attr-defined]


@pytest.mark.parametrize("share", SHARED)
def test_memory_of_an_input_that_was_handed_out(share: Any) -> None:
    model = nn.Sequential(nn.ReLU(inplace=True), nn.Linear(4, 4))
    x = torch.zeros(2, 4)
    there = share(x)
    with torch.no_grad(), capture(model):
        for _ in range(6):
            new = torch.randn(2, 4)
            there().copy_(new)
            y = model(x)
            assert torch.equal(y, F.linear(new.relu(), model[1].weight, model[1].bias))
            assert torch.equal(there(), new.relu())


class Axis(enum.IntEnum):
    """Where to flatten from."""

    PIXELS, ALL = 2, 1


@pytest.mark.parametrize(
    ("module", "before", "after", "first", "shape"),
    [
        (nn.AdaptiveAvgPool2d(1), {"output_size": 1}, {"output_size": 2}, "conv", (2, 4, 8, 8)),
        (nn.Conv2d(4, 4, 1, 8), {"stride": (8, 8)}, {"stride": (4, 4)}, "conv", (2, 4, 8, 8)),
        (
            nn.Unflatten(1, (16, 1)),
            {"unflattened_size": [16, 1]},
            {"unflattened_size": [1, 16]},
            *F4,
        ),
        (
            nn.Flatten(2),
            {"start_dim": np.int64(2)},
            {"start_dim": np.int64(1)},
            "conv",
            (2, 4, 3, 3),
        ),
        (nn.Flatten(2), {"start_dim": Axis.PIXELS}, {"start_dim": Axis.ALL}, "conv", (2, 4, 3, 3)),
    ],
    ids=["pool", "stride", "list", "numpy", "member"],
)
def test_a_setting_says_where_the_filters_are(
    module: Any, before: dict[str, Any], after: dict[str, Any], first: str, shape: Any
) -> None:
    """The axis is that of a new block's, or there is none."""
    layer = nn.Conv2d(4, 4, 1) if first == "conv" else nn.Linear(4, 16)
    flat = [nn.Flatten()] if isinstance(module, (nn.AdaptiveAvgPool2d, nn.Conv2d)) else []
    model = nn.Sequential(layer, module, *flat, nn.ReLU())
    with torch.no_grad(), capture(model) as maps:
        for n in range(8):
            for name, value in (before if n < 4 else after).items():
                setattr(module, name, value)
            model(torch.randn(shape))
        told = [fm.filter_dim for fm in maps.select(kind="activation")]
    with torch.no_grad(), capture(model, max_bytes=10**9) as fresh:
        model(torch.randn(shape))
        want = [fm.filter_dim for fm in fresh.select(kind="activation")]
    assert told == want


GIVEN: list[Tensor] = []


class FromElsewhere(nn.Module):
    """Its input is a global."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 1)

    def forward(self) -> Tensor:
        return torch.relu(self.conv(GIVEN[0]).flatten(1))


def test_a_layer_has_no_more_filters_than_it_has() -> None:
    model = FromElsewhere()
    with torch.no_grad(), capture(model) as maps:
        for n in range(8):
            GIVEN[:] = [torch.randn(2, 4, *((1, 1) if n < 4 else (3, 3)))]
            model()
            (a,) = maps.select(kind="activation")
            assert a.filter_dim == (1 if n < 4 else None)


class Called(nn.Identity):
    """Its class gets a `__call__` later on."""


def test_a_class_gets_a_call_of_its_own() -> None:
    model = nn.Sequential(nn.Linear(4, 4), Called(), nn.Linear(4, 4))
    try:
        with torch.no_grad(), capture(model) as maps:
            for n in range(8):
                if n == 4:
                    Called.__call__ = lambda self, x: torch.relu(x)  # type: ignore[method-assign]
                x = torch.randn(2, 4)
                model(x)
                z = F.linear(x, model[0].weight, model[0].bias)
                assert torch.equal(maps["0", "preactivation"].tensor, z)
                if n >= 4:
                    assert torch.equal(maps["0", "activation"].tensor, z.relu())
    finally:
        del Called.__call__
