"""Code of the model's puts into modules of torch's what those decide by, while the pass runs.

Nothing announces it before the call, and torch's own code leaves no mark: so it is looked at where
it is put, by whatever syntax. In the fifth pass it is something else.
"""

from __future__ import annotations

import contextlib
import traceback
import types
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fmapkit import capture
from fmapkit.paths.rewriting import make_twins
from fmapkit.paths.sinks import start, stop
from tests.test_paths import Turn, hold, random

pytestmark = pytest.mark.filterwarnings("ignore::fmapkit.CaptureWarning")
MODES = [torch.no_grad, torch.inference_mode]
CHANGED, PASSES = 4, 7


class Box:
    """A plain object, which nobody compares."""

    def __init__(self, **values: Any) -> None:
        self.__dict__.update(values)


@contextlib.contextmanager
def giving(value: Any) -> Iterator[Any]:
    yield value


# -- settings: where a Flatten begins and ends ----------------------------------------------------


class Flattens(nn.Module):
    """Where the axes lie by which it flattens is put into a module of torch's in each pass."""

    def __init__(self, put: Callable[[Any], object]) -> None:
        super().__init__()
        self.fc, self.flat, self.act = nn.Linear(4, 4), nn.Flatten(1, 2), nn.ReLU()
        self.box, self.put = Box(axes=(1, 2)), put

    def forward(self, x: Tensor) -> Tensor:
        self.put(self)
        y: Tensor = self.act(self.flat(self.fc(x)))
        return y


class Self(nn.Flatten):
    """The same, where the module itself is of a class of torch's."""

    def __init__(self) -> None:
        super().__init__(1, 2)
        self.fc, self.box, self.act = nn.Linear(4, 4), Box(axes=(1, 2)), nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        self.start_dim, self.end_dim = self.box.axes
        y: Tensor = self.act(super().forward(self.fc(x)))
        return y


def one_by_one(m: Any) -> None:
    m.flat.start_dim = m.box.axes[0]
    m.flat.end_dim = m.box.axes[1]


def in_a_row(m: Any) -> None:
    m.flat.start_dim = m.box.first = m.box.axes[0]
    m.flat.end_dim = m.box.axes[1]


def by_a_name(m: Any) -> None:
    flat = m.flat
    flat.start_dim, flat.end_dim = m.box.axes


def unpacked(m: Any) -> None:
    m.flat.start_dim, m.flat.end_dim = m.box.axes


def of_a_display(m: Any) -> None:
    m.flat.start_dim, m.box.x, m.flat.end_dim = m.box.axes[0], None, m.box.axes[1]


def of_a_dict(m: Any) -> None:
    m.flat.start_dim, m.flat.end_dim = dict(zip("ab", m.box.axes, strict=True)).values()


def of_an_array(m: Any) -> None:
    m.flat.start_dim, m.flat.end_dim = m.box.array[:2]


def of_the_lists_ends(m: Any) -> None:
    [m.flat.start_dim, *m.box.rest, m.flat.end_dim] = [m.box.axes[0], 7, 8, m.box.axes[1]]


def starred(m: Any) -> None:
    _, *m.shape.unflattened_size = (0, 4, 3) if m.box.axes[0] == 1 else (0, 3, 4)
    m.flat.start_dim, m.flat.end_dim = m.box.axes


def nested(m: Any) -> None:
    (m.flat.start_dim, (m.flat.end_dim,)), m.box.x = (m.box.axes[0], m.box.axes[1:]), 3


def unpacked_twice(m: Any) -> None:
    m.box.both = m.flat.start_dim, m.flat.end_dim = m.box.axes


def in_a_loop(m: Any) -> None:
    for m.flat.start_dim, m.flat.end_dim in m.box.rows:  # noqa: B020
        pass


def in_a_loop_by_numbers(m: Any) -> None:
    for m.flat.start_dim in m.box.axes[:1]:  # noqa: B020
        for m.flat.end_dim in m.box.axes[1:]:  # noqa: B020
            pass


def annotated(m: Any) -> None:
    m.flat.start_dim: int = m.box.axes[0]
    m.flat.end_dim: int = m.box.axes[1]


def list_comprehension(m: Any) -> None:
    [0 for m.flat.start_dim, m.flat.end_dim in m.box.rows]


def set_comprehension(m: Any) -> None:
    {0 for m.flat.start_dim, m.flat.end_dim in m.box.rows}


def dict_comprehension(m: Any) -> None:
    {0: 0 for m.flat.start_dim, m.flat.end_dim in m.box.rows}  # noqa: B035


def generator(m: Any) -> None:
    list(0 for m.flat.start_dim, m.flat.end_dim in m.box.rows)  # noqa: C400


def managed(m: Any) -> None:
    with giving(m.box.axes) as (m.flat.start_dim, m.flat.end_dim):
        pass


def managed_one_by_one(m: Any) -> None:
    with giving(m.box.axes[0]) as m.flat.start_dim, giving(m.box.axes[1]) as m.flat.end_dim:
        pass


def added(m: Any) -> None:
    m.flat.start_dim, m.flat.end_dim = 0, 0
    m.flat.start_dim += m.box.axes[0]
    m.flat.end_dim += m.box.axes[1]


def by_setattr(m: Any) -> None:
    setattr(m.flat, "start_dim", m.box.axes[0])  # noqa: B010
    object.__setattr__(m.flat, "end_dim", m.box.axes[1])


def by_a_lambda(m: Any) -> None:
    (lambda flat: [0 for flat.start_dim, flat.end_dim in [m.box.axes]])(m.flat)


def in_a_class(m: Any) -> None:
    class Sets:
        m.flat.start_dim, m.flat.end_dim = m.box.axes


def in_its_dict(m: Any) -> None:
    vars(m.flat)["start_dim"] = m.box.axes[0]
    m.flat.__dict__["end_dim"] = m.box.axes[1]


def in_its_dict_by_a_name(m: Any) -> None:
    own, (first, last) = vars(m.flat), m.box.axes
    own["start_dim"] = first
    own["end_dim"] = last


def in_its_dict_by_names(m: Any) -> None:
    for name, value in zip(("start_dim", "end_dim"), m.box.axes, strict=True):
        vars(m.flat)[name] = value


def in_its_dict_unpacked(m: Any) -> None:
    own = m.flat.__dict__
    own["start_dim"], own["end_dim"] = m.box.array[:2]


def updated(m: Any) -> None:
    m.flat.__dict__.update(m.box.by_name)


def updated_by_a_name(m: Any) -> None:
    own, new = vars(m.flat), {"start_dim": m.box.axes[0]}
    own.update(new, end_dim=m.box.axes[1])


def updated_in_place(m: Any) -> None:
    m.flat.__dict__ |= m.box.by_name


SETTINGS = [
    *(one_by_one, in_a_row, by_a_name, unpacked, of_a_display, of_a_dict, of_an_array),
    *(of_the_lists_ends, nested, unpacked_twice, in_a_loop, in_a_loop_by_numbers),
    *(annotated, list_comprehension, set_comprehension, dict_comprehension, generator, managed),
    *(managed_one_by_one, added, by_setattr, by_a_lambda, in_a_class),
    *(in_its_dict, in_its_dict_by_a_name, in_its_dict_by_names, in_its_dict_unpacked),
    *(updated, updated_by_a_name, updated_in_place),
]


def _axes(n: int) -> Callable[[Any], None]:
    axes = (2, 3) if n == CHANGED else (1, 2)

    def change(model: Any) -> None:
        model.box.axes, model.box.rows, model.box.array = axes, [axes], np.array([*axes, 9])
        model.box.by_name = dict(zip(("start_dim", "end_dim"), axes, strict=True))

    return change


@torch.no_grad()
@pytest.mark.parametrize("put", SETTINGS)
def test_an_axis(put: Any) -> None:
    """In the fifth pass, positions and filters are in one axis: the map is no layer's."""
    passes = [Turn((random(2, 3, 2, 4, n=n),), _axes(n)) for n in range(PASSES)]
    seen = hold(Flattens(put), passes, most=1)
    assert not seen.labels[CHANGED] or seen.labels[CHANGED][0][0] == "act"
    assert all(each[0][0] == "fc" for n, each in enumerate(seen.labels) if n != CHANGED)


@torch.no_grad()
def test_an_axis_of_the_module_itself() -> None:
    passes = [Turn((random(2, 3, 2, 4, n=n),), _axes(n)) for n in range(PASSES)]
    hold(Self(), passes, most=1)


class Drops(nn.Module):
    """With p = 0, dropout gives its input itself, to which the sum is then written."""

    def __init__(self, put: Callable[[Any], object]) -> None:
        super().__init__()
        self.fc, self.drop, self.box, self.put = nn.Linear(4, 4), nn.Dropout(0.5), Box(), put

    def forward(self, x: Tensor) -> Tensor:
        self.put(self)
        h = self.drop(self.fc(x))
        r = F.relu(h)
        h += 1
        return r + h


def _p_of_values(m: Any) -> None:
    m.drop.p, m.box.k = {"p": m.box.p, "k": 1}.values()


def _p_of_an_array(m: Any) -> None:
    m.drop.p, m.box.k = np.array([m.box.p, 1.0])


def _p_of_a_loop(m: Any) -> None:
    for m.drop.p in [0.3, m.box.p]:  # noqa: B020
        pass


def _p_annotated(m: Any) -> None:
    m.drop.p: float = m.box.p


def _in_place(m: Any) -> None:
    m.drop.p, m.drop.inplace = 1e-9, m.box.p == 0


def _mode(m: Any) -> None:
    for m.drop.training in [m.box.p > 0]:  # noqa: B020
        pass


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    "put", [_p_of_values, _p_of_an_array, _p_of_a_loop, _p_annotated, _in_place, _mode]
)
def test_a_result_becomes_the_map_itself(put: Any, mode: Any) -> None:
    model, lost = Drops(put), 0
    with mode(), capture(model, kinds=("response", "activation")) as maps:
        for n in range(PASSES):
            model.box.p = 0.0 if n == CHANGED else 0.5
            x = random(2, 4, n=n)
            model(x)
            lost += not maps
            if maps:
                z = F.linear(x, model.fc.weight, model.fc.bias)
                assert torch.equal(maps["fc", "response"].tensor, z), n
    assert lost <= 1


# -- what a twin does to the code -----------------------------------------------------------------


class Slotted(nn.Module):
    """Some of its attributes cannot be set."""

    @property
    def p(self) -> float:
        return 0.5


def _in_order(m: Any, log: list[str]) -> None:
    def at(name: str) -> Any:
        log.append(name)
        return m

    def value() -> tuple[int, int]:
        log.append("value")
        return 1, 2

    at("a").p, at("b").dim = at("c").size = value()
    for at("d").p in value():
        log.append("turn")


def _unpacks_too_few(m: Any, log: list[str]) -> None:
    m.dim, m.p = (1,)


def _unpacks_too_many(m: Any, log: list[str]) -> None:
    m.dim, m.p = iter(range(1000))


def _sets_none(m: Any, log: list[str]) -> None:
    slotted = Slotted()
    m.dim, slotted.p = (1, 2)


def _of_nothing(m: Any, log: list[str]) -> None:
    nothing = None
    nothing.p = log.append("value")  # type: ignore[attr-defined]


def _of_no_name(m: Any, log: list[str]) -> None:
    if log:
        unbound = m
    unbound.p = log.append("value")


def _deleted(m: Any, log: list[str]) -> None:
    m.p, m.dim = 1, 2
    del m.p, m.dim
    log.append(str(sorted(vars(m))))


def _looks_at_locals(m: Any, log: list[str]) -> None:
    m.p, m.dim = 1, 2
    log.append(str(sorted(locals())))


def _generates(m: Any, log: list[str]) -> None:
    def rows() -> Iterator[tuple[int, int]]:
        for m.p, m.dim in [(1, 2), (3, 4)]:
            yield m.p, m.dim

    log.append(str(list(rows())))


def _elements_in_order(m: Any, log: list[str]) -> None:
    row: Any = nn.ModuleDict()

    def at(name: str) -> Any:
        log.append(name)
        return row if name == "row" else name

    def child(name: str) -> nn.Module:
        log.append(name)
        return nn.Identity()

    at("row")[at("a")] = child("value")
    at("row")[at("b")], at("row")[at("c")] = child("value"), child("value")
    for at("row")[at("d")] in [child("value")]:
        log.append("turn")
    row["e"] = nn.Tanh() if log else child("never")
    del at("row")[at("a")]
    row.update({"f": child("value")})
    m.kept, m.empty = row, nn.Sequential()
    m.empty.extend(child("value") for _ in range(2))
    m.empty += [child("value")] if not log else nn.Sequential(child("value"))
    log += [f"{name} {type(child).__name__}" for name, child in row.items()]
    log += [f"{len(m.empty)}"]


def _no_such_element(m: Any, log: list[str]) -> None:
    m.row = nn.Sequential(nn.Identity())
    m.row[3], m.x = nn.Identity(), 2


def _no_module(m: Any, log: list[str]) -> None:
    row = nn.ModuleList([nn.Identity()])
    row[0], m.x = 3, 2


def _no_elements(m: Any, log: list[str]) -> None:
    number: Any = 3
    number[log.append("index")] = log.append("value")


def _extends_by_none(m: Any, log: list[str]) -> None:
    nn.Sequential().extend(None)  # type: ignore[arg-type]


def _tensors(m: Any, log: list[str]) -> None:
    h, rows, by_name = torch.zeros(2, 3), [0, 1], {"size": 0}
    i, y = 1, torch.ones(3)
    h[0], h[:, i], rows[i], by_name["size"], by_name["y"] = y * 2, 3.0, y, 4, len(rows)
    h[i] = torch.add(y, 1)
    rows[0] = y.sum()
    by_name["size"] = rows[0]
    h += y
    rows += [y]
    log += [str(h.tolist()), str(rows), str(by_name)]


ODD = [
    *(_in_order, _unpacks_too_few, _unpacks_too_many, _sets_none, _of_nothing, _of_no_name),
    *(_deleted, _looks_at_locals, _generates, _elements_in_order, _no_such_element, _no_module),
    *(_no_elements, _extends_by_none, _tensors),
]


def _outcome(function: Any) -> Any:
    """What code logs, what it sets, and what it raises, with the lines of its own in that."""
    module, log, raised = nn.Module(), list[str](), None
    try:
        function(module, log)
    except Exception as error:
        lines = [
            f.lineno for f in traceback.extract_tb(error.__traceback__) if f.filename == __file__
        ]
        raised = type(error), str(error), lines[1:]
    told = {k: v for k, v in vars(module).items() if not k.startswith("_")}
    told |= {k: str(v) for k, v in module.named_children()}
    return log, told, raised


@pytest.mark.parametrize("function", ODD)
def test_code_does_what_it_would_do(function: Any) -> None:
    """Whether it is recorded or not makes no difference to the code itself."""
    bare = _outcome(function)
    code = function.__code__
    twin = make_twins(code, globals(), frozenset(), frozenset())[code]
    assert _outcome(types.FunctionType(twin.code, globals())) == bare
    sink = start(lambda tensor: None, (), lambda kind: None)
    try:
        assert _outcome(types.FunctionType(twin.code, globals())) == bare
        assert sink.items
    finally:
        stop()
