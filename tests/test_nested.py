"""Tensors in nested arguments, modules in modules, and what is remembered of classes and shapes."""

from __future__ import annotations

from collections import OrderedDict, namedtuple

import torch
from torch import Tensor, nn

from fmapkit import capture, layers, nonlinearities
from fmapkit.provenance.layout import ChannelAxis, ChannelLayout
from fmapkit.torchlib.nested import modules_in, tensors_in


class Marked(Tensor):
    """A subclass of torch's tensors."""


def test_every_tensor_in_order() -> None:
    a, b, c, d, e, f = (torch.zeros(1) for _ in range(6))
    own, parameter = c.as_subclass(Marked), nn.Parameter(d)
    pair = namedtuple("pair", "left right")
    given = (
        *(a, 3, None, (1, 2), torch.Size([4])),
        [[b], own],
        pair(1, parameter),
        OrderedDict(x={"y": (0, e)}, z="text"),
    )
    found = tensors_in(*given, {"key": f, "n": 1.0})
    assert [id(t) for t in found] == [id(t) for t in (a, b, own, parameter, e, f)]
    assert tensors_in() == tensors_in((), [], {}, 1, "") == []


def test_modules_are_those_of_torch() -> None:
    shared = nn.Sequential(nn.ReLU(), nn.Linear(1, 1))
    model = nn.Sequential(shared, nn.ModuleList([shared, nn.Identity()]), nn.ReLU())
    model.register_module("none", None)
    assert modules_in(model) == list(model.modules())


def test_a_type_that_is_registered_later_counts_from_then_on() -> None:
    class Swing(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.flip(-1)

    class Custom(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.cumsum(-1)

    model = nn.Sequential(nn.Linear(2, 3), Swing(), Custom())
    x = torch.ones(1, 2)
    with capture(model) as maps:
        model(x)
    assert maps.layers == ["0"]
    try:
        nonlinearities.register_nonlinearity(Swing)
        layers.register_layer(Custom, -1)
        with capture(model) as maps:
            model(x)
        assert maps.layers == ["0", "2"]
        assert maps["0"].nonlinearity == "swing"
    finally:
        del nonlinearities.MODULES[Swing], layers.REGISTERED[Custom]
        nonlinearities.version += 1
        layers.version += 1


class Symbol(int):
    """Stands for torch's symbolic sizes, which have no hash."""

    __hash__ = None  # type: ignore[assignment]


def test_sizes_that_are_symbols() -> None:
    filters = Symbol(6)
    axes = ChannelLayout.single(1, filters)
    split = axes.reshape((Symbol(2), filters), (2, 2, 3))
    assert split == ChannelLayout((ChannelAxis(1, 2, 3), ChannelAxis(2, 3, 1)))
    assert ChannelLayout.single(1, 6).reshape((2, 6), (2, 2, 3)) == split
