"""Calls that are no plain pass: torch.func around the model, and parts of it called by themselves.

Each is captured right, or named in `maps.missed`, and never spoils the passes that come after it.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor, nn
from torch.func import (
    functional_call,
    grad,
    hessian,
    jacfwd,
    jacrev,
    jvp,
    stack_module_state,
    vjp,
    vmap,
)
from torch.nn.utils import parametrizations, stateless
from torch.utils._pytree import tree_leaves

from fmapkit import NoPassError, capture
from tests import truth


class Modules(nn.Module):
    """Proven; the nonlinearity is a module."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.relu = nn.ReLU()
        self.last = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.relu(self.first(x)))


class Functions(Modules):
    """Proven; the nonlinearity is a function, read by a mode."""

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.relu(self.first(x)))


class Unproven(Modules):
    """A loop that cannot be proven: traced in every pass."""

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(len(iter_of(x))):
            x = self.relu(self.first(x))
        return self.last(x)


def iter_of(x: Tensor) -> list[int]:
    return [n for n in range(x.dim()) if n == 0]


NETS = [Modules, Functions, Unproven]
X = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))


def parameters(model: nn.Module) -> dict[str, Tensor]:
    return {k: p.detach() for k, p in model.named_parameters()}


def call(model: nn.Module) -> Callable[..., Tensor]:
    return lambda p, x: functional_call(model, p, (x,))


TRANSFORMS: dict[str, Callable[[nn.Module], Any]] = {
    "vmap over inputs": lambda m: vmap(m)(X.unsqueeze(1)),
    "vmap over weights": lambda m: vmap(call(m), in_dims=(0, None))(
        {k: torch.stack([p, 2 * p]) for k, p in parameters(m).items()}, X
    ),
    "grad by weights": lambda m: grad(lambda p: call(m)(p, X).sum())(parameters(m)),
    "grad by input": lambda m: grad(lambda x: m(x).square().sum())(X),
    "grad by neither": lambda m: grad(lambda s: (m(X) * s).sum())(torch.ones(())),
    "per-sample grad": lambda m: vmap(
        grad(lambda p, x: call(m)(p, x.unsqueeze(0)).sum()), in_dims=(None, 0)
    )(parameters(m), X),
    "jvp by weights": lambda m: jvp(lambda p: call(m)(p, X), (parameters(m),), (parameters(m),)),
    "jvp by input": lambda m: jvp(m, (X,), (X,)),
    "vjp": lambda m: vjp(m, X)[1](torch.ones(3, 2)),
    "jacrev": lambda m: jacrev(m)(X),
    "jacfwd": lambda m: jacfwd(m)(X),
    "hessian": lambda m: hessian(lambda x: m(x).square().sum())(X),
}


def assert_pass_is_right(model: nn.Module, maps: Any) -> None:
    """One more pass, against the witness."""
    true = truth.run_pass(copy.deepcopy(model), (X,), train=False, witness=True)
    seen = truth.run_pass(model, (X,), train=False)
    truth.assert_same_pass(true, seen)
    truth.assert_captured_exactly_once(maps, true.truth)
    names = {fm.layer for fm in maps if fm.kind == "activation"}
    assert names == {"first"}


@pytest.mark.parametrize("net", NETS)
@pytest.mark.parametrize("warm", [0, 2])
@pytest.mark.parametrize("name", TRANSFORMS)
@pytest.mark.filterwarnings("ignore::fmapkit.CaptureWarning")
def test_a_transform_around_the_model_is_named_and_spoils_nothing(
    net: type[nn.Module], warm: int, name: str
) -> None:
    model = net()
    transform = TRANSFORMS[name]
    expected = tree_leaves(transform(copy.deepcopy(model)))
    with capture(model, keep="all") as maps:
        for _ in range(warm):
            assert_pass_is_right(model, maps)
        for _ in range(2):
            for left, right in zip(expected, tree_leaves(transform(model)), strict=True):
                assert truth.same_bits(left.detach(), right.detach())
        assert {fm.step for fm in maps.select()} == set(range(warm))
        assert [m.layer for m in maps.missed] == [""]
        assert "torch.func" in maps.missed[0].reason
        for _ in range(3):
            assert_pass_is_right(model, maps)
    truth.assert_nothing_left(truth.fingerprint(copy.deepcopy(model)), model)


@pytest.mark.parametrize("net", NETS)
@pytest.mark.filterwarnings("ignore::fmapkit.CaptureWarning")
def test_an_ensemble_by_stacked_state(net: type[nn.Module]) -> None:
    models = [net() for _ in range(3)]
    params, buffers = stack_module_state(models)  # type: ignore[arg-type]
    base = net()
    expected = torch.stack([m(X) for m in models])
    with capture(base) as maps, torch.no_grad():
        out = vmap(lambda p, b, x: functional_call(base, (p, b), (x,)), in_dims=(0, 0, None))(
            params, buffers, X
        )
        torch.testing.assert_close(out, expected)
        with pytest.raises(NoPassError, match=r"torch\.func"):
            maps["first"]


@pytest.mark.parametrize("net", NETS)
def test_weights_given_for_one_call(net: type[nn.Module]) -> None:
    model = net()
    others = [net() for _ in range(4)]
    with capture(model) as maps:
        for n, other in enumerate(others):
            given = dict(other.named_parameters())
            way = stateless.functional_call if n % 2 else functional_call
            with truth.Witness(other) as witness:
                expected = other(X)
            assert truth.same_bits(way(model, given, (X,)), expected)
            truth.assert_captured_exactly_once(maps, witness.runs)
            assert maps["first"].layer == "first"
            assert_pass_is_right(model, maps)
        assert maps.missed == []


@pytest.mark.parametrize("net", NETS)
def test_forward_mode_gradients(net: type[nn.Module]) -> None:
    model = net()

    def run() -> tuple[Tensor, Tensor]:
        with forward_ad.dual_level():
            out = forward_ad.unpack_dual(model(forward_ad.make_dual(X, X + 1)))
            assert out.tangent is not None
            return out.primal.detach().clone(), out.tangent.detach().clone()

    expected = run()
    z = model.first(X)  # type: ignore[operator]
    with capture(model, keep="all") as maps:
        for _ in range(3):
            for left, right in zip(expected, run(), strict=True):
                assert truth.same_bits(left, right)
        for fm in maps.select("first", "preactivation"):
            assert truth.same_bits(fm.tensor, z.detach())
            assert truth.same_bits(maps["first"].tensor, z.detach().relu())
        assert len(maps.select("first", "preactivation")) == 3
        assert maps.missed == []


# -- parts called by themselves -------------------------------------------------------------------


class Autoencoder(nn.Module):
    """What people call by its methods."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 3)
        self.outer = nn.Sequential(nn.Linear(3, 3), nn.ReLU(inplace=True), nn.Linear(3, 4))

    def encode(self, x: Tensor) -> Tensor:
        return torch.tanh(self.inner(x))

    def decode(self, x: Tensor) -> Tensor:
        return self.outer(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.decode(self.encode(x))


class Outer(nn.Module):
    """The same one level down."""

    def __init__(self) -> None:
        super().__init__()
        self.net = Autoencoder()

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("warm", [0, 1, 3])
@pytest.mark.parametrize("method", ["encode", "decode"])
@pytest.mark.filterwarnings("ignore::fmapkit.CaptureWarning")
def test_methods_that_bypass_forward_are_named_by_the_module_they_call(
    nested: bool, warm: int, method: str
) -> None:
    model: Any = Outer() if nested else Autoencoder()
    net: Any = model.net if nested else model
    bare = copy.deepcopy(net)
    x = torch.randn(2, 4 if method == "encode" else 3)
    part = "inner" if method == "encode" else "outer"
    with capture(model) as maps:
        for _ in range(warm):
            model(torch.randn(2, 4))
        assert maps.missed == []
        held = {fm.step for fm in maps.select()}
        assert truth.same_bits(getattr(net, method)(x), getattr(bare, method)(x))
        # By the outermost module that was called, not by each one inside it.
        assert [m.layer for m in maps.missed] == [f"net.{part}" if nested else part]
        assert "called outside" in maps.missed[0].reason
        assert f"capture(model.{maps.missed[0].layer})" in maps.missed[0].reason
        assert {fm.step for fm in maps.select()} == held  # it passes for no pass
        if not warm:
            with pytest.raises(NoPassError, match="called outside"):
                maps["inner"]
        for _ in range(3):
            y = torch.randn(2, 4)
            with truth.Witness(net) as witness:
                expected = bare(y)
            out = model(y)
            assert truth.same_bits(out, expected)
            z = bare.inner(y)
            name = "net.inner" if nested else "inner"
            assert truth.same_bits(maps[name, "preactivation"].tensor, z.detach())
            assert len(witness.runs) == 2
        assert len(maps.missed) == 1
    truth.assert_nothing_left(truth.fingerprint(Outer() if nested else Autoencoder()), model)


def test_what_the_advice_says_captures_the_part() -> None:
    model = Autoencoder()
    bare = copy.deepcopy(model)
    x = torch.randn(2, 4)
    with capture(model.outer) as maps:
        for _ in range(3):
            code = model.encode(x)
            model.decode(code)
            z = bare.outer[0](bare.encode(x)).detach()
            assert truth.same_bits(maps["0", "preactivation"].tensor, z)
            assert truth.same_bits(maps["0"].tensor, z.relu())
        assert maps.missed == []


def test_reading_a_parametrized_weight_is_no_call() -> None:
    model = Autoencoder()
    parametrizations.weight_norm(model.inner)
    with capture(model) as maps:
        for _ in range(3):
            model.inner.weight.norm()
            model(torch.randn(2, 4))
            model.inner.weight.norm()
        assert maps.missed == []


def test_the_fused_path_of_a_part_called_before_a_pass_stays_fused() -> None:
    class Wrapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x)

    model = Wrapped().eval()
    x = torch.randn(2, 5, 8)
    with torch.no_grad():
        expected = model.layer(x)
        with capture(model):
            assert truth.same_bits(model.layer(x), expected)
