"""torch's functions on lists of tensors (`torch._foreach_*`): each is its function on one tensor.

Labels are those of the same forward that calls the function on one tensor, which is captured beside
it. What lies in a map is what a witness below autograd has cloned at that moment.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fmapkit import capture
from fmapkit.missed import Reason
from tests.checks import check, images, tags

IMAGE = (2, 3, 6, 6)
quiet = pytest.mark.filterwarnings("ignore::fmapkit.CaptureWarning")

# All that this version of torch has, but for those whose results are no map's shape.
FAMILY = sorted(
    name.removeprefix("_foreach_")
    for name in dir(torch)
    if name.startswith("_foreach_")
    and name.removesuffix("_") not in {f"_foreach_{n}" for n in ("mm", "norm", "powsum", "max")}
)
_WITH_OTHERS = {
    *("add", "sub", "mul", "div", "pow", "clamp_min", "clamp_max", "maximum", "minimum"),
}


def _others(name: str, given: list[Tensor]) -> list[tuple[Any, ...]]:
    """What may be given beside the first list: numbers, lists of numbers and of tensors, one."""
    plain, n = name.removesuffix("_"), len(given)
    like = [torch.rand_like(t) + 0.5 for t in given]
    numbers = [0.5 + i for i in range(n)]
    if plain in _WITH_OTHERS:
        one = [(torch.tensor(0.5),)] if plain in ("add", "mul", "div") else []
        return [(0.5,), (numbers,), (like,), *one]
    if plain in ("addcmul", "addcdiv"):
        return [(like, like, 0.5), (like, like, numbers), (like, like, torch.tensor(numbers))]
    if plain == "lerp":
        return [(like, 0.5), (like, like)]
    return [(like,)] if plain == "copy" else [()]


def _on_one(name: str, x: Tensor, others: list[Any]) -> Tensor:
    """The same of one tensor."""
    plain, in_place = name.removesuffix("_"), name.endswith("_")
    if plain in ("maximum", "minimum"):
        other = others[0] if isinstance(others[0], Tensor) else torch.tensor(others[0])
        found = getattr(torch, plain)(x, other)
        return x.copy_(found) if in_place else found
    function = getattr(Tensor, name)
    if plain in ("addcmul", "addcdiv"):
        found = function(x, *others[:2], value=float(others[2]))
    else:
        found = function(x, *others)
    assert isinstance(found, Tensor)
    return found


def _at(value: Any, i: int) -> Any:
    return value[i] if isinstance(value, list) or getattr(value, "shape", ()) else value


class Lists(nn.Module):
    """A convolution, a layer on it, some filters of the first, and what becomes of them."""

    def __init__(self, name: str, others: int, by_list: bool) -> None:
        super().__init__()
        self.conv, self.bn, self.fc = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, 5)
        self.name, self.others, self.by_list = name, others, by_list

    def forward(self, x: Tensor) -> list[Tensor]:
        y = self.bn(self.conv(x))
        given = [y * 1, self.fc(y.transpose(1, -1)), y[:, 1:3] * 1]
        torch.manual_seed(0)
        others = _others(self.name, given)[self.others]
        if self.by_list:
            found = getattr(torch, f"_foreach_{self.name}")(given, *others)
            found = given if self.name.endswith("_") else found
        else:
            found = [
                _on_one(self.name, t, [_at(o, i) for o in others]) for i, t in enumerate(given)
            ]
        sigmas = (torch.celu, torch.selu, F.mish)
        return [sigma(t) for sigma, t in zip(sigmas, found, strict=True)]


_CASES = [(name, i) for name in FAMILY for i in range(len(_others(name, [torch.ones(1)] * 3)))]


@quiet
@pytest.mark.parametrize(("name", "others"), _CASES)
def test_labels_are_those_of_the_function_on_one_tensor(name: str, others: int) -> None:
    x, found = torch.randn(IMAGE), []
    for by_list in (False, True):
        model = Lists(name, others, by_list)
        with capture(model) as maps, torch.no_grad():
            for _ in range(2):
                results = model(x)
                last = maps.select(kind="activation", step=-1)[-3:]
                for result, fm in zip(results, last, strict=True):  # roots of x < 0 are no numbers
                    assert torch.equal(result.nan_to_num(), fm.tensor.nan_to_num())
                found.append([(m.layer, m.filters) for m in last])
    assert len(found[0]) == 3
    assert found == [found[0]] * 4
    if name.removesuffix("_") in ("add", "mul", "neg", "sqrt", "clone"):
        assert found[0] == [("conv", range(4)), ("fc", range(5)), ("conv", range(1, 3))]


class Body(nn.Module):
    """A forward given as a function of the module and x."""

    def __init__(self, body: Any, **has: Any) -> None:
        super().__init__()
        self.conv, self.bn, self.body = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), body
        for name, value in has.items():
            setattr(self, name, value)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.body(self, x)
        return out


def _overwrites(m: Body, x: Tensor) -> Tensor:
    a = F.silu(m.bn(m.conv(x)))
    torch._foreach_mul_([a, torch.ones(2)], 0.9)
    return a.tanh()


def _overwrites_a_view(m: Body, x: Tensor) -> Tensor:
    a = F.silu(m.bn(m.conv(x)))
    torch._foreach_neg_([a[:, 1:3], a[:, :1]])
    return a.tanh()


def _overwrites_pieces(m: Body, x: Tensor) -> Tensor:
    a = F.silu(m.bn(m.conv(x)))
    pieces = [a[:, :2], a[:, 2:]]
    torch._foreach_copy_(pieces, [piece.clone() for piece in pieces[::-1]])
    torch._foreach_zero_([a[:, 3]])
    return a.tanh()


def _by_keyword(m: Body, x: Tensor) -> Tensor:
    a = F.silu(m.bn(m.conv(x)))
    torch._foreach_mul_(scalar=0.9, self=[a])
    return a.tanh()


def _by_out(m: Body, x: Tensor) -> Tensor:
    a = F.silu(m.bn(m.conv(x)))
    torch.ops.aten._foreach_mul.Scalar_out([a], 0.9, out=[a])
    return a.tanh()


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize(
    "body", [_overwrites, _overwrites_a_view, _overwrites_pieces, _by_keyword, _by_out]
)
def test_a_write_to_a_list_is_a_write_to_each(body: Any, train: bool) -> None:
    if train and body in (_by_out, _overwrites_pieces):
        pytest.skip("torch has no gradient of it")
    expected = [("conv", 0, "silu", range(4)), (":tanh", 0, "tanh", range(4))]
    check(Body(body), images(*IMAGE), expected, train=train)


# -- what is no map ------------------------------------------------------------------------------


def _reason(function: str, name: str) -> str:
    return Reason.ON_LISTS.text(function=f"torch.{function}", name=name)


@quiet
@pytest.mark.parametrize(
    ("body", "function", "name"),
    [
        (lambda m, z: torch._foreach_sigmoid([z])[0], "_foreach_sigmoid", "sigmoid"),
        (lambda m, z: (torch._foreach_tanh_([z]), z)[1], "_foreach_tanh_", "tanh"),
        (lambda m, z: torch._foreach_clamp_min([z], 0)[0], "_foreach_clamp_min", "clamp_min"),
        (lambda m, z: torch._foreach_maximum([z], 0.0)[0], "_foreach_maximum", "clamp_min"),
        (lambda m, z: torch._foreach_mul([z], [(z > 0) * 1.0])[0], "_foreach_mul", "mul"),
        (lambda m, z: (torch._foreach_mul_([z], [z > 0]), z)[1], "_foreach_mul_", "mul"),
    ],
)
def test_a_nonlinearity_on_a_list_is_named(body: Any, function: str, name: str) -> None:
    model = Body(lambda m, x: body(m, m.bn(m.conv(x))) * 2)
    with capture(model) as maps, torch.no_grad():
        for _ in range(3):
            model(torch.randn(IMAGE))
            assert tags(maps) == []
    assert [(m.layer, m.reason) for m in maps.missed] == [("", _reason(function, name))]


@quiet
def test_bounds_and_products_that_are_no_nonlinearity_are_not_named() -> None:
    def body(m: Body, x: Tensor) -> Tensor:
        z = torch._foreach_clamp_min([m.bn(m.conv(x))], 1e-6)[0]
        return torch.relu(torch._foreach_mul([z], [m.bn.weight.view(1, -1, 1, 1)])[0])

    check(Body(body), images(*IMAGE), [("conv", 0, "relu", range(4))])


class Own(nn.Module):
    """One nonlinearity, written by hand on lists."""

    def __init__(self, in_place: bool) -> None:
        super().__init__()
        self.in_place = in_place

    def forward(self, z: Tensor) -> Tensor:
        if self.in_place:
            torch._foreach_mul_([z], torch._foreach_sigmoid([z]))
            return z
        return torch._foreach_mul([z], torch._foreach_sigmoid([z]))[0]


@pytest.mark.parametrize("in_place", [False, True])
def test_a_module_that_is_one_nonlinearity_is_captured(in_place: bool) -> None:
    model = Body(lambda m, x: m.own(m.bn(m.conv(x))), own=Own(in_place)).eval()
    bare = copy.deepcopy(model)
    with capture(model) as maps, torch.no_grad():
        for _ in range(3):
            x = torch.randn(IMAGE)
            z = bare.bn(bare.conv(x))
            out = model(x)
            assert torch.equal(maps["conv", "preactivation"].tensor, z)
            assert torch.equal(maps["conv"].tensor, z * torch.sigmoid(z))
            assert torch.equal(out, maps["conv"].tensor)
            assert tags(maps) == [("conv", 0, "Own", range(4))]
    assert list(maps.missed) == []


class Half(nn.Module):
    """Has a nonlinearity on a list in it, and is none as a whole."""

    def forward(self, z: Tensor) -> Tensor:
        return torch._foreach_sigmoid([z])[0].mean((2, 3), keepdim=True) * z


class HalfByHand(nn.Module):
    """The same of a choice that is not given what was compared."""

    def forward(self, z: Tensor) -> Tensor:
        return torch.where(z > 0, 2 * z, 3 * z).mean((2, 3), keepdim=True) * z


@quiet
def test_what_is_missed_in_a_module_that_is_no_nonlinearity_is_named() -> None:
    model = Body(lambda m, x: m.part(m.conv(x)), part=Half())
    with capture(model) as maps, torch.no_grad():
        model(torch.randn(IMAGE))
    assert [(m.layer, m.reason) for m in maps.missed] == [
        ("part", _reason("_foreach_sigmoid", "sigmoid"))
    ]
    model = Body(lambda m, x: m.part(m.conv(x)), part=HalfByHand())
    with capture(model) as maps, torch.no_grad():
        model(torch.randn(IMAGE))
    assert [(m.layer, m.why) for m in maps.missed] == [("conv", Reason.COMPARED_BY_HAND)]


@quiet
@pytest.mark.skipif(not hasattr(torch, "_foreach_mm"), reason="torch has it from 2.13 on")
def test_a_layer_on_a_list_is_named_and_ends_the_label() -> None:
    model = Body(
        lambda m, x: torch._foreach_mm([m.fc(x.mean((2, 3)))], [m.weight])[0].relu(),
        fc=nn.Linear(3, 4),
        weight=nn.Parameter(torch.randn(4, 5)),
    )
    with capture(model) as maps, torch.no_grad():
        for _ in range(2):
            model(torch.randn(IMAGE))
            assert tags(maps) == [(":relu", 0, "relu", None)]
    assert [(m.layer, m.reason) for m in maps.missed] == [("", _reason("_foreach_mm", "mm"))]


def test_weights_that_are_computed_on_lists_are_their_layer_s() -> None:
    def body(m: Body, x: Tensor) -> Tensor:
        weights = torch._foreach_mul([m.conv.weight, m.other.weight], [0.5, 2.0])
        y = F.conv2d(x, weights[0], m.conv.bias).relu()
        return F.conv2d(y, weights[1]).tanh()

    model = Body(body, other=nn.Conv2d(4, 5, 1, bias=False))
    expected = [("conv", 0, "relu", range(4)), ("other", 0, "tanh", range(5))]
    check(model, images(*IMAGE), expected)


@pytest.mark.parametrize("others", [(), (1,), (2,), (3,)])
def test_a_norm_of_each_has_no_filters(others: tuple[int, ...]) -> None:
    def body(m: Body, x: Tensor) -> Tensor:
        return torch._foreach_norm([m.bn(m.conv(x))], *others)[0].tanh()

    check(Body(body), images(*IMAGE), [(":tanh", 0, "tanh", None)], train=False)


def test_numbers_from_data_give_no_axis() -> None:
    """Each element gets one number of a tensor whose own axis counts filters."""

    def body(m: Body, x: Tensor) -> Tensor:
        numbers = m.fc(x.mean((0, 2, 3)))  # (4,): one for each of four lists
        ones = [torch.ones(2, 4) for _ in range(4)]
        return torch._foreach_addcmul(ones, ones, ones, numbers)[1].tanh()

    model = Body(body, fc=nn.Linear(3, 4))
    with capture(model) as maps, torch.no_grad():
        for _ in range(2):
            model(torch.randn(IMAGE))
            assert tags(maps) == [(":tanh", 0, "tanh", None)]
