"""An operator is given a parameter of a layer that a plain object hands over.

In the fifth pass it is another layer's. No call is told whose it is, and no code in C picks it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fmapkit import capture
from tests.test_paths import random
from tests.test_put_in_the_pass import CHANGED, PASSES, Box

pytestmark = pytest.mark.filterwarnings("ignore::fmapkit.CaptureWarning")


class Multiplies(nn.Module):
    """Calls no layer, but uses the weight of one."""

    def __init__(self, multiply: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)
        self.box, self.multiply = Box(), multiply

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.multiply(self, x))


def by_a_name(m: Any, x: Tensor) -> Tensor:
    layer = m.box.layer
    return x @ layer.weight.T + layer.bias


def by_attributes(m: Any, x: Tensor) -> Tensor:
    return x @ m.box.layer.weight.T + m.box.layer.bias


def by_an_index(m: Any, x: Tensor) -> Tensor:
    return x @ m.box.layers[0].weight.T + m.box.layers[0].bias


def by_a_key(m: Any, x: Tensor) -> Tensor:
    return x @ m.box.parameters["weight"].T + m.box.parameters["bias"]


def by_getattr(m: Any, x: Tensor) -> Tensor:
    layer = m.box.layer
    return x @ getattr(layer, "weight").T + getattr(layer, "bias")  # noqa: B009


def in_a_loop(m: Any, x: Tensor) -> Tensor:
    for layer in m.box.layers:
        x = x @ layer.weight.T + layer.bias
    return x


def transposed(m: Any, x: Tensor) -> Tensor:
    return x @ m.box.layer.weight.mT + m.box.layer.bias


def data(m: Any, x: Tensor) -> Tensor:
    return x @ m.box.layer.weight.data.T + m.box.layer.bias


def by_names(m: Any, x: Tensor) -> Tensor:
    weight, bias = m.box.layer.weight, m.box.layer.bias
    return x @ weight.T + bias


def under_another_name(m: Any, x: Tensor) -> Tensor:
    return x @ m.box.w.T + m.box.b


def in_a_function(m: Any, x: Tensor) -> Tensor:
    return F.linear(x, m.box.layer.weight * 1, m.box.layer.bias)


def in_a_function_by_another_name(m: Any, x: Tensor) -> Tensor:
    return F.linear(x, m.box.w / 1, m.box.b)


def negated(m: Any, x: Tensor) -> Tensor:
    return F.linear(-x, -m.box.layer.weight, m.box.layer.bias)


def a_part(m: Any, x: Tensor) -> Tensor:
    return F.linear(x, m.box.layer.weight[:], m.box.layer.bias)


def unpacked(m: Any, x: Tensor) -> Tensor:
    weight, bias = m.box.both
    return x @ weight.T + bias


def element(m: Any, x: Tensor) -> Tensor:
    return x @ m.box.both[0].T + m.box.layer.bias


def in_place(m: Any, x: Tensor) -> Tensor:
    y = x.clone()
    y @= m.box.layer.weight.T
    y += m.box.layer.bias
    return y


def of_a_method(m: Any, x: Tensor) -> Tensor:
    return m.box.run(x)


class Runs(Box):
    """A plain object with a method."""

    def run(self, x: Tensor) -> Tensor:
        return x @ self.w.T + self.b


WAYS = [
    *(by_a_name, by_attributes, by_an_index, by_a_key, by_getattr, in_a_loop, transposed, data),
    *(by_names, under_another_name, in_a_function, in_a_function_by_another_name, negated, a_part),
    *(unpacked, element, in_place, of_a_method),
]
COMPUTED = {in_a_function, in_a_function_by_another_name, negated}  # such weights are not held


@torch.no_grad()
@pytest.mark.parametrize("once", [True, False])
@pytest.mark.parametrize("multiply", WAYS)
def test_a_parameter(multiply: Any, once: bool) -> None:
    """The map goes by the layer whose weight it is, or by none where the label stops."""
    model, lost = Multiplies(multiply), 0
    with capture(model) as maps:
        for n in range(PASSES):
            name = "b" if n == CHANGED or (n > CHANGED and not once) else "a"
            layer = getattr(model, name)
            own = {"weight": layer.weight, "bias": layer.bias}
            model.box = Runs(layer=layer, layers=[layer], parameters=own)
            model.box.w, model.box.b = model.box.both = layer.weight, layer.bias
            x = random(2, 4, n=n)
            model(x)
            lost += not maps
            if maps:
                (a,) = maps.select(kind="activation")
                assert torch.allclose(a.tensor, F.linear(x, layer.weight, layer.bias).relu())
                assert a.layer == name, n
                if multiply not in COMPUTED:
                    assert a.weight is not None
                    assert torch.equal(a.weight, layer.weight), n
    assert lost <= 1


def _matches(m: Any, x: Tensor) -> Tensor:
    match m.box.layer:
        case nn.Linear(weight=weight, bias=bias) if m.box.layer is not Box.weight:
            pass
        case Box.weight:
            return x
    return F.linear(x, weight, bias)


Box.weight = 3  # type: ignore[attr-defined]


@torch.no_grad()
def test_patterns_stay_as_they_are() -> None:
    model = Multiplies(_matches)
    with capture(model) as maps:
        for n in range(4):
            model.box = Box(layer=model.a)
            model(random(2, 4, n=n))
            assert maps.layers == ["a"]
    assert not maps.missed
