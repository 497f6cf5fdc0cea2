"""A tensor is indexed by a tensor from elsewhere, whose form says whether that makes a view.

By one without axes it is a view of the map, as by a number, and what is written to it is written to
the map. By one with axes, or by a mask, it is a copy. In the fifth pass it is the other one.
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Callable
from operator import getitem
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fmapkit import capture
from tests.test_paths import random
from tests.test_put_in_the_pass import CHANGED, MODES, PASSES, Box

pytestmark = pytest.mark.filterwarnings("ignore::fmapkit.CaptureWarning")


class Writes(nn.Module):
    """Adds to what it takes of a map."""

    def __init__(self, take: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        self.fc, self.box, self.take = nn.Linear(4, 4), Box(), take

    def forward(self, x: Tensor) -> Tensor:
        h = self.fc(x)
        y = self.take(self, h)
        y += 1
        return F.relu(h)


def attribute(m: Any, h: Tensor) -> Tensor:
    return h[:, m.box.at]


def first_axis(m: Any, h: Tensor) -> Tensor:
    return h[m.box.at]


def name(m: Any, h: Tensor) -> Tensor:
    at = m.box.at
    return h[:, at]


def parameter_of_a_function(m: Any, h: Tensor) -> Tensor:
    return _taken(h, m.box.at)


def _taken(h: Tensor, at: Any) -> Tensor:
    return h[:, at]


def whole_index(m: Any, h: Tensor) -> Tensor:
    return h[m.box.both]


def whole_index_by_name(m: Any, h: Tensor) -> Tensor:
    both = m.box.both
    return h[both]


def starred(m: Any, h: Tensor) -> Tensor:
    return h[(*m.box.both,)]


def element(m: Any, h: Tensor) -> Tensor:
    return h[:, m.box.row[0]]


def called(m: Any, h: Tensor) -> Tensor:
    return h[:, m.box.row.copy().pop()]


def of_an_attribute(m: Any, h: Tensor) -> Tensor:
    m.box.h = h
    return m.box.h[:, m.box.at]


def of_what_is_called(m: Any, h: Tensor) -> Tensor:
    return h.view_as(h)[:, m.box.at]


def method(m: Any, h: Tensor) -> Tensor:
    return h.__getitem__((slice(None), m.box.at))


def function(m: Any, h: Tensor) -> Tensor:
    return operator.getitem(h, (slice(None), m.box.at))


def function_by_a_name(m: Any, h: Tensor) -> Tensor:
    return getitem(h, m.box.both)


def getter(m: Any, h: Tensor) -> Tensor:
    return operator.itemgetter((slice(None), m.box.at))(h)


def chosen(m: Any, h: Tensor) -> Tensor:
    return h[:, m.box.at if m.training else 0]


def computed(m: Any, h: Tensor) -> Tensor:
    at = m.box.at.clone()
    return h[:, at]


def unpacked(m: Any, h: Tensor) -> Tensor:
    (at,) = m.box.row
    return h[:, at]


def in_a_comprehension(m: Any, h: Tensor) -> Tensor:
    return [h[:, at] for at in m.box.row][-1]


def by_a_lambda(m: Any, h: Tensor) -> Tensor:
    return (lambda at: h[:, at])(m.box.at)


def mapped(m: Any, h: Tensor) -> Tensor:
    return list(map(h.t().__getitem__, m.box.row))[-1]


def starmapped(m: Any, h: Tensor) -> Tensor:
    return list(itertools.starmap(operator.getitem, [(h.t(), m.box.at)]))[-1]


def method_by_a_name(m: Any, h: Tensor) -> Tensor:
    take = h.t().__getitem__
    return take(m.box.at)


def function_of_an_object(m: Any, h: Tensor) -> Tensor:
    take = [getitem][-1]
    return take(h.t(), m.box.at)


def getter_of_an_object(m: Any, h: Tensor) -> Tensor:
    return m.box.getter(h.t())


TAKE = [
    *(attribute, first_axis, name, parameter_of_a_function, whole_index, whole_index_by_name),
    *(starred, element, called, of_an_attribute, of_what_is_called, method, function),
    *(function_by_a_name, getter, chosen, computed, unpacked, in_a_comprehension, by_a_lambda),
    *(mapped, starmapped, method_by_a_name, function_of_an_object, getter_of_an_object),
]
ONE, ROW = torch.tensor(1), torch.tensor([1])
TRUTH = torch.tensor(True)
FORMS = {
    "axis": (ROW, ONE),
    "no axis": (ONE, ROW),
    "mask": (TRUTH, ONE),
    "bytes": (ONE, torch.tensor(1, dtype=torch.uint8)),
    "parameter": (nn.Parameter(ROW, False), nn.Parameter(ONE, False)),
}


def _set(model: Any, at: Any) -> None:
    model.box.at, model.box.both, model.box.row = at, (slice(None), at), [at]
    model.box.getter = operator.itemgetter(at)


def _compare(model: Writes, indices: list[Any], mode: Any) -> None:
    lost = 0
    with mode(), capture(model, kinds=("response", "activation")) as maps:
        for n, at in enumerate(indices):
            _set(model, at)
            x = random(2, 4, n=n)
            model(x)
            lost += not maps
            if maps:
                z = F.linear(x, model.fc.weight, model.fc.bias)
                assert torch.equal(maps["fc", "response"].tensor, z), n
                model.take(model, z).add_(1)
                assert torch.equal(maps["fc"].tensor, z.relu()), n
    assert lost <= 1


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("take", TAKE)
def test_a_view_or_a_copy(take: Any, form: str, mode: Any) -> None:
    usual, other = FORMS[form]
    _compare(Writes(take), [other if n == CHANGED else usual for n in range(PASSES)], mode)


@pytest.mark.parametrize("take", [attribute, name, whole_index, method])
def test_arrays(take: Any) -> None:
    usual, other = np.array([1]), np.array(1)
    indices = [other if n == CHANGED else usual for n in range(PASSES)]
    _compare(Writes(take), indices, torch.inference_mode)


@torch.no_grad()
@pytest.mark.parametrize("take", TAKE)
def test_no_pass_is_lost_where_the_form_stays(take: Any) -> None:
    model = Writes(take)
    with capture(model) as maps:
        for n in range(PASSES):
            _set(model, torch.tensor([n % 2]))
            model(random(2, 4, n=n))
            assert maps.select("fc")
    assert not maps.missed
