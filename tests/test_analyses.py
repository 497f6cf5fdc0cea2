"""Analyses of other people, as they come: what they do must not reach the model, nor it them."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from fmapkit import FeatureMap, MapStateError, capture
from fmapkit.analysis import DeadFilters, Similarity, Statistics, TopInputs
from tests.truth import assert_nothing_left, fingerprint


class Net(nn.Module):
    """Proven: analyses see its maps while it runs."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2)
        self.relu, self.tanh = nn.ReLU(inplace=True), nn.Tanh()

    def forward(self, x: Tensor) -> Tensor:
        return self.c(self.tanh(self.b(self.relu(self.a(x)))))


class Branching(Net):
    """Unproven: they see its maps when the pass has ended."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.a(x))
        if x.sum() >= 0:
            x = self.tanh(self.b(x))
        return self.c(x)


class Doing:
    """An analysis that does something with each map, and notes its tags."""

    def __init__(self, what: Callable[[FeatureMap], Any]) -> None:
        self.what = what
        self.seen: list[tuple[str, str]] = []

    def update(self, fm: FeatureMap) -> None:
        self.seen.append((fm.layer, fm.kind))
        self.what(fm)


TAGS = [(n, k) for n in "ab" for k in ("preactivation", "activation")] + [("c", "preactivation")]
both = pytest.mark.parametrize("kind", [Net, Branching])


@both
@pytest.mark.parametrize("keep", [0, 1])
def test_it_calls_the_model_itself(kind: type[Net], keep: int) -> None:
    """Those calls are its own: no pass, no map, no end of the pass that is under way."""
    net, x, probe = kind(), torch.randn(3, 4), torch.ones(1, 4)
    bare, expected, of_probe = fingerprint(net), net(x), net(probe)
    analysis = Doing(lambda fm: torch.testing.assert_close(net(probe), of_probe, rtol=0, atol=0))
    with capture(net, keep=keep, analyses=analysis) as maps:
        for step in range(3):
            assert torch.equal(net(x), expected)
            assert [fm.step for fm in maps] == [step] * 5 * keep
    assert maps.missed == []
    assert analysis.seen == TAGS * 3
    assert_nothing_left(bare, net)


@both
def test_it_captures_another_model(kind: type[Net]) -> None:
    net, other, x = kind(), Net(), torch.randn(3, 4)
    seen = set()

    def look(fm: FeatureMap) -> None:
        with capture(other) as maps:
            other(x)
            seen.add(tuple((fm.layer, fm.kind) for fm in maps))
            other(x)
            seen.add(tuple((fm.layer, fm.kind) for fm in maps))

    with capture(net, analyses=Doing(look)):
        for _ in range(3):
            net(x)
    assert seen == {tuple(TAGS)}


@both
def test_its_own_modes_work_and_the_models_do_not(kind: type[Net]) -> None:
    class Names(TorchFunctionMode):
        def __init__(self) -> None:
            super().__init__()
            self.seen: list[Any] = []

        def __torch_function__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            self.seen.append(func)
            return func(*args, **(kwargs or {}))

    net, x = kind(), torch.randn(3, 4)
    theirs, its = Names(), Names()
    dtypes = []

    def look(fm: FeatureMap) -> None:
        with its:
            torch.erf(fm.tensor)
        dtypes.append((fm.tensor.float() @ fm.tensor.float().T).dtype)

    with capture(net, analyses=Doing(look)):
        for _ in range(3):
            with theirs, torch.autocast("cpu", torch.bfloat16):
                net(x)
                assert torch.is_autocast_enabled("cpu")
    assert its.seen == [torch.erf] * 15
    assert torch.erf not in theirs.seen
    assert torch.Tensor.matmul not in theirs.seen
    assert set(dtypes) == {torch.float32}


@both
def test_an_error_of_its_own_keeps_nothing_alive(kind: type[Net]) -> None:
    net = kind()
    held: list[Any] = []

    def fail(fm: FeatureMap) -> None:
        mine = torch.zeros(1)  # in a frame of the traceback
        held.append(weakref.ref(mine))
        raise ValueError("mine")

    with capture(net, keep=0, analyses=Doing(fail)):
        for _ in range(3):
            with suppress(ValueError):
                net(torch.randn(3, 4))
            gc.collect()  # torch's own frames around hooks know each other
            assert held.pop()() is None


def test_outputs_are_there_beside_some_filters_gradients_and_all() -> None:
    """The output of a module is held whole, whatever is held of the same tensor beside it."""
    net, x = Net(), torch.randn(3, 4)
    with capture(net, kinds=("preactivation", "output"), filters=[0], gradients=True) as maps:
        for _ in range(3):
            net(x)
            z = F.linear(x, net.a.weight, net.a.bias)
            a = z.clamp(min=0)
            assert torch.equal(maps["a", "preactivation"].tensor, z[:, :1])
            assert torch.equal(maps["relu", "output"].tensor, a)
            assert torch.equal(maps["a", "output"].tensor, z)
    assert maps.missed == []


def test_a_set_of_analyses_is_several() -> None:
    """`set.update` would take a map apart, and nobody would see any."""
    one, other = Doing(lambda fm: None), Doing(lambda fm: None)
    net = Net()
    with capture(net, analyses={one, other}):
        net(torch.randn(3, 4))
    assert one.seen == other.seen == TAGS


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_maps_in_eight_bits(dtype: torch.dtype) -> None:
    net, x, stats, dead = Net(), torch.randn(3, 4), Statistics(), DeadFilters()
    with capture(net, dtype=dtype, analyses=[stats, dead]) as maps:
        for _ in range(3):
            net(x)
        expected = F.linear(x, net.a.weight, net.a.bias).detach().clamp(min=0)
        expected = expected.to(dtype).double()
        assert np.array_equal(maps["a"].numpy(), expected.numpy())
        assert np.array_equal(maps["a"][1].numpy(), expected[:, 1].numpy())
    np.testing.assert_allclose(stats["a"].mean.numpy(), expected.mean(0).numpy(), rtol=1e-12)
    assert dead["a"].last_input.tolist() == [9 if any(c) else 0 for c in expected.T.tolist()]


@both
@pytest.mark.parametrize("gradients", [False, True])
def test_gradients_are_refused_by_name(kind: type[Net], gradients: bool) -> None:
    """An analysis comes before backward; the held maps have their gradients after it."""
    model = kind()
    reading = Doing(lambda fm: fm.grad)
    with (
        capture(model, analyses=reading, gradients=gradients),
        pytest.raises(MapStateError) as error,
    ):
        model(torch.randn(2, 4))
    assert str(error.value) == (
        "an analysis is shown the preactivation of layer 'a' as it is made, before any backward: "
        "it has no gradient yet; read fm.grad of the held maps after backward, with "
        "capture(gradients=True), and give those to an analysis with "
        "update(dataclasses.replace(fm, tensor=fm.grad))"
    )
    with capture(model, gradients=True, analyses=Statistics()) as maps:
        model(torch.randn(2, 4).abs()).sum().backward()
        stats = Statistics()
        for fm in maps:
            stats.update(replace(fm, tensor=fm.grad))
        c = next(fm for fm in maps if fm.layer == "c")
    assert c.grad is not None
    assert stats["c", "preactivation"].mean.tolist() == [1.0, 1.0]
    assert torch.equal(stats["a"].mean, maps["a"].grad.double().mean(0))  # type: ignore


_WHOLE = (torch.uint8, torch.int8, torch.int64, torch.uint16, torch.uint32, torch.uint64)


@pytest.mark.parametrize("dtype", [torch.bool, *_WHOLE], ids=str)
@pytest.mark.parametrize("locations", [(), (5,)])
def test_each_analysis_takes_integers_and_booleans(
    dtype: torch.dtype, locations: tuple[int, ...]
) -> None:
    x = torch.randint(0, 2 if dtype == torch.bool else 90, (8, 4, *locations))
    given, floats = (
        FeatureMap(values, "activation", "layer", filter_dim=1, filters=range(4))
        for values in (x.to(dtype), x.double())
    )
    makers: list[Callable[[], Any]] = [Statistics, DeadFilters, Similarity, TopInputs]
    makers.append(lambda: TopInputs(by="mean"))
    for make in makers:
        one, other = make(), make()
        one.update(given)
        other.update(floats)
        assert str(one) == str(other)
        assert not one.missed
        if isinstance(one, TopInputs):
            assert torch.equal(one["layer"].inputs, other["layer"].inputs)
            assert torch.equal(one["layer"].at, other["layer"].at)
