"""Code of the model's exchanges a module of another one, or its class, while the pass runs.

What is called then by torch's own code, or by a name that is compared before the pass, leaves no
mark. So it is looked at where it is put, by whatever syntax. In the fifth pass it is another one.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fmapkit import capture
from tests.test_paths import random
from tests.test_put_in_the_pass import CHANGED, MODES, PASSES, Box, giving

pytestmark = pytest.mark.filterwarnings("ignore::fmapkit.CaptureWarning")


class Exchanges(nn.Module):
    """Two layers, of which one becomes a child of another module."""

    def __init__(self, put: Callable[[Any], object]) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)
        self.child = self.a
        self.seq = nn.Sequential(nn.Identity(), self.a)
        self.rows, self.named = nn.ModuleList([self.a]), nn.ModuleDict({"x": self.a})
        self.empty = nn.Sequential()
        self.act, self.box, self.put = nn.ReLU(), Box(layer=self.a), put

    def forward(self, x: Tensor) -> Tensor:
        self.put(self)
        return F.relu(self.run(x))

    def run(self, x: Tensor) -> Tensor:
        return self.seq(x)


class Direct(Exchanges):
    def run(self, x: Tensor) -> Tensor:
        return self.child(x)


class Listed(Exchanges):
    def run(self, x: Tensor) -> Tensor:
        for layer in self.rows:
            x = layer(x)
        return x


class Grows(Exchanges):
    """An empty row is filled, and emptied again."""

    def run(self, x: Tensor) -> Tensor:
        y = self.empty(x)
        while len(self.empty):
            del self.empty[0]
        return y


def element(m: Any) -> None:
    m.seq[1] = m.box.layer


def last_element(m: Any) -> None:
    m.seq[-1] = m.box.layer


def element_by_names(m: Any) -> None:
    row, layer = m.seq, m.box.layer
    row[1] = layer


def element_by_a_name(m: Any) -> None:
    row = m.seq
    row[1] = m.box.layer


def element_of_a_method(m: Any) -> None:
    row = m.seq
    row[1] = m.box.get("layer")


def element_by_a_number(m: Any) -> None:
    m.seq[m.box.one] = m.box.layer


def chosen(m: Any) -> None:
    m.seq[1] = m.b if m.box.other else m.a


def deleted_and_put(m: Any) -> None:
    del m.seq[1]
    m.seq.append(m.box.layer)


def sliced(m: Any) -> None:
    del m.seq[1:]
    m.seq.extend([m.box.layer])


def extended_by_a_generator(m: Any) -> None:
    del m.seq[1:]
    m.seq.extend(layer for layer in m.box.layers)


def extended_by_a_list(m: Any) -> None:
    del m.seq[1:]
    m.seq.extend(m.box.layers)


def inserted(m: Any) -> None:
    m.seq.pop(1)
    m.seq.insert(1, m.box.layer)


def unpacked(m: Any) -> None:
    m.seq[1], m.box.x = m.box.layer, 1


def unpacked_of_a_dict(m: Any) -> None:
    m.seq[1], m.box.x = {"layer": m.box.layer, "x": 1}.values()


def in_a_loop(m: Any) -> None:
    for m.seq[1] in m.box.layers:  # noqa: B020
        pass


def in_a_comprehension(m: Any) -> None:
    [0 for m.seq[1] in m.box.layers]


def managed(m: Any) -> None:
    with giving(m.box.layer) as m.seq[1]:
        pass


def annotated(m: Any) -> None:
    m.seq[1]: nn.Module = m.box.layer


def of_a_name(m: Any) -> None:
    setattr(m.seq, "1", m.box.layer)


def added(m: Any) -> None:
    m.seq.add_module("1", m.box.layer)


def registered(m: Any) -> None:
    m.seq.register_module("1", m.box.layer)


def by_its_method(m: Any) -> None:
    m.seq.__setitem__(1, m.box.layer)


def by_an_operator(m: Any) -> None:
    operator.setitem(m.seq, 1, m.box.layer)


def in_its_dict(m: Any) -> None:
    m.seq._modules["1"] = m.box.layer


def in_its_dict_by_name(m: Any) -> None:
    modules, layer = m.seq._modules, m.box.layer
    modules["1"] = layer


def in_its_dict_by_a_name(m: Any) -> None:
    modules = m.seq._modules
    modules["1"] = m.box.layer


def updated(m: Any) -> None:
    m.seq._modules.update({"1": m.box.layer})


def updated_by_a_dict(m: Any) -> None:
    m.seq._modules.update(m.box.by_name)


def updated_in_place(m: Any) -> None:
    m.seq._modules |= m.box.by_name


def emptied_and_updated(m: Any) -> None:
    modules, own = m.seq._modules, {"0": m.seq[0], **m.box.by_name}
    modules.clear()
    modules.update(own.items())


def emptied_and_put(m: Any) -> None:
    modules = m.seq._modules
    modules.clear()
    modules["1"] = m.box.layer


def another_dict(m: Any) -> None:
    m.seq._modules = {"0": m.seq[0], **m.box.by_name}


def of_its_own_dict(m: Any) -> None:
    vars(m.seq)["_modules"] = {"0": m.seq[0], **m.box.by_name}


def mapped(m: Any) -> None:
    list(map(m.seq.__setitem__, [1], m.box.layers))


def a_row_of_its_own(m: Any) -> None:
    m.seq = nn.Sequential(m.box.layer)


def a_row_of_others(m: Any) -> None:
    m.seq = m.box.row


IN_A_ROW = [
    *(element, last_element, element_by_names, element_by_a_name, element_of_a_method),
    *(element_by_a_number, chosen, deleted_and_put, sliced, extended_by_a_generator),
    *(extended_by_a_list, inserted, unpacked, unpacked_of_a_dict, in_a_loop, in_a_comprehension),
    *(managed, annotated, of_a_name, added, registered, by_its_method, by_an_operator),
    *(in_its_dict, in_its_dict_by_name, in_its_dict_by_a_name, updated, updated_by_a_dict),
    *(
        updated_in_place,
        emptied_and_updated,
        emptied_and_put,
        another_dict,
        of_its_own_dict,
        mapped,
        a_row_of_its_own,
        a_row_of_others,
    ),
]


def attribute(m: Any) -> None:
    m.child = m.box.layer


def attribute_by_a_name(m: Any) -> None:
    layer = m.box.layer
    m.child = layer


def attribute_unpacked(m: Any) -> None:
    m.child, m.box.x = m.box.layer, 1


def attribute_in_a_loop(m: Any) -> None:
    for m.child in m.box.layers:  # noqa: B020
        pass


def attribute_managed(m: Any) -> None:
    with giving(m.box.layer) as m.child:
        pass


def attribute_annotated(m: Any) -> None:
    m.child: nn.Module = m.box.layer


def attribute_in_a_row(m: Any) -> None:
    m.box.latest = m.child = m.box.layer


def attribute_of_a_comprehension(m: Any) -> None:
    [0 for m.child in m.box.layers]


def attribute_by_setattr(m: Any) -> None:
    nn.Module.__setattr__(m, "child", m.box.layer)


DIRECT = [
    *(attribute, attribute_by_a_name, attribute_unpacked, attribute_in_a_loop),
    *(attribute_managed, attribute_annotated, attribute_in_a_row),
    *(attribute_of_a_comprehension, attribute_by_setattr),
]


def more(m: Any) -> None:
    m.empty += nn.Sequential(m.box.layer)


def more_of_a_row(m: Any) -> None:
    m.empty += m.box.row


def more_by_a_name(m: Any) -> None:
    empty, row = m.empty, m.box.row
    empty += row


def appended(m: Any) -> None:
    m.empty.append(m.box.layer)


def appended_by_a_name(m: Any) -> None:
    empty, layer = m.empty, m.box.layer
    empty.append(layer)


GROWING = [more, more_of_a_row, more_by_a_name, appended, appended_by_a_name]


def listed(m: Any) -> None:
    m.rows[0] = m.box.layer


def more_listed(m: Any) -> None:
    del m.rows[0]
    m.rows += [m.box.layer]


def more_of_a_list(m: Any) -> None:
    del m.rows[0]
    m.rows += m.box.layers


LISTED = [listed, more_listed, more_of_a_list]
WAYS = [
    *((Exchanges, way) for way in IN_A_ROW),
    *((Direct, way) for way in DIRECT),
    *((Grows, way) for way in GROWING),
    *((Listed, way) for way in LISTED),
]


class Boxed(Box):
    def get(self, name: str) -> Any:
        return getattr(self, name)


@torch.no_grad()
@pytest.mark.parametrize(("kind", "put"), WAYS, ids=lambda given: given.__name__)
def test_a_child(kind: Any, put: Any) -> None:
    """The map goes by the layer that ran."""
    model, lost = kind(put), 0
    rows = {"a": nn.Sequential(model.a), "b": nn.Sequential(model.b)}
    with capture(model) as maps:
        for n in range(PASSES):
            name = "b" if n == CHANGED else "a"
            layer = getattr(model, name)
            model.box = Boxed(
                layer=layer, layers=[layer], one=1, other=name == "b", by_name={"1": layer}
            )
            model.box.row = rows[name]
            x = random(2, 4, n=n)
            model(x)
            lost += not maps
            if maps:
                (z,) = maps.select(kind="preactivation")
                assert torch.equal(z.tensor, F.linear(x, layer.weight, layer.bias)), n
                assert z.layer == name, n
    assert lost <= 1


# -- classes --------------------------------------------------------------------------------------


class Becomes(nn.Module):
    """Its nonlinearity is of another class in the fifth pass."""

    def __init__(self, put: Callable[[Any], object]) -> None:
        super().__init__()
        self.fc, self.act, self.box, self.put = nn.Linear(4, 4), nn.ReLU(), Box(), put

    def forward(self, x: Tensor) -> Tensor:
        self.put(self)
        y: Tensor = self.act(self.fc(x))
        return y


def its_class(m: Any) -> None:
    m.act.__class__ = m.box.kind


def its_class_by_a_name(m: Any) -> None:
    act, kind = m.act, m.box.kind
    act.__class__ = kind


def its_class_unpacked(m: Any) -> None:
    m.act.__class__, m.box.x = m.box.kind, 1


def its_class_in_a_loop(m: Any) -> None:
    for m.act.__class__ in m.box.kinds:  # noqa: B020
        pass


def its_class_in_a_comprehension(m: Any) -> None:
    [0 for m.act.__class__ in m.box.kinds]


def its_class_managed(m: Any) -> None:
    with giving(m.box.kind) as m.act.__class__:
        pass


def its_class_annotated(m: Any) -> None:
    m.act.__class__: type = m.box.kind


def its_class_by_setattr(m: Any) -> None:
    setattr(m.act, "__class__", m.box.kind)  # noqa: B010


def its_class_by_object(m: Any) -> None:
    object.__setattr__(m.act, "__class__", m.box.kind)


CLASSES = [
    *(its_class, its_class_by_a_name, its_class_unpacked, its_class_in_a_loop),
    *(its_class_in_a_comprehension, its_class_managed, its_class_annotated),
    *(its_class_by_setattr, its_class_by_object),
]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("put", CLASSES)
def test_a_class(put: Any, mode: Any) -> None:
    model, lost = Becomes(put), 0
    with mode(), capture(model) as maps:
        for n in range(PASSES):
            model.box.kind = nn.SiLU if n == CHANGED else nn.ReLU
            model.box.kinds = [model.box.kind]
            x = random(2, 4, n=n)
            if isinstance(model.act, nn.SiLU):
                model.act.inplace = False
            model(x)
            lost += not maps
            if maps:
                z = F.linear(x, model.fc.weight, model.fc.bias)
                a = maps["fc"]
                assert a.nonlinearity == ("silu" if n == CHANGED else "relu"), n
                assert torch.equal(a.tensor, F.silu(z) if n == CHANGED else F.relu(z))
    assert lost <= 1


class Runs(nn.ReLU):
    """Its class gets another forward in the fifth pass."""


def of_the_class(m: Any) -> None:
    Runs.forward = m.box.forward  # type: ignore[method-assign]


def of_the_class_unpacked(m: Any) -> None:
    Runs.forward, m.box.x = m.box.forward, 1  # type: ignore[method-assign]


@torch.no_grad()
@pytest.mark.parametrize("put", [of_the_class, of_the_class_unpacked])
def test_a_forward_of_a_class(put: Any) -> None:
    model, lost = Becomes(put), 0
    model.act = Runs()
    try:
        with capture(model) as maps:
            for n in range(PASSES):
                kind: Any = nn.SiLU if n == CHANGED else nn.ReLU
                model.box.forward = kind.forward
                model(random(2, 4, n=n))
                lost += not maps
                if maps:
                    assert maps["fc"].nonlinearity == ("silu" if n == CHANGED else "relu"), n
        assert lost <= 1
    finally:
        del Runs.forward
